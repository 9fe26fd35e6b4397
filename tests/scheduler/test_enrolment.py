"""Nodes that enrol at a scheduler's real listeners, and those who are not who they say."""

from __future__ import annotations

import asyncio
import sqlite3
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from zeroconf.asyncio import AsyncServiceInfo

from parallax.fabric import channels
from parallax.fabric.addresses import listening_addresses
from parallax.fabric.certificates import new_key, signing_request
from parallax.fabric.channels import listen, open_channel, stop_listening
from parallax.fabric.credentials import Credentials
from parallax.fabric.discovery import SERVICE, Target, choose, read
from parallax.fabric.errors import (
    BadSetting,
    JoinRefused,
    NotAdmitted,
    PeerMismatch,
    SchedulerUnreachable,
)
from parallax.fabric.events import AwaitsApproval, Event
from parallax.fabric.identity import fingerprint
from parallax.fabric.limits import Limits
from parallax.fabric.members import MembersOnly
from parallax.fabric.settings import SchedulerSettings
from parallax.fabric.tally import Tally
from parallax.fabric.version import PROTOCOL, mlx_lm_version, mlx_version
from parallax.node.enrolment import Enrolment
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from parallax.scheduler import control
from parallax.scheduler.admission_values import Admitted, Refused, Verdict, Waiting
from parallax.scheduler.cluster import ClusterService
from parallax.scheduler.control import EnrolService, MembershipService
from parallax.scheduler.gate import OPEN_CERTIFICATE_S
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.store import FILE_NAME, Store
from tests.trust import authority, identity, member, peer, tally

LIMITS = Limits(connect_s=5.0)
LOOPBACK = listening_addresses(loopback_only=True)
TOKEN = "a token that nobody else may see"


@dataclass
class Door:
    """Answers as it is told, and remembers who asked."""

    verdicts: list[Verdict | Exception] = field(default_factory=list)
    asked: list[tuple[str, str, str, bool]] = field(default_factory=list)

    async def ask(
        self, node_id: str, name: str, token: str, *, local: bool, address: str
    ) -> Verdict:
        self.asked.append((node_id, name, token, local))
        verdict = self.verdicts.pop(0) if self.verdicts else Admitted()
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def certificate_s(self, node_id: str) -> float:
        return LIMITS.certificate_s


@dataclass
class Place:
    """A scheduler's enrol listener."""

    name: str
    port: int
    door: Door
    tally: Tally

    def target(self, expected: str | None = "", port: int = 0) -> Target:
        """Where it is, and who it is said to be; by default who it is."""
        wanted = peer(self.name) if expected == "" else expected
        return Target(wanted, (at(port or self.port),))


def at(port: int) -> wire.Endpoint:
    return wire.Endpoint(host="127.0.0.1", port=port, kind="loopback")


@asynccontextmanager
async def enrolling(name: str = "boss", cluster_port: int = 7) -> AsyncIterator[Place]:
    """A scheduler that takes strangers, and nothing else of it."""
    door, counted = Door(), tally()
    service = EnrolService(
        peer(name),
        cluster_port,
        door=door,
        authority=authority(name),
        tally=counted,
    )
    server, port = await listen(
        LOOPBACK,
        0,
        credentials=member(name, name),
        gate=None,
        limits=LIMITS,
        register=lambda server: rpc.add_EnrolServicer_to_server(service, server),
    )
    try:
        yield Place(name, port, door, counted)
    finally:
        await stop_listening(server, grace_s=0.1)


@dataclass
class Node:
    """One that wants to be a member."""

    folder: Path
    name: str = "node"
    token: str = TOKEN
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.credentials = Credentials(identity(self.name))
        self.enrolment = Enrolment(
            self.credentials,
            self.folder / f"{self.name}.pem",
            name=self.name,
            token=self.token,
            limits=LIMITS,
            on_event=self.events.append,
        )

    async def enrol(self, target: Target, *, named: bool = True) -> str:
        scheduler_id, _ = await self.enrolment.enrol(target, named=named)
        return scheduler_id


