"""Nodes of one kind share the best speed that any of them measured."""

from __future__ import annotations

from parallax.scheduler.membership import NodeFacts
from parallax.scheduler.speeds import level


def node(name: str, chip: str, bandwidth: float, flops: float) -> NodeFacts:
    return NodeFacts(
        node_id=name,
        name=name,
        chip=chip,
        platform="x",
        memory_bytes=1,
        budget_bytes=1,
        bandwidth_bytes_s=bandwidth,
        flops=flops,
    )


def test_nodes_of_one_chip_get_one_speed_and_others_keep_their_own() -> None:
    given = [node("a", "M4", 100, 7), node("b", "M4", 60, 9), node("c", "M1", 50, 3)]
    leveled = level(given)
    assert [(n.bandwidth_bytes_s, n.flops) for n in leveled] == [(100, 9), (100, 9), (50, 3)]
    assert [n.node_id for n in leveled] == ["a", "b", "c"]
