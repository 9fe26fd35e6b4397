"""Prompts beside running answers, in a ring whose stages take exact times."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import pytest

from parallax.node.conductor import Conductor, Output
from parallax.node.prefill_pace import SMALLEST_TOKENS, PrefillPace
from parallax.proto import wire_pb2 as wire

STEP_S = 0.015  # a lane's step on a stage
TOKEN_S = 0.002  # a prefilled token on a stage
FIXED_TOKENS = 1.0  # of a chunk's time, what it takes whatever its size
GPU_FIXED_TOKENS = 24.0


def shape(stages: int, *, exact: bool = True, chunk_tokens: int = 32) -> wire.RingShape:
    return wire.RingShape(
        lanes=stages,
        lane_rows=16,
        chunk_tokens=chunk_tokens,
        window_frames=16,
        context_tokens=1 << 20,
        block_tokens=4 if exact else 1,
    )


def costs(stages: int) -> list[wire.CacheCost]:
    return [wire.CacheCost(answers=True)] * stages


@dataclass
class Ring:
    """Stages that take frames in turn, each for a time that is known; a clock of its own."""

    stages: int
    conductor: Conductor
    step_s: float = STEP_S
    fixed_tokens: float = 0.0
    now: float = 0.0
    free_at: list[float] = field(default_factory=list)
    arrivals: list[tuple[float, int, wire.Frame]] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    delivered: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free_at = [0.0] * self.stages

    def take(self, out: Output) -> None:
        for frame in out.frames:
            if frame.kind == wire.PREFILL:
                self.chunks.append(len(frame.tokens))
                work_s = TOKEN_S * (self.fixed_tokens + len(frame.tokens))
            else:
                work_s = self.step_s if frame.kind == wire.DECODE else 0.0
            at = self.now
            for stage in range(self.stages):
                at = max(at, self.free_at[stage]) + work_s
                self.free_at[stage] = at
            frame.slowest_s = frame.last_s = work_s
            if frame.kind == wire.DECODE:
                frame.tokens[:] = [7] * frame.rows
            heapq.heappush(self.arrivals, (at, frame.number, frame))
        for token in out.tokens:
            self.delivered.setdefault(token.request, []).append(self.now)

    def submit(self, request: int, prompt_tokens: int, max_tokens: int = 10_000) -> None:
        order = wire.Submit(
            request=request, attempt=1, prompt=range(1, 1 + prompt_tokens), max_tokens=max_tokens
        )
        self.take(self.conductor.submit(order))

    def run_until(self, when: float) -> None:
        while self.arrivals and self.arrivals[0][0] <= when:
            self.now, _, frame = heapq.heappop(self.arrivals)
            self.take(self.conductor.returned(frame, self.now))
        self.now = when


def ring(stages: int, *, exact: bool = True) -> Ring:
    return Ring(stages, Conductor(1, shape(stages, exact=exact), stages, costs(stages)))


def ring_with_fixed_costs(stages: int, fixed_tokens: float, rows: float, chunk_tokens: int) -> Ring:
    """One whose steps have so many rows, and cost as much as a chunk of so many tokens."""
    one = ring(stages)
    one.conductor = Conductor(1, shape(stages, chunk_tokens=chunk_tokens), stages, costs(stages))
    one.step_s = TOKEN_S * (fixed_tokens + rows)
    one.fixed_tokens = fixed_tokens
    return one


def gaps(ring: Ring, begin: float, end: float) -> list[float]:
    found = []
    for request in sorted(ring.delivered.keys() & set(range(1, 9))):
        times = [at for at in ring.delivered[request] if begin <= at <= end]
        found += [after - before for before, after in pairwise(times)]
    return sorted(found)


def beside(one: Ring, streams: int) -> tuple[float, float]:
    """A prompt of 2,048 tokens beside streams: their p99 of their calm p50, and its seconds."""
    for request in range(1, 1 + streams):
        one.submit(request, 10)
    one.run_until(5.0)
    calm = gaps(one, 2.0, 5.0)
    one.chunks.clear()
    one.submit(100, 2048)
    while 100 not in one.delivered:
        one.run_until(one.now + 0.1)
    busy = gaps(one, 5.0, one.now)
    assert sum(one.chunks) == 2047
    return busy[int(0.99 * len(busy))] / median(calm), one.now - 5.0


def alone_s(one: Ring) -> float:
    """The same prompt alone, once the ring knows its times."""
    for request in (1, 2, 3):
        begin = one.now
        one.submit(request, 2048, 2)
        while request not in one.delivered:
            one.run_until(one.now + 0.02)
    return one.now - begin


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_running_answers_go_on_while_a_long_prompt_arrives(stages: int) -> None:
    one = ring(stages)
    ratio, _ = beside(one, 8)
    assert ratio <= 3
    assert set(one.chunks) - {2047 % 16, 2047 % 8, 2047 % 4} <= {4, 8, 16, 32}


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_so_does_a_lone_one(stages: int) -> None:
    ratio, _ = beside(ring_with_fixed_costs(stages, FIXED_TOKENS, 1, 32), 1)
    assert ratio <= 2.5


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_where_a_chunk_costs_much_whatever_its_size_prompts_get_larger_ones(stages: int) -> None:
    def gpus() -> Ring:
        return ring_with_fixed_costs(stages, GPU_FIXED_TOKENS, 8 / stages, 512)

    ratio, prompt_s = beside(gpus(), 8)
    assert ratio <= 3
    assert prompt_s < 4 * alone_s(gpus())


def test_the_prompt_is_not_starved_either() -> None:
    one = ring(2)
    for request in range(1, 9):
        one.submit(request, 10)
    one.run_until(5.0)
    one.submit(100, 2048)
    while 100 not in one.delivered:
        one.run_until(one.now + 0.1)
    alone = 2048 * TOKEN_S
    assert one.now - 5.0 < 3 * alone


def test_a_prompt_alone_takes_whole_chunks_as_fast_as_the_stages_do() -> None:
    one = ring(2)
    one.submit(100, 2048)
    while 100 not in one.delivered:
        one.run_until(one.now + 0.01)
    assert set(one.chunks) == {32, 31}
    assert one.now < 1.05 * (2048 + 32) * TOKEN_S + 2 * STEP_S


def test_short_prompts_pass_a_long_one_and_go_at_full_speed() -> None:
    one = ring(2)
    for request in range(1, 9):
        one.submit(request, 10)
    one.run_until(5.0)
    one.submit(100, 2048)
    one.run_until(5.5)
    one.chunks.clear()
    one.submit(101, 60)
    while 101 not in one.delivered:
        one.run_until(one.now + 0.01)
    assert 100 not in one.delivered
    assert {32, 27} <= set(one.chunks)
    assert one.now - 5.5 < 2 * 60 * TOKEN_S + 4 * 2 * STEP_S + 0.1


@pytest.mark.parametrize("streams", [0, 4])
def test_a_long_prompt_keeps_a_share_however_many_short_ones_pass_it(streams: int) -> None:
    one = ring(2)
    for request in range(1, 1 + streams):
        one.submit(request, 10)
    one.run_until(2.0)
    one.submit(100, 2048, 1)
    short = 200
    for short in range(200, 206):
        one.submit(short, 60, 1)
    waiting = {*range(200, 206)}
    while 100 not in one.delivered:
        one.run_until(one.now + 0.01)
        for ended in waiting & one.delivered.keys():
            waiting.discard(ended)
            short += 1
            waiting.add(short)
            one.submit(short, 60, 1)
    assert short > 220, "short ones went before it"
    alone = 2048 * TOKEN_S
    assert one.now - 2.0 < (8 if not streams else 20) * alone


@pytest.mark.parametrize("streams", [0, 4])
def test_a_prompt_shares_the_ring_with_a_much_longer_one_that_came_before(streams: int) -> None:
    one = ring(2)
    for request in range(1, 1 + streams):
        one.submit(request, 10)
    one.run_until(2.0)
    one.submit(100, 4096, 1)
    request, since, waits_s = 200, one.now, []
    one.submit(request, 256, 1)
    while 100 not in one.delivered:
        one.run_until(one.now + 0.01)
        if request in one.delivered:
            waits_s.append(one.now - since)
            request, since = request + 1, one.now
            one.submit(request, 256, 1)
    alone_s = (2 if streams else 1) * 4096 * TOKEN_S
    assert max(waits_s) < alone_s / 4, "none waits for all of it"
    assert one.now - 2.0 < 2.2 * alone_s, "and it keeps half of the ring"


def test_prompts_of_like_length_go_one_after_the_other() -> None:
    one = ring(2)
    one.submit(1, 1000, 1)
    one.submit(2, 990, 1)
    while 2 not in one.delivered:
        one.run_until(one.now + 0.01)
    (first_at,), (second_at,) = one.delivered[1], one.delivered[2]
    assert first_at < 0.6 * second_at


def test_a_chat_whose_prefix_is_kept_passes_a_long_prompt() -> None:
    one = ring(2)
    one.conductor = Conductor(
        1, shape(2), 2, [wire.CacheCost(answers=True, forks=True, trim_tokens=(1 << 32) - 1)] * 2
    )
    one.submit(1, 1000, 1)
    while 1 not in one.delivered:
        one.run_until(one.now + 0.01)
    for request in range(2, 6):
        one.take(
            one.conductor.submit(
                wire.Submit(request=request, attempt=1, prompt=[request] * 2048, max_tokens=1)
            )
        )
    begin = one.now
    one.submit(6, 1020, 1)  # goes on from the first one
    while 6 not in one.delivered:
        one.run_until(one.now + 0.01)
    assert not one.delivered.keys() & {2, 3, 4, 5}
    assert one.now - begin < 0.5


def test_where_results_depend_on_the_grid_there_is_one_size() -> None:
    one = ring(2, exact=False)
    for request in range(1, 9):
        one.submit(request, 10)
    one.run_until(5.0)
    one.chunks.clear()
    one.submit(100, 2048)
    while 100 not in one.delivered:
        one.run_until(one.now + 0.1)
    assert set(one.chunks) == {32, 31}


def test_a_window_whose_sums_depend_on_the_chunks_has_one_size_too() -> None:
    pace = PrefillPace(shape(2), [wire.CacheCost(answers=True), wire.CacheCost()])
    pace.measured_chunk(32, 0.064, 0.064)
    pace.measured_step(0, 0.001, None)
    assert pace.chunk_tokens([0]) == 32


def test_sizes_are_halves_of_the_grid_and_follow_what_was_measured() -> None:
    pace = PrefillPace(shape(2), costs(2))
    assert pace.chunk_tokens([0]) == 32  # nothing is measured yet
    pace.measured_chunk(32, 0.064, 0.064)
    pace.measured_step(0, 0.040, None)
    pace.measured_step(1, 0.040, None)
    assert pace.chunk_tokens([]) == 32
    assert pace.chunk_tokens([0, 1], 0) == 16  # the first: 2 * 17 * 1.9 ms of 1.4 * 80 ms
    assert pace.chunk_tokens([0, 1], 1) == 32  # behind another: (33 + 16) * 1.9 ms
    assert pace.chunk_tokens([0], 0) == 32  # a lone lane leaves a stage idle: 2 * 33 * 1.9 - 80 ms
    for _ in range(100):
        pace.measured_step(0, 0.0001, None)
        pace.measured_step(1, 0.0001, None)
    assert pace.chunk_tokens([0], 0) == SMALLEST_TOKENS


def test_bursts_shrink_until_one_step_in_a_hundred_takes_three_times_as_long() -> None:
    pace = PrefillPace(shape(2), costs(2))
    rng = random.Random(5)
    for tokens in (*[32] * 4, *[16] * 4):
        pace.measured_chunk(tokens, TOKEN_S * (1 + tokens), TOKEN_S * (1 + tokens))
    late = 0
    for number in range(20_000):
        lanes = {0, 1}
        for lane in lanes:
            pace.stepped(lane)
        size = pace.next_chunk(lanes, 1, 1000, short=False) if number >= 100 else 0
        for lane in lanes:
            chunk_s = TOKEN_S * (1 + size) if size else 0.0
            around_s = 2 * STEP_S + chunk_s * rng.uniform(1.0, 2.5)
            late += number >= 10_000 and around_s > 3 * 2 * STEP_S
            pace.measured_step(lane, STEP_S, around_s)
    assert 0.0 < late / 20_000 < 0.015


@pytest.mark.parametrize("stands_still", ["a step", "a chunk"])
def test_a_frame_that_stood_still_hardly_changes_sizes(stands_still: str) -> None:
    pace = PrefillPace(shape(2, chunk_tokens=512), costs(2))
    for tokens in (*[8] * 4, *[16] * 4):
        pace.measured_chunk(tokens, TOKEN_S * (1 + tokens), TOKEN_S * (1 + tokens))
    for lane in (0, 1):
        pace.measured_step(lane, 4 * STEP_S, None)
    before = pace.chunk_tokens([0, 1])
    if stands_still == "a step":
        pace.measured_step(0, 30.0, None)
    else:
        pace.measured_chunk(16, 30.0, 30.0)
    assert before / 2 <= pace.chunk_tokens([0, 1]) <= 2 * before


def test_what_short_prompts_do_to_steps_is_not_held_against_bursts() -> None:
    pace = PrefillPace(shape(2), costs(2))
    pace.measured_chunk(32, 0.064, 0.064)
    for _ in range(9):
        pace.stepped(0)
        pace.measured_step(0, 0.040, 0.080)
    before = pace.chunk_tokens([0], 0)
    for _ in range(99):
        pace.stepped(0)
        pace.next_chunk([0], 0, 30, short=True)
        pace.measured_step(0, 0.040, 0.800)
    assert pace.chunk_tokens([0], 0) == before


def test_the_smallest_size_is_a_share_of_the_grid() -> None:
    pace = PrefillPace(shape(2, chunk_tokens=512), costs(2))
    pace.measured_chunk(16, 0.064, 0.064)
    pace.measured_step(0, 0.0001, None)
    assert pace.chunk_tokens([0], 0) == 8


def test_a_burst_is_due_when_every_lane_has_stepped_since_the_last_one_began() -> None:
    pace = PrefillPace(shape(2), costs(2))
    assert pace.due([])
    assert not pace.due([0])
    pace.stepped(0)
    assert pace.due([0])
    assert not pace.due([0, 1])
    pace.stepped(1)
    assert pace.due([0, 1])
    pace.next_chunk([0, 1], 0, 100, short=False)
    assert pace.due([0, 1])  # the burst's second
    pace.next_chunk([0, 1], 1, 68, short=False)
    assert not pace.due([0])


def test_what_is_left_of_a_burst_waits_for_those_who_came_since() -> None:
    pace = PrefillPace(shape(2), costs(2))
    pace.next_chunk([], 0, 100, short=False)
    assert pace.due([])
    assert not pace.due([0])
    pace.stepped(0)
    assert pace.due([0])
