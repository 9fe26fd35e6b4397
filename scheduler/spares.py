"""Nodes that have nothing to do get ready for the place of any that may be lost. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.reconciler import Order, Ring, StageKey, key_of


class Spares:
    """Remembers what each spare node was told to prepare."""

    def __init__(self) -> None:
        self._told: dict[str, frozenset[StageKey]] = {}

    def prepare(self, rings: Sequence[Ring], free: Collection[str]) -> list[Order]:
        """Orders for the nodes in ``free``: every stage of the rings that serve, once."""
        stages = {
            key_of(stage): stage
            for ring in rings
            for place in ring.places
            for stage in (wire.StageRange(model=ring.model, first=place.first, end=place.end),)
        }
        wanted = frozenset(stages)
        self._told = {node: told for node, told in self._told.items() if node in free}
        orders = []
        for node_id in sorted(free):
            if wanted and self._told.get(node_id) != wanted:
                self._told[node_id] = wanted
                prepare = wire.PrepareStages(stages=[stages[key] for key in sorted(wanted)])
                orders.append(Order(node_id, wire.NodeOrder(prepare=prepare)))
        return orders
