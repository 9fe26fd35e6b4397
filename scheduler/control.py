"""gRPC: the scheduler's side of enrolment and membership.

Who calls is known from TLS: nobody on the enrol listener, a member on the other. A call in the name
of another node than the certificate's is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol

import grpc.aio

from parallax.fabric import bounds
from parallax.fabric.addresses import caller_host, is_this_machine
from parallax.fabric.authority import Authority
from parallax.fabric.certificates import Bound
from parallax.fabric.credentials import end_of, peer_of
from parallax.fabric.enrolment import check
from parallax.fabric.errors import (
    InvalidRequest,
    MessageRefused,
    NotAdmitted,
    ParallaxError,
    PeerMismatch,
    to_fault,
)
from parallax.fabric.limits import Limits
from parallax.fabric.members import MembersOnly
from parallax.fabric.tally import Tally
from parallax.fabric.version import PROTOCOL
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from parallax.scheduler.admission_values import Admitted, Refused, Verdict, Waiting

log = logging.getLogger(__name__)

OUTBOX_ORDERS = 4096
POLL_S = 2.0  # between two questions of a node that waits to be let in
LOOK_S = 60.0  # between two looks at a certificate's end: clocks are set anew now and then


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

    def certificate_s(self, node_id: str) -> float:
        """How long this member's next certificate is good."""
        ...


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


class Door(Protocol):
    """Who decides whether a node is let in."""

    async def ask(
        self, node_id: str, name: str, token: str, *, local: bool, address: str
    ) -> Verdict:
        """See :class:`~parallax.scheduler.gate.Gate`."""
        ...

    def certificate_s(self, node_id: str) -> float:
        """How long a certificate for this node is good, should it be let in."""
        ...


class EnrolService(rpc.EnrolServicer):
    """The only call a stranger can make.

    Args:
        scheduler_id: who this is; the caller has it from TLS already.
        cluster_port: where members attend.
        door: who decides.
        authority: gives a certificate to those who are let in.
        tally: where those are counted who are not who they say.
    """

    def __init__(
        self,
        scheduler_id: str,
        cluster_port: int,
        *,
        door: Door,
        authority: Authority,
        tally: Tally,
    ) -> None:
        self._scheduler_id = scheduler_id
        self._cluster_port = cluster_port
        self._door = door
        self._authority = authority
        self._tally = tally

    async def Enrol(
        self,
        request: wire.EnrolRequest,
        context: grpc.aio.ServicerContext[wire.EnrolRequest, wire.EnrolReply],
    ) -> wire.EnrolReply:
        """Lets a node in, has it wait, or refuses it; and tells where members attend."""
        reply = wire.EnrolReply(
            protocol=PROTOCOL, scheduler_id=self._scheduler_id, cluster_port=self._cluster_port
        )
        if request.protocol != PROTOCOL or not request.csr:
            return reply
        host = caller_host(context.peer())
        try:
            bounds.check(request)
            check(request, self._scheduler_id)
            # Issued before anybody is asked: what is wrong with the request must cost no token.
            life_s = self._door.certificate_s(request.node_id)
            bound = self._authority.issue(request.csr, request.node_id, life_s)
            verdict = await self._door.ask(
                request.node_id,
                request.name,
                request.token,
                local=is_this_machine(host),
                address=host,
            )
        except ParallaxError as error:
            if isinstance(error, PeerMismatch):
                self._tally.refuse("proof", f"{host}: {error.sentence}")
            reply.refused.CopyFrom(to_fault(error))
            return reply
        match verdict:
            case Admitted():
                reply.certificate.CopyFrom(_certificate(bound, self._authority))
            case Waiting(fingerprint):
                reply.waiting.fingerprint = fingerprint
                reply.waiting.poll_s = POLL_S
            case Refused(refusal):
                reply.refused.CopyFrom(to_fault(refusal))
        return reply


def _certificate(bound: Bound, authority: Authority) -> wire.Certificate:
    return wire.Certificate(own=bound.pem, authority=authority.pem)


class MembershipService(rpc.MembershipServicer):
    """One stream per node: reports go to the desk, its orders come back."""

    def __init__(self, desk: Desk, authority: Authority, limits: Limits, gate: MembersOnly) -> None:
        self._desk = desk
        self._authority = authority
        self._limits = limits
        self._gate = gate
        self._tally = gate.tally

    async def Renew(
        self,
        request: wire.RenewRequest,
        context: grpc.aio.ServicerContext[wire.RenewRequest, wire.RenewReply],
    ) -> wire.RenewReply:
        """The next certificate of the member that calls."""
        peer = peer_of(context) or ""
        try:
            bound = self._authority.issue(request.csr, peer, self._desk.certificate_s(peer))
        except PeerMismatch as error:
            self._tally.refuse("proof", f"{peer} at {context.peer()}: {error.sentence}")
            await context.abort(error.row.grpc, error.sentence)
        return wire.RenewReply(certificate=_certificate(bound, self._authority))

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
            self._must_be(first.hello.facts.node_id, context)
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
        proof = asyncio.create_task(self._proved(node_id, end_of(context) or 0.0, link))
        try:
            async for order in link.orders():
                yield order
            if link.refused is not None:
                await context.abort(link.refused.row.grpc, link.refused.sentence)
        finally:
            reader.cancel()
            proof.cancel()
            await asyncio.gather(reader, proof, return_exceptions=True)
            self._desk.node_lost(node_id, link, "its stream ended")

    def _must_be(
        self, node_id: str, context: grpc.aio.ServicerContext[wire.NodeReport, wire.NodeOrder]
    ) -> None:
        """
        Raises:
            PeerMismatch: the caller's certificate is another node's.
        """
        peer = peer_of(context)
        if peer != node_id:
            self._tally.refuse("identity", f"{peer} at {context.peer()} says it is {node_id}")
            raise PeerMismatch(
                "A node says it is another one than its certificate says",
                f"it says {node_id}",
                expected=node_id,
                found=peer,
            )

    async def _proved(self, node_id: str, end: float, link: NodeLink) -> None:
        """Ends the stream of a node that has shown no certificate that is still good.

        It goes on over a renewal: the node shows what is new in a call beside it. With the stream
        the node's rings end, and with these its streams to other nodes.
        """
        slack_s = self._limits.call_s  # for a renewal that is just being made
        left_s = slack_s
        while left_s > 0:
            left_s = self._gate.left_s(node_id, end) + slack_s
            await asyncio.sleep(max(0.0, min(left_s, LOOK_S)))
        self._tally.refuse("certificate", f"the certificate of {node_id} has ended")
        link.refuse(NotAdmitted("This node's certificate has ended", reason="certificate"))
        self._desk.node_lost(node_id, link, "its certificate has ended")

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
