"""The shell around the scheduler's machines: members, plans, rings and requests together."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any

from parallax.fabric.errors import (
    CutRefused,
    ModelTooBig,
    ParallaxError,
    RingLost,
    from_fault,
)
from parallax.fabric.events import Event, Loading, NodeJoined, NodeLeft, Problem, Ready
from parallax.fabric.models import resolve
from parallax.fabric.settings import SchedulerSettings
from parallax.fabric.version import PROTOCOL, mlx_lm_version, mlx_version
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.catalog import list_models
from parallax.scheduler.chosen import Chosen
from parallax.scheduler.control import NodeLink
from parallax.scheduler.dispatch import Dispatcher
from parallax.scheduler.generation import CatalogModel, Finish, Generation, ServedModel, Token
from parallax.scheduler.membership import (
    Change,
    Membership,
    NodeArrived,
    NodeFacts,
    NodeGone,
    Refused,
    Versions,
)
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.model_facts import read_facts
from parallax.scheduler.planner import LinkFacts, make_plan
from parallax.scheduler.reconciler import (
    Instruction,
    NeedEpoch,
    Order,
    Place,
    Reconciler,
    Ring,
    RingDown,
    RingUp,
)
from parallax.scheduler.shape import shape_of
from parallax.scheduler.speeds import level
from parallax.scheduler.stage_metrics import StageMetrics
from parallax.scheduler.status import status_of
from parallax.scheduler.store import Choice, Store

log = logging.getLogger(__name__)

BREAKS_IN_A_ROW = 3  # then a ring waits before it forms anew
REFORM_PAUSE_S = 1.0
ACCEPT_S = 20.0  # a model that takes longer to fetch is accepted, and fetched on


class ClusterService:
    """What HTTP sees (``Cluster``) and what nodes report to (``Desk``), in one place."""

    def __init__(
        self,
        settings: SchedulerSettings,
        peer_id: str,
        store: Store,
        metrics: Metrics,
        on_event: Callable[[Event], None],
    ) -> None:
        self.settings = settings
        self.peer_id = peer_id
        self._limits = settings.limits
        self._store = store
        self._on_event = on_event
        self._versions = Versions(PROTOCOL, mlx_version(), mlx_lm_version())
        self.members = Membership(self._versions, self._limits)
        self.reconciler = Reconciler(self._form)
        self.requests = Dispatcher(self._limits, self._ring_broken)
        self.chosen: Chosen | None = None
        self.problem: ParallaxError | None = None
        self.missing_bytes: int | None = None
        self.choosing: str | None = None  # a model that is being looked up or fetched
        self._metrics = metrics
        self._stage_metrics = StageMetrics(metrics)
        self._links: dict[int, NodeLink] = {}  # by stream
        self._stream_of: dict[int, int] = {}  # id of a link -> its stream
        self._hellos: dict[str, wire.Hello] = {}
        self._paths: dict[tuple[str, str], LinkFacts] = {}
        self._breaks: dict[tuple[str, ...], int] = {}
        self._streams = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._switch = asyncio.Lock()

    async def start(self) -> None:
        """Begins to watch members; takes up the model of the settings or of the last run."""
        self.requests.start()
        self._background(self._watch())
        remembered = await self._store.choice()
        if self.settings.model is not None:
            await self.choose(self.settings.model, self.settings.nodes, True)
        elif remembered is not None:
            with suppress(ParallaxError):
                await self.choose(remembered.model, remembered.nodes, True)

    async def stop(self) -> None:
        """Lets answers in flight finish for a while, then ends everything."""
        await self.requests.drained(self._limits.drain_s)
        await self.requests.stop()
        self._do(self.reconciler.want_none())
        for link in self._links.values():
            link.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------- what HTTP asks for

    async def generate(self, generation: Generation) -> AsyncGenerator[Token | Finish, None]:
        """See :class:`~parallax.scheduler.generation.Cluster`."""
        answer = self.requests.generate(generation)
        try:
            async for event in answer:
                yield event
        finally:
            await answer.aclose()

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
        """What to type on another machine."""
        return f"parallax join -s {self.peer_id}"

    async def choose(self, model: str, nodes: int, local_network: bool) -> None:
        """Looks a model up and makes it the cluster's, in place of the one before.

        A model that must be fetched first is accepted after a while; what goes
        wrong later is shown in the status.
        """
        task = asyncio.create_task(self._choose(model, nodes))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        done, _ = await asyncio.wait({task}, timeout=ACCEPT_S)
        if done:
            await task
        else:
            task.add_done_callback(self._chosen_late)

    async def _choose(self, model: str, nodes: int) -> None:
        async with self._switch:
            self.choosing = model
            try:
                folder = await asyncio.to_thread(resolve, model, state_dir=self.settings.state_dir)
                facts = await asyncio.to_thread(read_facts, folder)
            finally:
                self.choosing = None
            await self._store.choose(Choice(folder.location, nodes))
            await self._leave_model()
            self.chosen = Chosen(folder, facts, nodes)
            self.problem = None
            self._plan()

    def _chosen_late(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ParallaxError):
            self._trouble(error)

    async def _leave_model(self) -> None:
        """Answers in flight get a while to finish; then the old rings go."""
        if self.chosen is None:
            return
        self.requests.pause()
        await self.requests.drained(self._limits.drain_s)
        error = RingLost("The cluster changed its model", fix="Send the request to the new one")
        self.requests.fail_all(error)
        self._do(self.reconciler.want_none())
        self.requests.resume()

    # ----------------------------------------------------- what nodes report to

    def node_hello(self, hello: wire.Hello, link: NodeLink) -> None:
        """A node attends.

        Raises:
            VersionMismatch: it cannot be part of a ring here.
        """
        stream = next(self._streams)
        theirs = Versions(hello.protocol, hello.mlx_version, hello.mlx_lm_version)
        changes = self.members.hello(
            _facts(hello.facts), theirs, hello.incarnation, stream=stream, now=time.monotonic()
        )
        for change in changes:
            if isinstance(change, Refused):
                raise change.error
        self._links[stream] = link
        self._stream_of[id(link)] = stream
        self._hellos[hello.facts.node_id] = hello
        link.order(
            wire.NodeOrder(
                welcome=wire.Welcome(
                    scheduler_id=self.peer_id,
                    heartbeat_s=self._limits.heartbeat_s,
                    silence_s=self._limits.silence_s,
                )
            )
        )
        self._follow(changes)
        self._probe_links(hello)

    def node_report(self, node_id: str, report: wire.NodeReport) -> None:
        """A node says something."""
        now = time.monotonic()
        member = self.members.get(node_id)
        match report.WhichOneof("report"):
            case "heartbeat" if member is not None:
                starved = report.heartbeat.starved
                self._follow(self.members.heartbeat(member.stream, starved=starved, now=now))
            case "progress":
                self._loading(node_id, report.progress)
            case "ready":
                self._do(self.reconciler.stage_ready(node_id, report.ready))
            case "failed":
                self._stage_failed(node_id, report.failed)
            case "joined":
                self._do(self.reconciler.joined(node_id, report.joined.epoch))
            case "broken":
                self._ring_broken(report.broken.epoch, from_fault(report.broken.fault))
            case "health":
                self._stage_metrics.observe(report.health, self.name_of(node_id))
            case "link":
                path = LinkFacts(report.link.round_trip_s, report.link.bandwidth_bytes_s)
                self._paths[node_id, report.link.node_id] = path
            case "goodbye" if member is not None:
                self._follow(self.members.goodbye(member.stream, report.goodbye.reason, now=now))

    def node_lost(self, node_id: str, link: NodeLink, reason: str) -> None:
        """A node's stream ended."""
        stream = self._stream_of.pop(id(link), None)
        if stream is not None:
            self._links.pop(stream, None)
            self._follow(self.members.broken(stream, now=time.monotonic()))

    def name_of(self, node_id: str) -> str:
        """A node's name for people."""
        member = self.members.get(node_id)
        return member.facts.name if member else node_id

    # --------------------------------------------------------------- decisions

    def _follow(self, changes: Iterable[Change]) -> None:
        replan = False
        for change in changes:
            if isinstance(change, NodeArrived):
                member = self.members.get(change.node_id)
                budget = member.facts.budget_bytes if member else 0
                self._do(self.reconciler.node_up(change.node_id, budget))
                if self.chosen is not None:
                    self.chosen.failed.pop(change.node_id, None)
                self._on_event(NodeJoined(self.name_of(change.node_id)))
                replan = True
            elif isinstance(change, NodeGone):
                name = self.name_of(change.node_id)
                self._do(self.reconciler.node_down(change.node_id))
                link = self._links.get(change.stream)
                if link is not None:
                    link.close()
                self._on_event(NodeLeft(name, change.reason))
                replan = True
        if replan:
            self._plan()

    def _plan(self) -> None:
        """Plans rings over the nodes that have no place yet."""
        chosen = self.chosen
        if chosen is None:
            return
        usable = [m for m in self.members.usable() if m.facts.node_id not in chosen.failed]
        busy = self.reconciler.busy_nodes()
        free = [m.facts for m in usable if m.facts.node_id not in busy]
        if not free or (not chosen.began and len(usable) < chosen.nodes):
            return
        wanted = chosen.nodes if not busy else min(chosen.nodes, len(free))
        try:
            plan = make_plan(
                chosen.facts,
                level(free),
                self._paths,
                cuts=chosen.cuts,
                min_nodes=min(wanted, len(free)),
            )
        except ModelTooBig as error:
            if not busy:
                self.missing_bytes = int(error.fields.get("missing_bytes", 0))
                self._trouble(error)
            return
        chosen.began = True
        self.missing_bytes = None
        if not chosen.failed:
            self.problem = None
        for ring in plan.rings:
            places = tuple(Place(s.node_id, s.first, s.end) for s in ring.stages)
            wanted_ring = Ring(chosen.source, places, ring.throughput_tokens_s)
            self._do(self.reconciler.want(wanted_ring))

    def _do(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Order(node_id, order):
                    self._order(node_id, order)
                case NeedEpoch(ring):
                    self._background(self._issue_epoch(ring))
                case RingUp(ring):
                    self._ring_up(ring)
                case RingDown(_, epoch):
                    self.requests.ring_down(epoch)
                    self._stage_metrics.forget(epoch)

    def _order(self, node_id: str, order: wire.NodeOrder) -> None:
        member = self.members.get(node_id)
        link = self._links.get(member.stream) if member else None
        if link is not None:
            link.order(order)

    async def _issue_epoch(self, ring: Ring) -> None:
        if self._breaks.get(ring.nodes, 0) >= BREAKS_IN_A_ROW:
            await asyncio.sleep(REFORM_PAUSE_S)
        epoch = await self._store.next_epoch()
        self._do(self.reconciler.epoch_issued(ring, epoch))

    def _form(self, ring: Ring, reports: list[wire.StageReady]) -> list[wire.FormRing]:
        """The orders that form a ring, one per stage."""
        assert self.chosen is not None  # noqa: S101 - rings are wanted for a chosen model only
        hellos = [self._hellos[place.node_id] for place in ring.places]
        shape = shape_of(
            reports,
            [hello.facts.budget_bytes for hello in hellos],
            self.chosen.facts.context_tokens,
            accelerated=all(hello.facts.backend != "cpu" for hello in hellos),
            limits=self._limits,
        )
        self.chosen.context_tokens = shape.context_tokens
        stages = [
            wire.StagePlace(
                node_id=place.node_id, endpoints=hello.endpoints, first=place.first, end=place.end
            )
            for place, hello in zip(ring.places, hellos, strict=True)
        ]
        return [
            wire.FormRing(
                epoch=ring.epoch,
                index=index,
                model=ring.model,
                stages=stages,
                shape=shape,
                costs=[report.cache for report in reports],
                batches=all(report.batches for report in reports),
            )
            for index in range(len(stages))
        ]

    def _ring_up(self, ring: Ring) -> None:
        self._breaks.pop(ring.nodes, None)
        head = ring.places[0].node_id
        report = self.reconciler.report_of(ring, ring.places[0])
        batches = report is None or report.batches
        lanes = len(ring.places) if batches else self._limits.window_frames
        slots = lanes * (self._limits.lane_rows if batches else 1)
        endpoints = list(self._hellos[head].endpoints)
        self.requests.ring_up(ring.epoch, head, endpoints, slots, ring.tokens_s)
        self._on_event(Ready(ring.model.name, len(self.reconciler.rings)))

    def _ring_broken(self, epoch: int, error: ParallaxError) -> None:
        ring = self.reconciler.by_epoch(epoch)
        if ring is None:
            return
        log.warning("ring %d broke: %s", epoch, error.sentence)
        self._breaks[ring.nodes] = self._breaks.get(ring.nodes, 0) + 1
        self._do(self.reconciler.broken(epoch))

    def _stage_failed(self, node_id: str, failed: wire.StageFailed) -> None:
        error = from_fault(failed.fault)
        chosen = self.chosen
        if chosen is None or failed.stage.model.digest != chosen.folder.digest:
            return
        if isinstance(error, CutRefused) and chosen.cuts is None:
            text = error.fields.get("working_cuts", "")
            chosen.cuts = frozenset(int(cut) for cut in text.split(",") if cut.strip())
        else:
            chosen.failed[node_id] = error.sentence
        self._trouble(error)
        self._do(self.reconciler.stage_failed(node_id, failed.stage))
        self._plan()

    def _loading(self, node_id: str, progress: wire.LoadProgress) -> None:
        self.reconciler.stage_progress(node_id, progress)
        stage = progress.stage
        fraction = progress.done_bytes / progress.total_bytes if progress.total_bytes else 0.0
        text = (
            f"{stage.model.name} layers {stage.first}-{stage.end - 1} "
            f"on {self.name_of(node_id)}: {progress.phase}"
        )
        self._on_event(Loading(text, fraction))

    def _trouble(self, error: ParallaxError) -> None:
        if self.problem is None or self.problem.sentence != error.sentence:
            self._on_event(Problem(error))
        self.problem = error

    def _probe_links(self, hello: wire.Hello) -> None:
        """The new node and the others measure the ways between them."""

        def place(other: wire.Hello) -> wire.StagePlace:
            return wire.StagePlace(node_id=other.facts.node_id, endpoints=other.endpoints)

        new = hello.facts.node_id
        others = [m.facts.node_id for m in self.members.usable() if m.facts.node_id != new]
        for other in others:
            peers = [place(hello)]
            self._order(other, wire.NodeOrder(probe=wire.ProbeLinks(peers=peers)))
        if others:
            peers = [place(self._hellos[other]) for other in others]
            self._order(new, wire.NodeOrder(probe=wire.ProbeLinks(peers=peers)))

    # ------------------------------------------------------------------- clock

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._limits.heartbeat_s / 2)
            self._follow(self.members.tick(time.monotonic()))
            self._metrics.set_queue(self.requests.waiting, self.requests.running)
            loads = self.requests.loads.values()
            self._metrics.set_lanes(
                sum(load.decoding for load in loads),
                sum(load.lanes for load in loads),
                sum(load.free_rows for load in loads),
            )

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _facts(facts: wire.NodeFacts) -> NodeFacts:
    return NodeFacts(
        node_id=facts.node_id,
        name=facts.name,
        chip=facts.chip,
        platform=facts.platform,
        memory_bytes=facts.memory_bytes,
        budget_bytes=facts.budget_bytes,
        bandwidth_bytes_s=facts.bandwidth_bytes_s,
        flops=facts.flops,
        accelerators=facts.accelerators,
        backend=facts.backend,
    )
