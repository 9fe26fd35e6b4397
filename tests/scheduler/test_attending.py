"""Members at a scheduler's real listener: who attends, is cut off, has a new certificate."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509

from parallax.fabric.certificates import new_key, signing_request
from parallax.fabric.channels import listen, open_channel, stop_listening
from parallax.fabric.credentials import Credentials, Papers
from parallax.fabric.errors import (
    NotAdmitted,
)
from parallax.fabric.members import MembersOnly
from parallax.fabric.settings import SchedulerSettings
from parallax.fabric.version import PROTOCOL, mlx_lm_version, mlx_version
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from parallax.scheduler import control
from parallax.scheduler.cluster import ClusterService
from parallax.scheduler.control import MembershipService
from parallax.scheduler.gate import OPEN_CERTIFICATE_S
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.store import FILE_NAME, Store
from tests.scheduler.test_enrolment import LIMITS, LOOPBACK, Node, at
from tests.trust import authority, identity, member, peer


@dataclass
class Cluster:
    """A scheduler's listener of members, with the real cluster behind it."""

    service: ClusterService
    port: int

    async def connect(self, credentials: Credentials) -> grpc.aio.Channel:
        channel, _ = await open_channel(
            [at(self.port)], peer("boss"), limits=LIMITS, credentials=credentials
        )
        return channel

    async def attend(self, credentials: Credentials, *, as_: str = "") -> Attendance:
        channel = await self.connect(credentials)
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
async def cluster(
    folder: Path, *, open_to_all: bool = False, clock: Callable[[], float] = time.time
) -> AsyncIterator[Cluster]:
    settings = SchedulerSettings(state_dir=folder, limits=LIMITS, open=open_to_all)
    credentials = member("boss")
    async with await Store.open(folder) as store:
        service = ClusterService(settings, credentials, store, Metrics(), lambda event: None)
        await service.gate.start()
        gate = MembersOnly(service.gate.allowed, service.tally, clock)
        members = MembershipService(service, authority(), LIMITS, gate)
        server, port = await listen(
            LOOPBACK,
            0,
            credentials=credentials,
            gate=gate,
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


async def test_who_attends_is_remembered_to_have_attended(tmp_path: Path) -> None:
    async with cluster(tmp_path) as boss:
        for name in ("one", "two"):
            await boss.service.gate.approve(peer(name))
        one = await boss.attend(member("one"))
        await one.order("welcome")
        await boss.service.gate.write()
        await one.channel.close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as state:
        assert state.execute("SELECT node_id FROM unattended").fetchall() == [(peer("two"),)]


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


async def renewed(node: Node, boss: Cluster) -> tuple[asyncio.Task[None], list[Papers]]:
    """The task that renews, once it has connected twice, and with which papers it did."""
    connected: list[Papers] = []

    async def connect() -> grpc.aio.Channel:
        connected.append(node.credentials.papers)
        return await boss.connect(node.credentials)

    renewing = asyncio.create_task(node.enrolment.renewing(connect))
    async with asyncio.timeout(60):
        while len(connected) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return renewing, connected


async def test_a_clock_that_is_days_ahead_has_no_certificate_renewed_on_and_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(days=4)

    monkeypatch.setattr("parallax.node.enrolment.datetime", Ahead)
    async with cluster(tmp_path) as boss:
        await boss.service.gate.approve(peer("node"))
        node = Node(tmp_path)
        node.credentials.adopt(member("node", life_s=7 * 86_400.0).papers)
        renewing, connected = await renewed(node, boss)
        for _ in range(3):  # which takes as long as three of those would
            await (await boss.connect(node.credentials)).close()
        assert len(connected) == 2
        assert not renewing.done()
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)


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
        renewing, connected = await renewed(node, boss)
        new = node.credentials.papers
        assert new.own.certificate.not_valid_after_utc > old.own.certificate.not_valid_after_utc
        assert connected == [old, new], "the new one was not shown to the scheduler"
        assert (tmp_path / "node.pem").exists()
        assert not attendance.call.done()
        again = await boss.attend(node.credentials)
        await again.order("welcome")
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        for one in (attendance, again):
            await one.channel.close()


async def test_a_stream_ends_with_its_certificate_unless_a_newer_one_was_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LOOK_S", 0.01)
    ahead_s = 0.0
    async with cluster(tmp_path, clock=lambda: time.time() + ahead_s) as boss:
        for name in ("one", "two"):
            await boss.service.gate.approve(peer(name))
        one = await boss.attend(member("one", life_s=3600))
        two = await boss.attend(member("two", life_s=3600))
        for node in (one, two):
            await node.order("welcome")
        await (await boss.connect(member("two", life_s=7200))).close()
        ahead_s = 3601  # a renewal that is on its way has LIMITS.call_s
        with pytest.raises(NotAdmitted, match="ended") as caught:
            await boss.attend(member("one", life_s=3600))
        assert caught.value.fields["reason"] == "certificate"
        assert len(boss.service.members.usable()) == 2
        ahead_s = 3601 + LIMITS.call_s
        with pytest.raises(grpc.aio.AioRpcError, match="certificate has ended"):
            await one.order("dismiss")
        assert [m.facts.node_id for m in boss.service.members.usable()] == [peer("two")]
        await boss.service.gate.approve(peer("three"))
        await boss.service.gate.remove(peer("three"))
        await two.order("shut_out")
        await two.order("shut_out")  # its stream stands
        for node in (one, two):
            await node.channel.close()


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
