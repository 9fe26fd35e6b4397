"""Drafts of a lone answer: what the conductor sends ahead, and what it makes of the returns."""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Callable

import pytest

from parallax.node.conductor import SPARE_FRAMES
from parallax.node.drafts import Drafts
from parallax.node.prefix_cache import UNLIMITED
from parallax.node.sequences import Sequence
from parallax.node.speculation import Speculation
from parallax.proto import wire_pb2 as wire
from tests.node.pretend import (
    END,
    NEVER,
    Model,
    PretendRing,
    Timing,
    lone_answer,
    make_ring,
    submit,
)

COST = wire.CacheCost(bytes_per_token=1, forks=True, answers=True, trim_tokens=UNLIMITED)


def repeating(period: int, wrong_percent: int, ends: bool = True) -> Model:
    """A model that says what it read ``period`` tokens ago, but for this share."""

    def token(history: list[int]) -> int:
        value = hash(tuple(history[-20:])) ^ len(history) * 2654435761
        if len(history) <= period or value % 100 < wrong_percent:
            return value // 100 % 40 + (0 if ends else 1)
        return history[-period]

    return token


def speculating(model: Model, **fields: int) -> PretendRing:
    values = {"draft_tokens": 32, "block_tokens": 8, **fields}
    return make_ring(cost=COST, model=model, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(40))
def test_answers_are_the_same_whatever_is_drafted(seed: int) -> None:
    """Random odds, sizes, times, arrivals and cancellations; the pretend ring checks each frame."""
    rng = random.Random(seed)
    model = repeating(rng.choice([1, 3, 7, 15]), rng.choice([0, 2, 10, 30, 70, 100]))
    grown = rng.choice([0.0, 0.1, 0.7, 1.0])
    ring = speculating(
        model,
        stages=rng.randrange(1, 6),
        lanes=rng.randrange(1, 3),
        rows=rng.randrange(1, 4),
        grid=rng.choice([8, 32]),
        draft_tokens=rng.choice([1, 2, 8, 32]),
        block_tokens=rng.choice([1, 2, 8]),
        context_tokens=rng.choice([100, 10_000]),
    )
    ring.timing = Timing(
        ring.conductor._stages,
        lambda tokens: 0.01 * (1 + grown * (tokens - 1)) * rng.uniform(0.8, 1.2),
        rng.choice([0.0, 0.004]),
    )
    limit = ring.conductor._shape.context_tokens
    prompts: dict[int, list[int]] = {}
    waiting = deque(
        (n, [rng.randrange(1, 9) for _ in range(rng.randrange(1, 90))]) for n in range(1, 13)
    )
    cancelled: set[int] = set()
    crowd = rng.choice([0.0, 0.02, 0.1])
    while waiting or ring.frames:
        if waiting and ring.conductor.free_rows and (not ring.frames or rng.random() < crowd):
            number, prompt = waiting.popleft()
            prompts[number] = prompt
            ring.take(ring.conductor.submit(submit(number, prompt, 40)))
        if prompts and rng.random() < 0.01:
            victim = rng.choice(list(prompts))
            if victim not in ring.ends:
                cancelled.add(victim)
                ring.take(ring.conductor.cancel(wire.Cancel(request=victim, attempt=1)))
        if rng.random() < 0.05:
            ring.take(ring.conductor.beat(ring.timing.now))
        if ring.frames:
            ring.step()
    for number, prompt in prompts.items():
        most = min(40, limit - len(prompt))
        answer, reason = lone_answer(prompt, most, END, model)
        found = ring.answers.get(number, [])
        if number in cancelled:
            assert found == answer[: len(found)]
        else:
            assert (found, ring.ends[number]) == (answer, reason)
    assert set(ring.ends) == set(prompts)
    assert not ring.caches
    assert not ring.lanes
    assert ring.most_in_flight <= ring.window
    load = ring.load
    assert load.accepted_tokens <= load.drafted_tokens


def run(ring: PretendRing, prompt: list[int], tokens: int, request: int = 1) -> float:
    """Steps until the answer is there; seconds from its first token on."""
    ring.take(ring.conductor.submit(submit(request, prompt, tokens, NEVER)))
    while request not in ring.answers:
        ring.step()
    begin = ring.timing.now
    while request not in ring.ends:
        ring.step()
    return ring.timing.now - begin


def linear(growth: float) -> Callable[[int], float]:
    """Times of frames in which each token more takes this share of the first."""
    return lambda tokens: 0.01 * (1 + growth * (tokens - 1))


