"""What goes wrong again and again, and how long to wait then. Pure."""

from __future__ import annotations

from collections.abc import Collection

from parallax.fabric.errors import StageStuck
from parallax.fabric.limits import DEFAULT_LIMITS, Limits

FREE_BREAKS = 3  # so many in a row cost no pause
FIRST_PAUSE_S = 1.0  # doubled with each further break
LONGEST_PAUSE_S = 10.0
STEADY_S = 10.0  # a ring that served for so long begins with a clean slate
PATIENCE = 20.0  # times its slowest frame: a stage that is in one for longer hangs
SLOW_PATIENCE = 4.0  # the same where that is longer than the limit for everyone
LEAST_DEADLINE_S = 10.0  # a busy machine may need as long for what took a millisecond before
FIRST_PATIENCE = 10  # times ``stuck_s`` before an epoch's first step: shaders compile then

Nodes = tuple[str, ...]


class Setbacks:
    """Rings that break, rings that do not form, compute threads that hang."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._breaks: dict[Nodes, int] = {}
        self._up_since: dict[Nodes, float] = {}
        self._forming: dict[int, float] = {}
        self._stuck: set[str] = set()

    # ------------------------------------------------------------------- rings

    def forming(self, epoch: int, now: float) -> None:
        """The orders that form a ring are out."""
        self._forming[epoch] = now

    def formed(self, nodes: Nodes, epoch: int, now: float) -> None:
        """A ring serves."""
        self._forming.pop(epoch, None)
        self._up_since[nodes] = now

    def broke(self, nodes: Nodes, epoch: int, now: float) -> None:
        """A ring of these nodes broke, or did not form."""
        self._forming.pop(epoch, None)
        steady = self.steady(nodes, now)
        self._up_since.pop(nodes, None)
        self._breaks[nodes] = 1 if steady else self._breaks.get(nodes, 0) + 1

    def pause_s(self, nodes: Nodes) -> float:
        """How long these nodes wait before they form a ring again."""
        more = self._breaks.get(nodes, 0) - FREE_BREAKS
        if more < 0:
            return 0.0
        return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(more, 16)))

    def steady(self, nodes: Nodes, now: float) -> bool:
        """Whether a ring of these nodes has served for a while."""
        up_since = self._up_since.get(nodes)
        return up_since is not None and now - up_since >= STEADY_S

    def overdue(self, alive: Collection[int], now: float) -> list[int]:
        """Epochs, of those ``alive``, that should long have formed: a node says nothing of it."""
        self._forming = {e: since for e, since in self._forming.items() if e in alive}
        limit_s = self._limits.form_s + self._limits.call_s
        return [epoch for epoch, since in self._forming.items() if now - since > limit_s]

    # ------------------------------------------------------------------- nodes

    def busy(
        self, node_id: str, busy_s: float, *, stepped: bool, slowest_s: float | None = None
    ) -> bool | None:
        """How long a node's compute thread has been in one job, loading left out.

        Args:
            stepped: whether its stage has made a step in its epoch; the first one compiles.
            slowest_s: the longest that its stage took for one frame; None: not known.

        Returns:
            True when it counts as stuck from now on, False when no longer, None: no change.
        """
        stuck = node_id in self._stuck
        if stuck and busy_s <= LEAST_DEADLINE_S:
            self._stuck.discard(node_id)
            return False
        limit_s = self._limits.stuck_s * (1 if stepped else FIRST_PATIENCE)
        if stepped and slowest_s is not None:
            limit_s = deadline_s(slowest_s, self._limits.stuck_s)
        if not stuck and busy_s > limit_s:
            self._stuck.add(node_id)
            return True
        return None

    def stuck(self, node_id: str) -> bool:
        """Whether a node cannot be planned with."""
        return node_id in self._stuck

    def gone(self, node_id: str) -> None:
        """A node left: nothing is held against it when it comes back."""
        self._stuck.discard(node_id)
        for known in (self._breaks, self._up_since):
            for nodes in [nodes for nodes in known if node_id in nodes]:
                del known[nodes]


def deadline_s(slowest_s: float, most_s: float) -> float:
    """How long a stage may be in one frame that took ``slowest_s`` at most so far.

    ``most_s`` is for stages whose frames are quick; of slow ones it is some multiple too.
    """
    return max(min(most_s, max(LEAST_DEADLINE_S, PATIENCE * slowest_s)), SLOW_PATIENCE * slowest_s)


def hanging(name: str, busy_s: float) -> StageStuck:
    """What people are told of a node that hangs."""
    return StageStuck(
        f"{name} hangs",
        f"its compute thread has been in one job for {busy_s:.0f} s",
        f"Others take over where they can; if it stays, start {name} again",
    )
