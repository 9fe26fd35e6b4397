"""The shell around blame and losses: nodes that are put aside, and come back.

Who is aside, and what is held against whom, is written down and known over restarts.
"""

from __future__ import annotations

import logging
import time

from parallax.fabric.errors import InternalError, LinkBroken, ParallaxError
from parallax.scheduler.blame import Blame, Judgement
from parallax.scheduler.formation import Formation
from parallax.scheduler.losses import Losses, finite
from parallax.scheduler.membership import (
    NodeArrived,
    NodeGone,
    NodeRecovered,
    NodeState,
    NodeSuspected,
)
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.reconciler import Ring, RingState
from parallax.scheduler.roster import Roster
from parallax.scheduler.store import Store
from parallax.scheduler.trouble import Trouble
from parallax.scheduler.wishes import Wishes

log = logging.getLogger(__name__)

NOTE = "aside"


class Aside:
    """Nodes that stay members and are not planned with, while others can do their work.

    Args:
        store: where it is written down.
        roster: who is heard, and what nodes are called.
        formation: rings as they are, and what is held against their nodes.
        wishes: rings as they should be.
        trouble: is told whom rings do without, and why.
        metrics: where it is counted.
    """

    def __init__(
        self,
        store: Store,
        roster: Roster,
        formation: Formation,
        wishes: Wishes,
        trouble: Trouble,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._roster = roster
        self._formation = formation
        self._blame: Blame = formation.blame
        self._losses: Losses = formation.losses
        self._wishes = wishes
        self._trouble = trouble
        self._metrics = metrics
        self._written: tuple[list[object], list[object]] = ([], [])

    # ------------------------------------------------------------------ memory

    async def recall(self) -> None:
        """Takes up who was aside in an earlier process, and why."""
        match await self._store.note(NOTE):
            case {"monotonic_s": then, "wall_s": wall, "blame": blame, "losses": losses}:
                now = time.monotonic()
                try:
                    passed_s = max(0.0, time.time() - finite(wall))
                    shift_s = now - passed_s - finite(then)
                except (TypeError, ValueError, OverflowError):
                    return
                self._blame.recall(blame, shift_s, now)
                self._losses.recall(losses, shift_s, now)
                self._written = self._blame.told(), self._losses.told()
                if self._formation.aside:
                    self._wishes.be_patient(now)

    async def remember(self) -> None:
        """Writes that down whenever it has changed."""
        told = self._blame.told(), self._losses.told()
        if told != self._written:
            clocks = {"monotonic_s": time.monotonic(), "wall_s": time.time()}
            await self._store.keep(NOTE, {**clocks, "blame": told[0], "losses": told[1]})
            self._written = told

    # ------------------------------------------------------------ nodes that come and go

    def gone(self, change: NodeGone | NodeSuspected, now: float) -> None:
        """A node is gone, or silent; to be told before its rings are given up."""
        node_id = change.node_id
        self._blame.excuse(node_id)
        if self._formation.reconciler.place_of(node_id) is None:
            return
        if isinstance(change, NodeSuspected):
            member = self._roster.members.get(node_id)
            incarnation = member.incarnation if member else 0
            self._losses.lost(
                node_id, incarnation, f"it was silent for {change.silent_s:.0f} s", now
            )
        elif not change.farewell:
            self._losses.lost(node_id, change.incarnation, change.reason, now)

    def back(self, change: NodeArrived | NodeRecovered, now: float) -> None:
        """A node attends, or speaks again; to be told before anything is planned with it."""
        member = self._roster.members.get(change.node_id)
        if member is None:
            return
        self._blame.arrived(change.node_id, member.incarnation)
        seconds = self._losses.back(change.node_id, member.incarnation, now)
        if seconds is not None:
            name, why = member.facts.name, self._losses.why(change.node_id)
            log.warning("%s is put aside for %.0f s: %s", name, seconds, why)
            self._metrics.put_aside(name)

    # --------------------------------------------------------------------- judgement

    def tick(self, now: float) -> None:
        """Judges what is to be judged; to be called again and again."""
        for ring in self._formation.reconciler.rings:
            if ring.state is RingState.READY and self._formation.setbacks.steady(ring.nodes, now):
                self._blame.served(ring.nodes)
        ready = [ring for ring in self._formation.reconciler.rings if ring.state is RingState.READY]
        self._losses.serving({node for ring in ready for node in ring.nodes}, now)
        if back := [*self._blame.over(now), *self._losses.over(now)]:
            log.info("planned with again: %s", ", ".join(map(self._roster.name_of, back)))
            self._wishes.plan()
        for judgement in self._blame.due(self._heard):
            self._judge(judgement, now)

    def told(self, node_id: str, now: float) -> dict[str, object] | None:
        """Why a node is aside and for how many seconds more, for the status."""
        judges = (self._blame, self._losses)
        left = [
            (judge.left_s(node_id, now), why) for judge in judges if (why := judge.why(node_id))
        ]
        if not left:
            return None
        seconds, why = max(left)
        return {"why": why, "seconds": round(seconds)}

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
            aside = self._blame.instead(node_id) | self._losses.aside
            if not spared and self._wishes.can_be_without(ring, aside):
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
