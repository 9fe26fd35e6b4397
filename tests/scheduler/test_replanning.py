"""When a better plan is worth a move."""

from __future__ import annotations

import random
from itertools import pairwise

from parallax.fabric.limits import Limits
from parallax.scheduler.planner import Plan
from parallax.scheduler.replanning import LONGEST_PAUSE_S, Replanning

LIMITS = Limits(replan_margin=0.15, replan_hold_s=10, replan_pause_s=60)


def plan(tokens_s: float) -> Plan:
    return Plan((), tokens_s, 1.0, tokens_s)


def due_at(watch: Replanning, gains: list[tuple[float, float]]) -> list[float]:
    """The moments of these (moment, new over old) at which a move is due."""
    return [now for now, gain in gains if watch.is_due(plan(100), plan(100 * gain), now)]


def test_a_plan_must_be_better_by_the_margin_for_a_while() -> None:
    watch = Replanning(LIMITS)
    assert due_at(watch, [(t, 1.1) for t in range(100)]) == []
    assert due_at(watch, [(t, 1.3) for t in range(200, 209)]) == []
    assert due_at(watch, [(209, 1.0), *((t, 1.3) for t in range(210, 222))]) == [220, 221]


def test_a_dip_below_the_margin_delays_nothing_if_half_of_it_is_left() -> None:
    watch = Replanning(LIMITS)
    gains = [(0, 1.2), (5, 1.1), (9, 1.2), (11, 1.1), (12, 1.2)]
    assert due_at(watch, gains) == [12]
    watch = Replanning(LIMITS)
    assert due_at(watch, [(0, 1.2), (5, 1.05), (9, 1.2), (12, 1.2), (19, 1.2)]) == [19]


def test_moves_come_after_longer_and_longer_pauses_until_a_node_comes_or_goes() -> None:
    watch = Replanning(LIMITS)
    moves = []
    for now in range(0, 2000, 2):
        if watch.is_due(plan(100), plan(150), float(now)):
            watch.moved(float(now))
            moves.append(now)
    gaps = [b - a for a, b in pairwise(moves)]
    assert gaps == [60, 120, 240, 480, 960]
    for _ in range(40):
        watch.moved(0.0)
    assert watch.pause_s == LONGEST_PAUSE_S
    watch.members_changed()
    assert watch.pause_s == 60


def test_figures_that_wander_around_the_margin_move_nothing_back_and_forth() -> None:
    chance = random.Random(1)
    watch = Replanning(LIMITS)
    state, moves = 1.0, 0  # how much better the other plan is; a move turns it round
    for now in range(0, 3600, 2):
        noise = chance.uniform(0.85, 1.15)
        if watch.is_due(plan(100), plan(100 * state * noise), float(now)):
            watch.moved(float(now))
            state, moves = 1 / state, moves + 1
    assert moves == 0


def test_undoing_a_mistake_waits_for_no_pause_and_counts_as_nothing() -> None:
    watch = Replanning(LIMITS)
    for now in (0.0, 60.0, 180.0):
        watch.moved(now)
    pause_s = watch.pause_s
    watch.moved(500.0)
    better = [float(t) for t in range(500, 520, 2)]
    assert not any(watch.is_due(plan(100), plan(150), now) for now in better)
    assert watch.is_due(plan(100), plan(150), 520.0, undoes=True)
    watch.undone(520.0)
    assert watch.pause_s == pause_s
