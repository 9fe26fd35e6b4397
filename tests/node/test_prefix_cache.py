"""What the conductor keeps, begins with and lets go, on a ring that only obeys."""

from __future__ import annotations

import random
from collections import deque

import pytest

from parallax.node.conductor import Conductor
from parallax.node.prefix_cache import MOST_KEPT, UNLIMITED
from parallax.proto import wire_pb2 as wire
from tests.node.pretend import (
    NEVER,
    PretendRing,
    lone_answer,
    make_ring,
    next_token,
    prompt_of,
    submit,
)

# What the caches of models can do; every token takes a byte.
DENSE = wire.CacheCost(bytes_per_token=1, forks=True, answers=True, trim_tokens=UNLIMITED)
LATENT = wire.CacheCost(bytes_per_token=1, forks=True, trim_tokens=UNLIMITED)
WINDOW = wire.CacheCost(
    window_bytes_per_token=1, window_tokens=40, forks=True, answers=True, trim_tokens=40
)
STATE = wire.CacheCost(fixed_bytes=100, forks=True)
KINDS = {"dense": DENSE, "latent": LATENT, "window": WINDOW, "state": STATE}


def ask(ring: PretendRing, request: int, prompt: list[int], max_tokens: int = 10) -> int:
    """Runs a request to its end; how much of its prompt was kept."""
    ring.take(ring.conductor.submit(submit(request, prompt, max_tokens, NEVER)))
    ring.run_out()
    assert ring.answers[request] == lone_answer(prompt, max_tokens, NEVER)[0]
    return ring.cached.get(request, 0)


def some(length: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, 97) for _ in range(length)]


def test_the_next_turn_of_a_chat_begins_where_the_last_answer_ended() -> None:
    ring = make_ring(cost=DENSE)
    first = some(50)
    assert ask(ring, 1, first) == 0
    second = [*first, *ring.answers[1], *some(9, 2)]
    assert ask(ring, 2, second) == 56, "59 tokens are in the caches, 7 whole steps"
    third = [*second, *ring.answers[2][:-4], 5, *some(9, 3)]  # the answer's end reads otherwise
    assert ask(ring, 3, third) == 72
    load = ring.load.prefixes
    assert (load.prompts, load.hits, load.saved_tokens) == (3, 2, 128)
    assert load.kept == 1, "each turn takes the place of those that it goes on from"
    assert list(map(len, ring.kept.values())) == [94]


def test_a_prompt_that_is_known_whole_is_prefilled_from_the_last_step_on() -> None:
    ring = make_ring(cost=DENSE)
    prompt = some(57)
    ask(ring, 1, prompt)
    before = ring.prefilled
    assert ask(ring, 2, prompt) == 56
    assert ring.prefilled == before, "all but its last token was there"
    assert ask(ring, 3, prompt[:56]) == 48, "its last token is the first step's input"


def test_a_system_prompt_is_found_while_the_first_request_still_runs() -> None:
    ring = make_ring(cost=DENSE)
    system = some(40)
    for number in (1, 2, 3):
        ring.take(ring.conductor.submit(submit(number, [*system, *some(5, number)], 30, NEVER)))
    ring.run_out()
    assert ring.cached == {2: 40, 3: 40}
    assert ring.prefilled == 44 + 4 + 4


def test_what_was_decoded_is_not_kept_where_it_leaves_other_bits() -> None:
    ring = make_ring(cost=LATENT)
    prompt = some(50)
    ask(ring, 1, prompt)
    assert ask(ring, 2, [*prompt, *ring.answers[1], *some(9, 2)]) == 48
    assert ask(ring, 3, [*prompt[:20], *some(9, 3)]) == 16


def test_caches_that_cannot_be_cut_are_kept_at_boundaries_and_where_prompts_part() -> None:
    ring = make_ring(cost=STATE)
    prompt = some(50)
    ask(ring, 1, prompt)
    assert list(map(len, ring.kept.values())) == [48]
    assert ask(ring, 2, [*prompt, *ring.answers[1], *some(9, 2)]) == 48
    assert ask(ring, 3, [*prompt[:37], *some(20, 3)]) == 0, "the state is beyond that"
    assert ask(ring, 4, [*prompt[:37], *some(20, 4)]) == 32, "kept where those two parted"
    assert ask(ring, 5, prompt) == 48


def test_a_window_is_cut_until_it_wraps() -> None:
    ring = make_ring(cost=WINDOW)
    ask(ring, 1, some(39))
    assert ask(ring, 2, [*some(39)[:20], *some(30, 2)]) == 16
    assert ask(ring, 3, [*some(39)[:20], *some(30, 3)]) == 16
    ask(ring, 4, some(60, 4))
    assert ask(ring, 5, [*some(60, 4)[:50], *some(5, 5)]) == 0
    assert ask(ring, 6, [*some(60, 4)[:58], *some(5, 6)]) == 56


