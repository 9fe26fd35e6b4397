"""The shell around blame: nodes whose rings break again and again are put aside, and come back."""

from __future__ import annotations

import logging

from parallax.fabric.errors import InternalError, LinkBroken, ParallaxError
from parallax.scheduler.blame import Blame, Judgement
from parallax.scheduler.formation import Formation
from parallax.scheduler.membership import NodeState
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.reconciler import Ring, RingState
from parallax.scheduler.roster import Roster
from parallax.scheduler.trouble import Trouble
from parallax.scheduler.wishes import Wishes

log = logging.getLogger(__name__)


class Aside:
    """Nodes that stay members and are not planned with, while others can do their work.

    Args:
        roster: who is heard, and what nodes are called.
        formation: rings as they are, and what is held against their nodes.
        wishes: rings as they should be.
        trouble: is told whom rings do without, and why.
        metrics: where it is counted.
    """

    def __init__(
        self,
        roster: Roster,
        formation: Formation,
        wishes: Wishes,
        trouble: Trouble,
        metrics: Metrics,
    ) -> None:
        self._roster = roster
        self._formation = formation
        self._blame: Blame = formation.blame
        self._wishes = wishes
        self._trouble = trouble
        self._metrics = metrics

    def tick(self, now: float) -> None:
        """Judges what is to be judged; to be called again and again."""
        for ring in self._formation.reconciler.rings:
            if ring.state is RingState.READY and self._formation.setbacks.steady(ring.nodes, now):
                self._blame.served(ring.nodes)
        if back := self._blame.over(now):
            log.info("planned with again: %s", ", ".join(map(self._roster.name_of, back)))
            self._wishes.plan()
        for judgement in self._blame.due(self._heard):
            self._judge(judgement, now)

    def told(self, node_id: str, now: float) -> dict[str, object] | None:
        """Why a node is aside and for how many seconds more, for the status."""
        why = self._blame.why(node_id)
        if why is None:
            return None
        return {"why": why, "seconds": round(self._blame.left_s(node_id, now))}

    def _heard(self, node_id: str) -> float | None:
        member = self._roster.members.get(node_id)
        well = member is not None and member.state is NodeState.READY and not member.starved
        return member.heard_s if member is not None and well else None

    def _judge(self, judgement: Judgement, now: float) -> None:
        rings = self._formation.reconciler.rings
        ring = next((ring for ring in rings if ring.nodes == judgement.nodes), None)
        if ring is None:
            return
        serving = {
            node
            for other in rings
            if other is not ring and other.state is RingState.READY
            for node in other.nodes
        }
        for node_id in judgement.suspects:
            spared = node_id in serving  # another ring would be lost with it
            if not spared and self._wishes.can_be_without(ring, self._blame.instead(node_id)):
                self._put_aside(node_id, ring, judgement, now)
                return

    def _put_aside(self, node_id: str, ring: Ring, judgement: Judgement, now: float) -> None:
        member = self._roster.members.get(node_id)
        if member is None:
            return
        name = member.facts.name
        work = judgement.work
        why = f"Rings with it broke {judgement.breaks} times in a row; {judgement.why}"
        seconds = self._blame.put_aside(node_id, member.incarnation, why, now, work=work)
        what = f"{name} is put aside for {seconds:.0f} s"
        fix = f"Others do its work meanwhile; 'parallax nodes undrain {name}' takes it back at once"
        kind = InternalError if work else LinkBroken
        error: ParallaxError = kind(what, why, fix)
        log.warning("%s", error.sentence)
        self._metrics.put_aside(name)
        self._formation.do(self._formation.reconciler.retire(ring))
        self._wishes.plan()
        self._trouble.tell(error)
        self._formation.ring_trouble = error
