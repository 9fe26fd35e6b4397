"""The head's shell: what ends an epoch, and what does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import cast

from parallax.fabric.errors import MessageRefused, ParallaxError, StageStuck
from parallax.fabric.limits import Limits
from parallax.node.head import FIRST_PATIENCE, Head
from parallax.node.ring import RingMember
from parallax.proto import wire_pb2 as wire

LIMITS = Limits(beat_s=0.01, stuck_s=0.05)
SHAPE = wire.RingShape(
    lanes=2, lane_rows=4, chunk_tokens=8, window_frames=16, context_tokens=100, orphan_s=60
)


@dataclass
class Stage:
    """Stage 0, as the head sees it."""

    frames: list[wire.Frame] = field(default_factory=list)
    error: ParallaxError | None = None
    carry_bytes_per_token: int = 0
    ended: bool = False

    def process(self, frame: wire.Frame) -> None:
        self.frames.append(frame)

    def end(self, error: ParallaxError) -> None:
        self.error, self.ended = error, True


def start(stages: int = 2) -> tuple[Head, Stage]:
    places = [wire.StagePlace(node_id=str(i)) for i in range(stages)]
    form = wire.FormRing(epoch=3, shape=SHAPE, stages=places, costs=[wire.CacheCost()] * stages)
    head, stage = Head(form, LIMITS), Stage()
    head.start(cast(RingMember, stage))
    return head, stage


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def orders(*given: wire.HeadOrder) -> AsyncIterator[wire.HeadOrder]:
    for order in given:
        yield order
    await asyncio.Event().wait()


def submit(*prompt: int) -> wire.HeadOrder:
    return wire.HeadOrder(
        epoch=3, submit=wire.Submit(request=1, attempt=1, prompt=prompt, max_tokens=9)
    )


async def test_a_ring_that_answers_nothing_any_more_is_given_up() -> None:
    head, stage = start()
    reports = head.serve(orders(submit(5)))
    await anext(reports)
    await until(lambda: any(f.kind == wire.DECODE for f in stage.frames))
    for frame in list(stage.frames):
        head.returned(wire.Frame(number=frame.number, tokens=[7] * frame.rows))
    await until(lambda: stage.error is not None)
    assert isinstance(stage.error, StageStuck)
    await reports.aclose()
    await head.stop()


async def test_the_first_step_may_take_longer_because_shaders_compile() -> None:
    head, stage = start(stages=1)
    await until(lambda: bool(stage.frames))
    begin = asyncio.get_running_loop().time()
    await until(lambda: stage.error is not None)
    assert asyncio.get_running_loop().time() - begin > 0.9 * FIRST_PATIENCE * LIMITS.stuck_s
    await head.stop()


async def test_a_slow_ring_that_still_answers_is_left_alone() -> None:
    head, stage = start()
    reports = head.serve(orders(submit(5)))
    await anext(reports)
    await until(lambda: any(f.kind == wire.DECODE for f in stage.frames))
    returned = 0
    begin = asyncio.get_running_loop().time()
    while asyncio.get_running_loop().time() - begin < 4 * 2 * LIMITS.stuck_s:
        await asyncio.sleep(LIMITS.stuck_s)
        for frame in stage.frames[returned:]:
            returned += 1
            head.returned(wire.Frame(number=frame.number, tokens=[7] * frame.rows))
    assert stage.error is None
    assert returned > 3
    assert head._conductor.stepped, "it would be waited for longer"
    await reports.aclose()
    await head.stop()


async def test_an_order_that_cannot_be_carried_out_ends_the_epoch_and_the_stream() -> None:
    head, stage = start()
    async with asyncio.timeout(60):
        async for _ in head.serve(orders(submit())):  # a prompt of no tokens
            pass
    assert isinstance(stage.error, MessageRefused)
    await head.stop()