@dataclass
class Wire:
    """A proxy that keeps what clients send."""

    port: int = 0
    sent: bytes = b""

    def records(self) -> list[tuple[int, int]]:
        """The TLS records that were sent: type and length."""
        found, at = [], 0
        while at < len(self.sent):
            length = int.from_bytes(self.sent[at + 3 : at + 5], "big")
            found.append((self.sent[at], length))
            at += 5 + length
        return found


@asynccontextmanager
async def recorded(port: int) -> AsyncIterator[Wire]:
    """What goes to ``port``, byte by byte."""
    tap = Wire()

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, keep: bool
    ) -> None:
        try:
            while data := await reader.read(65536):
                if keep:
                    tap.sent += data
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(
            pump(reader, to_writer, keep=True), pump(to_reader, writer, keep=False)
        )

    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    tap.port = server.sockets[0].getsockname()[1]
    try:
        yield tap
    finally:
        server.close()
        await until_quiet()


async def until_quiet() -> None:
    """The proxy's tasks end with their connections."""
    async with asyncio.timeout(30):
        while any("meet" in repr(task.get_coro()) for task in asyncio.all_tasks()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_node_that_is_let_in_has_a_certificate_and_knows_where_to_attend(
    tmp_path: Path,
) -> None:
    node = Node(tmp_path)
    async with enrolling() as place:
        assert await node.enrol(place.target()) == peer("boss")
    assert place.door.asked == [(peer("node"), "node", TOKEN, True)]
    assert node.credentials.scheduler_id == peer("boss")
    assert node.credentials.papers.own.peer_id == peer("node")
    assert (tmp_path / "node.pem").stat().st_mode & 0o777 == 0o600


async def test_a_scheduler_with_another_peer_id_is_told_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path)
    async with enrolling("mallory") as place, recorded(place.port) as tap:
        with pytest.raises(PeerMismatch) as caught:
            await node.enrol(place.target(peer("boss"), tap.port))
        assert caught.value.fields == {"expected": peer("boss"), "found": peer("mallory")}
        assert place.door.asked == []
        # The handshake, and of what is encrypted only its Finished: 32 bytes of it, its head,
        # its type and the tag (RFC 8446, 4.4.4, 5.2).
        records = tap.records()
        assert [kind for kind, _ in records if kind not in (20, 22)] == [23]
        assert records[-1] in ((23, 53), (23, 69))
        # The same tap on the right scheduler sees the token leave, encrypted.
        tap.sent = b""
        await node.enrol(place.target(peer("mallory"), tap.port))
        assert place.door.asked[0][2] == TOKEN
        assert sum(length for kind, length in tap.records() if kind == 23) > 500
        assert TOKEN.encode() not in tap.sent


async def test_a_forged_record_on_the_network_gets_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path)
    async with enrolling("mallory") as place:
        forged = AsyncServiceInfo(
            SERVICE,
            f"{peer('boss')}.{SERVICE}",
            port=place.port,
            properties={"id": peer("boss"), "protocol": str(PROTOCOL), "name": "studio"},
            parsed_addresses=["127.0.0.1"],
        )
        found = read(forged)
        assert found is not None
        for wanted in (peer("boss"), None):
            with pytest.raises(PeerMismatch):
                await node.enrol(choose([found], wanted))
        assert place.door.asked == []


async def test_a_token_is_not_given_to_a_scheduler_that_nobody_named(tmp_path: Path) -> None:
    async with enrolling() as place:
        with pytest.raises(BadSetting, match="PEER_ID"):
            await Node(tmp_path).enrol(place.target(None), named=False)
        assert place.door.asked == []
        without = Node(tmp_path, token="")
        assert await without.enrol(place.target(None), named=False) == peer("boss")


async def test_a_node_waits_until_it_is_let_in_and_says_what_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "POLL_S", 0.01)
    node = Node(tmp_path, token="")
    async with enrolling() as place:
        print_ = fingerprint(peer("boss"), peer("node"))
        # Its own reckoning: whoever stood in between would tell it what the other side sees.
        place.door.verdicts = [Waiting("AAAA-BBBB-CCCC-DDDD"), Waiting(""), Admitted()]
        await node.enrol(place.target())
    assert node.events == [AwaitsApproval(peer("boss"), print_)]
    assert len(place.door.asked) == 3


