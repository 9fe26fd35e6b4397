"""The rings this node sits in: formed, served and left by order of the scheduler.

Also the two gRPC services of a node: ``Ring``, called by the stage before, and
``Head``, called by the scheduler.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from typing import TypeVar

import grpc.aio

from parallax.fabric.bounds import check_form
from parallax.fabric.credentials import Credentials, peer_of
from parallax.fabric.data_channel import DataListener
from parallax.fabric.errors import FrameRefused, InternalError, LinkBroken, ParallaxError, to_fault
from parallax.fabric.limits import Limits
from parallax.fabric.shares import Shares
from parallax.fabric.tally import Tally
from parallax.fabric.tasks import Tasks
from parallax.node.compute import Compute
from parallax.node.head import Head
from parallax.node.ring import RingMember
from parallax.node.runner import Runner
from parallax.node.shelf import Shelf
from parallax.node.shortcomings import error_of
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc

log = logging.getLogger(__name__)

T = TypeVar("T")

SLACK_TOKENS = 4096  # of drafts that are ahead of an answer
MOST_EARLY = 64  # streams of rings that this node has not been told of yet
EACH_EARLY = 4  # of one member: a neighbour opens one for each ring

Tell = Callable[[wire.NodeReport], None]


class Seat:
    """One ring's member, its runner, and on the first stage its head."""

    def __init__(self, member: RingMember, runner: Runner, head: Head | None) -> None:
        self.member = member
        self.runner = runner
        self.head = head


