"""One request's life: no token twice, none lost, one end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallax.fabric.errors import MessageRefused
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.generation import Finish, Generation, Reason, Sampling, Token
from parallax.scheduler.lifecycle import Phase, Request


def make() -> Request:
    generation = Generation(
        model="m",
        prompt=(1, 2, 3),
        sampling=Sampling(seed=9, temperature=0.5, logit_bias={4: -1.0}),
        max_tokens=8,
        end_tokens=frozenset({2, 1}),
    )
    return Request(7, generation, deadline=100.0)


def token(attempt: int, index: int, value: int) -> wire.TokenEvent:
    return wire.TokenEvent(request=7, attempt=attempt, index=index, token=value)


def end(attempt: int, reason: wire.EndReason.ValueType) -> wire.EndEvent:
    return wire.EndEvent(request=7, attempt=attempt, reason=reason)


def test_an_attempt_carries_everything_that_was_generated() -> None:
    request = make()
    first = request.start(epoch=3)
    assert (first.attempt, list(first.generated), list(first.end_tokens)) == (1, [], [1, 2])
    assert request.take(token(1, 0, 50)) == Token(0, 50)
    assert request.take(token(1, 1, 51)) == Token(1, 51)
    assert request.ring_lost(3)
    second = request.start(epoch=4)
    assert (second.attempt, list(second.generated)) == (2, [50, 51])
    assert second.sampling == first.sampling


def test_the_first_token_tells_how_much_of_the_prompt_was_kept() -> None:
    request = make()
    request.start(epoch=3)
    first = token(1, 0, 50)
    first.cached_tokens = 2
    assert request.take(first) == Token(0, 50, cached_tokens=2)
    request.ring_lost(3)
    request.start(epoch=4)
    later = token(2, 1, 51)
    later.cached_tokens = 3
    assert request.take(later) == Token(1, 51), "that is no part of the prompt"


@pytest.mark.parametrize(("attempt", "index"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_only_the_current_attempts_next_token_is_taken(attempt: int, index: int) -> None:
    request = make()
    request.start(epoch=3)
    request.take(token(1, 0, 50))
    request.take(token(1, 1, 51))
    request.ring_lost(3)
    request.start(epoch=4)
    assert request.take(token(attempt, index, 60)) is None
    assert request.take(token(2, 2, 61)) == Token(2, 61)
    assert request.tokens == [50, 51, 61]


def test_an_end_ends_once() -> None:
    request = make()
    request.start(epoch=3)
    assert request.end(end(1, wire.END_STOP)) == Finish(Reason.STOP)
    assert request.end(end(1, wire.END_STOP)) is None
    assert request.take(token(1, 0, 50)) is None
    assert request.phase is Phase.ENDED
    assert not request.ring_lost(3)


@pytest.mark.parametrize("reason", [wire.END_REFUSED, wire.END_CANCELLED])
def test_what_the_ring_hands_back_goes_again(reason: wire.EndReason.ValueType) -> None:
    request = make()
    request.start(epoch=3)
    request.take(token(1, 0, 50))
    assert request.end(end(1, reason)) is None
    assert request.phase is Phase.QUEUED
    assert list(request.start(epoch=3).generated) == [50]


def test_an_old_attempts_end_changes_nothing() -> None:
    request = make()
    request.start(epoch=3)
    request.ring_lost(3)
    request.start(epoch=4)
    assert request.end(end(1, wire.END_STOP)) is None
    assert request.phase is Phase.RUNNING


def test_only_a_running_request_is_taken_back_from_its_ring() -> None:
    waiting = make()
    assert waiting.cancel() is None
    running = make()
    running.start(epoch=3)
    assert running.cancel() == wire.Cancel(request=7, attempt=1)


def test_a_head_gives_no_more_tokens_than_were_asked_for() -> None:
    request = make()
    request.start(epoch=3)
    for index in range(8):
        assert request.take(token(1, index, 50)) is not None
    assert request.take(token(1, 8, 50)) is None
    assert len(request.tokens) == 8


def test_a_token_that_the_model_does_not_have_is_not_taken_on() -> None:
    request = make()
    request.generation = replace(request.generation, vocabulary=100)
    request.start(epoch=3)
    assert request.take(token(1, 0, 99)) is not None
    with pytest.raises(MessageRefused, match="token 100"):
        request.take(token(1, 1, 100))
    assert request.tokens == [99]
