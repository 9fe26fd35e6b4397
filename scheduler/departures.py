"""The shell around leaving: layers moved off nodes, nodes taken back, nodes sent away."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from parallax.fabric.errors import ModelTooBig, ParallaxError
from parallax.scheduler.formation import Formation
from parallax.scheduler.leaving import Departure, Leaving, find_node
from parallax.scheduler.planning import Change
from parallax.scheduler.reconciler import Ring, RingState
from parallax.scheduler.roster import Roster
from parallax.scheduler.store import Store
from parallax.scheduler.wishes import Wishes

log = logging.getLogger(__name__)

NOTE = "leaving"


class Departures:
    """Nodes that people ask to give their layers up.

    Args:
        store: where it is written down, before it is done.
        roster: the names of nodes.
        formation: rings as they are.
        wishes: rings as they should be.
        leaving: what was asked.
        send_away: refuses a node (id, name) from now on, and cuts it off.
        admitted: the names of those that may be members, here or not, by id.
    """

    def __init__(
        self,
        store: Store,
        roster: Roster,
        formation: Formation,
        wishes: Wishes,
        leaving: Leaving,
        send_away: Callable[[str, str], Awaitable[None]],
        admitted: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._store = store
        self._roster = roster
        self._formation = formation
        self._wishes = wishes
        self._leaving = leaving
        self._send_away = send_away
        self._admitted = admitted

    async def recall(self) -> None:
        """Takes up what was asked of an earlier process."""
        self._leaving.recall(await self._store.note(NOTE), time.monotonic())

    # --------------------------------------------------------- what people ask

    async def drain(self, word: str, *, force: bool = False) -> str:
        """A node is to have no layers; its requests move on. Returns its id.

        Raises:
            UnknownNode: no node is meant, or more than one.
            ModelTooBig: the model does not fit without it, and ``force`` is not set.
            BadSetting: it could not be written down, and is not done.
        """
        node_id, name = self._found(word)
        if not force:
            self._check(node_id, name)
        await self._write_down(node_id, self._leaving.drain(node_id, name, forced=force))
        self.tick(time.monotonic())
        return node_id

    async def undrain(self, word: str) -> str:
        """A node may have layers again. Returns its id.

        Raises:
            UnknownNode: no node is meant, or more than one.
        """
        node_id, _ = self._found(word)
        aside = self._formation.losses.forgive(node_id) | self._formation.blame.take_back(node_id)
        before = self._leaving.take_back(node_id)
        if before is not None:
            await self._write_down(node_id, before)
        if aside or before is not None:
            self._wishes.plan()
        return node_id

    async def remove(self, word: str, *, force: bool = False, at_once: bool = False) -> str:
        """A node is drained, for a minute at most, and then cut off for good. Returns its id.

        With ``at_once`` it is cut off before anything else is done, whether the model fits without
        it or not: its rings are made again without it, as if it had died.

        Raises:
            UnknownNode: no node is meant, or more than one.
            ModelTooBig: the model does not fit without it, and ``force`` is not set.
            BadSetting: it could not be written down, and is not done; with ``at_once`` it is done,
                and written as soon as it can be.
        """
        node_id, name = self._found(word)
        if at_once:
            self._leaving.remove(node_id, name, time.monotonic(), forced=True, wait_s=0.0)
            await self._let_go(node_id, name)  # if that fails, the next look sees to it
            return node_id
        if not force:
            self._check(node_id, name)
        before = self._leaving.remove(node_id, name, time.monotonic(), forced=force)
        await self._write_down(node_id, before)
        self.tick(time.monotonic())
        await self.cut_off(time.monotonic())
        return node_id

    def name_of(self, node_id: str) -> str:
        """A node's name for people."""
        return self._leaving.names().get(node_id) or self._roster.name_of(node_id)

    def state_of(self, node_id: str) -> str | None:
        """How a node that leaves stands; None for all others."""
        busy = self._formation.reconciler.place_of(node_id) is not None
        return self._leaving.state_of(node_id, busy=busy)

    # ------------------------------------------------------------------- doing

    def tick(self, now: float) -> None:
        """Brings the rings nearer to what was asked; to be called again and again."""
        leaving, reconciler = self._leaving.nodes, self._formation.reconciler
        if not leaving or reconciler.moving:
            return
        touched = [ring for ring in reconciler.rings if leaving.intersection(ring.nodes)]
        if touched:
            self._move(touched)
        if not reconciler.moving:
            for node_id in leaving:
                self._formation.do(reconciler.release(node_id))

    async def cut_off(self, now: float) -> None:
        """Sends away who has nothing to hand over any more, or no time left."""
        reconciler = self._formation.reconciler
        for node_id in self._leaving.due(reconciler.busy_nodes(), now):
            name = self._leaving.names().get(node_id)
            if name is None:
                continue  # it was sent away meanwhile
            for ring in [ring for ring in reconciler.rings if node_id in ring.nodes]:
                self._formation.do(reconciler.retire(ring))
            await self._let_go(node_id, name)

    async def _let_go(self, node_id: str, name: str) -> None:
        await self._send_away(node_id, name)
        self._leaving.take_back(node_id)
        await self._write()
        self._wishes.plan()

    def _move(self, touched: list[Ring]) -> None:
        reconciler, do = self._formation.reconciler, self._formation.do
        try:
            change = self._wishes.instead(touched, ())
        except ModelTooBig as error:
            nodes = {node for ring in touched for node in ring.nodes}
            if not self._leaving.forced(nodes):
                return  # it fitted when it was asked for: they stay for now
            self._wishes.missing_bytes = int(error.fields.get("missing_bytes", 0))
            change = Change(touched, [])
        if change is None:
            return
        log.info("rings move off leaving nodes: %s", [ring.places for ring in change.new])
        if all(ring.state is RingState.READY for ring in touched):
            do(reconciler.move(change.old, change.new))
        else:  # nothing runs there that could be disturbed
            for ring in change.old:
                do(reconciler.retire(ring))
            for ring in change.new:
                do(reconciler.want(ring))
        if not reconciler.rings:
            self._wishes.plan()  # which says how much is missing

    def _check(self, node_id: str, name: str) -> None:
        chosen, rings = self._wishes.chosen, self._formation.reconciler.rings
        touched = [ring for ring in rings if node_id in ring.nodes]
        if chosen is None or not touched:
            return
        try:
            self._wishes.instead(touched, (node_id,))
        except ModelTooBig as error:
            missing = int(error.fields["missing_bytes"])
            raise ModelTooBig(
                f"Without {name} the model {chosen.folder.name} does not fit: "
                f"{missing:,} bytes are missing",
                error.why,
                "Join another node first, or use --force: nothing is served then",
                **error.fields,
            ) from None

    def _found(self, word: str) -> tuple[str, str]:
        names = dict(self._admitted())  # a machine that was stolen does not attend
        names |= {m.facts.node_id: m.facts.name for m in self._roster.members.members()}
        names |= self._leaving.names()
        node_id = find_node(word, names)
        return node_id, names[node_id]

    async def _write_down(self, node_id: str, before: Departure | None) -> None:
        """Writes what was asked of a node; what cannot be written is not done either.

        Raises:
            BadSetting: it could not be written down.
        """
        try:
            await self._write()
        except ParallaxError:
            self._leaving.restore(node_id, before)
            raise

    async def _write(self) -> None:
        await self._store.keep(NOTE, self._leaving.told())