class Seats(rpc.RingServicer, rpc.HeadServicer):
    """All rings this node is part of, by epoch."""

    def __init__(
        self,
        credentials: Credentials,
        compute: Compute,
        shelf: Shelf,
        limits: Limits,
        tell: Tell,
        tally: Tally,
        data: DataListener | None = None,
    ) -> None:
        self._credentials = credentials
        self._tally = tally
        self._compute = compute
        self._shelf = shelf
        self._limits = limits
        self._tell = tell
        self._data = data
        self._seats: dict[int, Seat] = {}
        self._tasks = Tasks()
        self._forming: dict[int, asyncio.Task[None]] = {}
        self._latest = 0
        self._early = Shares(MOST_EARLY, EACH_EARLY)  # streams that wait for our order
        self._formed = asyncio.Condition()
        self.refused_frames = 0  # of epochs that are over, and streams that would bring such

    def form(self, form: wire.FormRing) -> None:
        """Begins to take a seat; reports it joined, or the ring broken."""
        if form.epoch in self._forming:
            return  # said twice
        self._forming[form.epoch] = task = self._tasks.start(self._form(form))
        task.add_done_callback(lambda _: self._forming.pop(form.epoch, None))

    async def _form(self, form: wire.FormRing) -> None:
        try:
            check_form(form)
            seat = await self._sit(form)
            await seat.member.join()
        except ParallaxError as error:
            self._broken(form.epoch, error)
            return
        except Exception as error:
            log.exception("ring %d cannot be formed", form.epoch)
            self._broken(form.epoch, error_of(error, "Forming failed"))
            return
        if seat.head is not None:
            seat.head.start(seat.member)
        self._tell(wire.NodeReport(joined=wire.RingJoined(epoch=form.epoch)))

    async def leave(self, epoch: int) -> None:
        """Gives a seat up, taken or about to be, and frees its caches."""
        forming = self._forming.get(epoch)
        if forming is not None:
            forming.cancel()
            await asyncio.gather(forming, return_exceptions=True)
        seat = self._seats.pop(epoch, None)
        if seat is None:
            return
        if seat.head is not None:
            await seat.head.stop()
        await seat.member.leave()
        self._compute.post(seat.runner.close)

    async def leave_all(self) -> None:
        """Gives every seat up."""
        for epoch in {*self._seats, *self._forming}:
            await self.leave(epoch)

    def new_scheduler(self) -> None:
        """Another scheduler gives the orders from now on: its epochs count anew."""
        self._latest = 0

    def health(self, now: float) -> list[wire.StageHealth]:
        """Running totals of every seat."""
        reports = []
        for seat in self._seats.values():
            health = wire.StageHealth()
            health.CopyFrom(seat.member.health)
            health.inbox = self._compute.waiting
            health.since_progress_s = self._compute.busy_s(now)
            if seat.head is not None:
                seat.head.add_health(health)
            reports.append(health)
        return reports

    async def _sit(self, form: wire.FormRing) -> Seat:
        place = form.stages[form.index]
        held = self._shelf.get(wire.StageRange(model=form.model, first=place.first, end=place.end))
        if held is None:
            raise LinkBroken(
                f"This node does not hold layers {place.first} to {place.end - 1}",
                peer=self._credentials.peer_id,
            )
        if form.epoch <= self._latest:
            raise FrameRefused(f"Epoch {form.epoch} is not newer than {self._latest}")
        self._latest = form.epoch
        stage = held
        runner = await self._compute.call(
            lambda: Runner(
                stage,
                epoch=form.epoch,
                index=form.index,
                count=len(form.stages),
                most_tokens=form.shape.context_tokens + SLACK_TOKENS,
            )
        )
        head = Head(form, self._limits) if form.index == 0 else None
        member = RingMember(
            form,
            runner,
            self._compute,
            self._limits,
            credentials=self._credentials,
            broken=self._broken,
            returns=head,
            data=self._data,
            refused=self._refuse,
        )
        seat = Seat(member, runner, head)
        async with self._formed:
            self._seats[form.epoch] = seat
            self._formed.notify_all()
        return seat

    def _refuse(self) -> None:
        self.refused_frames += 1

    def _broken(self, epoch: int, error: ParallaxError) -> None:
        log.warning("ring %d broke: %s", epoch, error.sentence)
        self._tell(wire.NodeReport(broken=wire.RingBroken(epoch=epoch, fault=to_fault(error))))

    async def _seat(self, epoch: int, caller: str | None) -> Seat | None:
        """The seat of an epoch; neighbours may be a little earlier than our order."""
        if epoch in self._seats:
            return self._seats[epoch]
        with self._early.place(caller) as free, suppress(TimeoutError):
            if not free:
                return None
            async with self._formed, asyncio.timeout(self._limits.form_s):
                await self._formed.wait_for(lambda: epoch in self._seats or epoch < self._latest)
        return self._seats.get(epoch)

    # -------------------------------------------------------------------- gRPC

    async def Flow(
        self,
        request_iterator: AsyncIterator[wire.FramePiece],
        context: grpc.aio.ServicerContext[wire.FramePiece, wire.FlowReply],
    ) -> AsyncIterator[wire.FlowReply]:
        """A neighbour's stream: its opening, then frames until either side ends."""
        first = await self._first(aiter(request_iterator))
        if first is None or not first.HasField("open"):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "a stream begins with its opening"
            )
        caller = peer_of(context)
        seat = await self._seat(first.open.epoch, caller)
        if seat is None or seat.member.ended:
            self._refuse()
            await context.abort(
                grpc.StatusCode.ABORTED, f"no ring of epoch {first.open.epoch} here"
            )
        member = seat.member
        if caller != member.before:
            self._tally.refuse("stage", f"{caller} at {context.peer()} wants to send frames")
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                f"stage {member.index} of ring {member.epoch} takes frames from {member.before}",
            )
        try:
            yield await member.accept(first.open)
            await member.receive(request_iterator)
        except ParallaxError as error:
            member.end(error)
            await context.abort(error.row.grpc, error.sentence)
        except Exception as error:
            member.end(InternalError(f"A stream failed: {type(error).__name__}: {error}"))
            raise
        finally:
            member.end(
                LinkBroken(
                    f"The stream to stage {member.index} ended",
                    "the node before it closed it or is gone",
                    peer=member.before,
                )
            )

    async def Probe(
        self,
        request: wire.ProbeRequest,
        context: grpc.aio.ServicerContext[wire.ProbeRequest, wire.ProbeReply],
    ) -> wire.ProbeReply:
        """Answers a neighbour that measures the link."""
        return wire.ProbeReply(
            received_bytes=len(request.payload), node_id=self._credentials.peer_id
        )

    async def Serve(
        self,
        request_iterator: AsyncIterator[wire.HeadOrder],
        context: grpc.aio.ServicerContext[wire.HeadOrder, wire.HeadReport],
    ) -> AsyncIterator[wire.HeadReport]:
        """The scheduler's stream to a ring's head. Its first order names the epoch."""
        caller = peer_of(context)
        if caller != self._credentials.scheduler_id:
            self._tally.refuse("scheduler", f"{caller} at {context.peer()} wants to give orders")
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, "only the scheduler may give orders"
            )
        orders = aiter(request_iterator)
        first = await self._first(orders)
        if first is None:
            return
        seat = self._seats.get(first.epoch)
        if seat is None or seat.head is None:
            self._refuse()
            await context.abort(grpc.StatusCode.ABORTED, f"no head of epoch {first.epoch} here")
        async with aclosing(seat.head.serve(orders)) as reports:
            async for report in reports:
                yield report

    async def _first(self, messages: AsyncIterator[T]) -> T | None:
        """A stream's first message; None when it does not come."""
        try:
            async with asyncio.timeout(self._limits.call_s):
                return await anext(messages, None)
        except TimeoutError:
            return None
