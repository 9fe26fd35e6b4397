"""A node's stream to its scheduler: reports up, orders down, for as long as it lasts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress

import grpc.aio
import psutil

from parallax.fabric.bounds import check
from parallax.fabric.channels import open_channel
from parallax.fabric.credentials import Credentials
from parallax.fabric.errors import ParallaxError, SchedulerUnreachable, VersionMismatch
from parallax.fabric.limits import Limits
from parallax.fabric.tally import Tally
from parallax.fabric.tasks import Tasks
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc

Orders = Callable[[wire.NodeOrder], Awaitable[None]]
Connect = Callable[[], Awaitable[grpc.aio.Channel]]

OUTBOX_REPORTS = 4096


class Attendance:
    """One node's membership. Reports may be told at any time; while no scheduler
    listens they are dropped, and the whole state is told again at the next hello.

    Args:
        limits: time-outs.
        credentials: what the scheduler is shown.
        tally: who was turned away here, which the scheduler is told.
        busy_s: how long the compute thread has been in one job.
    """

    def __init__(
        self,
        limits: Limits,
        credentials: Credentials,
        tally: Tally,
        busy_s: Callable[[float], float],
    ) -> None:
        self.farewell = wire.Goodbye(reason="stopped")
        self.refused_frames: Callable[[], int] = lambda: 0
        self._credentials = credentials
        self._tally = tally
        self._busy_s = busy_s
        self._limits = limits
        self._outbox: asyncio.Queue[wire.NodeReport] | None = None
        self._patience: asyncio.Timeout | None = None
        self._process = psutil.Process()

    def tell(self, report: wire.NodeReport) -> None:
        """Sends a report if a scheduler listens; one that does not read is given up."""
        if self._outbox is None:
            return
        if not self._outbox.full():
            self._outbox.put_nowait(report)
        elif self._patience is not None:
            self._end_in(self._patience, 0.0)

    async def attend(
        self,
        endpoints: list[wire.Endpoint],
        scheduler_id: str,
        hello: wire.Hello,
        *,
        orders: Orders,
        health: Callable[[float], list[wire.StageHealth]],
        held: Callable[[], list[wire.NodeReport]],
        beside: Callable[[Connect], Coroutine[None, None, None]],
        stopping: asyncio.Event,
    ) -> None:
        """One stream, from hello to its end; says goodbye when ``stopping`` is set.

        ``held`` tells what the node has, before its first heartbeat; ``beside`` runs meanwhile, and
        can open other channels to the scheduler.

        Raises:
            ParallaxError: the scheduler cannot be reached, or ``orders`` raised.
        """

        async def connect() -> grpc.aio.Channel:
            channel, _ = await open_channel(
                endpoints,
                scheduler_id,
                limits=self._limits,
                credentials=self._credentials,
                scheduler=True,
            )
            return channel

        channel = await connect()
        self._outbox = asyncio.Queue(maxsize=OUTBOX_REPORTS)
        for report in (wire.NodeReport(hello=hello), *held()):
            self._outbox.put_nowait(report)
        call = rpc.MembershipStub(channel).Attend(self._reports(self._outbox, stopping))
        tasks = Tasks()
        tasks.start(self._pulse(health))
        tasks.start(beside(connect))
        try:
            async with asyncio.timeout(None) as self._patience:
                tasks.start(self._goodbye(self._patience, stopping))
                async for order in call:
                    check(order)
                    await orders(order)
        except TimeoutError:
            if not stopping.is_set():
                raise SchedulerUnreachable(
                    "The scheduler does not read this node's reports"
                ) from None
        except grpc.aio.AioRpcError as error:
            if not stopping.is_set():
                raise SchedulerUnreachable(
                    "The scheduler is gone", error.details() or error.code().name
                ) from None
        finally:
            self._outbox = self._patience = None
            await tasks.stop()
            call.cancel()
            await channel.close()

    async def _goodbye(self, patience: asyncio.Timeout, stopping: asyncio.Event) -> None:
        """A scheduler that does not answer the goodbye is not waited for."""
        await stopping.wait()
        self._end_in(patience, self._limits.disconnect_s)

    def _end_in(self, patience: asyncio.Timeout, seconds: float) -> None:
        with suppress(RuntimeError):  # it has ended already
            patience.reschedule(asyncio.get_running_loop().time() + seconds)

    async def _reports(
        self, outbox: asyncio.Queue[wire.NodeReport], stopping: asyncio.Event
    ) -> AsyncIterator[wire.NodeReport]:
        stop = asyncio.create_task(stopping.wait())
        take: asyncio.Task[wire.NodeReport] | None = None
        try:
            while not stopping.is_set():
                take = asyncio.create_task(outbox.get())
                done, _ = await asyncio.wait({take, stop}, return_when=asyncio.FIRST_COMPLETED)
                if take in done:
                    yield take.result()
            if take is not None:
                take.cancel()
            while not outbox.empty():
                yield outbox.get_nowait()
            yield wire.NodeReport(goodbye=self.farewell)
        finally:
            stop.cancel()
            if take is not None:
                take.cancel()

    async def _pulse(self, health: Callable[[float], list[wire.StageHealth]]) -> None:
        count = 0
        due = time.monotonic()
        while True:
            now = time.monotonic()
            # Late by more than a heartbeat: this process was not given time to run.
            starved = now - due > self._limits.heartbeat_s
            heartbeat = wire.Heartbeat(
                count=count,
                starved=starved,
                resident_bytes=self._process.memory_info().rss,
                since_progress_s=self._busy_s(now),
                refused_frames=self.refused_frames(),
                refused=self._tally.totals(now),
            )
            self.tell(wire.NodeReport(heartbeat=heartbeat))
            for report in health(now):
                self.tell(wire.NodeReport(health=report))
            count += 1
            due = now + self._limits.heartbeat_s
            await asyncio.sleep(self._limits.heartbeat_s)


def fatal(error: ParallaxError) -> bool:
    """Whether trying again cannot help."""
    return isinstance(error, VersionMismatch)