@pytest.mark.parametrize("missing", ["forks", "trim_tokens"])
def test_without_the_self_checks_word_nothing_is_kept(missing: str) -> None:
    cost = wire.CacheCost()
    cost.CopyFrom(LATENT)
    cost.ClearField(missing)
    ring = make_ring(cost=cost)
    ask(ring, 1, some(5))
    ask(ring, 2, some(5))
    assert not ring.kept
    ask(ring, 3, some(50))
    ask(ring, 4, some(50))
    assert bool(ring.kept) == (missing == "trim_tokens")


def test_one_stage_that_cannot_is_enough() -> None:
    shape = wire.RingShape(
        lanes=1, lane_rows=2, chunk_tokens=8, window_frames=16, context_tokens=500
    )
    ring = PretendRing(Conductor(7, shape, 2, [DENSE, STATE]), 8, 16, cost=STATE)
    ask(ring, 1, some(50))
    assert list(map(len, ring.kept.values())) == [48]


def test_a_cancelled_prompt_is_kept_as_far_as_it_came() -> None:
    for cost in (DENSE, STATE):
        ring = make_ring(cost=cost, stages=2)
        ring.take(ring.conductor.submit(submit(1, some(200))))
        ring.step()
        ring.take(ring.conductor.cancel(wire.Cancel(request=1, attempt=1)))
        ring.run_out()
        assert not ring.caches
        assert ask(ring, 2, some(200)) == 32, "four chunks had been sent"


def test_an_answer_cancelled_in_the_middle_is_kept() -> None:
    ring = make_ring(cost=DENSE)
    prompt = some(20)
    ring.take(ring.conductor.submit(submit(1, prompt, 100, NEVER)))
    while len(ring.answers.get(1, ())) < 31:
        ring.step()
    ring.take(ring.conductor.cancel(wire.Cancel(request=1, attempt=1)))
    ring.run_out()
    assert ask(ring, 2, [*prompt, *ring.answers[1], 5]) == 48


def nearly_periodic(history: list[int]) -> int:
    """Repeats itself, and breaks off now and then: drafts are made, and some are wrong."""
    return next_token(history[-9:]) if sum(history[-3:]) % 5 == 0 else history[-4]


def test_wrong_drafts_are_not_kept() -> None:
    for length in range(20, 60):
        ring = make_ring(cost=DENSE, model=nearly_periodic, draft_tokens=12, block_tokens=4)
        prompt = some(length, length)
        ring.take(ring.conductor.submit(submit(1, prompt, 40, NEVER)))
        ring.run_out()
        assert len(ring.answers[1]) == 40
        again = [*prompt, *ring.answers[1], 5]
        ring.take(ring.conductor.submit(submit(2, again, 4, NEVER)))  # admitted with what was kept
        ring.run_out()
        assert ring.cached[2] >= (length + 39) // 8 * 8


def test_live_sequences_come_first_and_the_oldest_prefix_goes_first() -> None:
    ring = make_ring(cost=DENSE, budget=4 * 256, lanes=1)
    for number in (1, 2, 3, 4):
        ask(ring, number, some(60, number))
    assert len(ring.kept) == 3, "two beside a row and its lane's copy, and then what that row had"
    assert ring.load.prefixes.kept_bytes == 3 * 256
    assert ask(ring, 5, some(60, 3)) == 56
    ask(ring, 6, some(60, 6))
    assert ask(ring, 7, some(60, 3)) == 56, "used lately"
    assert ask(ring, 8, some(60, 4)) == 0, "evicted for that"
    before = ring.load.prefixes.evictions
    ring.take(ring.conductor.submit(submit(9, some(260, 9), 60, NEVER)))
    assert ring.load.free_rows == 3, "it fits, without prefixes"
    assert ring.load.prefixes.kept == 0
    assert ring.load.prefixes.evictions == before + 3
    ring.run_out()
    assert ring.ends[9] == wire.END_LENGTH


def test_what_is_used_in_part_counts_as_used() -> None:
    ring = make_ring(cost=DENSE, budget=4 * 256, lanes=1)
    ask(ring, 1, some(60, 1))
    ask(ring, 2, some(60, 2))
    ask(ring, 3, some(60, 1)[:20], max_tokens=2)
    assert ring.load.prefixes.kept == 2
    ask(ring, 4, some(60, 4))
    ask(ring, 5, some(60, 5))
    assert ask(ring, 6, some(60, 1)) == 56
    assert ask(ring, 7, some(60, 2)) == 0


def test_a_prompt_is_not_kept_at_the_cost_of_others_while_its_answer_is_to_come() -> None:
    ring = make_ring(cost=DENSE, budget=5 * 256, lanes=1)
    for number in (1, 2, 3):
        ask(ring, number, some(60, number))
    ring.take(ring.conductor.submit(submit(4, some(60, 4), 60, NEVER)))
    while not ring.answers.get(4):
        ring.step()
    assert (ring.load.prefixes.kept, ring.load.prefixes.evictions) == (3, 0)
    ring.run_out()
    assert (ring.load.prefixes.kept, ring.load.prefixes.evictions) == (4, 0)


