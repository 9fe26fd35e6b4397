"""The best plan of a small cluster: every set of nodes, order and cut, and every partition. Pure.

For each set of nodes a walk over all orders shares the work of common
beginnings; then all ways to divide the nodes into rings are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from parallax.scheduler.ring_layout import SLACK, Layout, Vector, close, lay_out, slower, start
from parallax.scheduler.stage_costs import StageCosts

EXACT_NODES = 6  # 1,956 orders: some hundredths of a second, a third at worst


class ExactSearch:
    """Exact for any model and cuts; time grows with the factorial of the number of nodes."""

    def __init__(self, costs: StageCosts) -> None:
        self._costs = costs
        self._count = len(costs.nodes)
        self._hops = [
            [costs.hop_s(a, b) if a != b else 0.0 for b in range(self._count)]
            for a in range(self._count)
        ]
        self._step_s = dict.fromkeys(range(1, 1 << self._count), math.inf)  # by set of nodes
        self._layouts: dict[int, Layout] = {}
        for head in range(self._count):
            self._walk(1 << head, head, head, start(costs))

    def best(self, stages: int) -> list[Layout]:
        """The best rings, none of fewer stages than this; empty if there is none."""
        rings = [
            nodes
            for nodes, step_s in self._step_s.items()
            if nodes.bit_count() >= stages and math.isfinite(step_s)
        ]
        plans = [
            (sum(1 / self._step_s[nodes] for nodes in plan), plan)
            for plan in _partitions((1 << self._count) - 1, rings)
            if plan
        ]
        if not plans:
            return []
        fastest = max(rate for rate, _ in plans)
        best: list[Layout] = []
        best_latency_s = math.inf
        for rate, plan in plans:
            if rate < fastest * (1 - SLACK):
                continue
            layouts = [self._layout(nodes) for nodes in plan]
            latency_s = max(layout.latency_s for layout in layouts)
            if latency_s < best_latency_s * (1 - SLACK):
                best, best_latency_s = layouts, latency_s
        return best

    def rates(self, stages: int) -> dict[int, float]:
        """For each set of nodes, the most steps per second of rings of its members.

        ``stages`` is the least number of them in a ring; sets that hold no ring are left out.
        """
        everyone = (1 << self._count) - 1
        rings = [
            (nodes, 1 / step_s)
            for nodes, step_s in self._step_s.items()
            if nodes.bit_count() >= stages and math.isfinite(step_s)
        ]
        best = {0: 0.0}
        for among in range(1, everyone + 1):
            lowest = among & -among
            best[among] = best[among & ~lowest]
            for nodes, rate in rings:
                if nodes & lowest and not nodes & ~among:
                    best[among] = max(best[among], rate + best[among & ~nodes])
        return {nodes: rate for nodes, rate in best.items() if rate > 0}

    def _walk(self, nodes: int, head: int, last: int, reached: Vector) -> None:
        """Every ring that begins like this one; ``reached`` leaves the last node's stage out."""
        compute = self._costs.compute(last)
        step_s = close(reached, compute + self._costs.return_s(last, head))
        self._step_s[nodes] = min(self._step_s[nodes], step_s)
        if nodes.bit_count() == self._costs.most_stages:
            return
        for after in range(self._count):
            if nodes >> after & 1:
                continue
            further = slower(reached, compute + self._hops[last][after])
            if np.isfinite(further).any():
                self._walk(nodes | 1 << after, head, after, further)

    def _layout(self, nodes: int) -> Layout:
        """Among the orders with the least step time, the first one with the least latency."""
        if nodes not in self._layouts:
            best: Layout | None = None
            for order in self._fast_orders(nodes):
                found = lay_out(self._costs, order)
                if found is not None and (
                    best is None or found.latency_s < best.latency_s * (1 - SLACK)
                ):
                    best = found
            if best is None:  # the walk has found one
                raise AssertionError("a ring without a layout")
            self._layouts[nodes] = best
        return self._layouts[nodes]

    def _fast_orders(self, nodes: int) -> Iterator[tuple[int, ...]]:
        """Orders of these nodes that reach their least step time, by node numbers."""
        limit_s = self._step_s[nodes] * (1 + SLACK)

        def extend(order: tuple[int, ...], left: int, reached: Vector) -> Iterator[tuple[int, ...]]:
            last = order[-1]
            compute = self._costs.compute(last)
            if not left:
                if close(reached, compute + self._costs.return_s(last, order[0])) <= limit_s:
                    yield order
                return
            for after in range(self._count):
                if left >> after & 1:
                    further = slower(reached, compute + self._hops[last][after])
                    if further.min() <= limit_s:
                        yield from extend((*order, after), left & ~(1 << after), further)

        for head in range(self._count):
            if nodes >> head & 1:
                yield from extend((head,), nodes & ~(1 << head), start(self._costs))


def _partitions(free: int, rings: list[int]) -> Iterator[tuple[int, ...]]:
    """Every way to form disjoint rings of some of the free nodes."""
    if not free:
        yield ()
        return
    lowest = free & -free
    for ring in rings:
        if ring & lowest and not ring & ~free:
            for rest in _partitions(free & ~ring, rings):
                yield (ring, *rest)
    yield from _partitions(free & ~lowest, rings)
