"""Good plans for clusters too large to try everything. Pure and deterministic.

Nodes are put in a line by a few keys (speed, memory, nearness). Along a line,
dynamic programming cuts it into rings, judging each piece by a fluid estimate;
the best line's pieces are then laid out exactly and improved by small moves
until nothing helps or a fixed amount of work is spent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from parallax.scheduler.ring_layout import SLACK, Layout, lay_out
from parallax.scheduler.stage_costs import REFERENCE_ROWS, StageCosts

IMPROVE_STAGES = 3000  # stages laid out while improving: bounds time, whatever the machine
BISECTIONS = 14
NEAR = 0.5  # a link this much faster than the default makes two nodes neighbours


class LargeSearch:
    """Rings for any number of nodes in well under a second."""

    def __init__(self, costs: StageCosts, effort: int | None = None) -> None:
        self._costs = costs
        self._effort = IMPROVE_STAGES if effort is None else effort
        self._count = len(costs.nodes)
        self._rate = np.array([1 / costs.layer_s(node) for node in range(self._count)])
        self._fit = np.array([costs.layers_that_fit(node) for node in range(self._count)])
        self._seen: dict[tuple[int, ...], Layout | None] = {}
        self._spent = 0

    def best(self, stages: int) -> list[Layout]:
        """Rings of at least so many stages; empty if none was found."""
        lines = self._lines()
        cuts = [(self._cut_line(line, stages), line) for line in lines]
        (_, sizes), line = max(cuts, key=lambda entry: entry[0][0])
        rings: list[Layout] = []
        begin = 0
        for size in sizes:
            if size > 0:
                nodes = line[begin : begin + size]
                layout = self._arrange(nodes)
                if layout is not None:
                    rings.append(layout)
            begin += abs(size)
        rings += self._gather(rings, stages)
        return _Improvement(self, rings, stages, self._effort).run() if rings else []

    def lay_out(self, order: tuple[int, ...]) -> Layout | None:
        """The layout of a ring in this order, remembered."""
        if order not in self._seen:
            self._spent += len(order)
            self._seen[order] = lay_out(self._costs, order)
        return self._seen[order]

    @property
    def spent(self) -> int:
        """Stages laid out so far."""
        return self._spent

    @property
    def most_stages(self) -> int:
        """No ring can have more stages than this."""
        return self._costs.most_stages

    @property
    def nodes(self) -> range:
        """Every node's number."""
        return range(self._count)

    # ------------------------------------------------------------------- lines

    def _lines(self) -> list[list[int]]:
        rate, fit = self._rate, self._fit
        usable = [node for node in range(self._count) if fit[node] >= 1]
        group = self._neighbourhoods()
        weight: dict[int, float] = {}
        for node in usable:
            weight[group[node]] = weight.get(group[node], 0.0) + float(rate[node])
        return [
            sorted(usable, key=lambda n: (-rate[n], -fit[n], n)),
            sorted(usable, key=lambda n: (-fit[n], -rate[n], n)),
            sorted(usable, key=lambda n: (-weight[group[n]], group[n], -rate[n], n)),
            sorted(usable, key=lambda n: (fit[n] / rate[n], -rate[n], n)),
        ]

    def _neighbourhoods(self) -> list[int]:
        """For each node the least node that fast links connect it to (union-find)."""
        parent = list(range(self._count))

        def root(node: int) -> int:
            while parent[node] != node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        for sender, receiver in self._costs.near_pairs(NEAR):
            a, b = sorted((root(sender), root(receiver)))
            parent[b] = a
        return [root(node) for node in range(self._count)]

    def _cut_line(self, line: Sequence[int], stages: int) -> tuple[float, list[int]]:
        """Cut a line into rings: the estimated rate, and sizes (negative: nodes left out)."""
        count = len(line)
        if count == 0:
            return 0.0, []
        rate, fit = self._rate[line], self._fit[line]
        hops = [self._costs.hop_s(a, b) for a, b in itertools.pairwise(line)]
        hop = np.array([*hops, hops[-1] if hops else 0.0])
        values = {
            size: self._estimate(size, rate, fit, hop)
            for size in self._sizes(stages, count, np.sort(fit)[::-1])
        }
        table = {size: value.tolist() for size, value in values.items()}
        best = [0.0] * (count + 1)
        choice = [-1] * count
        for begin in range(count - 1, -1, -1):
            best[begin] = best[begin + 1]
            for size, value in table.items():
                if begin + size <= count and value[begin] > 0:
                    total = value[begin] + best[begin + size]
                    if total > best[begin] * (1 + SLACK):
                        best[begin], choice[begin] = total, size
        sizes: list[int] = []
        begin = 0
        while begin < count:
            sizes.append(choice[begin])
            begin += abs(choice[begin])
        return best[0], sizes

    def _sizes(self, stages: int, count: int, fit: NDArray[np.float64]) -> list[int]:
        """Ring sizes to consider: each near the least that can hold the model, then sparser."""
        demand = self._costs.model.layers
        fitting = int(np.searchsorted(np.cumsum(fit), demand)) + 1
        size = max(stages, min(fitting, count))
        sizes: list[int] = []
        while size <= min(count, self._costs.most_stages):
            sizes.append(size)
            size += 1 if len(sizes) < 10 else math.ceil(size / 4)
        return sizes

    def _estimate(
        self,
        size: int,
        rate: NDArray[np.float64],
        fit: NDArray[np.float64],
        hop: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Steps per second of each run of ``size`` nodes, as if layers were alike; 0: no fit."""
        costs, model = self._costs, self._costs.model
        mean_held = float(costs.layer_held.mean())
        extra_held = (model.first_bytes + model.last_bytes) / mean_held
        if size == 1:
            extra_held -= model.tied_bytes / mean_held
        extra_bytes = model.last_bytes + REFERENCE_ROWS * model.draw_bytes
        extra_work = extra_bytes / max(1.0, sum(model.layer_read_bytes) / model.layers)
        rates, fits = sliding_window_view(rate, size), sliding_window_view(fit, size)
        hops = sliding_window_view(hop, size) if size > 1 else np.zeros((len(rate), 1))
        holds = fits.sum(axis=1) >= model.layers + extra_held
        whole = model.layers + extra_work
        low = (hops + 1 / rates).max(axis=1)
        high = np.maximum(low, (hops + whole / rates).max(axis=1))
        room = np.floor(np.minimum(fits, model.layers)) + extra_work / size
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            counts = np.minimum(room, (middle[:, None] - hops) * rates)
            enough = counts.sum(axis=1) >= whole * (1 - SLACK)
            high = np.where(enough, middle, high)
            low = np.where(enough, low, middle)
        return np.where(holds, 1 / high, 0.0)

    # ------------------------------------------------------------------- rings

    def _arrange(self, nodes: Sequence[int]) -> Layout | None:
        """Lay a set of nodes out in the best of a few orders."""
        large = sorted(nodes, key=lambda n: (-self._fit[n], n))
        orders = {
            tuple(nodes): None,
            tuple(sorted(nodes)): None,
            (*large[1:], large[0]): None,
            (large[0], *large[2:], *large[1:2]): None,
        }
        found = [layout for order in orders if (layout := self.lay_out(order)) is not None]
        return min(found, key=lambda f: (f.step_s, f.latency_s, f.order), default=None)

    def _gather(self, rings: Sequence[Layout], stages: int) -> list[Layout]:
        """More rings from the nodes that are left, by memory alone."""
        used = {node for ring in rings for node in ring.order}
        left = [n for n in np.lexsort((-self._rate, -self._fit)).tolist() if n not in used]
        more: list[Layout] = []
        while left:
            order = self._reach(left)
            if order is None:
                break
            rest = [node for node in left if node not in order]
            lacking = max(0, stages - len(order))
            layout = self._arrange((*rest[:lacking], *order)) if len(rest) >= lacking else None
            if layout is None:
                break
            more.append(layout)
            left = [node for node in left if node not in layout.order]
        return more

    def _reach(self, line: Sequence[int]) -> tuple[int, ...] | None:
        """A ring that fits, if one is found: each node in turn takes as much as it holds.

        Taking the most is best for a given order. The node that opens the ring
        also holds the embedding, so large ones are tried there; the rest come
        from large to small and the other way, which keeps a large one for the head.
        """
        for opener in line[:3]:
            others = [node for node in line if node != opener]
            for between in (others, others[::-1]):
                order = self._reach_in((opener, *between))
                if order is not None:
                    return order
        return None

    def _reach_in(self, line: Sequence[int]) -> tuple[int, ...] | None:
        order: list[int] = []
        position = 0
        for node in line:
            seconds = self._costs.compute(node)[position]
            if np.isfinite(seconds[-1]):
                return (*order, node)
            fitting = np.flatnonzero(np.isfinite(seconds[:-1]))
            if fitting.size:
                order.append(node)
                position = int(fitting[-1])
        return None


class _Improvement:
    """Small moves on a plan, taken as long as they help."""

    def __init__(self, search: LargeSearch, rings: list[Layout], stages: int, effort: int) -> None:
        self._search = search
        self._rings = rings
        self._stages = stages
        self._limit = search.spent + effort

    def run(self) -> list[Layout]:
        """Move until nothing helps or the work is spent."""
        helped = True
        while helped and self._search.spent < self._limit:
            helped = sum(self._improve_ring(at) for at in range(len(self._rings))) > 0
            helped = self._improve_pairs() or helped
        return self._rings

    def _improve_ring(self, at: int) -> bool:
        helped = False
        for order in self._variants(self._rings[at].order):
            if self._search.spent >= self._limit:
                break
            found = self._search.lay_out(order)
            if found is not None and _better(found, self._rings[at]):
                self._rings[at] = found
                helped = True
                break
        return helped

    def _variants(self, order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Rings that differ in one node or in the place of one."""
        used = {node for ring in self._rings for node in ring.order}
        spare = [node for node in self._search.nodes if node not in used]
        size = len(order)
        if size > self._stages:
            yield from (order[:i] + order[i + 1 :] for i in range(size))
        if size < self._search.most_stages:
            for node in spare:
                yield from ((*order[:i], node, *order[i:]) for i in range(size + 1))
        for node in spare:
            yield from ((*order[:i], node, *order[i + 1 :]) for i in range(size))
        for i in range(size):
            without = order[:i] + order[i + 1 :]
            for j in range(size):
                if j != i:
                    yield (*without[:j], order[i], *without[j:])

    def _improve_pairs(self) -> bool:
        """Exchange nodes between two rings, or hand one over."""
        helped = False
        for a in range(len(self._rings)):
            for b in range(a + 1, len(self._rings)):
                if self._search.spent >= self._limit:
                    return helped
                helped = self._improve_pair(a, b) or helped
        return helped

    def _improve_pair(self, a: int, b: int) -> bool:
        first, second = self._rings[a], self._rings[b]
        rate = 1 / first.step_s + 1 / second.step_s
        for one, other in self._exchanges(first.order, second.order):
            if self._search.spent >= self._limit:
                return False
            left, right = self._search.lay_out(one), self._search.lay_out(other)
            if left is None or right is None:
                continue
            if 1 / left.step_s + 1 / right.step_s > rate * (1 + SLACK):
                self._rings[a], self._rings[b] = left, right
                return True
        return False

    def _exchanges(
        self, one: tuple[int, ...], other: tuple[int, ...]
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        for i, node in enumerate(one):
            for j, their in enumerate(other):
                yield (*one[:i], their, *one[i + 1 :]), (*other[:j], node, *other[j + 1 :])
        for giver, taker, swapped in ((one, other, False), (other, one, True)):
            if len(giver) <= self._stages or len(taker) >= self._search.most_stages:
                continue
            for i, node in enumerate(giver):
                rest = giver[:i] + giver[i + 1 :]
                if not rest:
                    continue
                for j in range(len(taker) + 1):
                    longer = (*taker[:j], node, *taker[j:])
                    yield (longer, rest) if swapped else (rest, longer)


def _better(new: Layout, old: Layout) -> bool:
    if new.step_s < old.step_s * (1 - SLACK):
        return True
    return new.step_s <= old.step_s * (1 + SLACK) and new.latency_s < old.latency_s * (1 - SLACK)
