"""What a stage takes in from its neighbour before it has run it: bounded by frames and by bytes."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from parallax.fabric.errors import FrameRefused
from parallax.fabric.limits import Limits
from parallax.node.compute import Compute
from parallax.node.large_frames import LOOKED_AT_BYTES, MOST_COMMANDS, MOST_TOKENS
from parallax.node.ring import RingMember
from parallax.proto import wire_pb2 as wire
from tests.trust import member

LIMITS = Limits(piece_bytes=1000, message_bytes=4000, frame_bytes=10_000)
WINDOW_FRAMES, WINDOW_BYTES = 8, 20_000
CARRY = 9_900  # three such frames fill the inbox, with what is beside their carries


class Passing:
    """Runs frames by passing them on."""

    rows = lanes = cache_bytes = 0
    draw_s = 0.25

    def run(self, frame: wire.Frame) -> wire.Frame:
        return frame


class Silent:
    """The way to a next stage that takes nothing."""

    def send(self, message: bytes, sent: Callable[[], None]) -> None:
        """It waits."""

    def close(self) -> None:
        """Nothing to end."""


@asynccontextmanager
async def seat(limits: Limits = LIMITS) -> AsyncIterator[tuple[RingMember, threading.Event]]:
    """The second of two stages; its compute thread waits for the event."""
    shape = wire.RingShape(window_frames=WINDOW_FRAMES, window_bytes=WINDOW_BYTES)
    places = [wire.StagePlace(node_id=name) for name in "ab"]
    form = wire.FormRing(epoch=1, index=1, stages=places, shape=shape)
    compute = Compute(asyncio.get_running_loop())
    go = threading.Event()
    compute.post(lambda: (go.wait(60), None)[1])
    made = RingMember(
        form,
        Passing(),
        compute,
        limits,
        credentials=member("b"),
        broken=lambda epoch, error: None,
        returns=None,
    )
    try:
        yield made, go
    finally:
        go.set()
        await made.leave()
        compute.stop(5)


def frame(number: int, carry: int = 0, slowest_s: float = 0.0) -> bytes:
    sent = wire.Frame(epoch=1, number=number, carry=bytes(carry), slowest_s=slowest_s)
    return sent.SerializeToString()


def take(member: RingMember, first: int, end: int) -> None:
    for number in range(first, end):
        member._received(frame(number))


async def test_an_inbox_holds_so_many_frames() -> None:
    async with seat() as (member, _):
        for number in range(WINDOW_FRAMES):
            member._received(frame(number))
        with pytest.raises(FrameRefused, match="inbox"):
            take(member, WINDOW_FRAMES, 4 * WINDOW_FRAMES)


async def test_an_inbox_holds_so_many_bytes_and_more_once_they_have_been_run() -> None:
    async with seat() as (member, go):
        for number in range(3):
            member._received(frame(number, CARRY))
        with pytest.raises(FrameRefused, match="inbox"):
            member._received(frame(3, 400))
    async with seat() as (member, go):
        member._held = None
        for number in range(3):
            member._received(frame(number, CARRY))
        go.set()
        async with asyncio.timeout(30):
            while member._run_bytes < member._taken_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        for number in range(3, 6):
            member._received(frame(number, CARRY))


async def test_commands_take_room_in_an_inbox_too() -> None:
    async with seat() as (member, _):
        commands = [wire.Command()] * 140  # two bytes each on the wire, and far more here

        def send(first: int, end: int) -> None:
            for number in range(first, end):
                sent = wire.Frame(epoch=1, number=number, commands=commands)
                member._received(sent.SerializeToString())

        send(0, 3)
        with pytest.raises(FrameRefused, match="inbox"):
            send(3, 4)


@pytest.mark.parametrize("way", ["known", "not yet known"])
async def test_what_the_next_stage_does_not_take_is_bounded(way: str) -> None:
    async with seat() as (member, go):
        member._held = None if way == "known" else []
        member._sender = Silent() if way == "known" else None  # type: ignore[assignment]
        go.set()
        async with asyncio.timeout(30):
            for number in range(4):
                assert not member.ended
                member._received(frame(number, CARRY))
                while member._run_bytes < member._taken_bytes:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            while not member.ended:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (wire.Frame(epoch=1, commands=[wire.Command()] * (MOST_COMMANDS + 1)), "commands"),
        (wire.Frame(epoch=1, tokens=[1] * (MOST_TOKENS + 1)), "tokens"),
        (wire.Frame(epoch=1, commands=[wire.Command()] * 2 * LOOKED_AT_BYTES), "beside its carry"),
    ],
    ids=["too many commands", "too many tokens", "so many that they are not even read"],
)
async def test_a_frame_has_only_so_much_in_it(sent: wire.Frame, why: str) -> None:
    async with seat(Limits()) as (member, _):
        with pytest.raises(FrameRefused, match=why):
            member._received(sent.SerializeToString())
        assert not member._taken_bytes


async def test_the_largest_honest_frames_are_taken() -> None:
    async with seat(Limits(window_bytes=1 << 30)) as (member, _):
        admit = wire.Admit(prompt=[100_000] * 65_536)
        drops = [wire.Command(drop=wire.Drop(sequence=1 << 40))] * 1024
        commands = [wire.Command(admit=admit), wire.Command(admit=admit), *drops]
        carry = bytes(1 << 20)
        for number, (tokens, rows) in enumerate([(MOST_TOKENS, 1), (4096, 4096)]):
            given = [100_000] * tokens
            sent = wire.Frame(epoch=1, number=number, tokens=given, rows=rows, carry=carry)
            sent.commands.extend(commands)
            member._inbox_bytes = 1 << 30
            member._received(sent.SerializeToString())
        assert member._expected == 2
        assert not member.ended


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 1e300])
async def test_times_that_are_none_are_refused(seconds: float) -> None:
    async with seat() as (member, _):
        with pytest.raises(FrameRefused):
            member._received(frame(0, slowest_s=seconds))


@pytest.mark.parametrize(
    "message",
    [
        b"\xff",
        wire.Frame(epoch=1, commands=[wire.Command()] * 3000).SerializeToString(),
        frame(1),
        wire.Frame(epoch=2).SerializeToString(),
    ],
)
async def test_what_does_not_follow_or_is_no_frame_is_refused(message: bytes) -> None:
    async with seat() as (member, _):
        with pytest.raises(FrameRefused):
            member._received(message)


async def test_a_stage_reports_what_drawing_took_with_what_it_computed() -> None:
    async with seat() as (member, _):
        member._run(wire.Frame(epoch=1, kind=wire.DECODE, rows=1, tokens=[3]), 0)
        assert member.health.decode_frames == 1
        assert member.health.draw_s == 0.25
