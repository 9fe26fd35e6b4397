"""The shell around the reconciler: its instructions carried out, rings formed and ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable

from parallax.fabric.errors import (
    InternalError,
    LinkBroken,
    MessageRefused,
    ParallaxError,
    from_fault,
)
from parallax.fabric.events import Event, Ready
from parallax.fabric.limits import Limits
from parallax.fabric.tasks import Tasks
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.blame import Blame
from parallax.scheduler.chosen import Chosen
from parallax.scheduler.dispatch import Dispatcher
from parallax.scheduler.journal import Journal
from parallax.scheduler.losses import Losses
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.observed_speeds import ObservedSpeeds
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
from parallax.scheduler.roster import Roster
from parallax.scheduler.setbacks import Setbacks
from parallax.scheduler.shape import forms_of, shape_of
from parallax.scheduler.stage_metrics import StageMetrics
from parallax.scheduler.store import Store
from parallax.scheduler.trouble import of_node

log = logging.getLogger(__name__)

_SENSELESS = ("FrameRefused", "MessageRefused")  # kinds of faults

STORE_PAUSE_S = 1.0  # before a number that could not be written down is asked for again


class Formation:
    """Rings between the reconciler that wants them and the nodes that form them.

    Args:
        limits: time-outs and sizes.
        store: where epochs are written down.
        roster: the way to nodes.
        metrics: where stages' totals are counted.
        observed: forgets epochs that are over.
        has_room: whether a node can hold a stage beside everything that it holds now.
        chosen: the model of the moment.
        missing_bytes: how much memory it lacks, where it does not fit.
        trouble: is told what people should know.
        on_event: is told of rings that serve.
        speculation: whether lone answers are drafted.
        journal: is told what becomes of every request.
    """

    def __init__(
        self,
        limits: Limits,
        store: Store,
        roster: Roster,
        metrics: Metrics,
        observed: ObservedSpeeds,
        *,
        has_room: Callable[[Ring, Place], bool],
        chosen: Callable[[], Chosen | None],
        missing_bytes: Callable[[], int | None],
        trouble: Callable[[ParallaxError], None],
        on_event: Callable[[Event], None],
        speculation: bool,
        journal: Journal | None,
    ) -> None:
        self._limits = limits
        self._store = store
        self._roster = roster
        self._observed = observed
        self._chosen = chosen
        self._trouble = trouble
        self._on_event = on_event
        self._speculation = speculation
        self._tasks = Tasks()
        self.setbacks = Setbacks(limits)
        self.blame = Blame(limits)
        self.losses = Losses(limits)
        self._metrics = metrics
        self.stage_metrics = StageMetrics(metrics)
        self.reconciler = Reconciler(self._form, has_room)
        self.requests = Dispatcher(
            limits,
            roster.credentials,
            self.broke,
            lambda: len(self.reconciler.rings),
            journal,
            missing_bytes,
        )
        self.ring_trouble: ParallaxError | None = None  # of rings that break again and again

    @property
    def aside(self) -> frozenset[str]:
        """Nodes that are not planned with, for what happened to rings with them."""
        return self.blame.aside | self.losses.aside

    async def stop(self) -> None:
        """No epoch is issued any more."""
        await self._tasks.stop()

    def do(self, instructions: Iterable[Instruction]) -> None:
        """Carries out what the reconciler says."""
        for instruction in instructions:
            match instruction:
                case Order(node_id, order):
                    self._roster.order(node_id, order)
                case NeedEpoch(ring):
                    self._tasks.start(self._issue_epoch(ring))
                case RingUp(ring):
                    self._ring_up(ring)
                case RingDown(_, epoch, moved):
                    self.requests.ring_down(epoch, moved=moved)
                    self._offer_context()
                    self.stage_metrics.forget(epoch)
                    self._observed.forget_epoch(epoch)

    async def _issue_epoch(self, ring: Ring) -> None:
        await asyncio.sleep(self.setbacks.pause_s(ring.nodes))
        while True:
            try:
                epoch = await self._store.next_epoch()
                break
            except ParallaxError as error:  # a full disk, say: no ring forms until it is mended
                self._trouble(error)
                await asyncio.sleep(STORE_PAUSE_S)
        self.setbacks.forming(epoch, time.monotonic())
        self.do(self.reconciler.epoch_issued(ring, epoch))

    def _form(self, ring: Ring, reports: list[wire.StageReady]) -> list[wire.FormRing]:
        """The orders that form a ring, one per stage."""
        chosen = self._chosen()
        if chosen is None:
            raise InternalError("A ring forms although no model is chosen")
        hellos = [self._roster.hello_of(place.node_id) for place in ring.places]
        shape = shape_of(
            reports,
            [hello.facts.budget_bytes for hello in hellos],
            chosen.facts.context_tokens,
            accelerated=all(hello.facts.backend != "cpu" for hello in hellos),
            limits=self._limits,
            speculation=self._speculation,
        )
        ring.context_tokens = shape.context_tokens
        ring.chunk_tokens = shape.chunk_tokens
        self._offer_context()
        return forms_of(ring, reports, hellos, shape)

    def _offer_context(self) -> None:
        """A request may be as long as the roomiest ring takes: it waits for one that holds it."""
        chosen = self._chosen()
        contexts = [ring.context_tokens for ring in self.reconciler.rings if ring.context_tokens]
        if chosen is not None and contexts:
            chosen.context_tokens = max(contexts)

    def _ring_up(self, ring: Ring) -> None:
        self.setbacks.formed(ring.nodes, ring.epoch, time.monotonic())
        head = ring.places[0].node_id
        reports = [self.reconciler.report_of(ring, place) for place in ring.places]
        batches = all(report is None or report.batches for report in reports)
        lanes = len(ring.places) if batches else self._limits.window_frames
        slots = lanes * (self._limits.lane_rows if batches else 1)
        endpoints = list(self._roster.hello_of(head).endpoints)
        self.requests.ring_up(
            ring.epoch,
            head,
            endpoints,
            slots,
            ring.tokens_s,
            context_tokens=ring.context_tokens,
            costs=[report.cache for report in reports if report is not None],
            chunk_tokens=ring.chunk_tokens,
        )
        self._on_event(Ready(ring.model.name, len(self.reconciler.rings)))

    def tick(self, now: float) -> None:
        """Rings of which nothing is heard are formed anew; to be called again and again."""
        rings = {ring.epoch: ring for ring in self.reconciler.rings}
        for epoch in self.setbacks.overdue(rings.keys(), now):
            why = "a node has neither joined it nor said why"
            silent = [node for node in rings[epoch].nodes if node not in rings[epoch].joined]
            self.broke(epoch, LinkBroken(f"Ring {epoch} did not form", why), silent=silent)

    def reported(self, node_id: str, broken: wire.RingBroken) -> None:
        """A node says that a ring of its broke; of one that is over already, it may say why."""
        error = of_node(self._roster.name_of(node_id), from_fault(broken.fault))
        if self.reconciler.part_of(node_id, broken.epoch) is None:
            self.blame.corrected(node_id, broken.epoch, error)
            return
        if broken.fault.kind in _SENSELESS:
            self._metrics.message_refused("frame")
        self.broke(broken.epoch, error, node_id)

    def broke(
        self,
        epoch: int,
        error: ParallaxError,
        reporter: str | None = None,
        silent: Collection[str] = (),
    ) -> None:
        """A ring broke, or did not form: it forms anew. See :meth:`Blame.broke` for who says so."""
        ring = self.reconciler.by_epoch(epoch)
        if ring is None:
            return
        if reporter is None and isinstance(error, MessageRefused):
            self._metrics.message_refused("report")
            error = of_node(self._roster.name_of(ring.nodes[0]), error)
        log.warning("ring %d broke: %s", epoch, error.sentence)
        now = time.monotonic()
        self.blame.broke(ring.nodes, epoch, error, now, reporter=reporter, silent=silent)
        self.setbacks.broke(ring.nodes, epoch, now)
        if self.setbacks.pause_s(ring.nodes):  # again and again: people should know
            self._trouble(error)
            self.ring_trouble = error
        self.do(self.reconciler.broken(epoch))
