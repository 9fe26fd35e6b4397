"""Prompts beside running answers, in a ring whose stages take exact times."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import pytest

from parallax.node.conductor import Conductor, Output
from parallax.node.prefill_pace import SMALLEST_TOKENS, PrefillPace
from parallax.proto import wire_pb2 as wire

STEP_S = 0.015  # a lane's step on a stage
TOKEN_S = 0.002  # a prefilled token on a stage


def shape(stages: int, *, exact: bool = True) -> wire.RingShape:
    return wire.RingShape(
        lanes=stages,
        lane_rows=16,
        chunk_tokens=32,
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
                work_s = TOKEN_S * len(frame.tokens)
            else:
                work_s = STEP_S if frame.kind == wire.DECODE else 0.0
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
    conductor = Conductor(1, shape(stages, exact=exact), stages, costs(stages))
    return Ring(stages, conductor)


def gaps(ring: Ring, begin: float, end: float) -> list[float]:
    found = []
    for request in range(1, 9):
        times = [at for at in ring.delivered[request] if begin <= at <= end]
        found += [after - before for before, after in pairwise(times)]
    return sorted(found)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_running_answers_go_on_while_a_long_prompt_arrives(stages: int) -> None:
    one = ring(stages)
    for request in range(1, 9):
        one.submit(request, 10)
    one.run_until(5.0)
    calm = gaps(one, 2.0, 5.0)
    one.chunks.clear()
    one.submit(100, 2048)
    while 100 not in one.delivered:
        one.run_until(one.now + 0.1)
    busy = gaps(one, 5.0, one.now)
    assert busy[int(0.99 * len(busy))] <= 3 * median(calm)
    assert sum(one.chunks) == 2047
    assert set(one.chunks) - {2047 % 16, 2047 % 8} <= {8, 16, 32}


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
    pace.measured_step(0, 0.001)
    assert pace.chunk_tokens([0]) == 32


def test_sizes_are_halves_of_the_grid_and_follow_what_was_measured() -> None:
    pace = PrefillPace(shape(2), costs(2))
    assert pace.chunk_tokens([0]) == 32  # nothing is measured yet
    pace.measured_chunk(32, 0.064, 0.064)
    pace.measured_step(0, 0.040)
    pace.measured_step(1, 0.040)
    assert pace.chunk_tokens([]) == 32
    assert pace.chunk_tokens([0, 1]) == 16  # two of them: 3 * 16 * 2 ms of 1.8 * 80 ms
    assert pace.chunk_tokens([0]) == 8  # two of them too: 3 * 8 * 2 ms of 1.8 * 40 ms
    for _ in range(100):
        pace.measured_step(0, 0.0001)
    assert pace.chunk_tokens([0]) == SMALLEST_TOKENS


def test_a_burst_is_due_when_every_lane_has_stepped_since_the_last_one_began() -> None:
    pace = PrefillPace(shape(2), costs(2))
    assert pace.due([])
    assert not pace.due([0])
    pace.stepped(0)
    assert pace.due([0])
    assert not pace.due([0, 1])
    pace.stepped(1)
    assert pace.due([0, 1])
    pace.chunked()
    assert pace.due([0, 1])  # the burst's second
    pace.chunked()
    assert not pace.due([0])
