"""Requests between queue and rings, with heads that are only written down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import ClassVar

import pytest

from parallax.fabric.errors import ParallaxError, RingLost
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.scheduler import dispatch
from parallax.scheduler.dispatch import LOSSES_IN_A_ROW, Dispatcher
from parallax.scheduler.generation import Finish, Generation, Reason, Sampling, Token


class Link:
    """A stream to a head that keeps what it is given."""

    made: ClassVar[list[Link]] = []

    def __init__(self, epoch: int, *_: object) -> None:
        self.epoch = epoch
        self.submitted: list[wire.Submit] = []
        self.cancelled: list[wire.Cancel] = []
        Link.made.append(self)

    def submit(self, submit: wire.Submit) -> None:
        self.submitted.append(submit)

    def cancel(self, cancel: wire.Cancel) -> None:
        self.cancelled.append(cancel)

    async def close(self) -> None:
        """Nothing to end."""


def unheard(epoch: int, error: ParallaxError) -> None:
    raise AssertionError((epoch, error))


@pytest.fixture
async def dispatcher(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Dispatcher]:
    monkeypatch.setattr(dispatch, "HeadLink", Link)
    Link.made.clear()
    made = Dispatcher(Limits(), unheard)
    made.start()
    yield made
    await made.stop()


def ask(dispatcher: Dispatcher) -> asyncio.Task[list[Token | Finish]]:
    generation = Generation("m", (1, 2, 3), Sampling(seed=1), 8, frozenset())

    async def read() -> list[Token | Finish]:
        return [event async for event in dispatcher.generate(generation)]

    return asyncio.create_task(read())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def token(epoch: int, attempt: int, index: int, value: int = 9) -> wire.HeadReport:
    event = wire.TokenEvent(request=1, attempt=attempt, index=index, token=value)
    return wire.HeadReport(epoch=epoch, tokens=[event])


def end(epoch: int, attempt: int, reason: wire.EndReason.ValueType) -> wire.HeadReport:
    return wire.HeadReport(
        epoch=epoch, ends=[wire.EndEvent(request=1, attempt=attempt, reason=reason)]
    )


async def test_an_end_of_an_old_attempt_on_the_same_ring_changes_nothing(
    dispatcher: Dispatcher,
) -> None:
    dispatcher.ring_up(1, "a", [], 4, 1.0)
    answer = ask(dispatcher)
    await until(lambda: dispatcher.running == 1)
    dispatcher.head_report(end(1, 1, wire.END_REFUSED))
    await until(lambda: len(Link.made[0].submitted) == 2)
    dispatcher.head_report(end(1, 1, wire.END_REFUSED))
    assert (dispatcher.running, dispatcher.waiting) == (1, 0)
    dispatcher.head_report(token(1, 2, 0))
    dispatcher.head_report(end(1, 2, wire.END_STOP))
    assert await answer == [Token(0, 9), Finish(Reason.STOP)]
    assert dispatcher.running == 0


async def test_an_answer_on_which_every_ring_breaks_is_given_up(dispatcher: Dispatcher) -> None:
    answer = ask_later = None
    for epoch in range(1, LOSSES_IN_A_ROW + 2):
        dispatcher.ring_up(epoch, "a", [], 4, 1.0)
        if answer is None:
            answer = ask(dispatcher)
            await until(lambda: dispatcher.running == 1)
            dispatcher.head_report(token(1, 1, 0))
            ask_later = dispatcher.running
        dispatcher.ring_down(epoch)
    assert ask_later == 1
    assert answer is not None
    with pytest.raises(RingLost, match=f"{LOSSES_IN_A_ROW} in a row"):
        await answer
    submitted = [s.attempt for link in Link.made for s in link.submitted]
    assert submitted == list(range(1, LOSSES_IN_A_ROW + 1))
    assert (dispatcher.running, dispatcher.waiting) == (0, 0)


async def test_an_answer_that_gets_on_survives_any_number_of_rings(dispatcher: Dispatcher) -> None:
    dispatcher.ring_up(1, "a", [], 4, 1.0)
    answer = ask(dispatcher)
    await until(lambda: dispatcher.running == 1)
    for epoch in range(1, 2 * LOSSES_IN_A_ROW):
        dispatcher.head_report(token(epoch, epoch, epoch - 1))
        dispatcher.ring_down(epoch)
        dispatcher.ring_up(epoch + 1, "a", [], 4, 1.0)
    dispatcher.head_report(end(2 * LOSSES_IN_A_ROW, 2 * LOSSES_IN_A_ROW, wire.END_LENGTH))
    assert len(await answer) == 2 * LOSSES_IN_A_ROW


async def test_a_stopping_scheduler_finishes_what_it_has_and_takes_no_more(
    dispatcher: Dispatcher,
) -> None:
    dispatcher.ring_up(1, "a", [], 1, 1.0)
    first, second = ask(dispatcher), ask(dispatcher)
    await until(lambda: (dispatcher.running, dispatcher.waiting) == (1, 1))
    dispatcher.refuse()
    with pytest.raises(RingLost, match="stopping"):
        await ask(dispatcher)
    drained = asyncio.create_task(dispatcher.drained(5))
    dispatcher.head_report(end(1, 1, wire.END_STOP))
    await first
    await until(lambda: dispatcher.running == 1)
    assert not drained.done(), "the request in the queue was forgotten"
    event = wire.EndEvent(request=2, attempt=1, reason=wire.END_STOP)
    dispatcher.head_report(wire.HeadReport(epoch=1, ends=[event]))
    await second
    async with asyncio.timeout(1):
        await drained


async def test_nobody_waits_for_a_queue_that_no_ring_serves(dispatcher: Dispatcher) -> None:
    dispatcher.ring_up(1, "a", [], 1, 1.0)
    answer = ask(dispatcher)
    await until(lambda: dispatcher.running == 1)
    drained = asyncio.create_task(dispatcher.drained(5))
    await asyncio.sleep(0)
    dispatcher.ring_down(1)
    async with asyncio.timeout(1):
        await drained
    assert dispatcher.running == 0
    answer.cancel()


async def test_a_late_load_of_a_ring_that_is_no_more_is_not_kept(dispatcher: Dispatcher) -> None:
    dispatcher.ring_up(1, "a", [], 1, 1.0)
    dispatcher.ring_down(1)
    dispatcher.head_report(wire.HeadReport(epoch=1, load=wire.HeadLoad(decoding=1)))
    assert dispatcher.loads == {}
