"""This node's place in one ring of one epoch: frames in, compute, frames on.

The hot path is :meth:`RingMember._run`, on the MLX thread: command, forward, send. Frames come
in on the thread of the data connection from the stage before, or, where that cannot be reached,
on the event loop from its gRPC stream. Any error in it, or a broken neighbour stream, ends the
epoch.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc.aio
from google.protobuf.message import DecodeError

from parallax.fabric.bounds import check
from parallax.fabric.channels import open_channel
from parallax.fabric.credentials import Credentials
from parallax.fabric.data_channel import DataListener, DataSender, Receiver, Ticket, connect
from parallax.fabric.errors import FrameRefused, InternalError, LinkBroken, ParallaxError
from parallax.fabric.limits import Limits
from parallax.fabric.tasks import in_thread
from parallax.node.compute import Compute
from parallax.node.large_frames import LOOKED_AT_BYTES, check_counts, check_large, weight_of
from parallax.node.pieces import assemble, split
from parallax.node.shortcomings import error_of
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc

log = logging.getLogger(__name__)

Broken = Callable[[int, ParallaxError], None]

MOST_FRAME_S = 1e6  # of a stage's time for one frame, as frames tell it
WEIGH_EVERY_S = 0.5  # between two sums of the caches' bytes

_STREAM_ERRORS = (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError)


class FrameRunner(Protocol):
    """What runs a frame on the MLX thread: ``node/runner.py``."""

    def run(self, frame: wire.Frame) -> wire.Frame: ...

    @property
    def rows(self) -> int: ...

    @property
    def lanes(self) -> int: ...

    @property
    def cache_bytes(self) -> int: ...

    @property
    def draw_s(self) -> float: ...


class Returns(Protocol):
    """What takes the frames that come back to the head: ``node/head.py``. Any thread calls it."""

    def returned(self, frame: wire.Frame) -> float | None:
        """After how many seconds :meth:`report` is to follow; None if not on this account."""
        ...

    def report(self) -> None: ...


class RingMember:
    """One stage's seat in a ring.

    Args:
        form: the scheduler's order.
        runner: runs frames; touched on the MLX thread only.
        compute: the MLX thread.
        credentials: what the neighbours are shown.
        broken: told once, on the event loop, when the epoch cannot go on.
        returns: on the head, takes the frames that come back from the last stage.
        data: where the stage before may connect; without it, frames come through gRPC.
        refused: told of each frame that comes although its epoch is over, or that does not follow.
    """

    def __init__(
        self,
        form: wire.FormRing,
        runner: FrameRunner,
        compute: Compute,
        limits: Limits,
        *,
        credentials: Credentials,
        broken: Broken,
        returns: Returns | None,
        data: DataListener | None = None,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        self.epoch = form.epoch
        self.index = form.index
        self.count = len(form.stages)
        self.before = form.stages[form.index - 1].node_id  # the only one whose frames are taken
        self._form = form
        self._runner = runner
        self._compute = compute
        self._limits = limits
        self._credentials = credentials
        self._broken = broken
        self._returns = returns
        self._data = data
        self._refused = refused
        self._ticket: Ticket | None = None
        self._sender: DataSender | None = None
        self._outbox: asyncio.Queue[tuple[float, int, wire.Frame]] = asyncio.Queue(
            maxsize=2 * form.shape.window_frames + 8
        )
        # Results, while it is not known yet which way they go on; touched on the MLX thread only.
        self._held: list[tuple[float, wire.Frame]] | None = [] if self.count > 1 else None
        self._inbound = asyncio.Event()
        self._outbound: asyncio.Task[None] | None = None
        self._channel: grpc.aio.Channel | None = None
        self._ended = False
        self._ending = threading.Lock()
        self._expected = 0
        self._taken_bytes = self._run_bytes = 0  # of frames: taken in, and of them those run
        self._held_bytes = 0
        self._made_bytes = self._left_bytes = 0  # of results: passed on, and of them those sent
        self._looked_at_bytes = min(LOOKED_AT_BYTES, limits.message_bytes)
        self._inbox_limit = 2 * form.shape.window_frames + 8
        self._inbox_bytes = (form.shape.window_bytes or limits.window_bytes) + limits.frame_bytes
        self.health = wire.StageHealth(epoch=form.epoch, stage=form.index)
        self.carry_bytes_per_token = 0
        self._weighed_at = 0.0

    # ---------------------------------------------------------------- joining

    async def join(self) -> None:
        """Opens the stream to the next stage and waits for the one from the stage before.

        Raises:
            LinkBroken: a neighbour did not come within ``limits.form_s``.
        """
        if self.count == 1:
            return
        connected = False
        try:
            async with asyncio.timeout(self._limits.form_s):
                await self._connect()
                connected = True
                await self._inbound.wait()
        except TimeoutError:
            raise LinkBroken(
                f"Ring {self.epoch} did not form",
                f"stage {self.index} waited {self._limits.form_s:g} s for its neighbours",
                "Check that the nodes reach each other: parallax doctor",
                peer=self.before if connected else self._next.node_id,
            ) from None

    @property
    def _next(self) -> wire.StagePlace:
        return self._form.stages[(self.index + 1) % self.count]

    async def _connect(self) -> None:
        place = self._next
        # A neighbour that does not answer for so long is silent: others have waited already.
        patience_s = min(self._limits.connect_s, self._limits.silence_s)
        self._channel, endpoint = await open_channel(
            list(place.endpoints),
            place.node_id,
            limits=self._limits.model_copy(update={"connect_s": patience_s}),
            credentials=self._credentials,
        )
        call = rpc.RingStub(self._channel).Flow()
        opening = wire.FlowOpen(
            epoch=self.epoch, from_stage=self.index, to_stage=(self.index + 1) % self.count
        )
        why = ""
        try:
            await call.write(wire.FramePiece(open=opening))
            reply = await call.read()
        except _STREAM_ERRORS as error:
            reply, why = None, _details(error)
        if not isinstance(reply, wire.FlowReply):
            raise LinkBroken(
                f"{endpoint.host}:{endpoint.port} refused the stream of ring {self.epoch}",
                why,
                peer=place.node_id,
            )
        check(reply)
        await self._connect_data(endpoint, place.node_id, reply)
        self._outbound = asyncio.create_task(self._send(call, place.node_id))
        self._compute.post(self._release)

    async def _connect_data(
        self, endpoint: wire.Endpoint, peer_id: str, reply: wire.FlowReply
    ) -> None:
        """The short way for frames, if the next stage offers one."""
        if not reply.data_port:
            return
        host, port, ticket = endpoint.host, reply.data_port, reply.data_ticket
        try:
            connection = await in_thread(
                lambda: connect(
                    host,
                    port,
                    ticket,
                    self._limits,
                    credentials=self._credentials,
                    peer_id=peer_id,
                )
            )
        except OSError as error:
            log.warning(
                "frames of ring %d go through gRPC, which is slower: port %d of %s: %s",
                *(self.epoch, port, host, error),
            )
            return
        self._sender = DataSender(connection, lambda error: self._link_ended(error, peer_id))
        if self._ended:
            self._sender.close()

    async def accept(self, opening: wire.FlowOpen) -> wire.FlowReply:
        """Checks the stream that the stage before opens, and answers it.

        Raises:
            FrameRefused: it is not from the stage before this one.
        """
        expected = (self.index - 1) % self.count
        if (opening.from_stage, opening.to_stage) != (expected, self.index):
            raise FrameRefused(
                f"Stage {self.index} takes frames from stage {expected}, "
                f"not from {opening.from_stage}",
                epoch=opening.epoch,
            )
        reply = wire.FlowReply(epoch=self.epoch)
        if self._data is not None and self._ticket is None:
            report = self._returns.report if self._returns is not None else lambda: None
            receiver = Receiver(self._received, report, self._data_ended)
            self._ticket = self._data.expect(receiver, self.before)
            reply.data_port, reply.data_ticket = self._ticket.port, self._ticket.secret
        self._inbound.set()
        return reply

    async def leave(self) -> None:
        """Ends this node's part: streams closed, caches freed. Weights stay."""
        self._ended = True
        if self._ticket is not None:
            self._ticket.close()
        if self._sender is not None:
            self._sender.close()
        if self._outbound is not None:
            self._outbound.cancel()
            await asyncio.gather(self._outbound, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    def end(self, error: ParallaxError) -> None:
        """Ends the epoch with an error, once. Any thread may call it."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
        self._compute.tell(self._broken, self.epoch, error)

    @property
    def ended(self) -> bool:
        """Whether the epoch is over for this node."""
        return self._ended

    # --------------------------------------------------------------- hot path

    async def receive(self, pieces: AsyncIterator[wire.FramePiece]) -> None:
        """Takes frames from the stage before until the stream ends."""
        async for frame in assemble(pieces, self._limits.frame_bytes):
            if self._ended:
                self._refused()
                return
            self._report_in(self._take(frame, frame.ByteSize()))

    def _received(self, message: bytes) -> float | None:
        """A frame came over the data connection, on whose thread this runs."""
        size = len(message)
        if size > self._looked_at_bytes:
            check_large(message, self._limits.message_bytes)
        try:
            frame = wire.Frame.FromString(message)
        except DecodeError:
            raise FrameRefused("What came is no frame", epoch=self.epoch) from None
        if self._ended:
            self._refused()
            return None
        return self._take(frame, size)

    def _data_ended(self, error: ParallaxError | None) -> None:
        ended = LinkBroken(f"The data connection to stage {self.index} ended")
        self._link_ended(error or ended, self.before)

    def _link_ended(self, error: ParallaxError, peer_id: str) -> None:
        if isinstance(error, LinkBroken):
            error = LinkBroken(error.what, error.why, error.fix, peer=peer_id)
        self.end(error)

    def _take(self, frame: wire.Frame, size_bytes: int) -> float | None:
        sane = 0 <= frame.slowest_s < MOST_FRAME_S  # NaN is neither
        if frame.epoch != self.epoch or frame.number != self._expected or not sane:
            self._refused()
            raise FrameRefused(
                f"Frame {frame.number} of epoch {frame.epoch} does not follow "
                f"frame {self._expected - 1} of epoch {self.epoch}",
                epoch=frame.epoch,
                number=frame.number,
            )
        self._expected += 1
        check_counts(frame)
        if self._returns is not None:
            return self._returns.returned(frame)
        weight = weight_of(frame, size_bytes)
        self._taken_bytes += weight
        if self._taken_bytes - self._run_bytes > self._inbox_bytes:
            raise FrameRefused(f"The inbox of stage {self.index} is full", epoch=self.epoch)
        self.process(frame, weight)
        return None

    def process(self, frame: wire.Frame, weight: int = 0) -> None:
        """Queues a frame for this stage's layers. Any thread may call it.

        Args:
            weight: bytes that it takes of the inbox.

        Raises:
            FrameRefused: more frames wait than the ring's window allows.
        """
        if self._compute.waiting > self._inbox_limit:
            raise FrameRefused(f"The inbox of stage {self.index} is full", epoch=self.epoch)
        self._compute.post(lambda: self._run(frame, weight))

    def _run(self, frame: wire.Frame, weight: int) -> None:
        if self._ended:
            return
        begin = time.perf_counter()
        self._run_bytes += weight
        try:
            result = self._runner.run(frame)
        except ParallaxError as error:
            self.end(error)
            return
        except Exception as error:
            log.exception("stage %d failed in frame %d", self.index, frame.number)
            self.end(error_of(error, f"Stage {self.index} failed"))
            return
        end = time.perf_counter()
        if self._held is not None:
            self._hold(self._held, end, result)
        else:
            self._pass_on(end, result)
        self._count(frame, result, end - begin)

    def _pass_on(self, computed_at: float, result: wire.Frame) -> None:
        if self._sender is not None:
            message = result.SerializeToString()
            size = len(message)
            if self._has_room(size):
                self._sender.send(message, lambda: self._hopped(computed_at, size))
        elif self.count > 1:
            size = result.ByteSize()
            if self._has_room(size):
                self._compute.tell(self._queue, result, computed_at, size)
        elif self._returns is not None:
            self._compute.tell(self._report_in, self._returns.returned(result))

    def _has_room(self, size_bytes: int) -> bool:
        """Whether one more result may wait to be sent: else the ring ends, as with a full inbox."""
        self._made_bytes += size_bytes
        if self._made_bytes - self._left_bytes <= self._inbox_bytes:
            return True
        self._end_full()
        return False

    def _end_full(self) -> None:
        self.end(FrameRefused(f"The outbox of stage {self.index} is full", epoch=self.epoch))

    def _hold(self, held: list[tuple[float, wire.Frame]], at: float, result: wire.Frame) -> None:
        self._held_bytes += weight_of(result, len(result.carry))
        if len(held) < self._inbox_limit and self._held_bytes <= self._inbox_bytes:
            held.append((at, result))
        else:
            self._end_full()

    def _release(self) -> None:
        """The way on is known: results that were there before it go first. On the MLX thread."""
        held, self._held = self._held or [], None
        for computed_at, result in held:
            self._pass_on(computed_at, result)

    def _hopped(self, computed_at: float, size_bytes: int) -> None:
        self._left_bytes += size_bytes
        self.health.hops += 1
        self.health.hop_s += time.perf_counter() - computed_at

    def _report_in(self, delay_s: float | None) -> None:
        if delay_s is not None and self._returns is not None:
            asyncio.get_running_loop().call_later(delay_s, self._returns.report)

    def _queue(self, frame: wire.Frame, computed_at: float, size_bytes: int) -> None:
        if self._ended:
            return
        try:
            self._outbox.put_nowait((computed_at, size_bytes, frame))
        except asyncio.QueueFull:
            self._end_full()

    async def _send(
        self,
        call: grpc.aio.StreamStreamCall[wire.FramePiece, wire.FlowReply],
        peer: str,
    ) -> None:
        """Frames through gRPC, if there is no data connection; the stream's end in any case."""
        try:
            if self._sender is not None:
                reply = await call.read()
                raise asyncio.InvalidStateError(f"the next stage ended it ({reply!r:.60})")
            while True:
                computed_at, size, frame = await self._outbox.get()
                for piece in split(frame, self._limits.piece_bytes):
                    await call.write(piece)
                self._hopped(computed_at, size)
        except _STREAM_ERRORS as error:
            self.end(
                LinkBroken(
                    f"The stream from stage {self.index} to the next broke",
                    _details(error),
                    peer=peer,
                )
            )
        except Exception as error:
            log.exception("stage %d cannot send", self.index)
            self.end(InternalError(f"Sending failed: {type(error).__name__}: {error}"))

    def _count(self, frame: wire.Frame, result: wire.Frame, seconds: float) -> None:
        health = self.health
        tokens = len(frame.tokens)
        if frame.kind == wire.DECODE:
            if result.carry or result.tokens:  # else it was passed by
                health.decode_frames += 1
                health.decode_tokens += tokens
                health.decode_compute_s += seconds
                health.draw_s = self._runner.draw_s
        elif frame.kind == wire.PREFILL:
            health.prefill_frames += 1
            health.prefill_tokens += tokens
            health.prefill_compute_s += seconds
        if tokens and result.carry:
            self.carry_bytes_per_token = len(result.carry) // tokens
        health.slowest_s = max(health.slowest_s, seconds)
        health.rows = self._runner.rows
        health.lanes = self._runner.lanes
        now = time.monotonic()
        if now - self._weighed_at >= WEIGH_EVERY_S:  # many kept prefixes take long to add up
            self._weighed_at = now
            health.cache_bytes = self._runner.cache_bytes


def _details(error: Exception) -> str:
    details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    return details or type(error).__name__
