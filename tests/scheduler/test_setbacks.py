"""How long to wait for what goes wrong again and again."""

from __future__ import annotations

from parallax.fabric.limits import Limits
from parallax.scheduler.setbacks import (
    FIRST_PATIENCE,
    LEAST_DEADLINE_S,
    LONGEST_PAUSE_S,
    STEADY_S,
    Setbacks,
    deadline_s,
)

LIMITS = Limits(stuck_s=30, form_s=60, call_s=10)
NODES = ("a", "b")


def test_a_ring_that_breaks_soon_after_each_start_waits_longer_and_longer() -> None:
    setbacks = Setbacks(LIMITS)
    pauses = []
    for epoch in range(10):
        setbacks.formed(NODES, epoch, now=epoch)
        setbacks.broke(NODES, epoch, now=epoch + 0.1)
        pauses.append(setbacks.pause_s(NODES))
    assert pauses[:5] == [0, 0, 1, 2, 4]
    assert pauses[-1] == LONGEST_PAUSE_S
    assert setbacks.pause_s(("a", "c")) == 0


def test_a_ring_that_served_for_long_begins_with_a_clean_slate() -> None:
    setbacks = Setbacks(LIMITS)
    for epoch in range(6):
        setbacks.broke(NODES, epoch, now=0)
    setbacks.formed(NODES, 7, now=0)
    setbacks.broke(NODES, 7, now=STEADY_S)
    assert setbacks.pause_s(NODES) == 0


def test_a_node_that_comes_back_brings_no_old_setbacks() -> None:
    setbacks = Setbacks(LIMITS)
    for epoch in range(6):
        setbacks.broke(NODES, epoch, now=0)
    assert setbacks.busy("b", 1000, stepped=True) is True
    setbacks.gone("b")
    assert setbacks.pause_s(NODES) == 0
    assert not setbacks.stuck("b")


def test_a_ring_of_which_nothing_is_heard_is_overdue() -> None:
    setbacks = Setbacks(LIMITS)
    for epoch in (1, 2, 3):
        setbacks.forming(epoch, now=0)
    setbacks.formed(NODES, 1, now=5)
    assert setbacks.overdue({1, 2}, now=70) == []
    assert setbacks.overdue({1, 2}, now=70.1) == [2], "1 has formed, 3 is no more"


def test_a_thread_in_one_job_for_too_long_is_stuck_until_it_goes_on() -> None:
    setbacks = Setbacks(LIMITS)
    assert setbacks.busy("a", 30, stepped=True) is None
    assert setbacks.busy("a", 31, stepped=True) is True
    assert setbacks.stuck("a")
    assert setbacks.busy("a", 32, stepped=True) is None
    assert setbacks.busy("a", 0, stepped=False) is False
    assert not setbacks.stuck("a")


def test_the_first_step_may_take_longer() -> None:
    setbacks = Setbacks(LIMITS)
    assert setbacks.busy("a", 30 * FIRST_PATIENCE, stepped=False) is None
    assert setbacks.busy("a", 30 * FIRST_PATIENCE + 1, stepped=False) is True


def test_a_stage_has_a_deadline_of_its_own_from_the_slowest_frame_it_had() -> None:
    assert deadline_s(0.001, 30) == LEAST_DEADLINE_S, "a busy machine may need as long"
    assert deadline_s(1, 30) == 20
    assert deadline_s(5, 30) == 30, "so long at most, for quick ones"
    assert deadline_s(60, 30) == 240, "slow is not dead"
    setbacks = Setbacks(LIMITS)
    assert setbacks.busy("a", 11, stepped=True, slowest_s=1) is None
    assert setbacks.busy("a", 11, stepped=False, slowest_s=0.01) is None, "the first one compiles"
    assert setbacks.busy("a", 11, stepped=True, slowest_s=0.01) is True
    assert setbacks.busy("a", 0.5, stepped=True, slowest_s=11) is False