async def test_a_node_that_waits_knows_for_whom_when_the_scheduler_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "POLL_S", 0.01)
    node = Node(tmp_path, token="")
    async with enrolling() as place:
        place.door.verdicts = [Waiting("x"), RuntimeError("the power failed")]
        with pytest.raises(SchedulerUnreachable):
            await node.enrol(place.target())
        assert node.enrolment.waits_for == peer("boss")
        assert not node.enrolment.refused
        await node.enrol(place.target())
        assert node.enrolment.waits_for == ""


async def test_a_node_that_is_refused_hears_why(tmp_path: Path) -> None:
    node = Node(tmp_path)
    async with enrolling() as place:
        place.door.verdicts = [Refused(JoinRefused("No", "because", reason="denied"))]
        with pytest.raises(JoinRefused, match="because"):
            await node.enrol(place.target())
    assert node.enrolment.refused
    assert not node.credentials.member


async def test_a_restart_needs_neither_token_nor_approval(tmp_path: Path) -> None:
    async with enrolling() as place:
        await Node(tmp_path).enrol(place.target())
        again = Node(tmp_path, token="")
        await again.enrol(place.target())
        assert len(place.door.asked) == 1
        assert again.credentials.scheduler_id == peer("boss")


async def test_a_certificate_that_has_ended_or_is_damaged_or_of_another_cluster_is_replaced(
    tmp_path: Path,
) -> None:
    path = tmp_path / "node.pem"
    old = [member("node", life_s=-1).papers.pem, b"junk", member("node", "attic").papers.pem]
    async with enrolling() as place:
        for count, pem in enumerate(old, 1):
            path.write_bytes(pem)
            path.chmod(0o600)
            node = Node(tmp_path)
            await node.enrol(place.target())
            assert len(place.door.asked) == count
            assert node.credentials.scheduler_id == peer("boss")


async def test_a_request_in_the_name_of_another_node_is_refused_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar = Node(tmp_path, "liar")
    # It holds its own key only, whatever name it gives.
    monkeypatch.setattr(Credentials, "peer_id", property(lambda _: peer("honest")))
    async with enrolling() as place:
        with pytest.raises(PeerMismatch, match="not signed"):
            await liar.enrol(place.target())
        assert place.door.asked == []
        assert place.tally.totals(0.0) == {"proof": 1}


async def test_strangers_without_tls_are_refused() -> None:
    async with enrolling() as place, grpc.aio.insecure_channel(f"127.0.0.1:{place.port}") as plain:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.EnrolStub(plain).Enrol(wire.EnrolRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert place.door.asked == []


async def test_strangers_have_a_bounded_number_of_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "STRANGER_CONNECTIONS", 4)
    async with enrolling() as place:
        held = [await asyncio.open_connection("127.0.0.1", place.port) for _ in range(8)]
        ends = [asyncio.create_task(reader.read()) for reader, _ in held]
        async with asyncio.timeout(2):  # the handshakes of those that are let in have longer
            while sum(end.done() for end in ends) < 4:
                await asyncio.wait(
                    [end for end in ends if not end.done()], return_when=asyncio.FIRST_COMPLETED
                )
        assert sum(end.done() for end in ends) == 4
        for _, writer in held:
            writer.close()
        await asyncio.gather(*ends, return_exceptions=True)
        await Node(tmp_path).enrol(place.target())  # their places are free again


async def test_a_stranger_that_asks_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "STRANGER_IDLE_MS", 50)
    async with enrolling() as place:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        reader, writer = await asyncio.open_connection("127.0.0.1", place.port, ssl=context)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        async with asyncio.timeout(5):
            await reader.read()  # to its end
        writer.close()


async def test_a_node_that_waits_outlives_its_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "POLL_S", 0.01)
    monkeypatch.setattr(channels, "STRANGER_AGE_MS", 100)
    monkeypatch.setattr(channels, "STRANGER_IDLE_MS", 100)
    node = Node(tmp_path, token="")
    async with enrolling() as place:
        place.door.verdicts = [Waiting("x") for _ in range(4)]
        await node.enrol(place.target())  # asks every 0.2 s, so each time over a new one
        assert len(place.door.asked) == 5


# ------------------------------------------------------------------------ members


