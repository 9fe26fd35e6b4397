"""When a better plan is worth a move of running rings. Pure.

A plan must be better by a margin, stay so for a while, and come some time after the last move; that
time doubles with every move between which no node came or went. So figures that wander with the
load of the machines do not send rings back and forth. Only what undoes a mistake need not wait: a
node was tried again and is as slow as it was.
"""

from __future__ import annotations

import math

from parallax.fabric.limits import DEFAULT_LIMITS, Limits
from parallax.scheduler.planner import Plan, improves

LONGEST_PAUSE_S = 3600.0
STILL = 0.5  # of the margin: a plan that had all of it once may fall to this and still count


class Replanning:
    """Watches how much better the best plan is than the rings that serve."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._better_since: float | None = None
        self._last_move = -math.inf
        self._moves = 0  # since a node last came or went

    def members_changed(self) -> None:
        """A node came or went: what was learnt of the old cluster does not count against moves."""
        self._moves = 0
        self._better_since = None

    def moved(self, now: float) -> None:
        """Rings move to a new plan."""
        self._last_move = now
        self._moves += 1
        self._better_since = None

    def undone(self, now: float) -> None:
        """Rings move, and the last move proved a mistake: neither counts against further ones."""
        self.moved(now)
        self._moves = max(0, self._moves - 2)

    @property
    def pause_s(self) -> float:
        """The least time between the last move and the next one."""
        doubled = self._limits.replan_pause_s * 2.0 ** min(16, max(0, self._moves - 1))
        return float(min(LONGEST_PAUSE_S, doubled))

    def is_due(self, present: Plan, best: Plan, now: float, *, undoes: bool = False) -> bool:
        """Whether to move from the present plan to the best one, both judged by the same figures.

        To be asked again and again.

        Args:
            undoes: the last move was a mistake, and this one puts it right.
        """
        margin = self._limits.replan_margin * (1.0 if self._better_since is None else STILL)
        if not improves(present, best, margin):
            self._better_since = None
            return False
        if self._better_since is None:
            self._better_since = now
        lasting = now - self._better_since >= self._limits.replan_hold_s
        # What it has fallen to meanwhile must be worth a move as well.
        worth = improves(present, best, self._limits.replan_margin)
        return lasting and worth and (undoes or now - self._last_move >= self.pause_s)
