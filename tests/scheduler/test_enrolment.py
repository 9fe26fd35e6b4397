"""Nodes that enrol at a scheduler's real listeners, and those who are not who they say."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
import grpc.aio
import pytest
from zeroconf.asyncio import AsyncServiceInfo

from parallax.fabric import channel_options
from parallax.fabric.addresses import listening_addresses
from parallax.fabric.channels import listen, stop_listening
from parallax.fabric.credentials import Credentials
from parallax.fabric.discovery import SERVICE, Target, choose, read
from parallax.fabric.errors import (
    BadSetting,
    JoinRefused,
    PeerMismatch,
    SchedulerUnreachable,
)
from parallax.fabric.events import AwaitsApproval, Event
from parallax.fabric.identity import fingerprint
from parallax.fabric.limits import Limits
from parallax.fabric.members import Anybody
from parallax.fabric.tally import Tally
from parallax.fabric.version import PROTOCOL
from parallax.node.enrolment import Enrolment
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from parallax.scheduler import control
from parallax.scheduler.admission_values import Admitted, Refused, Verdict, Waiting
from parallax.scheduler.control import EnrolService
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
        gate=Anybody(counted),
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
    monkeypatch.setattr(channel_options, "STRANGER_CONNECTIONS", 4)
    async with enrolling() as place:
        held = [await asyncio.open_connection("127.0.0.1", place.port) for _ in range(8)]
        ends = [asyncio.create_task(reader.read()) for reader, _ in held]
        async with asyncio.timeout(4):  # the handshakes of those that are let in have longer
            while sum(end.done() for end in ends) < 4:
                await asyncio.wait(
                    [end for end in ends if not end.done()], return_when=asyncio.FIRST_COMPLETED
                )
        assert sum(end.done() for end in ends) == 4
        for _, writer in held:
            writer.close()
        await asyncio.gather(*ends, return_exceptions=True)
        node = Node(tmp_path)
        async with asyncio.timeout(20):  # their places are free once their ends are noticed
            while not node.credentials.member:
                with contextlib.suppress(SchedulerUnreachable):
                    await node.enrol(place.target())


async def test_a_stranger_that_asks_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_options, "STRANGER_IDLE_MS", 50)
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
    monkeypatch.setattr(channel_options, "STRANGER_AGE_MS", 100)
    monkeypatch.setattr(channel_options, "STRANGER_IDLE_MS", 100)
    node = Node(tmp_path, token="")
    async with enrolling() as place:
        place.door.verdicts = [Waiting("x") for _ in range(4)]
        await node.enrol(place.target())  # asks every 0.2 s, so each time over a new one
        assert len(place.door.asked) == 5


async def test_a_node_that_enrols_has_a_certificate_for_as_long_as_the_gate_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Door, "certificate_s", lambda door, node_id: 90.0)
    node = Node(tmp_path)
    async with enrolling() as place:
        await node.enrol(place.target())
    assert 0 < node.credentials.papers.left(datetime.now(UTC)).total_seconds() <= 90