@dataclass
class Cluster:
    """A scheduler's listener of members, with the real cluster behind it."""

    service: ClusterService
    port: int

    async def attend(self, credentials: Credentials, *, as_: str = "") -> Attendance:
        channel, _ = await open_channel(
            [at(self.port)], peer("boss"), limits=LIMITS, credentials=credentials
        )
        call = rpc.MembershipStub(channel).Attend()
        facts = wire.NodeFacts(node_id=as_ or credentials.peer_id, name="node", budget_bytes=1)
        hello = wire.Hello(
            protocol=PROTOCOL,
            mlx_version=mlx_version(),
            mlx_lm_version=mlx_lm_version(),
            facts=facts,
        )
        await call.write(wire.NodeReport(hello=hello))
        return Attendance(channel, call)


@dataclass
class Attendance:
    """A node's stream."""

    channel: grpc.aio.Channel
    call: grpc.aio.StreamStreamCall[wire.NodeReport, wire.NodeOrder]

    async def order(self, kind: str) -> wire.NodeOrder:
        """The next order of a kind."""
        async with asyncio.timeout(60):
            while True:
                order = await self.call.read()
                assert isinstance(order, wire.NodeOrder), f"the stream ended without {kind}"
                if order.WhichOneof("order") == kind:
                    return order


@asynccontextmanager
async def cluster(folder: Path, *, open_to_all: bool = False) -> AsyncIterator[Cluster]:
    settings = SchedulerSettings(state_dir=folder, limits=LIMITS, open=open_to_all)
    credentials = member("boss")
    async with await Store.open(folder) as store:
        service = ClusterService(settings, credentials, store, Metrics(), lambda event: None)
        await service.gate.start()
        members = MembershipService(service, authority(), LIMITS, service.tally)
        server, port = await listen(
            LOOPBACK,
            0,
            credentials=credentials,
            gate=MembersOnly(service.gate.allowed, service.tally),
            limits=LIMITS,
            register=lambda server: rpc.add_MembershipServicer_to_server(members, server),
        )
        try:
            yield Cluster(service, port)
        finally:
            await stop_listening(server, grace_s=0.1)
            await service.stop()


async def test_a_node_attends_as_the_one_that_its_certificate_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster(tmp_path) as boss:
        for name in ("one", "two"):
            await boss.service.gate.approve(peer(name))
        good = await boss.attend(member("one"))
        await good.order("welcome")
        liar = await boss.attend(member("two"), as_=peer("one"))
        fault = (await liar.order("dismiss")).dismiss.fault
        assert fault.kind == "PeerMismatch"
        assert boss.service.tally.totals(0.0) == {"identity": 1}
        assert any("says it is" in record.message for record in caplog.records)
        for node in (good, liar):
            await node.channel.close()


async def test_a_removed_node_is_cut_off_at_once_and_everybody_is_told(tmp_path: Path) -> None:
    async with cluster(tmp_path) as boss:
        for name in ("one", "two"):
            await boss.service.gate.approve(peer(name))
        one = await boss.attend(member("one"))
        two = await boss.attend(member("two"))
        await one.order("welcome")
        assert list((await two.order("shut_out")).shut_out.node_ids) == []
        await boss.service.departures.remove(peer("one"), force=True)
        fault = (await one.order("dismiss")).dismiss.fault
        assert fault.kind == "Dismissed"
        async with asyncio.timeout(60):
            assert await one.call.read() is grpc.aio.EOF
        assert list((await two.order("shut_out")).shut_out.node_ids) == [peer("one")]
        # Its connection still stands, and its certificate is good for a day.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.MembershipStub(one.channel).Renew(wire.RenewRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(NotAdmitted, match="no member"):
            await boss.attend(member("one"))
        three = peer("three")
        await boss.service.gate.approve(three)
        late = await boss.attend(member("three"))
        assert list((await late.order("shut_out")).shut_out.node_ids) == [peer("one")]
        assert boss.service.tally.totals(0.0) == {"not_admitted": 2}
        for node in (one, two, late):
            await node.channel.close()


