"""The conductor against a model of stages that only obeys: plain lists, no clocks."""

from __future__ import annotations

import itertools
import random
from collections import deque

import pytest

from parallax.node.conductor import Conductor
from parallax.proto import wire_pb2 as wire
from tests.node.pretend import NEVER, PretendRing, lone_answer, make_ring, prompt_of, submit


def test_a_lone_request_gets_the_lone_answer() -> None:
    ring = make_ring()
    prompt = list(range(1, 30))
    ring.take(ring.conductor.submit(submit(1, prompt)))
    ring.run_out()
    answer, reason = lone_answer(prompt, 20)
    assert ring.answers[1] == answer
    assert ring.ends[1] == reason
    assert not ring.caches, "its cache was not dropped"
    assert ring.conductor.idle


def test_no_frame_takes_longer_histories_than_its_message_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("parallax.node.sequences.MOST_JOINING_TOKENS", 50)
    ring = make_ring(stages=4, lanes=1, rows=8, grid=64)
    prompts = {n: [n] * length for n, length in enumerate((20, 20, 20, 90, 5, 5), 1)}
    for number, prompt in prompts.items():
        ring.take(ring.conductor.submit(submit(number, prompt)))
    joined: list[list[int]] = []
    while ring.frames:
        admits = [c.admit for c in ring.frames[0].commands if c.HasField("admit")]
        joined += [[len(admit.prompt) for admit in admits]] if admits else []
        ring.step()
    assert all(sum(lengths) <= 50 or len(lengths) == 1 for lengths in joined), joined
    assert max(map(len, joined)) > 1, "those that fit together join together"
    for number, prompt in prompts.items():
        assert (ring.answers.get(number, []), ring.ends[number]) == lone_answer(prompt, 20)


@pytest.mark.parametrize("seed", range(30))
def test_any_mix_of_arrivals_and_cancellations_leaves_each_answer_alone(seed: int) -> None:
    rng = random.Random(seed)
    ring = make_ring(
        stages=rng.randrange(1, 5),
        lanes=rng.randrange(1, 4),
        rows=rng.randrange(1, 5),
        grid=rng.choice([1, 4, 8, 32]),
    )
    prompts: dict[int, list[int]] = {}
    waiting = deque((n, prompt_of(rng)) for n in range(1, 25))
    cancelled: set[int] = set()
    while waiting or ring.frames:
        if waiting and (not ring.frames or rng.random() < 0.3):
            if ring.conductor.free_rows:
                number, prompt = waiting.popleft()
                prompts[number] = prompt
                ring.take(ring.conductor.submit(submit(number, prompt)))
            elif not ring.frames:
                pytest.fail("the ring is full and nothing moves")
        if prompts and rng.random() < 0.05:
            victim = rng.choice(list(prompts))
            if victim not in ring.ends:
                cancelled.add(victim)
                ring.take(ring.conductor.cancel(wire.Cancel(request=victim, attempt=1)))
        if rng.random() < 0.05:
            ring.take(ring.conductor.beat(0.0))
        if ring.frames:
            ring.step()
    assert set(ring.ends) == set(prompts), "every accepted request has exactly one end"
    for number, prompt in prompts.items():
        answer, reason = lone_answer(prompt, 20)
        if number in cancelled:
            assert ring.answers.get(number, []) == answer[: len(ring.answers.get(number, []))]
        else:
            assert ring.answers.get(number, []) == answer
            assert ring.ends[number] == reason
    assert not ring.caches
    assert not ring.lanes
    assert ring.most_in_flight <= 16


def test_a_second_attempt_goes_on_where_the_first_one_stopped() -> None:
    prompt = [5, 6, 7, 8, 9]
    answer, reason = lone_answer(prompt, 20)
    ring = make_ring()
    order = submit(1, prompt)
    order.attempt = 2
    order.generated.extend(answer[:3])
    ring.answers[1] = answer[:3]
    ring.take(ring.conductor.submit(order))
    ring.run_out()
    assert ring.answers[1] == answer
    assert ring.ends[1] == reason


