"""Nodes that were sent away, as all others have to know them: nobody takes their calls any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.roster import Roster


class Fence:
    """Tells members whom to refuse. Whom the scheduler itself lets call, admission says.

    Args:
        roster: the members' streams.
        sent_away: the nodes that are to be refused now.
    """

    def __init__(self, roster: Roster, sent_away: Callable[[], Iterable[str]]) -> None:
        self._roster = roster
        self._sent_away = sent_away
        self._told: frozenset[str] = frozenset()

    def tell(self) -> None:
        """Has every member know who is refused now; to be called when that has changed."""
        away = frozenset(self._sent_away())
        if away != self._told:
            self._told = away
            self._roster.order_all(self._order(away))

    def greet(self, node_id: str) -> None:
        """Tells a node that has just come, also that it is nobody: it may have heard of some."""
        self._roster.order(node_id, self._order(frozenset(self._sent_away())))

    def _order(self, away: frozenset[str]) -> wire.NodeOrder:
        return wire.NodeOrder(shut_out=wire.ShutOut(node_ids=sorted(away)))
