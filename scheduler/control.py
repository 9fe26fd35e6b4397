"""gRPC: the scheduler's side of enrolment and membership."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol

import grpc.aio

from parallax.fabric import bounds
from parallax.fabric.errors import InvalidRequest, MessageRefused, ParallaxError, to_fault
from parallax.fabric.limits import Limits
from parallax.fabric.version import PROTOCOL
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc

log = logging.getLogger(__name__)

OUTBOX_ORDERS = 4096


class Desk(Protocol):
    """Who decides over members: the cluster."""

    def node_hello(self, hello: wire.Hello, link: NodeLink) -> None:
        """A node attends over ``link``.

        Raises:
            ParallaxError: it is refused.
        """
        ...

    def node_report(self, node_id: str, link: NodeLink, report: wire.NodeReport) -> None: ...

    def node_lost(self, node_id: str, link: NodeLink, reason: str) -> None: ...

    def message_refused(self, sender: str, error: MessageRefused) -> None: ...


class NodeLink:
    """The way to one attending node: orders are queued, never awaited."""

    def __init__(self) -> None:
        self._outbox: asyncio.Queue[wire.NodeOrder | None] = asyncio.Queue(maxsize=OUTBOX_ORDERS)
        self.refused: ParallaxError | None = None

    def order(self, order: wire.NodeOrder) -> None:
        """Sends an order; a node that does not read its orders is cut off."""
        if self._outbox.qsize() >= OUTBOX_ORDERS - 1:
            self.close()
        else:
            self._outbox.put_nowait(order)

    def close(self) -> None:
        """Ends the stream after the orders already queued."""
        if not self._outbox.full():
            self._outbox.put_nowait(None)

    def refuse(self, error: ParallaxError) -> None:
        """Ends the stream, because of what came over it."""
        self.refused = error
        self.close()

    async def orders(self) -> AsyncIterator[wire.NodeOrder]:
        """The orders, until :meth:`close`."""
        while (order := await self._outbox.get()) is not None:
            yield order


class EnrolService(rpc.EnrolServicer):
    """The only call a stranger can make."""

    def __init__(self, scheduler_id: str, cluster_port: int) -> None:
        self._reply = wire.EnrolReply(
            protocol=PROTOCOL, scheduler_id=scheduler_id, cluster_port=cluster_port
        )

    async def Enrol(
        self,
        request: wire.EnrolRequest,
        context: grpc.aio.ServicerContext[wire.EnrolRequest, wire.EnrolReply],
    ) -> wire.EnrolReply:
        """Tells a node who this is and where members attend."""
        return self._reply


class MembershipService(rpc.MembershipServicer):
    """One stream per node: reports go to the desk, its orders come back."""

    def __init__(self, desk: Desk, limits: Limits) -> None:
        self._desk = desk
        self._limits = limits

    async def Attend(
        self,
        request_iterator: AsyncIterator[wire.NodeReport],
        context: grpc.aio.ServicerContext[wire.NodeReport, wire.NodeOrder],
    ) -> AsyncIterator[wire.NodeOrder]:
        """A node attends from its hello until either side ends the stream."""
        reports = aiter(request_iterator)
        link = NodeLink()
        try:
            async with asyncio.timeout(self._limits.call_s):
                first = await anext(reports, None)
            if first is None or not first.HasField("hello") or not first.hello.facts.node_id:
                raise InvalidRequest("A node begins with its hello", field="hello")
            bounds.check_hello(first.hello)
            self._desk.node_hello(first.hello, link)
        except ParallaxError as error:
            if isinstance(error, MessageRefused):
                self._desk.message_refused("hello", error)
            yield wire.NodeOrder(dismiss=wire.Dismiss(fault=to_fault(error)))
            return
        except TimeoutError:
            return
        node_id = first.hello.facts.node_id
        reader = asyncio.create_task(self._read(node_id, reports, link))
        try:
            async for order in link.orders():
                yield order
            if link.refused is not None:
                await context.abort(link.refused.row.grpc, link.refused.sentence)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._desk.node_lost(node_id, link, "its stream ended")

    async def _read(
        self, node_id: str, reports: AsyncIterator[wire.NodeReport], link: NodeLink
    ) -> None:
        try:
            async for report in reports:
                bounds.check(report)
                self._desk.node_report(node_id, link, report)
                if report.HasField("goodbye"):
                    break
        except MessageRefused as error:
            self._desk.message_refused(node_id, error)
            link.refuse(error)
        except Exception:
            log.exception("a report of %s could not be taken in: its stream is ended", node_id)
        finally:
            link.close()
