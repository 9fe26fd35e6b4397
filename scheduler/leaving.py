"""Nodes that are to have no layers: drained for a while, or sent away for good. Pure.

A drained node stays attended, over restarts too, and gets layers again when it is taken back. One
that is sent away is drained first, for a time that is bounded, and cut off then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from parallax.fabric.errors import UnknownNode

REMOVE_S = 60.0  # what a node that is sent away gets for handing its requests over


@dataclass(frozen=True, slots=True)
class Departure:
    """What was asked of a node."""

    name: str
    forced: bool = False  # even where no ring is left without it
    removed: bool = False  # it goes for good
    until: float | None = None  # a removal's monotonic deadline


class Leaving:
    """Who gives its layers up, and who is to be cut off."""

    def __init__(self) -> None:
        self._departures: dict[str, Departure] = {}

    @property
    def nodes(self) -> frozenset[str]:
        """Nodes that no plan counts on."""
        return frozenset(self._departures)

    def names(self) -> dict[str, str]:
        """Their names by id, also of those that do not attend."""
        return {node_id: departure.name for node_id, departure in self._departures.items()}

    def forced(self, nodes: Collection[str]) -> bool:
        """Whether those of these nodes that leave may take the last ring with them."""
        known = self._departures
        return all(known[node_id].forced for node_id in nodes if node_id in known)

    def drain(self, node_id: str, name: str, *, forced: bool = False) -> Departure | None:
        """This node is to have no layers; a removal stays one. Returns what was asked before."""
        asked = self._departures.get(node_id)
        before = asked or Departure(name)
        forced = forced or before.forced
        self._departures[node_id] = Departure(name, forced, before.removed, before.until)
        return asked

    def remove(
        self,
        node_id: str,
        name: str,
        now: float,
        *,
        forced: bool = False,
        wait_s: float = REMOVE_S,
    ) -> Departure | None:
        """This node is to go for good, after ``wait_s`` at most. Returns what was asked before."""
        before = self._departures.get(node_id)
        self._departures[node_id] = Departure(name, forced, True, now + wait_s)
        return before

    def take_back(self, node_id: str) -> Departure | None:
        """This node may have layers again; None when nothing was asked of it."""
        return self._departures.pop(node_id, None)

    def restore(self, node_id: str, before: Departure | None) -> None:
        """What was asked last of this node was not: this holds again."""
        if before is None:
            self._departures.pop(node_id, None)
        else:
            self._departures[node_id] = before

    def due(self, busy: Collection[str], now: float) -> list[str]:
        """Removed nodes that have no layers any more, or whose time is over."""
        return [
            node_id
            for node_id, departure in self._departures.items()
            if departure.removed
            and (node_id not in busy or departure.until is None or now >= departure.until)
        ]

    def state_of(self, node_id: str, *, busy: bool) -> str | None:
        """How such a node stands, in one word; None for all others."""
        departure = self._departures.get(node_id)
        if departure is None:
            return None
        if departure.removed:
            return "removing"
        return "draining" if busy else "drained"

    def told(self) -> list[object]:
        """Everything as JSON values, for :meth:`recall`; clocks begin anew then."""
        return [[node_id, d.name, d.forced, d.removed] for node_id, d in self._departures.items()]

    def recall(self, told: object, now: float) -> None:
        """Takes up what an earlier process told; what makes no sense is left out."""
        for entry in told if isinstance(told, list) else []:
            try:
                node_id, name, forced, removed = entry
            except (TypeError, ValueError):
                continue
            until = now + REMOVE_S if removed else None
            self._departures[str(node_id)] = Departure(
                str(name), bool(forced), bool(removed), until
            )


def find_node(word: str, names: Mapping[str, str]) -> str:
    """The id of the node that a word means: its id, its name, or how one of them begins.

    Args:
        word: what somebody typed.
        names: every node's name, by id.

    Raises:
        UnknownNode: none is meant, or more than one.
    """
    word = word.strip()
    if word in names:
        return word
    ways = (
        [node_id for node_id, name in names.items() if name == word],
        [n for n, name in names.items() if word and (n.startswith(word) or name.startswith(word))],
    )
    for found in ways:
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            several = ", ".join(sorted(f"{names[n]} ({n})" for n in found)[:8])
            raise UnknownNode(
                f"'{word}' means {len(found)} nodes",
                several,
                "Name the one you mean by its whole id",
                node=word,
            )
    raise UnknownNode(
        f"No node '{word}' is here",
        "It is no node's name or id, and none begins with it",
        "'parallax nodes' lists them all",
        node=word,
    )
