"""How a node becomes a member, and stays one: it enrols, waits to be let in, and renews in time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc.aio

from parallax.fabric import bounds
from parallax.fabric.certificates import SKEW, key_pem, new_key, signing_request
from parallax.fabric.channels import open_to_scheduler
from parallax.fabric.credentials import Credentials, Papers, out_of_time
from parallax.fabric.discovery import Target
from parallax.fabric.enrolment import prove
from parallax.fabric.errors import (
    BadSetting,
    ParallaxError,
    PeerMismatch,
    SchedulerUnreachable,
    VersionMismatch,
    from_fault,
)
from parallax.fabric.events import AwaitsApproval, Event
from parallax.fabric.identity import fingerprint
from parallax.fabric.keyfiles import read_secret, write_secret
from parallax.fabric.limits import Limits
from parallax.fabric.version import PROTOCOL
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc

Connect = Callable[[], Awaitable[grpc.aio.Channel]]

log = logging.getLogger(__name__)

POLL_S = (0.2, 30.0)  # at least and at most, whatever the scheduler says
LOOK_S = 60.0  # between two looks at how long the certificate is still valid
RENEW_AGAIN_S = 5.0
LEAST_S = 0.5  # between two renewals


class Enrolment:
    """A node's way into one cluster.

    Args:
        credentials: get the certificate.
        path: where it is kept, so that a restart needs neither token nor approval.
        name: what the node calls itself.
        token: what lets it in without anybody's approval, if it has one.
        limits: time-outs.
        on_event: is told when somebody has to approve.
    """

    def __init__(
        self,
        credentials: Credentials,
        path: Path,
        *,
        name: str,
        token: str,
        limits: Limits,
        on_event: Callable[[Event], None],
    ) -> None:
        self._credentials = credentials
        self._path = path
        self._name = name
        self._token = token
        self._limits = limits
        self._on_event = on_event
        self._fresh = False  # whether the certificate is of the last try to enrol
        self.refused = False  # for good: the scheduler has said no
        self.waits_for = ""  # the scheduler that has this node wait, if one does

    async def enrol(self, target: Target, *, named: bool) -> tuple[str, list[wire.Endpoint]]:
        """Makes this node a member, if it is not, and asks where members attend.

        Args:
            target: the scheduler.
            named: whether its peer id is known from whoever started this node, and not only from
                the network.

        Returns:
            The scheduler's peer id and the endpoints of its cluster listener.

        Raises:
            BadSetting: a token would be given to a scheduler that nobody has named.
            ParallaxError: the scheduler cannot be reached, is another one, or refuses this node.
        """
        if self._token and not named:
            raise BadSetting(
                "A token is given only to a scheduler whose peer id is known",
                "Somebody else may answer at an address, and would have the token then",
                "Use the whole join command, or PEER_ID@host:port",
                setting="token",
            )
        channel, endpoint, scheduler_id = await open_to_scheduler(
            target.endpoints, target.peer_id, limits=self._limits
        )
        try:
            self._recall(scheduler_id)
            request = wire.EnrolRequest(
                protocol=PROTOCOL, node_id=self._credentials.peer_id, name=self._name
            )
            key = None
            if not self._credentials.member:
                key = new_key()
                request.csr = signing_request(self._credentials.identity, key)
                request.token = self._token
                prove(request, self._credentials.identity, scheduler_id)
            reply = await self._until_let_in(channel, endpoint, scheduler_id, request)
        finally:
            await channel.close()
        self.waits_for = ""
        if key is not None:
            self._adopt(key_pem(key), reply.certificate, scheduler_id)
            self._fresh = True
        # The address that answered first, the others behind it.
        hosts = [endpoint, *(e for e in target.endpoints if e.host != endpoint.host)]
        return scheduler_id, [
            wire.Endpoint(host=e.host, port=reply.cluster_port, kind=e.kind) for e in hosts
        ]

    def start_over(self) -> bool:
        """Lets go of a certificate that is accepted no more; False if it is brand new."""
        if self._fresh:
            return False
        self._credentials.resign()
        self._path.unlink(missing_ok=True)
        return True

    async def renewing(self, connect: Connect) -> None:
        """Renews the certificate at the scheduler, whenever half of its life is over.

        And shows the new one there, over a connection of its own: by that the scheduler lets the
        node's stream stand, which came in with the old one.

        Args:
            connect: opens a channel to the scheduler with the certificate that counts now.
        """
        shown = self._credentials.papers  # the node attends with them
        new = False
        while True:
            papers = self._credentials.papers
            certificate = papers.own.certificate
            life = certificate.not_valid_after_utc - certificate.not_valid_before_utc - SKEW
            early_s = (papers.left(datetime.now(UTC)) - life / 2).total_seconds()
            due = early_s <= 0 and not new
            if papers is shown and not due:
                wait_s = early_s
                if early_s <= 0:
                    log.warning("what is new is half over: is this machine's clock far ahead?")
                    wait_s = max(LEAST_S, papers.left(datetime.now(UTC)).total_seconds() / 4)
                await asyncio.sleep(min(wait_s, LOOK_S))
                new = False
                continue
            try:
                async with await connect() as channel:  # which is a call already
                    shown = papers
                    if due:
                        await self._renew(channel)
                        new = True
            except (grpc.aio.AioRpcError, ParallaxError) as error:
                log.warning("the certificate could not be renewed: %s", error)
                await asyncio.sleep(RENEW_AGAIN_S)

    async def _renew(self, channel: grpc.aio.Channel) -> None:
        key = new_key()
        request = wire.RenewRequest(csr=signing_request(self._credentials.identity, key))
        reply = await rpc.MembershipStub(channel).Renew(request, timeout=self._limits.call_s)
        bounds.check(reply)
        self._adopt(key_pem(key), reply.certificate, self._credentials.scheduler_id)
        log.info("the certificate is renewed")

    async def _until_let_in(
        self,
        channel: grpc.aio.Channel,
        endpoint: wire.Endpoint,
        scheduler_id: str,
        request: wire.EnrolRequest,
    ) -> wire.EnrolReply:
        told = False
        while True:
            try:
                reply = await rpc.EnrolStub(channel).Enrol(request, timeout=self._limits.call_s)
            except grpc.aio.AioRpcError as error:
                raise SchedulerUnreachable(
                    f"{endpoint.host}:{endpoint.port} does not answer as a Parallax scheduler",
                    error.details() or error.code().name,
                    "Check the address and that 'parallax run' is running there",
                    address=f"{endpoint.host}:{endpoint.port}",
                ) from None
            bounds.check(reply)
            if reply.protocol != PROTOCOL:
                raise VersionMismatch(
                    "The scheduler speaks another version of the protocol",
                    f"it speaks {reply.protocol}, this node {PROTOCOL}",
                    "Install the same version of Parallax on both",
                    ours=PROTOCOL,
                    theirs=reply.protocol,
                )
            match reply.WhichOneof("outcome"):
                case "refused":
                    self.refused = True
                    raise from_fault(reply.refused)
                case "waiting":
                    self.waits_for = scheduler_id
                    if not told:  # reckoned here: who stands in between would tell us another's
                        told = True
                        mark = fingerprint(scheduler_id, self._credentials.peer_id)
                        self._on_event(AwaitsApproval(scheduler_id, mark))
                    await asyncio.sleep(min(max(reply.waiting.poll_s, POLL_S[0]), POLL_S[1]))
                case "certificate":
                    return reply
                case _ if not request.csr:
                    return reply
                case _:
                    raise SchedulerUnreachable("The scheduler's answer makes no sense")

    def _recall(self, scheduler_id: str) -> None:
        """Takes up the certificate of an earlier run, and lets go of one that is of no use."""
        self._fresh = False
        now = datetime.now(UTC)
        if not self._credentials.member:
            try:
                kept = read_secret(self._path)
                if kept is not None:
                    self._credentials.adopt(Papers.from_pem(kept))
            except ParallaxError as error:
                log.warning("the certificate in %s is not used: %s", self._path, error.sentence)
        papers = self._credentials.papers
        if papers.scheduler_id != scheduler_id or not papers.valid(now):
            self._credentials.resign()

    def _adopt(self, key: bytes, certificate: wire.Certificate, scheduler_id: str) -> None:
        """
        Raises:
            PeerMismatch: the certificate is not ours, or not from this scheduler's authority.
            NotAdmitted: by this machine's clock it is not valid.
        """
        papers = Papers.of(key, certificate.own, certificate.authority)
        if papers.scheduler_id != scheduler_id:
            raise PeerMismatch(
                "The certificate that came is from another authority",
                f"it is of {papers.scheduler_id}",
                expected=scheduler_id,
                found=papers.scheduler_id,
            )
        error = out_of_time(papers.own, "The certificate that came", datetime.now(UTC))
        if error is not None:
            raise error
        self._credentials.adopt(papers)
        write_secret(self._path, papers.pem, replace=True)
