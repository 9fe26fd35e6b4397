"""gRPC: the scheduler's streams to the heads of its rings."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import grpc
import grpc.aio

from parallax.fabric.channels import open_channel
from parallax.fabric.credentials import Credentials
from parallax.fabric.errors import LinkBroken, MessageRefused, ParallaxError
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from parallax.scheduler.head_account import REPORT_BYTES, HeadAccount

log = logging.getLogger(__name__)

OUTBOX_ORDERS = 4096
TOO_LARGE = "Received message larger"  # as gRPC says it of a message that is not read


class HeadListener(Protocol):
    """Who is told what a head says."""

    def head_report(self, report: wire.HeadReport) -> None: ...

    def head_lost(self, epoch: int, error: ParallaxError) -> None: ...


class HeadLink:
    """One stream to one ring's head, for one epoch."""

    def __init__(
        self,
        epoch: int,
        node_id: str,
        endpoints: list[wire.Endpoint],
        listener: HeadListener,
        limits: Limits,
        credentials: Credentials,
    ) -> None:
        self.epoch = epoch
        self._node_id = node_id
        self._endpoints = endpoints
        self._listener = listener
        self._limits = limits
        self._credentials = credentials
        self._account = HeadAccount()
        self._outbox: asyncio.Queue[wire.HeadOrder] = asyncio.Queue(maxsize=OUTBOX_ORDERS)
        self._task = asyncio.create_task(self._run())

    def submit(self, submit: wire.Submit) -> None:
        """Sends a request to the ring."""
        try:
            self._account.sent(submit)
        except MessageRefused as error:
            self._refuse(error.sentence)
            return
        self._put(wire.HeadOrder(epoch=self.epoch, submit=submit))

    def cancel(self, cancel: wire.Cancel) -> None:
        """Takes a request back from the ring."""
        self._put(wire.HeadOrder(epoch=self.epoch, cancel=cancel))

    async def close(self) -> None:
        """Ends the stream; nothing is told any more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _put(self, order: wire.HeadOrder) -> None:
        try:
            self._outbox.put_nowait(order)
        except asyncio.QueueFull:
            self._lost("its orders pile up")

    def _lost(self, why: str) -> None:
        self._tell(
            LinkBroken(
                f"The stream to the head of ring {self.epoch} broke", why, peer=self._node_id
            )
        )

    def _refuse(self, why: str) -> None:
        """What the head says cannot be: nobody else is to blame."""
        self._tell(MessageRefused(f"The head of ring {self.epoch} reports what cannot be", why))

    def _tell(self, error: ParallaxError) -> None:
        lost: Callable[[int, ParallaxError], None] = self._listener.head_lost
        asyncio.get_running_loop().call_soon(lost, self.epoch, error)

    async def _run(self) -> None:
        channel: grpc.aio.Channel | None = None
        writer: asyncio.Task[None] | None = None
        try:
            channel, _ = await open_channel(
                self._endpoints,
                self._node_id,
                limits=self._limits,
                credentials=self._credentials,
                receive_bytes=REPORT_BYTES,
            )
            call = rpc.HeadStub(channel).Serve()
            await call.write(wire.HeadOrder(epoch=self.epoch))
            writer = asyncio.create_task(self._write(call))
            async for report in call:
                if report.epoch != self.epoch:
                    raise MessageRefused("A head reports of a ring that is not its own")
                self._account.take(report)
                self._listener.head_report(report)
            self._lost("the head ended it")
        except grpc.aio.AioRpcError as error:
            why = error.details() or error.code().name
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and TOO_LARGE in why:
                self._refuse(f"a report of over {REPORT_BYTES} bytes")
            else:
                self._lost(why)
        except MessageRefused as error:
            self._refuse(error.sentence)
        except ParallaxError as error:
            self._lost(error.sentence)
        except Exception as error:
            log.exception("the link to the head of ring %d failed", self.epoch)
            self._lost(f"{type(error).__name__}: {error}")
        finally:
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
            if channel is not None:
                await channel.close()

    async def _write(
        self, call: grpc.aio.StreamStreamCall[wire.HeadOrder, wire.HeadReport]
    ) -> None:
        try:
            while True:
                await call.write(await self._outbox.get())
        except Exception as error:  # most often the stream broke, and the reader says so too
            self._lost(f"orders cannot be sent: {type(error).__name__}")
