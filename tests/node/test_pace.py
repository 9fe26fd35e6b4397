"""Block sizes and depths from measured times."""

from __future__ import annotations

import pytest

from parallax.node.pace import SIZES, Pace
from parallax.node.times import FRESH_FRAMES


def measured(times: dict[int, float], stages: int = 2, round_trip_s: float = 0.0) -> Pace:
    pace = Pace(stages, 8)
    for size, stage_s in times.items():
        for _ in range(8):
            pace.observe(size, stage_s)
    if round_trip_s:
        for _ in range(3):
            pace.observe_round_trip(round_trip_s, alone=True)
    return pace


def test_before_anything_is_measured_a_ring_is_filled_and_one_stage_goes_without() -> None:
    plan = Pace(4, 1).plan(0.9)
    assert plan is not None
    assert (plan.block, plan.depth) == (1, 4)
    assert Pace(1, 1).plan(0.9) is None


def test_bad_odds_are_not_worth_a_frame() -> None:
    pace = measured({1: 0.002}, stages=2, round_trip_s=0.005)
    assert pace.plan(0.0) is None
    assert pace.plan(0.1) is None
    assert pace.plan(0.9) is not None


def test_frames_that_cost_nothing_more_are_as_large_as_allowed() -> None:
    flat = dict.fromkeys(SIZES, 0.01)
    plan = measured(flat, stages=1).plan(0.95)
    assert plan is not None
    assert plan.block == 8
    plan = measured(flat, stages=4).plan(0.95)
    assert plan is not None
    assert (plan.block, plan.depth) == (8, 4)


def test_frames_that_cost_as_much_as_their_tokens_have_one() -> None:
    plan = measured({size: 0.01 * size for size in SIZES}, stages=3).plan(0.97)
    assert plan is not None
    assert (plan.block, plan.depth) == (1, 3)
    assert measured({size: 0.01 * size for size in SIZES}, stages=1).plan(0.97) is None


def test_a_slow_way_round_takes_more_frames() -> None:
    near = measured({1: 0.01}, stages=3, round_trip_s=0.03).plan(0.9)
    far = measured({1: 0.01}, stages=3, round_trip_s=0.05).plan(0.9)
    assert near is not None
    assert far is not None
    assert far.depth > near.depth


def test_a_ring_that_is_slower_when_busy_wants_better_odds() -> None:
    """As where stages share cores: what was measured counts, not what it should be."""
    pace = measured({1: 0.01}, stages=2, round_trip_s=0.025)
    assert pace.plan(0.5) is not None
    for _ in range(3):
        pace.observe_round_trip(0.033, alone=False)
        pace.observe_period(1, 0.019)
    assert pace.plan(0.5) is None
    assert pace.plan(0.9) is not None
    for _ in range(FRESH_FRAMES + 8):
        pace.observe(1, 0.01)
    for _ in range(3):
        pace.observe_round_trip(0.025, alone=True)
    assert pace.plan(0.5) is not None, "it is tried again some time"


def test_worse_odds_reach_less_far() -> None:
    pace = measured({1: 0.01}, stages=4, round_trip_s=0.05)
    reaches = []
    for probability in (0.5, 0.8, 0.97, 1.0):
        plan = pace.plan(probability)
        assert plan is not None
        reaches.append(plan.ahead)
    assert reaches == sorted(reaches)
    assert reaches[0] < 4
    assert reaches[-1] > 32


def test_one_slow_frame_changes_nothing() -> None:
    pace = measured(dict.fromkeys(SIZES, 0.01), stages=1)
    before = pace.plan(0.95)
    pace.observe(8, 5.0)
    for _ in range(8):
        pace.observe(1, 0.01)
    assert pace.plan(0.95) == before


def test_sizes_not_sent_for_long_are_judged_by_the_others() -> None:
    pace = measured({1: 0.01, 8: 5.0}, stages=1)
    plan = pace.plan(0.95)
    assert plan is None or plan.block < 8
    for _ in range(FRESH_FRAMES + 8):
        pace.observe(1, 0.01)
        pace.observe(2, 0.01)
    plan = pace.plan(0.95)
    assert plan is not None
    assert plan.block == 8


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_plans_stay_within_their_bounds(probability: float) -> None:
    for stages in (1, 2, 5):
        for growth in (0.0, 0.3, 1.0):
            times = {size: 0.01 * (1 + growth * (size - 1)) for size in SIZES}
            plan = measured(times, stages, 0.011 * stages).plan(probability)
            if plan is not None:
                assert plan.block in SIZES
                assert 1 <= plan.depth <= stages + 2
                assert plan.block * plan.depth > 1
                assert plan.ahead >= 1
