"""Requests between queue and rings, with heads that are only written down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import ClassVar

import pytest

from parallax.fabric.errors import ParallaxError, PromptTooLong, QueueTimeout, RingLost
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.scheduler import dispatch
from parallax.scheduler.dispatch import LOSSES_IN_A_ROW, Dispatcher
from parallax.scheduler.generation import Finish, Generation, Reason, Sampling, Token
from tests.trust import member


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
    made = Dispatcher(Limits(), member("boss"), unheard)
    made.start()
    yield made
    await made.stop()


def ask(
    dispatcher: Dispatcher, *, prompt: int = 3, client: str = "", token: int = 1
) -> asyncio.Task[list[Token | Finish]]:
    generation = Generation("m", (token,) * prompt, Sampling(seed=1), 32, frozenset(), client)

    async def read() -> list[Token | Finish]:
        return [event async for event in dispatcher.generate(generation)]

    return asyncio.create_task(read())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
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
    drained = asyncio.create_task(dispatcher.drained(300))
    dispatcher.head_report(end(1, 1, wire.END_STOP))
    await first
    await until(lambda: dispatcher.running == 1)
    assert not drained.done(), "the request in the queue was forgotten"
    event = wire.EndEvent(request=2, attempt=1, reason=wire.END_STOP)
    dispatcher.head_report(wire.HeadReport(epoch=1, ends=[event]))
    await second
    async with asyncio.timeout(60):
        await drained


async def test_nobody_waits_for_a_queue_that_no_ring_serves(dispatcher: Dispatcher) -> None:
    dispatcher.ring_up(1, "a", [], 1, 1.0)
    answer = ask(dispatcher)
    await until(lambda: dispatcher.running == 1)
    drained = asyncio.create_task(dispatcher.drained(300))
    await asyncio.sleep(0)
    dispatcher.ring_down(1)
    async with asyncio.timeout(60):
        await drained
    assert dispatcher.running == 0
    answer.cancel()


async def test_a_late_load_of_a_ring_that_is_no_more_is_not_kept(dispatcher: Dispatcher) -> None:
    dispatcher.ring_up(1, "a", [], 1, 1.0)
    dispatcher.ring_down(1)
    dispatcher.head_report(wire.HeadReport(epoch=1, load=wire.HeadLoad(decoding=1)))
    assert dispatcher.loads == {}


async def test_a_request_is_not_sent_to_a_head_whose_caches_have_no_room(
    dispatcher: Dispatcher,
) -> None:
    costs = [wire.CacheCost(bytes_per_token=1), wire.CacheCost(bytes_per_token=2)]
    dispatcher.ring_up(1, "a", [], 4, 1.0, context_tokens=1000, costs=costs)
    first = ask(dispatcher)
    await until(lambda: dispatcher.running == 1)
    second = ask(dispatcher, prompt=600)
    await until(lambda: dispatcher.running == 2)
    budget, needed = 4096, 2 * 768
    load = wire.HeadLoad(
        decoding=2, free_rows=2, charged_bytes=budget - needed + 1, budget_bytes=budget
    )
    dispatcher.head_report(wire.HeadReport(epoch=1, load=load))
    third = ask(dispatcher, prompt=600)
    await until(lambda: dispatcher.waiting == 1)
    load.charged_bytes -= 1
    dispatcher.head_report(wire.HeadReport(epoch=1, load=load))
    assert (dispatcher.running, dispatcher.waiting) == (3, 0)
    for task in (first, second, third):
        task.cancel()


async def test_a_prompt_that_no_ring_holds_ends_with_how_much_they_do(
    dispatcher: Dispatcher,
) -> None:
    dispatcher.ring_up(1, "a", [], 1, 1.0, context_tokens=100)
    with pytest.raises(PromptTooLong, match="at most 99 tokens"):
        await ask(dispatcher, prompt=100)
    running, waiting = ask(dispatcher, prompt=90), ask(dispatcher, prompt=99)
    await until(lambda: (dispatcher.running, dispatcher.waiting) == (1, 1))
    dispatcher.ring_up(2, "b", [], 1, 1.0, context_tokens=95)
    dispatcher.ring_down(1)
    with pytest.raises(PromptTooLong, match="at most 94 tokens"):
        await waiting
    assert dispatcher.running == 1
    running.cancel()


async def test_a_client_with_one_request_goes_before_the_rest_of_one_with_many(
    dispatcher: Dispatcher,
) -> None:
    dispatcher.ring_up(1, "a", [], 1, 1.0)
    many = [ask(dispatcher, client="many") for _ in range(100)]
    await until(lambda: dispatcher.running + dispatcher.waiting == 100)
    one = ask(dispatcher, client="one")
    await until(lambda: dispatcher.running + dispatcher.waiting == 101)
    submitted = Link.made[0].submitted
    for count in (2, 3):
        event = wire.EndEvent(request=submitted[-1].request, attempt=1, reason=wire.END_STOP)
        dispatcher.head_report(wire.HeadReport(epoch=1, ends=[event]))
        await until(lambda count=count: len(submitted) == count)  # type: ignore[misc]
    assert [submit.request for submit in submitted] == [1, 101, 2]
    assert await one == [Finish(Reason.STOP)]
    for task in many:
        task.cancel()


async def test_of_idle_rings_the_one_that_served_the_prompts_beginning_gets_it(
    dispatcher: Dispatcher,
) -> None:
    for epoch in (1, 2):
        dispatcher.ring_up(epoch, "a", [], 4, 1.0)

    async def ask_to_the_end(number: int, prompt: tuple[int, ...]) -> int:
        """The ring that got it."""
        generation = Generation("m", prompt, Sampling(seed=1), 8, frozenset())
        events = dispatcher.generate(generation)
        answer = asyncio.ensure_future(anext(events))

        def rings() -> list[int]:
            return [k.epoch for k in Link.made if any(s.request == number for s in k.submitted)]

        await until(lambda: bool(rings()))
        (ring,) = rings()
        event = wire.TokenEvent(request=number, attempt=1, index=0, token=9)
        dispatcher.head_report(wire.HeadReport(epoch=ring, tokens=[event]))
        await answer
        await events.aclose()
        return ring

    system = tuple(range(64))
    busy = asyncio.ensure_future(ask_to_the_end(1, (7,) * 9))
    assert await busy == 1, "the first of equals"
    holding = dispatcher.generate(Generation("m", (8,), Sampling(seed=1), 900, frozenset()))
    held = asyncio.ensure_future(anext(holding))
    await until(lambda: dispatcher.running == 1)
    assert await ask_to_the_end(3, (*system, 1)) == 2, "the other one has work"
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    await until(lambda: dispatcher.running == 0)
    assert await ask_to_the_end(4, (*system, 2, 3)) == 2, "it has the prompt's beginning"
    assert await ask_to_the_end(5, (5,) * 40) == 1
    dispatcher.ring_down(2)
    dispatcher.ring_up(3, "a", [], 4, 1.0)
    assert await ask_to_the_end(6, (*system, 4)) == 1, "its caches went with it"


async def test_an_answer_that_fits_no_ring_any_more_ends_with_the_reason(
    dispatcher: Dispatcher,
) -> None:
    dispatcher.ring_up(1, "n", [], 4, 1.0)
    answer = ask(dispatcher, prompt=50)
    await until(lambda: bool(Link.made) and bool(Link.made[0].submitted))
    dispatcher.ring_down(1)
    dispatcher.ring_up(2, "n", [], 4, 1.0, context_tokens=40)
    dispatcher._look(time.monotonic())
    assert not answer.done(), "a ring that takes it may still come"
    dispatcher._look(time.monotonic() + Limits().queue_wait_s + 1)
    with pytest.raises(RingLost, match=r"50 tokens .* which take 40"):
        await answer


async def test_an_answer_that_nobody_can_go_on_with_says_how_much_memory_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "HeadLink", Link)
    Link.made.clear()
    dispatcher = Dispatcher(Limits(), member("boss"), unheard, missing_bytes=lambda: 12_345)
    dispatcher.start()
    dispatcher.ring_up(1, "n", [], 4, 1.0)
    answer = ask(dispatcher)
    await until(lambda: bool(Link.made) and bool(Link.made[0].submitted))
    dispatcher.ring_down(1)
    dispatcher._look(time.monotonic() + Limits().queue_wait_s + 1)
    with pytest.raises(RingLost, match="12,345 bytes of memory are missing"):
        await answer
    await dispatcher.stop()


async def test_an_answer_that_has_begun_waits_for_a_ring_until_its_own_deadline(
    dispatcher: Dispatcher,
) -> None:
    limits = Limits()
    dispatcher.ring_up(1, "n", [], 1, 1.0)
    answer = ask(dispatcher)
    await until(lambda: dispatcher.running == 1)
    began = time.monotonic()
    dispatcher.head_report(token(1, 1, 0))
    dispatcher.head_report(end(1, 1, wire.END_REFUSED))  # its caches outgrew the ring's
    for waited_s in (0.0, 2 * limits.queue_wait_s):
        dispatcher._look(began + waited_s)
    assert [submit.attempt for submit in Link.made[0].submitted] == [1, 2]
    dispatcher.ring_down(1)
    for waited_s in (2 * limits.queue_wait_s, limits.request_s - 1):
        dispatcher._look(began + waited_s)
    assert dispatcher.waiting == 1
    dispatcher._look(began + limits.request_s + 1)
    with pytest.raises(RingLost, match="no other ring could go on"):
        await answer


async def test_an_answer_may_take_any_time_while_it_grows_and_is_given_up_when_it_does_not(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_s = Limits().request_s
    dispatcher.ring_up(1, "n", [], 1, 1.0)
    answer = ask(dispatcher)
    await until(lambda: dispatcher.running == 1)
    began = time.monotonic()
    for index, passed_s in enumerate((0.9 * request_s, 1.8 * request_s)):
        monkeypatch.setattr(time, "monotonic", lambda now=began + passed_s: now)
        dispatcher.head_report(token(1, 1, index))
        dispatcher._look(began + passed_s)
    dispatcher._look(began + 2.7 * request_s)
    assert dispatcher.running == 1
    dispatcher._look(began + 2.9 * request_s)
    with pytest.raises(RingLost, match=f"no token of it came for {request_s:g} s"):
        await answer
    assert [cancel.attempt for cancel in Link.made[0].cancelled] == [1]


async def test_a_request_for_which_heads_had_no_room_is_told_that_rings_are_full(
    dispatcher: Dispatcher,
) -> None:
    dispatcher.ring_up(1, "n", [], 1, 1.0)
    answer = ask(dispatcher)
    await until(lambda: dispatcher.running == 1)
    dispatcher.head_report(end(1, 1, wire.END_REFUSED))
    dispatcher._look(time.monotonic() + Limits().queue_wait_s + 1)
    dispatcher._look(time.monotonic() + 2 * Limits().queue_wait_s + 2)
    with pytest.raises(QueueTimeout, match="stayed full"):
        await answer


async def test_an_end_that_its_client_does_not_read_yet_holds_up_no_stop(
    dispatcher: Dispatcher,
) -> None:
    dispatcher.ring_up(1, "n", [], 1, 1.0)
    events = dispatcher.generate(Generation("m", (1,), Sampling(seed=1), 8, frozenset()))
    first = asyncio.ensure_future(anext(events))
    await until(lambda: dispatcher.running == 1)
    dispatcher.head_report(token(1, 1, 0))
    await first
    drained = asyncio.create_task(dispatcher.drained(300))
    await asyncio.sleep(0)
    dispatcher.head_report(end(1, 1, wire.END_STOP))
    _, late = await asyncio.wait({drained}, timeout=60)
    assert not late, "a slow client's end is waited for"
    await events.aclose()


async def test_an_answer_that_breaks_every_ring_takes_no_other_one_along(
    dispatcher: Dispatcher,
) -> None:
    dispatcher.ring_up(1, "n", [], 4, 1.0)
    broken, *others = [ask(dispatcher) for _ in range(4)]
    await until(lambda: dispatcher.running == 4)
    for epoch in range(1, 20):
        if broken.done():
            break
        submitted = Link.made[-1].submitted
        for submit in submitted:  # grows: who has got on makes way for the next one
            if all(each.request != 1 for each in submitted):
                event = wire.TokenEvent(request=submit.request, attempt=submit.attempt, token=9)
                load = wire.HeadLoad(free_rows=4, decoding=1)
                dispatcher.head_report(wire.HeadReport(epoch=epoch, tokens=[event], load=load))
        dispatcher.ring_up(epoch + 1, "n", [], 4, 1.0)
        dispatcher.ring_down(epoch)
        await asyncio.sleep(0)
    with pytest.raises(RingLost, match=f"{LOSSES_IN_A_ROW} in a row"):
        await broken
    last = Link.made[-1]
    for number in (2, 3, 4):
        attempt = max(s.attempt for s in last.submitted if s.request == number)
        event = wire.EndEvent(request=number, attempt=attempt, reason=wire.END_STOP)
        dispatcher.head_report(
            wire.HeadReport(epoch=last.epoch, ends=[event], load=wire.HeadLoad(free_rows=4))
        )
    assert [(await other)[-1] for other in others] == [Finish(Reason.STOP)] * 3


def load(epoch: int, *tokens: tuple[int, int, int]) -> wire.HeadReport:
    """Tokens of requests, as (request, attempt, index)."""
    events = [wire.TokenEvent(request=r, attempt=a, index=i, token=9) for r, a, i in tokens]
    return wire.HeadReport(epoch=epoch, tokens=events)


async def test_a_first_token_lets_the_next_prompt_go(dispatcher: Dispatcher) -> None:
    dispatcher.ring_up(1, "n", [], 36, 1.0, chunk_tokens=32)
    many = [ask(dispatcher, prompt=2000, client="many", token=n) for n in range(4)]
    await until(lambda: dispatcher.running + dispatcher.waiting == 4)
    submitted = Link.made[0].submitted
    one = ask(dispatcher, prompt=2000, client="one", token=5)
    await until(lambda: dispatcher.waiting == 3)
    assert [submit.request for submit in submitted] == [1, 2]
    dispatcher.head_report(load(1, (1, 1, 0)))
    assert [submit.request for submit in submitted][:3] == [1, 2, 5]
    dispatcher.head_report(load(1, (1, 1, 1)))
    assert 4 not in [submit.request for submit in submitted]
    for task in (*many, one):
        task.cancel()


async def test_an_answer_that_outgrows_its_ring_goes_on_where_it_fits(
    dispatcher: Dispatcher,
) -> None:
    dispatcher.ring_up(1, "n", [], 4, 1.0, context_tokens=10)
    dispatcher.ring_up(2, "n", [], 4, 1.0, context_tokens=1000)
    dispatcher.ring_down(2)
    answer = ask(dispatcher, prompt=8)
    await until(lambda: dispatcher.running == 1)
    dispatcher.ring_up(3, "n", [], 4, 1.0, context_tokens=1000)
    report = load(1, (1, 1, 0), (1, 1, 1))
    report.ends.append(wire.EndEvent(request=1, attempt=1, reason=wire.END_LENGTH))
    report.load.free_rows = 4
    dispatcher.head_report(report)
    (again,) = Link.made[2].submitted
    assert (again.attempt, list(again.generated)) == (2, [9, 9])
    assert dispatcher._router._rings[1].open, "it need not pause"
    last = load(3, (1, 2, 2))
    last.ends.append(wire.EndEvent(request=1, attempt=2, reason=wire.END_LENGTH))
    dispatcher.head_report(last)
    assert await answer == [*(Token(n, 9) for n in range(3)), Finish(Reason.LENGTH)]


async def test_a_long_prompt_waits_while_a_ring_is_coming_and_else_ends_as_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "HeadLink", Link)
    planned = 2
    dispatcher = Dispatcher(Limits(), member("boss"), unheard, lambda: planned)
    dispatcher.ring_up(1, "a", [], 4, 1.0, context_tokens=10)
    dispatcher.ring_up(2, "b", [], 1, 1.0, context_tokens=1000)
    running, waiting = ask(dispatcher, prompt=500), ask(dispatcher, prompt=500)
    await until(lambda: (dispatcher.running, dispatcher.waiting) == (1, 1))
    dispatcher.ring_down(2)
    dispatcher._look(time.monotonic())
    assert dispatcher.waiting == 2, "it forms anew"
    planned = 1
    dispatcher._look(time.monotonic())
    with pytest.raises(PromptTooLong, match="at most 9 tokens"):
        await waiting
    running.cancel()
    await dispatcher.stop()
