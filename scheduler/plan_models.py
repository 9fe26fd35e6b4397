"""Rings for several models over the same nodes. Pure.

The objective is the weighted geometric mean of the models' throughputs (proportional fairness:
Kelly, Maulloo and Tan 1998): no model starves, a model of twice the weight is worth twice the
nodes, and making one model faster by a tenth is worth slowing an equal one by a tenth. A small
cluster is divided by trying everything. A large one is divided by prices, from the dual of the
problem in which nodes may be shared; those prices also bound what any division can reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from parallax.fabric.errors import ModelTooBig
from parallax.scheduler.membership import NodeFacts
from parallax.scheduler.model_facts import ModelFacts
from parallax.scheduler.plan_exact import EXACT_NODES, ExactSearch
from parallax.scheduler.planner import Plan, make_plan
from parallax.scheduler.stage_costs import DEFAULT_LINK, LinkFacts, Links, StageCosts

PRICE_STEPS = 300
EFFORT = 400  # stages laid out for each model while improving its rings
MOST_LOANS = 200  # nodes that change their model because one does not fit otherwise

Rates = NDArray[np.float64]  # [nodes, models]


@dataclass(frozen=True, slots=True)
class Demand:
    """A model that is to be served, and how much it counts."""

    model: ModelFacts
    weight: float = 1.0
    cuts: frozenset[int] | None = None
    min_nodes: int = 1


@dataclass(frozen=True, slots=True)
class ModelsPlan:
    """A plan for each demand, in their order; no node is in two of them."""

    plans: tuple[Plan, ...]
    mean_tokens_s: float  # weighted geometric mean
    bound_tokens_s: float  # no division of these nodes can be better


def make_plans(
    demands: Sequence[Demand],
    nodes: Sequence[NodeFacts],
    links: Links | None = None,
    *,
    default_link: LinkFacts = DEFAULT_LINK,
) -> ModelsPlan:
    """The best rings for several models.

    Raises:
        ModelTooBig: the nodes cannot hold all of these models at once.
    """
    ordered = sorted(nodes, key=lambda node: node.node_id)
    division = _Division(demands, ordered, links or {}, default_link)
    if len(demands) == 1:
        plan = division.plan(0, ordered)
        return ModelsPlan((plan,), plan.throughput_tokens_s, plan.bound_tokens_s)
    if len(ordered) <= EXACT_NODES:
        plans = division.exactly()
        mean = division.mean(plans)
        return ModelsPlan(plans, mean, mean)
    plans, bound = division.by_prices()
    return ModelsPlan(plans, division.mean(plans), max(bound, division.mean(plans)))


class _Division:
    def __init__(
        self,
        demands: Sequence[Demand],
        nodes: Sequence[NodeFacts],
        links: Links,
        default_link: LinkFacts,
    ) -> None:
        self._demands = demands
        self._nodes = nodes
        self._links = links
        self._default_link = default_link
        total = sum(demand.weight for demand in demands)
        self._weights = np.array([demand.weight / total for demand in demands])

    def plan(self, at: int, nodes: Sequence[NodeFacts], effort: int | None = None) -> Plan:
        demand = self._demands[at]
        return make_plan(
            demand.model,
            nodes,
            self._links,
            cuts=demand.cuts,
            min_nodes=demand.min_nodes,
            default_link=self._default_link,
            effort=effort,
        )

    def mean(self, plans: Sequence[Plan]) -> float:
        """The weighted geometric mean of what the plans do."""
        logs = [math.log(plan.throughput_tokens_s) for plan in plans]
        return math.exp(float(np.dot(self._weights, logs)))

    def _costs(self, demand: Demand) -> StageCosts:
        return StageCosts(demand.model, self._nodes, self._links, demand.cuts, self._default_link)

    # ----------------------------------------------------------- small clusters

    def exactly(self) -> tuple[Plan, ...]:
        """Every division of the nodes, by dynamic programming over sets of them."""
        everyone = (1 << len(self._nodes)) - 1
        value: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by nodes given away
        for weight, demand in zip(self._weights, self._demands, strict=True):
            costs = self._costs(demand)
            rates = ExactSearch(costs).rates(
                max(1, min(demand.min_nodes, len(self._nodes), costs.most_stages))
            )
            after: dict[int, tuple[float, tuple[int, ...]]] = {}
            for given, (so_far, sets) in value.items():
                free = everyone & ~given
                taken = free
                while taken:
                    rate = rates.get(taken, 0.0)
                    if rate > 0:
                        total = so_far + float(weight) * math.log(rate)
                        known = after.get(given | taken)
                        if known is None or total > known[0]:
                            after[given | taken] = total, (*sets, taken)
                    taken = (taken - 1) & free
            value = after
        if not value:
            self._refuse()
        _, sets = max(value.values())
        return tuple(
            self.plan(at, [n for i, n in enumerate(self._nodes) if nodes >> i & 1])
            for at, nodes in enumerate(sets)
        )

    # ----------------------------------------------------------- large clusters

    def by_prices(self) -> tuple[tuple[Plan, ...], float]:
        """Plans, and the bound on their mean."""
        rates = np.stack([self._costs(d).most_rates() for d in self._demands], axis=1)
        for at in np.flatnonzero(rates.sum(axis=0) <= 0):
            self.plan(int(at), self._nodes)  # raises: no node can hold a layer of it
        shares, bound = self._prices(rates)
        model_of = _rounded(rates, shares)
        plans = self._feasible(model_of, rates)
        self._use_spare(plans, model_of, rates)
        return tuple(plans), bound

    def _prices(self, rates: Rates) -> tuple[Rates, float]:
        """How to share nodes among models, and the bound.

        For any prices y of a token of each model, the nodes can earn at most C(y), the sum over
        nodes of max_m y_m rate_m, so every possible T has sum y_m T_m <= C(y); and under that
        constraint the mean is largest at T_m = w_m C(y) / y_m. The prices that make this bound
        least are found by subgradient steps; the mean of their answers is how to share nodes.
        """
        weights = self._weights
        price = np.log(weights / np.maximum(rates.sum(axis=0), 1e-12))
        count = len(rates)
        rows = np.arange(count)
        shares = np.zeros_like(rates)
        least = math.inf
        total = 0.0
        for step in range(PRICE_STEPS):
            worth = rates * np.exp(price - price.max())
            best = worth.argmax(axis=1)
            earned = np.bincount(best, weights=worth[rows, best], minlength=len(weights))
            whole = earned.sum()
            value = float(np.dot(weights, np.log(weights * whole) - (price - price.max())))
            least = min(least, value)
            size = 1.0 / (1.0 + step / 10)
            if step >= PRICE_STEPS // 4:
                shares[rows, best] += size
                total += size
            price -= size * (earned / whole - weights)
        return shares / total, math.exp(least)

    def _feasible(self, model_of: NDArray[np.intp], rates: Rates) -> list[Plan]:
        """A plan for every model; where one does not fit, it borrows nodes from the others."""
        plans: list[Plan | None] = [None] * len(self._demands)
        pending = sorted(range(len(plans)), key=lambda at: -self._demands[at].model.weight_bytes)
        settled: set[int] = set()
        loans = 0
        while pending:
            at = pending.pop(0)
            try:
                plans[at] = self.plan(at, self._of(model_of, at), EFFORT)
                settled.add(at)
            except ModelTooBig:
                lenders = [
                    n
                    for n in range(len(self._nodes))
                    if model_of[n] != at and model_of[n] not in settled and rates[n, at] > 0
                ]
                loans += 1
                if not lenders or loans > MOST_LOANS:
                    self._refuse()
                # Large ones first: few are then enough.
                lender = max(lenders, key=lambda n: self._nodes[n].budget_bytes)
                model_of[lender] = at
                pending.insert(0, at)
        return [plan for plan in plans if plan is not None]

    def _use_spare(self, plans: list[Plan], model_of: NDArray[np.intp], rates: Rates) -> None:
        """Nodes that their model leaves out go where they can do most; taken if it helps."""
        used = {s.node_id for plan in plans for ring in plan.rings for s in ring.stages}
        spare = [n for n, node in enumerate(self._nodes) if node.node_id not in used]
        gains: dict[int, list[int]] = {}
        totals = np.array([plan.throughput_tokens_s for plan in plans])
        for n in spare:
            worth = self._weights * rates[n] / totals
            worth[model_of[n]] = 0.0
            if worth.max() > 0:
                gains.setdefault(int(worth.argmax()), []).append(n)
        for at, more in gains.items():
            extra = [self._nodes[n] for n in more]
            try:
                rings = self.plan(at, extra, EFFORT)
            except ModelTooBig:
                continue
            plans[at] = _together(plans[at], rings)

    def _of(self, model_of: NDArray[np.intp], at: int) -> list[NodeFacts]:
        return [self._nodes[n] for n in np.flatnonzero(model_of == at).tolist()]

    def _refuse(self) -> NoReturn:
        """Raises what is missing: for one model alone, or for all of them together."""
        for at in range(len(self._demands)):
            self.plan(at, self._nodes)
        needed = sum(demand.model.weight_bytes for demand in self._demands)
        available = sum(max(0, node.budget_bytes) for node in self._nodes)
        raise ModelTooBig(
            f"{len(self._demands)} models do not fit at once",
            f"they take {needed} bytes and room for their caches, the nodes offer {available}",
            "Join more nodes, let them hold more (--memory), or serve fewer models.",
            needed_bytes=needed,
            available_bytes=available,
            missing_bytes=max(0, needed - available),
        )


def _rounded(rates: Rates, shares: Rates) -> NDArray[np.intp]:
    """One model for each node, so that among like nodes each model gets about its share."""
    order = np.lexsort((*rates.T, shares.argmax(axis=1)))
    owed = np.zeros(shares.shape[1])
    model_of = np.zeros(len(rates), dtype=np.intp)
    for n in order:
        owed += shares[n]
        model = int(np.where(shares[n] > 0, owed, -math.inf).argmax())
        owed[model] -= 1
        model_of[n] = model
    return model_of


def _together(one: Plan, other: Plan) -> Plan:
    rings = tuple(
        sorted(
            (*one.rings, *other.rings),
            key=lambda ring: (-ring.throughput_tokens_s, ring.stages[0].node_id),
        )
    )
    throughput = one.throughput_tokens_s + other.throughput_tokens_s
    bound = max(throughput, one.bound_tokens_s + other.bound_tokens_s)
    return Plan(rings, throughput, max(one.latency_s, other.latency_s), bound)
