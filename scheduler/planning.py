"""What the cluster plans with, and the rings that come of it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from parallax.fabric.errors import ModelTooBig
from parallax.fabric.limits import DEFAULT_LIMITS, Limits
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.chosen import Chosen
from parallax.scheduler.layouts import Layouts
from parallax.scheduler.membership import NodeFacts
from parallax.scheduler.model_facts import ModelFacts
from parallax.scheduler.observed_speeds import ObservedSpeeds
from parallax.scheduler.planner import Plan, RingPlan, StagePlan, improves, make_plan, rate
from parallax.scheduler.reconciler import Place, Ring, RingState
from parallax.scheduler.replanning import Replanning
from parallax.scheduler.room import has_room
from parallax.scheduler.speeds import level
from parallax.scheduler.stage_costs import LinkFacts, Links


@dataclass(frozen=True, slots=True)
class _Figures:
    """What a plan is made from."""

    model: ModelFacts
    nodes: list[NodeFacts]
    links: dict[tuple[str, str], LinkFacts]
    unknown: LinkFacts  # what a way that nobody measured is taken for


@dataclass(frozen=True, slots=True)
class Change:
    """Rings that should take the place of others."""

    old: list[Ring]
    new: list[Ring]


class Planning:
    """Plans for a chosen model from what nodes measured at their start and showed at work."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS, layouts: Layouts | None = None) -> None:
        self._limits = limits
        self.layouts = layouts or Layouts()
        self.observed = ObservedSpeeds()
        self.replanning = Replanning(limits)
        self._judged: dict[int, tuple[object, Plan | None, Plan]] = {}  # by number of stages

    def rings_for(
        self,
        chosen: Chosen,
        nodes: Sequence[NodeFacts],
        paths: Links,
        min_nodes: int,
        now: float,
        later: Collection[str] = (),
    ) -> list[Ring]:
        """The best rings of nodes that have none.

        Args:
            later: nodes to do without where the others make as many rings.

        Raises:
            ModelTooBig: these nodes cannot hold the model.
        """
        rings = self._best(chosen, nodes, paths, min_nodes, now)
        first = [node for node in nodes if node.node_id not in later]
        if len(first) >= min_nodes and any(n in later for ring in rings for n in ring.nodes):
            with suppress(ModelTooBig):
                without = self._best(chosen, first, paths, min_nodes, now)
                if len(without) >= len(rings):
                    return without
        return rings

    def _best(
        self,
        chosen: Chosen,
        nodes: Sequence[NodeFacts],
        paths: Links,
        min_nodes: int,
        now: float,
    ) -> list[Ring]:
        figures = self._figures(chosen, nodes, paths, now)
        plan = _plan(chosen, figures, min(min_nodes, len(nodes)))
        return self._rings(chosen, figures, plan)

    def instead(
        self,
        chosen: Chosen,
        nodes: Sequence[NodeFacts],
        paths: Links,
        rings: Sequence[Ring],
        min_nodes: int,
        now: float,
        later: Collection[str] = (),
    ) -> Change:
        """The best rings of these nodes, in place of those; the same ones stay.

        Raises:
            ModelTooBig: these nodes cannot hold the model.
        """
        wanted = self.rings_for(chosen, nodes, paths, min_nodes, now, later)
        kept = {ring.places for ring in rings} & {ring.places for ring in wanted}
        old = [ring for ring in rings if ring.places not in kept]
        return Change(old, [ring for ring in wanted if ring.places not in kept])

    def taken_up(self, chosen: Chosen, nodes: Sequence[NodeFacts], now: float) -> list[Ring]:
        """Rings that served before this process began, all of whose nodes are here and free."""
        by_id = {node.node_id: node for node in nodes}
        return [
            Ring(chosen.source, layout.places, layout.tokens_s)
            for layout in self.layouts.take_up(chosen.folder.digest, by_id.keys(), now)
            if _can_be(chosen, layout.places, by_id)
        ]

    def change(
        self,
        chosen: Chosen,
        nodes: Sequence[NodeFacts],
        paths: Links,
        rings: Sequence[Ring],
        now: float,
    ) -> Change | None:
        """What should take the place of rings that all serve, if anything.

        Either rings can come nearer to the number of stages that was asked for, or the new plan
        has been better by the margin for long enough.
        """
        known = {node.node_id for node in nodes}
        if not rings or any(ring.state is not RingState.READY for ring in rings):
            return None
        if not all(known.issuperset(ring.nodes) for ring in rings):
            return None  # one of theirs is silent just now, or could not load something else
        better = self._better(chosen, nodes, paths, rings, now)
        if better is None:
            return None
        kept = {ring.places for ring in rings} & {ring.places for ring in better}
        new = [ring for ring in better if ring.places not in kept]
        if not new:
            return None
        if self._undoes(rings, {node_id for ring in better for node_id in ring.nodes}):
            self.replanning.undone(now)
        else:
            self.replanning.moved(now)
        return Change([ring for ring in rings if ring.places not in kept], new)

    def _better(
        self,
        chosen: Chosen,
        nodes: Sequence[NodeFacts],
        paths: Links,
        rings: Sequence[Ring],
        now: float,
    ) -> list[Ring] | None:
        least = min(len(ring.places) for ring in rings)
        wish = min(chosen.nodes, len(nodes))
        busy = {node for ring in rings for node in ring.nodes}
        figures = self._figures(chosen, nodes, paths, now)
        short = sum(len(ring.places) for ring in rings if len(ring.places) < wish)
        if least < wish and short + sum(node.node_id not in busy for node in nodes) >= wish:
            longer, _ = self._judge(chosen, figures, rings, wish)
            if longer is not None and min(len(r.stages) for r in longer.rings) > least:
                return self._rings(chosen, figures, longer)
        best, present = self._judge(chosen, figures, rings, min(wish, least))
        if best is None:
            return None
        undoes = self._undoes(rings, {s.node_id for ring in best.rings for s in ring.stages})
        if not self.replanning.is_due(present, best, now, undoes=undoes):
            return None
        return self._rings(chosen, figures, best)

    def _undoes(self, rings: Sequence[Ring], then: Collection[str]) -> bool:
        """Whether nodes that were tried again in vain are not among those that serve then."""
        return any(
            self.observed.is_slow_again(node_id)
            for ring in rings
            for node_id in ring.nodes
            if node_id not in then
        )

    def has_room(
        self,
        chosen: Chosen,
        place: Place,
        held: Sequence[wire.StageReady],
        budget_bytes: int,
    ) -> bool:
        """Whether a node can load a stage beside what it holds."""
        stage = wire.StageRange(model=chosen.source, first=place.first, end=place.end)
        cache_bytes = self.observed.cache_bytes(place.node_id)
        return has_room(
            chosen.facts, stage, held, budget_bytes=budget_bytes, cache_bytes=cache_bytes
        )

    def _rings(self, chosen: Chosen, figures: _Figures, plan: Plan) -> list[Ring]:
        return [
            Ring(chosen.source, self._places(chosen, figures, ring), ring.throughput_tokens_s)
            for ring in plan.rings
        ]

    def _places(self, chosen: Chosen, figures: _Figures, ring: RingPlan) -> tuple[Place, ...]:
        """A ring's cut: the one that its nodes had last, unless the new one is worth a change."""
        new = tuple(Place(s.node_id, s.first, s.end) for s in ring.stages)
        by_id = {node.node_id: node for node in figures.nodes}
        old = self.layouts.places_of(chosen.folder.digest, [place.node_id for place in new])
        if old is None or old == new or not _can_be(chosen, old, by_id):
            return new
        stages = [StagePlan(p.node_id, p.first, p.end) for p in old]
        before = _rate(figures, [stages])
        tokens_s, latency_s = ring.throughput_tokens_s, ring.latency_s
        after = Plan((ring,), tokens_s, latency_s, tokens_s)
        return new if improves(before, after, self._limits.replan_margin) else old

    def _figures(
        self, chosen: Chosen, nodes: Sequence[NodeFacts], paths: Links, now: float
    ) -> _Figures:
        facts = self.observed.corrected(chosen.facts, level(nodes), now)
        links, unknown = self.observed.links(paths, now)
        model = self.observed.drawing(chosen.facts, facts, now)
        return _Figures(model, facts, links, unknown)

    def _judge(
        self,
        chosen: Chosen,
        figures: _Figures,
        rings: Sequence[Ring],
        min_nodes: int,
    ) -> tuple[Plan | None, Plan]:
        """The best plan and what the present rings do by the same figures; remembered for these."""
        places = tuple(ring.places for ring in rings)
        asked = chosen.folder.digest, figures, places, chosen.cuts
        judged = self._judged.get(min_nodes)
        if judged is not None and judged[0] == asked:
            return judged[1], judged[2]
        present = _rate(
            figures, [[StagePlan(p.node_id, p.first, p.end) for p in r] for r in places]
        )
        best: Plan | None
        try:
            best = _plan(chosen, figures, min_nodes)
        except ModelTooBig:  # budgets are smaller than when the rings were made
            best = None
        self._judged[min_nodes] = asked, best, present
        return best, present


def _plan(chosen: Chosen, figures: _Figures, min_nodes: int) -> Plan:
    return make_plan(
        figures.model,
        figures.nodes,
        figures.links,
        cuts=chosen.cuts,
        min_nodes=min_nodes,
        default_link=figures.unknown,
    )


def _rate(figures: _Figures, rings: Sequence[Sequence[StagePlan]]) -> Plan:
    return rate(figures.model, figures.nodes, figures.links, rings, figures.unknown)


def _can_be(chosen: Chosen, places: Sequence[Place], nodes: Mapping[str, NodeFacts]) -> bool:
    """Whether a remembered cut is one of this model, allowed, and within today's budgets."""
    ends = [place.end for place in places]
    if [place.first for place in places] != [0, *ends[:-1]] or ends[-1] != chosen.facts.layers:
        return False
    if chosen.cuts is not None and not chosen.cuts.issuperset(ends[:-1]):
        return False
    return all(
        place.first < place.end
        and has_room(
            chosen.facts,
            wire.StageRange(model=chosen.source, first=place.first, end=place.end),
            (),
            budget_bytes=nodes[place.node_id].budget_bytes,
            cache_bytes=0,
        )
        for place in places
    )
