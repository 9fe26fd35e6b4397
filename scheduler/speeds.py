"""Speeds that nodes measured at their start, levelled by chip. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from parallax.scheduler.membership import NodeFacts


def level(nodes: Iterable[NodeFacts]) -> list[NodeFacts]:
    """The same nodes, those of one kind with one speed: the best that any of them measured.

    A measurement takes half a second while the machine does other things, so
    it errs downwards only, and often by half. Machines of the same chip are
    equally fast; without this they would get unequal shares by chance.
    """
    given = list(nodes)
    bandwidth: dict[tuple[str, str, int], float] = {}
    flops: dict[tuple[str, str, int], float] = {}
    for node in given:
        kind = node.chip, node.backend, node.accelerators
        bandwidth[kind] = max(bandwidth.get(kind, 0.0), node.bandwidth_bytes_s)
        flops[kind] = max(flops.get(kind, 0.0), node.flops)
    return [
        replace(
            node,
            bandwidth_bytes_s=bandwidth[node.chip, node.backend, node.accelerators],
            flops=flops[node.chip, node.backend, node.accelerators],
        )
        for node in given
    ]
