"""How long a request the caches of a ring take, and a message to its head."""

from __future__ import annotations

from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.shape import shape_of, tokens_that_fit


def ready(**cost: int) -> wire.StageReady:
    return wire.StageReady(cache=wire.CacheCost(**cost))


def test_a_lone_sequence_fits_with_a_copy_of_its_caches() -> None:
    assert tokens_that_fit([ready(bytes_per_token=10)], 10_000, 32) == 500
    stages = [ready(bytes_per_token=10), ready(bytes_per_token=20, fixed_bytes=1000)]
    assert tokens_that_fit(stages, 10_000, 32) == 200, "the tightest stage decides"


def test_a_window_holds_a_chunk_more_while_it_is_prefilled() -> None:
    cost = {"bytes_per_token": 10, "window_bytes_per_token": 10, "window_tokens": 100}
    assert tokens_that_fit([ready(**cost)], 10_000, 32) == 400
    assert tokens_that_fit([ready(**cost)], 10_000, 700) == 200


def test_what_does_not_grow_takes_any_length() -> None:
    assert tokens_that_fit([ready(fixed_bytes=1000)], 10_000, 32) == 1 << 31


def test_the_longest_request_fits_a_message_to_its_head() -> None:
    limits = Limits()
    shape = shape_of([ready(fixed_bytes=1)], [1 << 40], 10 << 20, accelerated=True, limits=limits)
    submit = wire.Submit(prompt=[(1 << 21) - 1] * shape.context_tokens)
    assert submit.ByteSize() < limits.message_bytes
    assert shape.context_tokens == 1 << 20