@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_what_repeats_comes_at_one_token_in_each_stages_time(stages: int) -> None:
    model = repeating(7, 0, ends=False)
    prompt = [1, 2, 3, 4, 5, 6, 7] * 3
    times = {}
    for drafts in (0, 64):
        ring = speculating(model, stages=stages, draft_tokens=drafts, block_tokens=1)
        ring.timing = Timing(stages, linear(1.0), hop_s=0.001)
        times[drafts] = run(ring, prompt, 200)
        assert ring.answers[1] == lone_answer(prompt, 200, NEVER, model)[0]
        assert ring.load.accepted_tokens == ring.load.drafted_tokens
    assert times[0] == pytest.approx(199 * stages * 0.011)
    assert times[64] < 1.15 * 199 * 0.01


def test_blocks_are_as_large_as_they_are_worth() -> None:
    model = repeating(7, 0, ends=False)
    prompt = [1, 2, 3, 4, 5, 6, 7] * 3
    for growth, size in ((0.0, 8), (1.5, 1)):  # a GPU's, and far worse than a CPU's
        ring = speculating(model, stages=2)
        ring.timing = Timing(2, linear(growth), hop_s=0.002)
        run(ring, prompt, 400)
        assert ring.answers[1] == lone_answer(prompt, 400, NEVER, model)[0]
        later = [tokens for tokens, _ in ring.blocks[-60:]]  # another is tried now and then
        assert statistics.mode(later) == size


@pytest.mark.parametrize("wrong_percent", [5, 20, 40, 60, 80, 100])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_drafts_never_make_an_answer_much_slower(stages: int, wrong_percent: int) -> None:
    model = repeating(11, wrong_percent, ends=False)
    times = {}
    for drafts in (0, 64):
        ring = speculating(model, stages=stages, draft_tokens=drafts)
        ring.timing = Timing(stages, linear(0.6), hop_s=0.002)
        times[drafts] = run(ring, list(range(1, 12)) * 2, 400)
    assert times[64] < 1.03 * times[0]
    if wrong_percent == 5 and stages > 1:
        assert times[64] < 0.75 * times[0]


def contrary(history: list[int]) -> int:
    """Of five tokens, any but the one that is foretold."""
    drafts = Drafts()
    for token in history:
        drafts.append(token)
    foretold = drafts.after(0, 1) or [0]
    return (foretold[0] + hash(tuple(history)) % 4) % 5 + 1


def test_what_is_always_wrong_is_soon_not_sent_any_more() -> None:
    ring = speculating(contrary, stages=2)
    ring.timing = Timing(2, linear(0.6), hop_s=0.002)
    run(ring, [1, 2, 1, 3, 2, 3], 300)
    load = ring.load
    assert load.accepted_tokens == 0
    assert load.drafted_tokens < 12
    assert ring.answers[1] == lone_answer([1, 2, 1, 3, 2, 3], 300, NEVER, contrary)[0]


