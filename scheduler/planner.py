"""Models x nodes x links -> rings and layer ranges. Pure.

The objective is the throughput of all rings together; between equals, one
user's latency. A node that would slow its ring down is left out, unless its
memory is needed. Small clusters are planned exactly, large ones by a heuristic
whose distance from the best is bounded by :attr:`Plan.bound_tokens_s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from parallax.fabric.errors import ModelTooBig
from parallax.scheduler.membership import NodeFacts
from parallax.scheduler.model_facts import ModelFacts
from parallax.scheduler.plan_exact import EXACT_NODES, ExactSearch
from parallax.scheduler.plan_large import LargeSearch
from parallax.scheduler.ring_layout import SLACK, Layout
from parallax.scheduler.stage_costs import (
    DEFAULT_LINK,
    REFERENCE_ROWS,
    LinkFacts,
    Links,
    StageCosts,
    decode_s,
    draw_s,
)

__all__ = [
    "DEFAULT_LINK",
    "LinkFacts",
    "Links",
    "Plan",
    "RingPlan",
    "StagePlan",
    "improves",
    "make_plan",
    "rate",
]


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Layers ``[first, end)`` on a node."""

    node_id: str
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class RingPlan:
    """One copy of the model: its stages, head first, and what the ring is expected to do."""

    stages: tuple[StagePlan, ...]
    throughput_tokens_s: float
    latency_s: float  # of one token once around


@dataclass(frozen=True, slots=True)
class Plan:
    """Rings that share no node, the fastest first."""

    rings: tuple[RingPlan, ...]
    throughput_tokens_s: float  # of all rings together
    latency_s: float  # of one token on the slowest ring
    bound_tokens_s: float  # no plan can be faster; equals the throughput where the plan is exact


def make_plan(
    model: ModelFacts,
    nodes: Sequence[NodeFacts],
    links: Links | None = None,
    *,
    cuts: Iterable[int] | None = None,
    min_nodes: int = 1,
    default_link: LinkFacts = DEFAULT_LINK,
    effort: int | None = None,
) -> Plan:
    """The best rings for a model; the same input gives the same plan, whatever its order.

    Args:
        cuts: layers at which a stage may begin; None: all.
        min_nodes: stages that every ring should have at least. If that cannot
            be, the most that can.
        effort: stages laid out while a large cluster's plan is improved; None: the usual.

    Raises:
        ModelTooBig: there is no ring that holds the model and a reserve for caches.
    """
    ordered = sorted(nodes, key=lambda node: node.node_id)
    costs = StageCosts(model, ordered, links or {}, cuts, default_link)
    exact = len(ordered) <= EXACT_NODES
    search = ExactSearch(costs) if exact else LargeSearch(costs, effort)
    layouts = search.best(max(1, min(min_nodes, len(ordered), costs.most_stages)))
    if not layouts and min_nodes > 1:
        layouts = _longest(search, min_nodes)
    if not layouts:
        raise _too_big(costs)
    return _plan(costs, layouts, exact)


def rate(
    model: ModelFacts,
    nodes: Sequence[NodeFacts],
    links: Links,
    rings: Iterable[Sequence[StagePlan]],
    default_link: LinkFacts = DEFAULT_LINK,
) -> Plan:
    """What given rings are expected to do, by the figures that a new plan would be made from."""
    ordered = sorted(nodes, key=lambda node: node.node_id)
    costs = StageCosts(model, ordered, links, None, default_link)
    number = {node.node_id: at for at, node in enumerate(ordered)}
    rated = []
    for stages in rings:
        order = [number[stage.node_id] for stage in stages]
        times = [
            decode_s(model, ordered[node], stage.first, stage.end, REFERENCE_ROWS)
            + draw_s(model, ordered[node], stage.end, REFERENCE_ROWS)
            + (
                costs.hop_s(node, after)
                if stage.end < model.layers
                else costs.return_s(node, after)
            )
            for node, after, stage in zip(order, (*order[1:], order[0]), stages, strict=True)
        ]
        step_s = max(*times, 1e-12)
        rated.append(RingPlan(tuple(stages), REFERENCE_ROWS / step_s, sum(times)))
    throughput = sum(ring.throughput_tokens_s for ring in rated)
    latency_s = max((ring.latency_s for ring in rated), default=0.0)
    return Plan(tuple(rated), throughput, latency_s, max(throughput, costs.bound_tokens_s()))


def improves(old: Plan | None, new: Plan, margin: float = 0.1) -> bool:
    """Whether ``new`` is better than ``old`` by more than a margin that pays for the change."""
    if old is None:
        return True
    if new.throughput_tokens_s > old.throughput_tokens_s * (1 + margin):
        return True
    as_fast = new.throughput_tokens_s >= old.throughput_tokens_s * (1 - SLACK)
    return as_fast and new.latency_s * (1 + margin) < old.latency_s


def _longest(search: ExactSearch | LargeSearch, failing: int) -> list[Layout]:
    """The best rings of the largest least length below ``failing`` that can be had (bisection)."""
    best = search.best(1)
    works = 1 if best else failing
    while works + 1 < failing:
        middle = (works + failing) // 2
        layouts = search.best(middle)
        if layouts:
            works, best = middle, layouts
        else:
            failing = middle
    return best


def _plan(costs: StageCosts, layouts: list[Layout], exact: bool) -> Plan:
    rings = []
    for layout in layouts:
        firsts = (0, *layout.ends[:-1])
        stages = tuple(
            StagePlan(costs.nodes[node].node_id, first, end)
            for node, first, end in zip(layout.order, firsts, layout.ends, strict=True)
        )
        rings.append(RingPlan(stages, REFERENCE_ROWS / layout.step_s, layout.latency_s))
    rings.sort(key=lambda ring: (-ring.throughput_tokens_s, ring.stages[0].node_id))
    throughput = sum(ring.throughput_tokens_s for ring in rings)
    return Plan(
        rings=tuple(rings),
        throughput_tokens_s=throughput,
        latency_s=max(ring.latency_s for ring in rings),
        bound_tokens_s=throughput if exact else max(throughput, costs.bound_tokens_s()),
    )


def _too_big(costs: StageCosts) -> ModelTooBig:
    budgets = [max(0, node.budget_bytes) for node in costs.nodes]
    available = sum(budgets)
    needed = costs.needed_bytes(min(len(budgets), costs.most_stages))
    missing = needed - available
    why = f"It needs {_gib(needed)} GiB with room for its caches; the nodes offer {_gib(available)}"
    if missing <= 0:  # enough in sum, but no layer can be halved
        missing = round(float(costs.layer_held.max()))
        why += ", in pieces into which its layers do not go"
    return ModelTooBig(
        f"The model {costs.model.name} does not fit: about {_gib(missing)} GiB are missing",
        why,
        "Join more nodes, let them hold more (--memory), or choose a smaller model.",
        needed_bytes=needed,
        available_bytes=available,
        missing_bytes=missing,
    )


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.3g}"