async def test_a_node_that_was_away_hears_that_somebody_is_back(tmp_path: Path) -> None:
    async with cluster(tmp_path) as boss:
        for name in ("one", "two"):
            await boss.service.gate.approve(peer(name))
        await boss.service.gate.remove(peer("one"))
        two = await boss.attend(member("two"))
        assert list((await two.order("shut_out")).shut_out.node_ids) == [peer("one")]
        await two.channel.close()
        await boss.service.gate.approve(peer("one"))
        again = await boss.attend(member("two"))
        assert list((await again.order("shut_out")).shut_out.node_ids) == []
        await again.channel.close()


async def test_a_removal_of_long_ago_is_told_whatever_the_life_of_certificates_is_now(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path) as boss:
        await boss.service.gate.remove(peer("one"))
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as state, state:
        state.execute("UPDATE node SET since_s = 0")
    async with cluster(tmp_path) as boss:
        await boss.service.gate.approve(peer("two"))
        two = await boss.attend(member("two"))
        assert list((await two.order("shut_out")).shut_out.node_ids) == [peer("one")]
        await two.channel.close()


async def test_a_node_that_came_by_open_is_cut_off_when_it_is_denied(tmp_path: Path) -> None:
    async with cluster(tmp_path, open_to_all=True) as boss:
        one, two = await boss.attend(member("one")), await boss.attend(member("two"))
        await one.order("welcome")
        assert list((await two.order("shut_out")).shut_out.node_ids) == []
        await boss.service.gate.deny(peer("one"))
        assert (await one.order("dismiss")).dismiss.fault.kind == "Dismissed"
        async with asyncio.timeout(60):
            assert await one.call.read() is grpc.aio.EOF
        assert list((await two.order("shut_out")).shut_out.node_ids) == [peer("one")]
        with pytest.raises(NotAdmitted, match="no member"):
            await boss.attend(member("one"))
        assert [m.facts.node_id for m in boss.service.members.usable()] == [peer("two")]
        for node in (one, two):
            await node.channel.close()


async def test_a_certificate_given_by_open_alone_ends_soon_and_lasts_once_somebody_decides(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path, open_to_all=True) as boss:
        attendance = await boss.attend(member("node"))
        await attendance.order("welcome")
        request = wire.RenewRequest(csr=signing_request(identity("node"), new_key()))

        async def renewed_s() -> float:
            renew = rpc.MembershipStub(attendance.channel).Renew
            reply: wire.RenewReply = await renew(request, timeout=10)
            ends = x509.load_pem_x509_certificate(reply.certificate.own).not_valid_after_utc
            return (ends - datetime.now(UTC)).total_seconds()

        assert await renewed_s() <= OPEN_CERTIFICATE_S
        await boss.service.gate.approve(peer("node"))
        assert await renewed_s() > LIMITS.certificate_s - 60
        await attendance.channel.close()


async def test_a_node_that_enrols_has_a_certificate_for_as_long_as_the_gate_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Door, "certificate_s", lambda door, node_id: 90.0)
    node = Node(tmp_path)
    async with enrolling() as place:
        await node.enrol(place.target())
    assert 0 < node.credentials.papers.left(datetime.now(UTC)).total_seconds() <= 90


async def test_a_certificate_is_renewed_beside_the_stream(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path) as boss:
        await boss.service.gate.approve(peer("node"))
        node = Node(tmp_path)
        node.credentials.adopt(member("node", life_s=2.0).papers)
        old = node.credentials.papers
        attendance = await boss.attend(node.credentials)
        await attendance.order("welcome")
        renewing = asyncio.create_task(node.enrolment.renewing(attendance.channel))
        async with asyncio.timeout(60):
            while node.credentials.papers is old:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert node.credentials.papers.own.certificate.not_valid_after_utc > (
            old.own.certificate.not_valid_after_utc
        )
        assert (tmp_path / "node.pem").exists()
        assert not attendance.call.done()
        again = await boss.attend(node.credentials)
        await again.order("welcome")
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        for one in (attendance, again):
            await one.channel.close()


async def test_nobody_renews_for_another_node(tmp_path: Path) -> None:
    async with cluster(tmp_path) as boss:
        for name in ("one", "two"):
            await boss.service.gate.approve(peer(name))
        attendance = await boss.attend(member("one"))
        request = wire.RenewRequest(csr=signing_request(identity("two"), new_key()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.MembershipStub(attendance.channel).Renew(request, timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert boss.service.tally.totals(0.0) == {"proof": 1}
        await attendance.channel.close()