def test_a_long_prompt_is_in_every_stage_at_once_and_does_not_hold_up_decoding() -> None:
    ring = make_ring(stages=4, lanes=2, grid=8)
    short = next(p for n in range(1, 90) if len(lone_answer(p := [n, n + 1], 40)[0]) == 40)
    ring.take(ring.conductor.submit(submit(1, short, 40)))
    ring.step()
    ring.take(ring.conductor.submit(submit(2, list(range(1, 90)) * 4, 5)))
    assert sum(f.kind == wire.PREFILL for f in ring.frames) == 4
    ring.run_out()
    first = [n for n, kind in enumerate(ring.kinds) if kind == wire.DECODE]
    gaps = [b - a for a, b in itertools.pairwise(first)]
    assert max(gaps) <= 5, "a decode step waited behind more chunks than there are stages"


def test_no_room_is_said_at_once() -> None:
    ring = make_ring(lanes=1, rows=1)
    ring.take(ring.conductor.submit(submit(1, [1, 2, 3])))
    ring.take(ring.conductor.submit(submit(2, [4, 5, 6])))
    assert ring.ends == {2: wire.END_REFUSED}


def test_what_outgrows_the_budget_is_handed_back_youngest_first() -> None:
    ring = make_ring(lanes=1, rows=4, grid=64, budget=4 * (512 + 255))
    ring.take(ring.conductor.submit(submit(1, [1] * 20, 600, NEVER)))
    ring.take(ring.conductor.submit(submit(2, [2] * 20, 600, NEVER)))
    ring.run_out()
    assert ring.ends == {1: wire.END_LENGTH, 2: wire.END_REFUSED}
    assert len(ring.answers[2]) == 492, "until a row has 513 tokens and the caches grow"
    assert ring.answers[1] == lone_answer([1] * 20, 600, NEVER)[0]
    assert not ring.caches


def test_nobody_is_taken_in_who_would_be_handed_back_soon() -> None:
    ring = make_ring(lanes=1, rows=4, grid=64, budget=2 * 2 * (256 + 255))
    ring.take(ring.conductor.submit(submit(1, [1] * 200, 120, NEVER)))
    ring.take(ring.conductor.submit(submit(2, [2] * 200, 120, NEVER)))
    assert ring.ends == {2: wire.END_REFUSED}, "both would fit until their 257th token"
    ring.run_out()
    ring.take(ring.conductor.submit(submit(3, [2] * 200, 40, NEVER)))
    ring.take(ring.conductor.submit(submit(4, [2] * 200, 40, NEVER)))
    ring.run_out()
    assert ring.ends[3] == ring.ends[4] == wire.END_LENGTH, "they end before that"


def test_a_request_that_is_handed_back_again_and_again_gets_further_each_time() -> None:
    ring = make_ring(lanes=1, rows=4, grid=64, budget=5 * 1024)
    prompts = {n: [n] * 50 for n in (1, 2, 3, 4)}
    answers: dict[int, list[int]] = {n: [] for n in prompts}
    waiting = list(prompts)
    attempts = dict.fromkeys(prompts, 0)
    handed_back = 0
    while any(len(answer) < 900 for answer in answers.values()):
        for number in list(waiting):
            order = submit(number, prompts[number], 900, NEVER)
            attempts[number] += 1
            order.attempt = attempts[number]
            order.generated.extend(answers[number])
            ring.ends.pop(number, None)
            ring.answers[number] = answers[number]
            ring.take(ring.conductor.submit(order))
            if number in ring.ends:
                break  # the others wait behind it
            waiting.remove(number)
        assert ring.frames, "nobody is on the ring and nobody is taken in"
        running = [n for n in prompts if n not in ring.ends]
        while ring.frames and all(n not in ring.ends for n in running):
            ring.step()
        back = [n for n in running if ring.ends.get(n) == wire.END_REFUSED]
        handed_back += len(back)
        waiting = sorted({*waiting, *back})
    for number, prompt in prompts.items():
        assert answers[number] == lone_answer(prompt, 900, NEVER)[0]
    assert 0 < handed_back <= 8, handed_back
    assert ring.prefilled < 8_000, "prefilled again and again"


