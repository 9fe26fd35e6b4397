"""The shell around the scheduler's machines: members, plans, rings and requests together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing

from parallax.fabric.credentials import Credentials
from parallax.fabric.errors import (
    Dismissed,
    MessageRefused,
    NoRing,
    ParallaxError,
    RingLost,
    StageStuck,
    from_fault,
    to_fault,
)
from parallax.fabric.events import Event, NodeJoined, NodeLeft
from parallax.fabric.models import ModelFolder
from parallax.fabric.settings import SchedulerSettings
from parallax.fabric.tally import Tally
from parallax.fabric.tasks import Tasks
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.aside import Aside
from parallax.scheduler.catalog import list_models
from parallax.scheduler.choosing import Choosing
from parallax.scheduler.chosen import Chosen
from parallax.scheduler.control import NodeLink
from parallax.scheduler.departures import Departures
from parallax.scheduler.fence import Fence
from parallax.scheduler.formation import Formation
from parallax.scheduler.gate import Gate
from parallax.scheduler.generation import CatalogModel, Finish, Generation, ServedModel, Token
from parallax.scheduler.head_metrics import HeadMetrics
from parallax.scheduler.journal import Journal
from parallax.scheduler.leaving import Leaving
from parallax.scheduler.ledger import Ledger
from parallax.scheduler.membership import (
    Change,
    Member,
    NodeArrived,
    NodeGone,
    NodeReady,
    NodeRecovered,
    NodeState,
    NodeSuspected,
)
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.model_facts import ModelFacts
from parallax.scheduler.planner import LinkFacts
from parallax.scheduler.planning import Planning
from parallax.scheduler.reconciler import Place, Ring, RingState
from parallax.scheduler.roster import Roster
from parallax.scheduler.setbacks import hanging
from parallax.scheduler.status import loading_of, status_of
from parallax.scheduler.store import Choice, Store
from parallax.scheduler.trouble import Trouble
from parallax.scheduler.weights import ModelWeights
from parallax.scheduler.wishes import Wishes

log = logging.getLogger(__name__)


class ClusterService:
    """What HTTP sees (``Cluster``) and what nodes report to (``Desk``), in one place."""

    def __init__(
        self,
        settings: SchedulerSettings,
        credentials: Credentials,
        store: Store,
        metrics: Metrics,
        on_event: Callable[[Event], None],
        journal: Journal | None = None,
    ) -> None:
        self.settings = settings
        self.peer_id = peer_id = credentials.peer_id
        self._limits = settings.limits
        self._store = store
        self._on_event = on_event
        self.gate = Gate(
            peer_id,
            store,
            metrics,
            on_event,
            open_to_all=settings.open,
            token_s=self._limits.join_token_s,
            certificate_s=self._limits.certificate_s,
            most_idle=self._limits.unattended_nodes,
        )
        self.gate.decided = self._decided
        self.tally = Tally(settle_s=2 * self._limits.connect_s)
        self._roster = Roster(credentials, self._limits)
        self.fence = Fence(self._roster, self.gate.sent_away)
        self.members = self._roster.members
        self._metrics = metrics
        self.totals = metrics.totals
        self._ledger = Ledger(store, metrics.totals)
        self._head_metrics = HeadMetrics(metrics)
        self.weights = ModelWeights(settings.state_dir, metrics.observe_weights)
        self._planning = Planning(self._limits)
        self._trouble = Trouble(on_event)
        self._formation = Formation(
            self._limits,
            store,
            self._roster,
            metrics,
            self._planning.observed,
            has_room=self._has_room,
            chosen=lambda: self.chosen,
            missing_bytes=lambda: self.missing_bytes,
            trouble=self._trouble.tell,
            on_event=on_event,
            speculation=settings.speculation,
            journal=journal,
        )
        self.reconciler = self._formation.reconciler
        self.requests = self._formation.requests
        self._setbacks = self._formation.setbacks
        self._do = self._formation.do
        leaving = Leaving()
        self._wishes = Wishes(
            store,
            self._roster,
            self._planning,
            self._formation,
            self._trouble,
            self._limits.reload_s,
            barred=lambda: leaving.nodes,
        )
        self.departures = Departures(
            store,
            self._roster,
            self._formation,
            self._wishes,
            leaving,
            self._send_away,
            self.gate.admitted,
        )
        self._blame = self._formation.blame
        self.aside = Aside(
            store, self._roster, self._formation, self._wishes, self._trouble, metrics
        )
        self._tasks = Tasks()
        self._choosing = Choosing(settings.state_dir, self._take, self._trouble.tell)

    async def start(self) -> None:
        """Begins to watch members; takes up the model of the settings or of the last run."""
        self.requests.start()
        await self.departures.recall()
        await self._ledger.recall()
        await self._wishes.recall()
        await self.aside.recall()
        self._tasks.start(self._watch())
        self._tasks.start(self._write_on())
        self._tasks.start(self.gate.keep_renewing())
        remembered = await self._store.choice()
        if self.settings.model is not None:
            await self.choose(self.settings.model, self.settings.nodes, True)
        elif remembered is not None:
            try:
                await self.choose(remembered.model, remembered.nodes, True)
            except ParallaxError as error:  # nodes and people can still come
                self._trouble.tell(error)

    async def stop(self) -> None:
        """Lets answers in flight finish for a while, takes no new ones, then ends everything."""
        self.requests.refuse()
        await self.requests.drained(self._limits.drain_s)
        await self.requests.stop()
        self._do(self.reconciler.want_none())
        self._roster.close()
        await self._choosing.stop()
        self.weights.close()
        await self._formation.stop()
        await self._tasks.stop()
        await self._ledger.write()

    @property
    def chosen(self) -> Chosen | None:
        """The model that is to be served."""
        return self._wishes.chosen

    @property
    def problem(self) -> ParallaxError | None:
        """What is wrong just now."""
        return self._trouble.problem

    @property
    def missing_bytes(self) -> int | None:
        """How much memory the model lacks, where it does not fit."""
        return self._wishes.missing_bytes

    # ------------------------------------------------------- what HTTP asks for

    async def generate(self, generation: Generation) -> AsyncGenerator[Token | Finish, None]:
        """See :class:`~parallax.scheduler.generation.Cluster`."""
        if self.chosen is None or generation.model != self.chosen.folder.name:
            raise NoRing(
                f"{generation.model} is not served any more",
                "the cluster changed its model while the prompt was read",
                "Send the request again",
                retry_after_s=self._limits.retry_after_s,
            )
        async with aclosing(self.requests.generate(generation)) as answer:
            async for event in answer:
                yield event

    def check_place(self, client: str) -> None:
        """See :class:`~parallax.scheduler.generation.Cluster`."""
        self.requests.check_place(client)

    def served(self) -> ServedModel | None:
        """The current model, or None before one is chosen."""
        return self.chosen.served if self.chosen else None

    def catalog(self) -> list[CatalogModel]:
        """Models that may be chosen."""
        return list_models(self.settings.state_dir, self.served())

    def status(self) -> dict[str, object]:
        """The ``data`` of a ``cluster_status`` message."""
        return status_of(self)

    def join_command(self) -> str:
        """What to type on another machine, with a token: for admins' eyes."""
        return self.gate.join_command()

    async def choose(self, model: str, nodes: int, local_network: bool) -> None:
        """Looks a model up and makes it the cluster's, in place of the one before.

        A model that must be fetched first is accepted after a while; what goes
        wrong later is shown in the status.
        """
        await self._choosing.choose(model, nodes)

    @property
    def choosing(self) -> str | None:
        """A model that is being looked up or fetched."""
        return self._choosing.model

    async def _take(self, folder: ModelFolder, facts: ModelFacts, nodes: int) -> None:
        before = await self._store.choice()
        await self._store.choose(Choice(folder.location, nodes))
        await self.weights.offer(folder)
        if before is not None and before.nodes != nodes:
            self._wishes.forget()
        chosen = self.chosen
        if chosen is not None and chosen.is_same(folder) and not chosen.failed:
            self._wishes.wish(nodes)  # what it serves or loads already goes on
            return
        await self._leave_model()
        self._planning.observed.forget_model()
        self._wishes.chosen = Chosen(folder, facts, nodes)
        self._trouble.over()
        self._wishes.plan()

    def _has_room(self, ring: Ring, place: Place) -> bool:
        return self._wishes.has_room(ring, place)

    async def _send_away(self, node_id: str, name: str) -> None:
        """This node is refused from now on, and its stream ended."""
        await self.gate.remove(node_id, name)

    def _decided(self) -> None:
        """Who may not be a member any more loses its stream, and all others hear of it."""
        self.fence.tell()
        away = frozenset(self.gate.sent_away())
        for member in self.members.usable():
            node_id, name = member.facts.node_id, member.facts.name
            self.gate.attended(node_id)  # it came by --open, perhaps, and is let in only now
            if node_id in away:
                fault = self._dismissal(node_id, name)
                self._roster.order(node_id, wire.NodeOrder(dismiss=wire.Dismiss(fault=fault)))
                why = "it was sent away"
                self._follow(self.members.goodbye(member.stream, why, now=time.monotonic()))

    def _dismissal(self, node_id: str, name: str) -> wire.Fault:
        done, verb = ("removed", "remove") if self.gate.removed(node_id) else ("denied", "deny")
        what = f"{name} was {done} and is no member of this cluster"
        why = f"somebody used 'parallax nodes {verb}'"
        fix = "Ask whoever runs the scheduler to let it in again"
        return to_fault(Dismissed(what, why, fix))

    async def _leave_model(self) -> None:
        """Answers in flight get a while to finish; then the old rings go."""
        if self.chosen is None:
            return
        self.requests.pause()
        try:
            await self.requests.drained(self._limits.drain_s)
            error = RingLost("The cluster changed its model", fix="Send the request to the new one")
            self.requests.fail_all(error)
            self._do(self.reconciler.want_none())
        finally:
            self.requests.resume()

    # ----------------------------------------------------- what nodes report to

    def node_hello(self, hello: wire.Hello, link: NodeLink) -> None:
        """A node attends.

        Raises:
            VersionMismatch: it cannot be part of a ring here.
        """
        if hello.facts.node_id in self.gate.sent_away():
            raise from_fault(self._dismissal(hello.facts.node_id, hello.facts.name))
        changes = self._roster.hello(hello, link, time.monotonic())
        self.gate.attended(hello.facts.node_id)
        self.fence.greet(hello.facts.node_id)  # before it is told to do anything with others
        self._follow(changes)

    def node_report(self, node_id: str, link: NodeLink, report: wire.NodeReport) -> None:
        """A node says something; what comes over a stream that it has replaced is too late."""
        now = time.monotonic()
        member = self.members.get(node_id)
        if member is None or not self._roster.current(node_id, link):
            return
        match report.WhichOneof("report"):
            case "heartbeat":
                starved, name = report.heartbeat.starved, self.name_of(node_id)
                if starved:  # what broke since it was last heard broke for that
                    self._blame.excuse(node_id, member.heard_s - self._limits.silence_s)
                self._metrics.observe_stale(name, report.heartbeat.refused_frames)
                self._follow(self.members.heartbeat(member.stream, starved=starved, now=now))
                if not starved:  # else nothing went on there, and it knows
                    self._busy(node_id, report.heartbeat.since_progress_s, stepped=False)
                self._metrics.turned_away(member.facts.name, report.heartbeat.refused)
            case "progress":
                self._loading(node_id, report.progress)
            case "ready":
                self._do(self.reconciler.stage_ready(node_id, report.ready))
            case "failed":
                self._wishes.stage_failed(node_id, report.failed)
            case "joined":
                self._do(self.reconciler.joined(node_id, report.joined.epoch))
            case "broken":
                self._formation.reported(node_id, report.broken)
            case "health" if ring := self.reconciler.part_of(node_id, report.health.epoch):
                health = report.health
                if not ring.seats(node_id, health.stage):
                    return
                if ring.state is RingState.READY:  # whose end is told
                    self._formation.stage_metrics.observe(health, self.name_of(node_id))
                    self._planning.observed.observe(health, ring, time.monotonic())
                if not member.starved:
                    self._busy(
                        node_id,
                        health.since_progress_s,
                        stepped=health.decode_frames > 0,
                        slowest_s=health.slowest_s,
                    )
            case "link" if self.members.get(report.link.node_id):
                path = LinkFacts(report.link.round_trip_s, report.link.bandwidth_bytes_s)
                self._roster.paths[node_id, report.link.node_id] = path
            case "goodbye":
                bye, stream = report.goodbye, member.stream
                self._follow(self.members.goodbye(stream, bye.reason, now=now, failed=bye.failed))

    def node_lost(self, node_id: str, link: NodeLink, reason: str) -> None:
        """A node's stream ended."""
        self._follow(self._roster.lost(link, time.monotonic()))

    def message_refused(self, sender: str, error: MessageRefused) -> None:
        """A node said something that makes no sense; its stream ends."""
        log.warning("refused of %s: %s", sender, error.sentence)
        self._metrics.message_refused("hello" if sender == "hello" else "report")

    def certificate_s(self, node_id: str) -> float:
        """See :class:`~parallax.scheduler.control.Desk`."""
        return self.gate.certificate_s(node_id)

    def name_of(self, node_id: str) -> str:
        """A node's name for people."""
        return self._roster.name_of(node_id)

    def state_of(self, member: Member) -> str:
        """How a node stands; one that hangs is as suspect as one that is silent."""
        node_id = member.facts.node_id
        if member.state is NodeState.READY:
            if self._setbacks.stuck(node_id):
                return NodeState.SUSPECT.value
            leaving = self.departures.state_of(node_id)
            if leaving is not None:
                return leaving
            if node_id in self._formation.aside:
                return "aside"
        return member.state.value

    # --------------------------------------------------------------- decisions

    def _follow(self, changes: Iterable[Change]) -> None:
        replan, now = False, time.monotonic()
        for change in changes:
            if isinstance(change, NodeArrived):
                member = self.members.get(change.node_id)
                budget = member.facts.budget_bytes if member else 0
                self.aside.back(change, now)
                self._do(self.reconciler.node_up(change.node_id, budget))
                if self.chosen is not None:
                    self.chosen.failed.pop(change.node_id, None)
                self._on_event(NodeJoined(self.name_of(change.node_id)))
            elif isinstance(change, NodeReady):
                replan = True  # only now: what it holds it said before its first heartbeat
            elif isinstance(change, NodeSuspected):
                log.warning("%s is silent: others take over", self.name_of(change.node_id))
                self.aside.gone(change, now)
                self._without(change.node_id)
                replan = True
            elif isinstance(change, NodeRecovered):
                self.aside.back(change, now)
                replan = True
            elif isinstance(change, NodeGone):
                name = self.name_of(change.node_id)
                self.aside.gone(change, now)
                self._do(self.reconciler.node_down(change.node_id))
                self._roster.gone(change)
                self._setbacks.gone(change.node_id)
                self._planning.observed.forget_node(change.node_id)
                self._on_event(NodeLeft(name, change.reason))
                replan = True
        if replan:
            self._planning.replanning.members_changed()
            self._wishes.plan()

    def _busy(
        self, node_id: str, busy_s: float, *, stepped: bool, slowest_s: float | None = None
    ) -> None:
        """A node whose compute thread hangs gets no work until it goes on."""
        change = self._setbacks.busy(node_id, busy_s, stepped=stepped, slowest_s=slowest_s)
        if change is None:
            return
        if not change:
            self._trouble.over(StageStuck)
            self._wishes.plan()
            return
        self._blame.excuse(node_id)
        self._without(node_id)
        self._wishes.plan()
        self._trouble.tell(hanging(self.name_of(node_id), busy_s))

    def _without(self, node_id: str) -> None:
        """Rings with this node serve nobody: their requests wait for others, or for it."""
        for ring in [r for r in self.reconciler.rings if node_id in r.nodes]:
            self._do(self.reconciler.retire(ring))

    def _loading(self, node_id: str, progress: wire.LoadProgress) -> None:
        self.reconciler.stage_progress(node_id, progress)
        self._on_event(loading_of(progress, self.name_of(node_id)))

    # ------------------------------------------------------------------- clock

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._limits.heartbeat_s / 2)
            try:
                self._tick(time.monotonic())
                self.fence.tell()
                self._metrics.turned_away("", self.tally.totals(time.monotonic()))
                self._metrics.set_queue(self.requests.waiting, self.requests.running)
                self._head_metrics.observe(self.requests.loads)
                self._metrics.observe_stale("scheduler", self.requests.refused)
            except Exception:  # the watch must go on
                log.exception("watching the members failed")

    async def _write_on(self) -> None:
        """Beside the watch: a slow disk must make nobody blind."""
        failure = ""
        while True:
            await asyncio.sleep(self._limits.heartbeat_s / 2)
            try:
                await self.departures.cut_off(time.monotonic())  # first: also on a full disk
                await self.gate.write()
                await self._wishes.remember()
                await self.aside.remember()
                await self._ledger.write(time.monotonic())
                failure = ""
            except ParallaxError as error:  # said once, and tried again
                if error.sentence != failure:
                    log.warning("what the scheduler remembers is not written: %s", error.sentence)
                failure = error.sentence
            except Exception:
                log.exception("writing down what the scheduler remembers failed")

    def _tick(self, now: float) -> None:
        self._follow(self.members.tick(now))
        self.departures.tick(now)
        self._wishes.tick(now)
        rings = self.reconciler.rings
        trouble = self._formation.ring_trouble
        if trouble and all(self._setbacks.steady(r.nodes, now) for r in rings):
            self._trouble.over(trouble)
            self._formation.ring_trouble = None
        self._formation.tick(now)
        self.aside.tick(now)
