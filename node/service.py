"""A node's process: finds its scheduler, attends, and does what it is ordered."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import grpc.aio
import mlx.core as mx

from parallax.fabric.addresses import Address, host_port, listening_addresses
from parallax.fabric.channels import listen, stop_listening
from parallax.fabric.claim import claim
from parallax.fabric.credentials import Credentials
from parallax.fabric.data_channel import DataListener
from parallax.fabric.discovery import Target, find_scheduler, parse_target
from parallax.fabric.errors import Dismissed, NotAdmitted, ParallaxError, StageStuck, from_fault
from parallax.fabric.events import Event, Joined, Loading, NodeStarted, Problem, Ready, Stopped
from parallax.fabric.identity import load_identity
from parallax.fabric.members import MembersOnly
from parallax.fabric.settings import NodeSettings
from parallax.fabric.tally import Tally
from parallax.fabric.tasks import Tasks
from parallax.fabric.version import PROTOCOL, VERSION, mlx_lm_version, mlx_version
from parallax.fabric.weights_service import WeightsService
from parallax.node.attendance import Attendance, fatal
from parallax.node.compute import Compute
from parallax.node.enrolment import Enrolment
from parallax.node.facts import measure_facts
from parallax.node.fetch import Line, Place
from parallax.node.library import Library
from parallax.node.links import measure
from parallax.node.residency import keep_resident
from parallax.node.reunion import Patience, meet_again
from parallax.node.seats import Seats
from parallax.node.shelf import Shelf
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc

T = TypeVar("T")

log = logging.getLogger(__name__)


class NodeService:
    """Everything one node runs, and the orders it follows."""

    def __init__(self, settings: NodeSettings, on_event: Callable[[Event], None]) -> None:
        self._settings = settings
        self._limits = settings.limits
        self._on_event = on_event
        self._stopping = asyncio.Event()
        self._tasks = Tasks()
        self._patience = Patience()
        self._met: Target | None = None  # the scheduler attended last, by where it answered
        self._compute = Compute(asyncio.get_running_loop())
        self._compute.on_death = self._died
        self._failure: ParallaxError | None = None
        self._credentials = Credentials(load_identity(settings.state_dir / "node.key"))
        self._tally = Tally(settle_s=2 * self._limits.connect_s)
        self._shut_out: frozenset[str] = frozenset()  # nodes that were sent away
        self._enrolment = Enrolment(
            self._credentials,
            settings.state_dir / "member.pem",
            name=settings.name,
            token=settings.token.get_secret_value() if settings.token else "",
            limits=self._limits,
            on_event=on_event,
        )
        self._attendance = Attendance(
            self._limits, self._credentials, self._tally, self._compute.busy_s
        )
        self._scheduler: Line | None = None  # whose orders are followed
        self._library: Library
        self._shelf: Shelf
        self._seats: Seats

    def stop(self) -> None:
        """Asks the service to end; answers in flight are handed back to the scheduler."""
        self._stopping.set()

    def _died(self) -> None:
        """The MLX thread is no more: the node says so and ends, for whoever starts it again."""
        self._attendance.farewell = wire.Goodbye(reason="its compute thread died", failed=True)
        self._failure = StageStuck(
            "The compute thread of this node died",
            "the log says of what",
            "Start the node again; a service manager does so by itself",
        )
        self.stop()

    async def run(self) -> None:
        """Serves until :meth:`stop`, or until no scheduler can ever be reached.

        Raises:
            ParallaxError: at start, when no scheduler is found or it refuses this node; later,
                when its compute thread dies.
        """
        settings = self._settings
        node_id = self._credentials.peer_id
        facts = await self._compute.call(
            lambda: measure_facts(
                node_id,
                name=settings.name,
                memory_bytes=settings.memory,
                kept=settings.state_dir / "measurements.json",
            )
        )
        await self._compute.call(lambda: keep_resident(mx.device_info(), facts.budget_bytes))
        self._library = Library(
            settings.state_dir, self._limits, lambda: self._scheduler, settings.cache_bytes
        )
        self._shelf = Shelf(
            self._compute, settings.state_dir, facts.budget_bytes, self._tell, self._library
        )
        addresses = listening_addresses(loopback_only=settings.loopback_only)
        data = self._data_listener(addresses)
        self._seats = Seats(
            self._credentials,
            self._compute,
            self._shelf,
            self._limits,
            self._attendance.tell,
            self._tally,
            data,
        )
        self._attendance.refused_frames = lambda: self._seats.refused_frames
        server, port = await listen(
            addresses,
            settings.grpc_port,
            credentials=self._credentials,
            gate=MembersOnly(lambda peer: peer not in self._shut_out, self._tally),
            limits=self._limits,
            register=self._register,
        )
        hello = wire.Hello(
            protocol=PROTOCOL,
            version=VERSION,
            mlx_version=mlx_version(),
            mlx_lm_version=mlx_lm_version(),
            facts=facts,
            endpoints=[address.endpoint(port) for address in addresses],
            incarnation=secrets.randbits(63),
        )
        self._on_event(
            NodeStarted(
                node_id=node_id,
                name=facts.name,
                port=port,
                notice="",
            )
        )
        try:
            await self._attend(hello)
        finally:
            await self._seats.leave_all()
            if data is not None:
                data.close()
            await self._tasks.stop()
            await stop_listening(server)
            self._compute.stop(self._limits.connect_s)
            self._on_event(Stopped())
        if self._failure is not None:
            raise self._failure

    def _data_listener(self, addresses: Sequence[Address]) -> DataListener | None:
        """Next to the gRPC port where that is free, so that firewalls need one rule.

        None where nothing can be listened on, which the gRPC listener then says better.
        """
        grpc_port = self._settings.grpc_port
        beside = grpc_port + 1 if 0 < grpc_port < 65535 else 0
        try:
            return DataListener(addresses, self._limits, self._credentials, self._tally, beside)
        except OSError as error:
            log.warning("no data connections here, frames come through gRPC: %s", error)
            return None

    def _register(self, server: grpc.aio.Server) -> None:
        rpc.add_RingServicer_to_server(self._seats, server)
        rpc.add_HeadServicer_to_server(self._seats, server)
        rpc.add_WeightsServicer_to_server(WeightsService(self._library.holding), server)

    def _tell(self, report: wire.NodeReport) -> None:
        if report.HasField("progress"):
            progress = report.progress
            stage = progress.stage
            fraction = progress.done_bytes / progress.total_bytes if progress.total_bytes else 0.0
            text = f"{stage.model.name} layers {stage.first} to {stage.end - 1}: {progress.phase}"
            self._on_event(Loading(stage=text, fraction=fraction))
        elif report.HasField("ready"):
            stage = report.ready.stage
            self._on_event(Ready(model=stage.model.name, rings=0))
        elif report.HasField("failed"):
            self._on_event(Problem(from_fault(report.failed.fault)))
        self._attendance.tell(report)

    async def _attend(self, hello: wire.Hello) -> None:
        """Attends, and after a lost scheduler finds it again, until told to stop."""
        known = ""  # the scheduler attended last
        while not self._stopping.is_set():
            try:
                found = await self._unless_stopping(self._find(known))
                if found is None:
                    return
                scheduler_id, endpoints = found
                if scheduler_id != known:
                    known = scheduler_id
                    self._seats.new_scheduler()
                    self._shut_out = frozenset()  # which was another cluster's
                place = Place(scheduler_id, tuple(endpoints), scheduler=True)
                self._scheduler = Line(place, self._limits, self._credentials)
                where = host_port(endpoints[0].host, endpoints[0].port)
                self._on_event(Joined(scheduler_id, where))
                await self._attendance.attend(
                    endpoints,
                    scheduler_id,
                    hello,
                    orders=self._order,
                    health=self._seats.health,
                    held=self._shelf.held,
                    beside=self._enrolment.renewing,
                    stopping=self._stopping,
                )
            except Dismissed:
                raise
            except NotAdmitted as error:
                # A certificate of an earlier run may be of no use any more; a new one must be.
                if not self._enrolment.start_over() and not known:
                    raise
                log.warning("%s", error.sentence)
            except ParallaxError as error:
                # From then on it is known which scheduler this is about, and waited for.
                known = known or self._enrolment.waits_for
                if not known or fatal(error) or self._enrolment.refused:
                    raise
                self._on_event(Problem(error))
            await self._seats.leave_all()
            await self._pause(self._patience.pause_s(time.monotonic()))

    async def _find(self, known: str) -> tuple[str, list[wire.Endpoint]]:
        """The scheduler: where it was a moment ago, or where it is found.

        The one that is named, or, from the first meeting on, the one that was met.
        """
        wanted = self._settings.scheduler
        named = wanted is not None and parse_target(wanted)[0] is not None

        async def search() -> Target:
            return await find_scheduler(
                wanted or known or None,
                timeout_s=self._limits.call_s,
                loopback_only=self._settings.loopback_only,
            )

        async def enrol(target: Target) -> tuple[str, list[wire.Endpoint]]:
            expected = replace(target, peer_id=known or target.peer_id)
            found = await self._enrolment.enrol(expected, named=named)
            self._met = expected
            return found

        if self._met is None:
            return await enrol(await search())
        return await meet_again(
            self._met, enrol, search, lambda: self._patience.pause_s(time.monotonic())
        )

    async def _unless_stopping(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What ``work`` returns; None when :meth:`stop` comes first."""
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else None
        finally:
            for waiting in (task, stop):
                waiting.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return

    async def _order(self, order: wire.NodeOrder) -> None:
        match order.WhichOneof("order"):
            case "welcome":
                self._patience.met()
            case "load":
                load = order.load
                self._tasks.start(self._shelf.load(load.stage, load.instead_of, load.sources))
            case "prepare":
                self._tasks.start(self._shelf.prepare(list(order.prepare.stages)))
            case "unload":
                self._tasks.start(self._shelf.unload(order.unload.stage))
            case "form":
                self._seats.form(order.form)
            case "leave":
                await self._seats.leave(order.leave.epoch)
            case "shut_out":
                self._shut_out = frozenset(order.shut_out.node_ids)
            case "probe":
                self._tasks.start(self._probe(list(order.probe.peers)))
            case "dismiss":
                fault = order.dismiss.fault
                error = from_fault(fault)
                raise error if fatal(error) else Dismissed(error.what, error.why, error.fix)

    async def _probe(self, peers: list[wire.StagePlace]) -> None:
        for peer in peers:
            report = await measure(peer, self._limits, self._credentials)
            if report is not None:
                self._attendance.tell(wire.NodeReport(link=report))


async def serve_node(
    settings: NodeSettings,
    *,
    on_event: Callable[[Event], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Runs a node until ``stop`` is set, or for good.

    Raises:
        ParallaxError: the node could not start, or its scheduler dismissed it.
    """
    with claim(settings.state_dir, "node"):
        service = NodeService(settings, on_event)
        watch = asyncio.create_task(_watch(stop, service)) if stop is not None else None
        try:
            await service.run()
        finally:
            if watch is not None:
                watch.cancel()


async def _watch(stop: asyncio.Event, service: NodeService) -> None:
    await stop.wait()
    service.stop()