def test_an_answer_begins_with_the_odds_of_those_before_it() -> None:
    signs = 95

    def counting(history: list[int]) -> int:
        return history[-1] % signs + 1

    misleading: list[int] = []  # whatever follows four that count on does not
    for start in range(signs):
        misleading += [(start + place) % signs + 1 for place in range(4)]
        misleading.append((start + signs // 2) % signs + 1)
    times = {}
    for drafts in (0, 64):
        ring = speculating(counting, stages=2, draft_tokens=drafts)
        ring.timing = Timing(2, linear(0.9), hop_s=0.0005)
        times[drafts] = [run(ring, misleading, 89, request) for request in range(1, 9)]
    assert sum(times[64]) < 1.002 * sum(times[0])
    ring.model = repeating(7, 0, ends=False)
    run(ring, [1, 2, 3, 4, 5, 6, 7] * 3, 200, 9)
    assert ring.load.accepted_tokens > 150, "what was always wrong is not tried again"
    assert ring.answers[9] == lone_answer([1, 2, 3, 4, 5, 6, 7] * 3, 200, NEVER, ring.model)[0]


def test_drafts_begin_again_when_the_text_repeats_after_all() -> None:
    noise, period = 150, 9

    def model(history: list[int]) -> int:
        if len(history) < noise:
            return hash(tuple(history[-9:])) % 5 + 1
        return history[-period]

    ring = speculating(model, stages=3)
    run(ring, [1, 2, 3], 400)
    assert ring.load.accepted_tokens > 200
    assert ring.answers[1] == lone_answer([1, 2, 3], 400, NEVER, model)[0]


def test_drafts_leave_room_in_the_window() -> None:
    model = repeating(7, 10, ends=False)
    ring = speculating(model, stages=6, window=8)
    ring.timing = Timing(6, linear(0.6))
    ring.take(ring.conductor.beat(0.0))
    run(ring, [1, 2, 3, 4, 5, 6, 7] * 3, 200)
    assert ring.load.accepted_tokens > 50
    assert ring.most_in_flight <= 8 - SPARE_FRAMES + 1


def test_nothing_is_drafted_when_it_is_switched_off_or_caches_cannot_be_cut() -> None:
    model = repeating(3, 0, ends=False)
    states = wire.CacheCost(forks=True, trim_tokens=0)
    for ring in (
        speculating(model, draft_tokens=0),
        make_ring(cost=states, model=model, draft_tokens=32, block_tokens=8),
    ):
        run(ring, [1, 2, 3] * 4, 50)
        assert ring.load.drafted_tokens == 0
        assert {tokens for tokens, _ in ring.blocks} == {1}


def test_drafts_end_before_a_window_wraps() -> None:
    model = repeating(3, 20, ends=False)
    cost = wire.CacheCost(bytes_per_token=1, forks=True, trim_tokens=40)
    ring = make_ring(cost=cost, model=model, draft_tokens=32, block_tokens=8)
    ring.timing = Timing(2, linear(0.1))
    run(ring, [1, 2, 3] * 4, 100)  # the pretend ring refuses a trim of more
    assert 0 < ring.load.drafted_tokens < 60
    assert ring.answers[1] == lone_answer([1, 2, 3] * 4, 100, NEVER, model)[0]


def test_nothing_is_sent_behind_an_end_token_or_the_last_token() -> None:
    model = repeating(5, 0, ends=False)
    ring = speculating(model, stages=4)
    prompt = [1, 2, 3, 4, 5] * 4
    run(ring, prompt, 33)
    computed = sum(tokens for tokens, _ in ring.blocks)
    assert computed == 33, "one token went in for each that came out"
    ring = speculating(model, stages=4)
    ring.take(ring.conductor.submit(submit(1, prompt, 100, end=5)))
    ring.run_out()
    assert ring.answers[1] == [1, 2, 3, 4]
    assert sum(tokens for tokens, _ in ring.blocks) == 5


def test_a_second_request_ends_the_drafting_and_its_end_begins_it_again() -> None:
    model = repeating(7, 0, ends=False)
    ring = speculating(model, stages=3)
    prompt = [1, 2, 3, 4, 5, 6, 7] * 3
    ring.take(ring.conductor.submit(submit(1, prompt, 300, NEVER)))
    while ring.load.accepted_tokens < 30:
        ring.step()
    other = [9, 8, 7, 6, 5, 4, 3, 2] * 3
    ring.take(ring.conductor.submit(submit(2, other, 40, NEVER)))
    before = ring.load.drafted_tokens
    while 2 not in ring.ends:
        ring.step()
        assert ring.load.drafted_tokens == before or 2 in ring.ends
    ring.run_out()
    assert ring.load.drafted_tokens > before + 50
    assert ring.answers[1] == lone_answer(prompt, 300, NEVER, model)[0]
    assert ring.answers[2] == lone_answer(other, 40, NEVER, model)[0]


def test_a_cancelled_answer_leaves_nothing_to_the_next_one_in_its_lane() -> None:
    model = repeating(7, 0, ends=False)
    ring = speculating(model, stages=4, lanes=1)
    prompt = [1, 2, 3, 4, 5, 6, 7] * 3
    ring.take(ring.conductor.submit(submit(1, prompt, 300, NEVER)))
    while ring.load.accepted_tokens < 30:
        ring.step()
    assert len(ring.frames) > 3
    ring.take(ring.conductor.cancel(wire.Cancel(request=1, attempt=1)))
    ring.take(ring.conductor.submit(submit(2, [5], 60, NEVER)))
    ring.run_out()
    assert ring.answers[2] == lone_answer([5], 60, NEVER, model)[0]
    assert not ring.caches


def test_a_return_that_does_not_fit_is_refused() -> None:
    shape = wire.RingShape(draft_tokens=8, block_tokens=4, context_tokens=1000)
    speculation = Speculation(2, shape, [COST])
    sequence = Sequence(1, 1, 1, [1, 2, 3], [], wire.Sampling(), 20, frozenset())
    block = speculation.first(sequence, None, alone=True)
    with pytest.raises(ValueError, match="2 draws"):
        speculation.returned(block, [4, 5], None, 0.0)
