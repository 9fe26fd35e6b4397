"""The conductor against a model of stages that only obeys: plain lists, no clocks."""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from parallax.node.conductor import Conductor, Output
from parallax.proto import wire_pb2 as wire

VOCABULARY = 97
END = 0


def next_token(history: list[int]) -> int:
    """The token a pretend model gives after a history: any pure function will do."""
    value = 17
    for token in history:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCABULARY


def lone_answer(prompt: list[int], max_tokens: int) -> tuple[list[int], int]:
    """What a request must get, whatever runs beside it."""
    answer: list[int] = []
    while True:
        token = next_token(prompt + answer)
        if token == END:
            return answer, wire.END_STOP
        answer.append(token)
        if len(answer) >= max_tokens:
            return answer, wire.END_LENGTH


@dataclass
class PretendRing:
    """Runs frames as stages do: commands in order, rows in lane order, caches by sequence."""

    conductor: Conductor
    grid: int
    window: int
    frames: deque[wire.Frame] = field(default_factory=deque)
    caches: dict[int, list[int]] = field(default_factory=dict)
    lanes: dict[int, list[int]] = field(default_factory=dict)
    expected: int = 0
    answers: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    most_in_flight: int = 0
    kinds: list[int] = field(default_factory=list)

    def take(self, out: Output) -> None:
        self.frames.extend(out.frames)
        self.most_in_flight = max(self.most_in_flight, len(self.frames))
        for event in out.tokens:
            answer = self.answers.setdefault(event.request, [])
            assert event.index == len(answer), "an index was skipped or repeated"
            assert event.request not in self.ends, "a token after the end"
            answer.append(event.token)
        for end in out.ends:
            assert end.request not in self.ends, "two ends"
            self.ends[end.request] = end.reason

    def step(self) -> None:
        frame = self.frames.popleft()
        assert frame.number == self.expected
        self.expected += 1
        self.kinds.append(frame.kind)
        for command in frame.commands:
            self.obey(command)
        back = wire.Frame(epoch=frame.epoch, number=frame.number, kind=frame.kind)
        if frame.kind == wire.PREFILL:
            cache = self.caches.setdefault(frame.sequence, [])
            assert len(cache) % self.grid == 0, "a chunk does not begin on the grid"
            assert len(frame.tokens) <= self.grid
            cache.extend(frame.tokens)
        elif frame.kind == wire.DECODE:
            rows = self.lanes[frame.lane]
            assert len(rows) == frame.rows == len(frame.tokens)
            for sequence, token in zip(rows, frame.tokens, strict=True):
                self.caches[sequence].append(token)
                back.tokens.append(next_token(self.caches[sequence]))
        self.take(self.conductor.returned(back, now=0.0))

    def obey(self, command: wire.Command) -> None:
        if command.HasField("admit"):
            admit = command.admit
            cache = self.caches.setdefault(admit.sequence, [])
            history = [*admit.prompt, *admit.generated]
            assert cache == history[:-1], "admitted before its prefill was complete"
            self.lanes.setdefault(admit.lane, []).append(admit.sequence)
        elif command.HasField("drop"):
            del self.caches[command.drop.sequence]
            for lane in list(self.lanes):
                if command.drop.sequence in self.lanes[lane]:
                    self.lanes[lane].remove(command.drop.sequence)
                    if not self.lanes[lane]:
                        del self.lanes[lane]

    def run_out(self) -> None:
        while self.frames:
            self.step()


def make_ring(
    *, stages: int = 2, lanes: int = 2, rows: int = 4, grid: int = 8, budget: int = 0
) -> PretendRing:
    shape = wire.RingShape(
        lanes=lanes,
        lane_rows=rows,
        chunk_tokens=grid,
        window_frames=16,
        cache_bytes=budget,
        context_tokens=10_000,
    )
    costs = [wire.CacheCost(bytes_per_token=1) for _ in range(stages)]
    return PretendRing(Conductor(7, shape, stages, costs), grid, 16)


def submit(request: int, prompt: list[int], max_tokens: int = 20) -> wire.Submit:
    return wire.Submit(
        request=request, attempt=1, prompt=prompt, max_tokens=max_tokens, end_tokens=[END]
    )


def prompt_of(rng: random.Random, longest: int = 60) -> list[int]:
    return [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, longest))]


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
    ring = make_ring(lanes=1, rows=4, grid=64, budget=2 * 2 * 256)
    starts = [p for n in range(1, 96) if len(lone_answer(p := [n] * 200, 120)[0]) == 120]
    ring.take(ring.conductor.submit(submit(1, starts[0], 120)))
    ring.take(ring.conductor.submit(submit(2, starts[1], 120)))
    ring.run_out()
    assert ring.ends[2] == wire.END_REFUSED
    assert 0 < len(ring.answers[2]) < 120
    assert ring.answers[1] == lone_answer(starts[0], 120)[0]
    assert not ring.caches


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
