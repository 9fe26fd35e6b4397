"""Rings as they served: which nodes had which layers, kept over restarts. Pure.

A scheduler that starts again takes up the rings that served last, as soon as all nodes of one
attend: they hold its layers still, and a plan made anew may cut elsewhere. Nodes of a ring that is
not complete are waited for, for a while. Later, a ring of the same nodes is cut as it was before
unless another cut is worth it, so that whoever comes back finds its files in the page cache and
the others keep what they hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from parallax.scheduler.reconciler import Place, Ring

REMEMBERED = 32  # layouts, the latest first
WAIT_S = 6.0  # for the other nodes of a ring; longer than a node pauses between two tries


@dataclass(frozen=True, slots=True)
class Layout:
    """One ring's cut of one model."""

    digest: str
    places: tuple[Place, ...]
    tokens_s: float

    @property
    def nodes(self) -> frozenset[str]:
        """Who has a place in it."""
        return frozenset(place.node_id for place in self.places)


class Layouts:
    """What served last, what served before, and what of the last process is still to come."""

    def __init__(self) -> None:
        self._known: list[Layout] = []  # the latest first
        self._serving: list[Layout] = []
        self._awaited: list[Layout] = []
        self._until: float | None = None  # None: nobody of theirs has come yet
        self.waited = False  # in vain, for nodes of a ring of the last process

    # ------------------------------------------------------------------ memory

    def served(self, rings: Iterable[Ring]) -> bool:
        """These rings serve now, and no others; returns whether that is news."""
        serving = [Layout(r.model.digest, r.places, r.tokens_s) for r in rings]
        if serving == self._serving:
            return False
        self._serving = serving
        known = [*serving, *(old for old in self._known if not _replaced(old, serving))]
        self._known = known[:REMEMBERED]
        return True

    def places_of(self, digest: str, nodes: Collection[str]) -> tuple[Place, ...] | None:
        """How these nodes shared a model when they last did.

        If they never did: as the last ring that one of them joins in the place of another, so that
        a mended ring keeps the layers that its nodes hold.
        """
        wanted = frozenset(nodes)
        known = [layout for layout in self._known if layout.digest == digest]
        for layout in known:
            if layout.nodes == wanted:
                return layout.places
        for layout in known:
            lost, new = layout.nodes - wanted, wanted - layout.nodes
            if len(lost) == len(new) == 1 < len(wanted):
                return tuple(
                    replace(place, node_id=next(iter(new))) if place.node_id in lost else place
                    for place in layout.places
                )
        return None

    def told(self) -> list[object]:
        """Everything as JSON values, for :meth:`recall`."""
        return [
            [
                layout.digest,
                [[place.node_id, place.first, place.end] for place in layout.places],
                layout.tokens_s,
                layout in self._serving,
            ]
            for layout in self._known
        ]

    def recall(self, told: object) -> None:
        """Takes up what an earlier process told; what makes no sense is left out."""
        for entry in told if isinstance(told, list) else []:
            try:
                digest, places, tokens_s, serving = entry
                layout = Layout(
                    str(digest),
                    tuple(Place(str(node), int(first), int(end)) for node, first, end in places),
                    float(tokens_s),
                )
            except (TypeError, ValueError):
                continue
            if layout.places and layout.tokens_s > 0:
                self._known.append(layout)
                if serving is True:
                    self._awaited.append(layout)

    # --------------------------------------------------------------- a restart

    def take_up(self, digest: str, free: Collection[str], now: float) -> list[Layout]:
        """Rings of the last process all of whose nodes are free now; each is handed out once."""
        self._awaited = [layout for layout in self._awaited if layout.digest == digest]
        complete = [layout for layout in self._awaited if layout.nodes.issubset(free)]
        self._awaited = [layout for layout in self._awaited if layout not in complete]
        if self._until is None and self.awaited & set(free):
            self._until = now + WAIT_S
        return complete

    @property
    def awaited(self) -> frozenset[str]:
        """Nodes that are kept free for a ring whose other nodes may still come."""
        return frozenset[str]().union(*(layout.nodes for layout in self._awaited))

    def over(self, now: float) -> bool:
        """True once, when the wait for rings of the last process has been in vain."""
        if not self._awaited or self._until is None or now < self._until:
            return False
        self._awaited = []
        self.waited = True
        return True

    def give_up(self, nodes: Collection[str] | None = None) -> None:
        """Rings with these nodes are waited for no more; None: no ring is."""
        self._awaited = [
            layout
            for layout in self._awaited
            if nodes is not None and layout.nodes.isdisjoint(nodes)
        ]


def _replaced(old: Layout, serving: Sequence[Layout]) -> bool:
    return any(old.digest == new.digest and old.nodes == new.nodes for new in serving)
