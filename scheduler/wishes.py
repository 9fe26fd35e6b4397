"""The shell around planning: which rings are wanted, of which nodes, and from when on."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection

from parallax.fabric.errors import (
    CutRefused,
    ModelTooBig,
    ParallaxError,
    UnknownArchitecture,
    from_fault,
)
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.chosen import Chosen
from parallax.scheduler.formation import Formation
from parallax.scheduler.layouts import WAIT_S
from parallax.scheduler.membership import NodeFacts, NodeState
from parallax.scheduler.planning import Change, Planning
from parallax.scheduler.reconciler import Place, Ring, RingState
from parallax.scheduler.roster import Roster
from parallax.scheduler.spares import Spares
from parallax.scheduler.store import Store
from parallax.scheduler.trouble import Trouble, of_node

log = logging.getLogger(__name__)

LOOK_S = 2.0  # between two looks for better rings
NOTE = "layouts"
MOST_TOLD = 4  # nodes that could not load, in one sentence

_FOR_GOOD = (CutRefused, ModelTooBig, UnknownArchitecture)  # waiting does not help


class Wishes:
    """Asks for rings: first ones, better ones, and those that served in an earlier life.

    Args:
        store: where the rings that serve are written down.
        reload_s: after how long a node that could not load is tried again.
        barred: nodes that no plan may count on, whatever they could do.
    """

    def __init__(
        self,
        store: Store,
        roster: Roster,
        planning: Planning,
        formation: Formation,
        trouble: Trouble,
        reload_s: float,
        barred: Callable[[], Collection[str]],
    ) -> None:
        self._store = store
        self._roster = roster
        self._planning = planning
        self._layouts = planning.layouts
        self._do = formation.do
        self._reconciler = formation.reconciler
        self._setbacks = formation.setbacks
        self._formation = formation
        self._losses = formation.losses
        self._trouble = trouble
        self._reload_s = reload_s
        self._barred = barred
        self.chosen: Chosen | None = None
        self.missing_bytes: int | None = None
        self._spares = Spares()
        self._next_look = 0.0
        self._left_out: set[str] = set()  # nodes that no ring could be made of when last tried
        self._retries: dict[str, float] = {}  # when a node that could not load tries again
        self._told: ParallaxError | None = None  # of such a node
        self._changed = False  # another number of stages is asked for than rings were made for
        self._unwritten = False  # whether other rings serve than the disk says
        self._patient_until: float | None = None  # till then nobody is taken back

    # ------------------------------------------------------------------ memory

    async def recall(self) -> None:
        """Takes up the rings that served in an earlier process, once their nodes attend."""
        self._layouts.recall(await self._store.note(NOTE))

    async def remember(self) -> None:
        """Writes the rings down that serve, whenever they are others than before."""
        rings = self._reconciler.rings
        settled = rings and all(ring.state is RingState.READY for ring in rings)
        if settled and not self._reconciler.moving and self._layouts.served(rings):
            self._unwritten = True
        if self._unwritten:  # also what a full disk did not take the last time
            await self._store.keep(NOTE, self._layouts.told())
            self._unwritten = False

    def be_patient(self, now: float) -> None:
        """Some nodes were aside when this process began: others may still come."""
        self._patient_until = now + WAIT_S

    def forget(self) -> None:
        """People asked for something else than what served in an earlier process."""
        self._layouts.give_up()

    # --------------------------------------------------------------- decisions

    def plan(self) -> None:
        """Plans rings over the nodes that have no place yet."""
        chosen = self.chosen
        if chosen is None or self._reconciler.moving:
            return
        now = time.monotonic()
        usable = self.usable(chosen)
        self._take_up(chosen, usable, now)
        busy, awaited = self._reconciler.busy_nodes(), self._layouts.awaited
        free = [f for f in usable if f.node_id not in busy and f.node_id not in awaited]
        here = usable if self._patient_until is not None else self._fit(chosen)
        began = chosen.began or self._layouts.waited or len(here) >= chosen.nodes
        waits = awaited.intersection(facts.node_id for facts in usable)
        if (not free and (busy or waits)) or not began:
            return
        if self._reconsider(chosen, usable, now):
            return
        try:
            rings = self._planning.rings_for(
                chosen, free, self._roster.paths, chosen.nodes, now, self._losses.often
            )
        except ModelTooBig as error:
            if not busy and self._patient_until is None and self._take_back():
                self.plan()
            elif not busy:
                self.missing_bytes = int(error.fields.get("missing_bytes", 0))
                self._trouble.tell(_without(error, chosen))
            return
        chosen.began = True
        self.missing_bytes = None
        if not chosen.failed:
            self._trouble.over()
        elif self._told is not None and isinstance(self._trouble.problem, ModelTooBig):
            self._trouble.tell(self._told)  # but it fits now
        for ring in rings:
            self._do(self._reconciler.want(ring))

    def wish(self, nodes: int) -> None:
        """So many nodes should share a copy from now on; rings that serve move to that."""
        if self.chosen is None or self.chosen.nodes == nodes:
            return
        self.chosen.nodes = nodes
        self._changed = True
        self._reshape(self.chosen)
        self.plan()

    def tick(self, now: float) -> None:
        """Now and then: is a wait over, have figures or nodes made better rings possible?"""
        enough = self._patient_until is not None and now >= self._patient_until
        if enough:
            self._patient_until = None
        if self._layouts.over(now) or enough:
            self.plan()
        if self._changed and self.chosen is not None:
            self._reshape(self.chosen)
        for node_id in [n for n, due in self._retries.items() if now >= due]:
            del self._retries[node_id]
            if self.chosen is not None and node_id in self.chosen.failed:
                del self.chosen.failed[node_id]
                if not self.chosen.failed and self._told is not None:
                    self._trouble.over(self._told)  # as far as is known
                self.plan()
        if now >= self._next_look:
            self.look(now)

    def stage_failed(self, node_id: str, failed: wire.StageFailed) -> None:
        """A node could not load: others are planned with, and it tries again after a while."""
        error = from_fault(failed.fault)
        chosen = self.chosen
        if chosen is None or failed.stage.model.digest != chosen.folder.digest:
            return
        wanted = self._reconciler.wants(node_id, failed.stage)
        self._do(self._reconciler.stage_failed(node_id, failed.stage))
        if not wanted:  # of a plan that was given up meanwhile, by another node's failure perhaps
            return
        if isinstance(error, CutRefused) and chosen.cuts is None:
            text = error.fields.get("working_cuts", "")
            chosen.cuts = frozenset(map(int, re.findall(r"\b\d{1,5}\b", text)))
        else:
            layers = f"layers {failed.stage.first} to {failed.stage.end - 1}"
            name = self._roster.name_of(node_id)
            error = self._told = of_node(
                name, error, f"could not load {layers} of {chosen.folder.name}"
            )
            chosen.failed[node_id] = error.sentence
            if not isinstance(error, _FOR_GOOD):
                self._retries[node_id] = time.monotonic() + self._reload_s
        self._trouble.tell(error)
        self.plan()

    def look(self, now: float) -> None:
        """Looks for better rings."""
        self._next_look = now + LOOK_S
        chosen = self.chosen
        if chosen is None or self._reconciler.moving:
            return
        usable = self.usable(chosen)
        left = {facts.node_id for facts in usable} - self._reconciler.busy_nodes()
        rings = self._reconciler.rings
        if all(ring.state is RingState.READY for ring in rings):
            self._do(self._spares.prepare(rings, left))
        if not self._reconsider(chosen, usable, now) and left != self._left_out:
            self.plan()
            self._left_out = left
        self._do(self._reconciler.settle())

    def usable(self, chosen: Chosen) -> list[NodeFacts]:
        """The nodes that can be planned with."""
        aside = self._formation.aside
        return [facts for facts in self._fit(chosen) if facts.node_id not in aside]

    def _fit(self, chosen: Chosen) -> list[NodeFacts]:
        members = self._roster.members.usable()
        known = [m.facts for m in members if m.state is NodeState.READY]
        barred = {*chosen.failed, *self._barred()}
        fit = (facts for facts in known if not self._setbacks.stuck(facts.node_id))
        return [facts for facts in fit if facts.node_id not in barred]

    def instead(self, touched: list[Ring], without: Collection[str]) -> Change | None:
        """Rings of the nodes that stay, in place of those; only fewer, where others serve.

        Raises:
            ModelTooBig: nothing would serve any more.
        """
        chosen = self.chosen
        if chosen is None:
            return None
        others = [ring for ring in self._reconciler.rings if ring not in touched]
        out = {*without, *(node for ring in others for node in ring.nodes)}
        pool = [facts for facts in self.usable(chosen) if facts.node_id not in out]
        try:
            paths, later = self._roster.paths, self._losses.often
            now = time.monotonic()
            return self._planning.instead(chosen, pool, paths, touched, chosen.nodes, now, later)
        except ModelTooBig:
            if others:
                return Change(touched, [])
            raise

    def can_be_without(self, ring: Ring, aside: Collection[str]) -> bool:
        """Whether the model is still served, by as many rings, without a ring of these nodes."""
        chosen = self.chosen
        if chosen is None:
            return False
        if self._reconciler.has_old(ring):
            return True
        others = [other for other in self._reconciler.rings if other is not ring]
        out = {*aside, *(node for other in others for node in other.nodes)}
        pool = [facts for facts in self._fit(chosen) if facts.node_id not in out]
        try:
            now = time.monotonic()
            self._planning.rings_for(chosen, pool, self._roster.paths, chosen.nodes, now)
        except ModelTooBig:
            return False
        return True

    def has_room(self, ring: Ring, place: Place) -> bool:
        """Whether a node can hold a stage beside what it holds."""
        member = self._roster.members.get(place.node_id)
        if self.chosen is None or member is None:
            return False
        held = self._reconciler.held(place.node_id)
        return self._planning.has_room(self.chosen, place, held, member.facts.budget_bytes)

    def _take_back(self) -> bool:
        """Plans with those again that were put aside: without them nothing serves."""
        blame = self._formation.blame
        back = self._losses.needed() or [n for n in blame.aside if blame.take_back(n)]
        if back:
            names = ", ".join(self._roster.name_of(node_id) for node_id in sorted(back))
            log.warning("%s: planned with again, for the model does not fit without", names)
        return bool(back)

    def _take_up(self, chosen: Chosen, usable: list[NodeFacts], now: float) -> None:
        """Goes on with rings that served before this process began, as far as they are whole."""
        # What was asked for last counts, and what happened last.
        self._layouts.give_up({*self._barred(), *self._formation.aside})
        busy = self._reconciler.busy_nodes()
        free = [facts for facts in usable if facts.node_id not in busy]
        for ring in self._planning.taken_up(chosen, free, now):
            log.info("a ring of the last run is taken up: %s", ring.places)
            chosen.began = True
            self._do(self._reconciler.want(ring))

    def _reconsider(self, chosen: Chosen, usable: list[NodeFacts], now: float) -> bool:
        """Begins to move the rings that serve to better ones, if there are such."""
        if self._layouts.awaited.intersection(facts.node_id for facts in usable):
            return False  # soon over; those of whom nobody comes at all hold up nothing
        rings, paths = self._reconciler.rings, self._roster.paths
        # Nobody's layers move to one that was lost more than once lately.
        later = self._losses.often - self._reconciler.busy_nodes()
        known = [facts for facts in usable if facts.node_id not in later]
        change = self._planning.change(chosen, known, paths, rings, now)
        if change is not None:
            log.info("rings move: %s", [ring.places for ring in change.new])
            self._do(self._reconciler.move(change.old, change.new))
        return change is not None

    def _reshape(self, chosen: Chosen) -> None:
        """Moves rings, when all of them serve, to ones of the number of stages asked for."""
        rings = self._reconciler.rings
        if self._reconciler.moving or any(ring.state is not RingState.READY for ring in rings):
            return
        self._changed = False
        usable, paths = self.usable(chosen), self._roster.paths
        try:
            now = time.monotonic()
            later = self._losses.often
            change = self._planning.instead(chosen, usable, paths, rings, chosen.nodes, now, later)
        except ModelTooBig:  # a node of theirs is silent just now
            return
        if change.old and change.new:
            self._do(self._reconciler.move(change.old, change.new))


def _without(error: ModelTooBig, chosen: Chosen) -> ModelTooBig:
    """That a model does not fit, and which nodes would help if they could load it."""
    if not chosen.failed:
        return error
    left_out = " ".join(list(chosen.failed.values())[:MOST_TOLD])
    why = f"{error.why.rstrip('.')}. Left out: {left_out}"
    return ModelTooBig(error.what, why, error.fix, **error.fields)
