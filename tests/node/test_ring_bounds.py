"""What a stage takes in from its neighbour before it has run it: bounded by frames and by bytes."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from parallax.fabric.errors import FrameRefused
from parallax.fabric.limits import Limits
from parallax.node.compute import Compute
from parallax.node.ring import RingMember
from parallax.proto import wire_pb2 as wire
from tests.trust import member

LIMITS = Limits(piece_bytes=1000, message_bytes=4000, frame_bytes=10_000)
WINDOW_FRAMES, WINDOW_BYTES = 8, 20_000


class Passing:
    """Runs frames by passing them on."""

    rows = lanes = cache_bytes = 0

    def run(self, frame: wire.Frame) -> wire.Frame:
        return frame


@asynccontextmanager
async def seat() -> AsyncIterator[tuple[RingMember, threading.Event]]:
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
        LIMITS,
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
            member._received(frame(number, 10_000))
        with pytest.raises(FrameRefused, match="inbox"):
            member._received(frame(3, 1))
    async with seat() as (member, go):
        for number in range(3):
            member._received(frame(number, 10_000))
        go.set()
        async with asyncio.timeout(30):
            while member._run_bytes < 30_000:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        for number in range(3, 6):
            member._received(frame(number, 10_000))


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