def test_where_answers_are_not_kept_the_oldest_goes_for_a_prompt_at_once() -> None:
    ring = make_ring(cost=LATENT, budget=5 * 256, lanes=1)
    for number in (1, 2, 3, 4, 5):
        ask(ring, number, some(60, number))
    assert (ring.load.prefixes.kept, ring.load.prefixes.evictions) == (3, 2)
    assert ask(ring, 6, some(60, 5)) == 56


def test_a_prompt_cancelled_between_boundaries_is_not_kept_where_nothing_can_be_cut() -> None:
    ring = make_ring(cost=STATE, lanes=1, grid=32)
    ring.take(ring.conductor.submit(submit(1, [1, 2], 50, NEVER)))
    ring.take(ring.conductor.submit(submit(2, some(20), 50, NEVER)))
    ring.take(ring.conductor.cancel(wire.Cancel(request=2, attempt=1)))  # before it joins the lane
    ring.run_out()
    assert not ring.kept


def test_a_request_for_which_nothing_makes_room_evicts_nothing() -> None:
    ring = make_ring(cost=DENSE, budget=5 * 256, lanes=1)
    ask(ring, 1, some(60, 1))
    ring.take(ring.conductor.submit(submit(2, some(100, 2), 100, NEVER)))
    ring.take(ring.conductor.submit(submit(3, some(600, 3), 100, NEVER)))
    assert ring.ends[3] == wire.END_REFUSED
    assert ring.load.prefixes.kept >= 1
    assert ring.load.prefixes.evictions == 0


def test_a_chat_that_fills_the_budget_goes_on_from_its_own_prefix() -> None:
    ring = make_ring(cost=DENSE, budget=2 * 512, lanes=1)
    ask(ring, 1, some(60, 1))
    first = some(480, 2)
    ask(ring, 2, first)
    assert [len(kept) for kept in ring.kept.values()] == [489]
    assert ask(ring, 3, [*first, *ring.answers[2], *some(5, 3)]) == 488


def test_many_small_prefixes_are_bounded_in_number() -> None:
    ring = make_ring(cost=DENSE)
    for number in range(1, MOST_KEPT + 20):
        ask(ring, number, some(20, number), max_tokens=2)
    assert ring.load.prefixes.kept == len(ring.kept) == MOST_KEPT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_kept_and_let_go_each_answer_is_the_lone_one(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    ring = make_ring(
        stages=rng.randrange(1, 4),
        lanes=rng.randrange(1, 4),
        rows=rng.randrange(1, 5),
        grid=rng.choice([1, 4, 8, 32]),
        budget=rng.choice([0, 3 * 256, 8 * 256, 40 * 256]),
        cost=KINDS[kind],
    )
    texts = [prompt_of(rng, 300) for _ in range(3)]
    prompts: dict[int, list[int]] = {}
    waiting = deque(range(1, 30))
    cancelled: set[int] = set()
    while waiting or ring.frames:
        if waiting and (not ring.frames or rng.random() < 0.2):
            number = waiting[0]
            text = rng.choice(texts)
            prompt = [*text[: rng.randrange(1, len(text) + 1)], *prompt_of(rng, 20)]
            ring.take(ring.conductor.submit(submit(number, prompt, 15)))
            ring.check_budget()
            if ring.ends.get(number) == wire.END_REFUSED:
                del ring.ends[number]
                assert ring.frames, "refused by an idle ring"
            else:
                prompts[waiting.popleft()] = prompt
                if rng.random() < 0.5 and number in ring.answers:
                    texts.append([*prompt, *ring.answers[number]])
        if prompts and rng.random() < 0.05:
            victim = rng.choice(list(prompts))
            if victim not in ring.ends:
                cancelled.add(victim)
                ring.take(ring.conductor.cancel(wire.Cancel(request=victim, attempt=1)))
        if ring.frames:
            ring.step()
        for number in [n for n, end in ring.ends.items() if end == wire.END_REFUSED]:
            del ring.ends[number]
            cancelled.add(number)  # handed back: what it had stays right
    for number, prompt in prompts.items():
        answer = lone_answer(prompt, 15)[0]
        found = ring.answers.get(number, [])
        assert found == (answer[: len(found)] if number in cancelled else answer)
    assert not ring.caches
    load = ring.load
    assert load.charged_bytes == 0
    assert load.prefixes.kept == len(ring.kept)
    assert ring.budget == 0 or load.prefixes.kept_bytes <= ring.budget
    while ring.conductor._prefixes.evict_oldest():
        pass
    assert ring.load.prefixes.kept_bytes == 0, "what is let go is not charged any more"
    assert ring.conductor._prefixes._index._root.idle, "the trie is as it was"