def test_who_was_handed_back_must_find_twice_the_room_to_grow() -> None:
    ring = make_ring(lanes=1, rows=4, grid=64, budget=5 * 1024)
    for number in (1, 2, 3):
        ring.take(ring.conductor.submit(submit(number, [number] * 20, 3000, NEVER)))
    while 3 not in ring.ends:
        ring.step()
    assert ring.ends[3] == wire.END_REFUSED, "three rows of 769 tokens outgrow it"
    ring.take(ring.conductor.cancel(wire.Cancel(request=2, attempt=1)))
    back = submit(3, [3] * 20, 3000, NEVER)
    back.attempt = 2
    back.generated.extend(ring.answers[3])
    del ring.ends[3]
    ring.take(ring.conductor.submit(back))
    assert ring.ends[3] == wire.END_REFUSED, "with 512 tokens more it would not fit"
    known = [3] * 20 + ring.answers[3]
    ring.take(ring.conductor.submit(submit(4, known, 2000, NEVER)))
    assert 4 not in ring.ends, "with 256 tokens more a new one of the same length does"


def test_the_context_ends_an_answer() -> None:
    shape = wire.RingShape(lanes=1, lane_rows=1, chunk_tokens=8, window_frames=8, context_tokens=12)
    ring = PretendRing(Conductor(1, shape, 1, [wire.CacheCost()]), 8, 8)
    prompt = next(p for n in range(1, 90) if len(lone_answer(p := [n] * 5, 20)[0]) == 20)
    ring.take(ring.conductor.submit(submit(1, prompt, 100)))
    ring.run_out()
    assert len(prompt) + len(ring.answers[1]) == 12
    assert ring.ends[1] == wire.END_LENGTH


def test_orphans_are_dropped_without_a_word() -> None:
    ring = make_ring()
    ring.take(ring.conductor.submit(submit(1, list(range(1, 50)))))
    ring.step()
    ring.take(ring.conductor.abandon())
    ring.run_out()
    assert ring.conductor.idle
    assert not ring.caches
    assert not ring.ends


def test_only_beats_measure_the_round_trip() -> None:
    ring = make_ring()
    ring.take(ring.conductor.beat(5.0))
    assert ring.conductor.beat(6.0).frames == [], "one beat at a time"
    frame = ring.frames.popleft()
    ring.conductor.returned(wire.Frame(number=frame.number), now=5.25)
    assert ring.conductor.round_trip_s == 0.25
    ring.expected += 1
    ring.take(ring.conductor.submit(submit(1, list(range(1, 50)))))
    ring.take(ring.conductor.cancel(wire.Cancel(request=1, attempt=1)))
    ring.run_out()
    assert ring.conductor.round_trip_s == 0.25


def test_a_ring_is_quiet_while_a_beat_is_out_and_nothing_comes_back() -> None:
    ring = make_ring()
    assert ring.conductor.quiet_s(100.0) == 0, "nothing is expected back"
    ring.take(ring.conductor.beat(100.0))
    assert ring.conductor.quiet_s(104.0) == 4
    assert not ring.conductor.stepped
    ring.take(ring.conductor.submit(submit(1, [1, 2])))
    ring.conductor.returned(wire.Frame(number=ring.frames.popleft().number), now=105.0)
    assert ring.conductor.quiet_s(109.0) == 0, "the beat is back"
    ring.take(ring.conductor.beat(110.0))
    step = next(frame for frame in ring.frames if frame.kind == wire.DECODE)
    ring.conductor.returned(wire.Frame(number=step.number, tokens=[3] * step.rows), now=112.0)
    assert ring.conductor.stepped
    assert ring.conductor.quiet_s(113.0) == 1, "counted from the last frame that came back"


def test_a_long_prompt_has_its_turns_beside_short_ones_without_end() -> None:
    ring = make_ring(stages=2, lanes=2, rows=4, grid=8)
    ring.take(ring.conductor.submit(submit(1, [5] * 200, 5, NEVER)))
    number = 1
    for _ in range(2000):
        while ring.conductor.free_rows:
            number += 1
            ring.take(ring.conductor.submit(submit(number, [number] * 10, 1, NEVER)))
        ring.step()
        if 1 in ring.ends:
            break
    assert ring.answers[1] == lone_answer([5] * 200, 5, NEVER)[0]
    assert number > 20, "short ones went before it"
