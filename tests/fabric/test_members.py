"""Who gets through to a listener of members, over real TLS, and what the others are told."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest

from parallax.fabric import channel_options
from parallax.fabric.addresses import Address, Kind, caller_host, is_this_machine
from parallax.fabric.channels import listen, open_channel, stop_listening
from parallax.fabric.credentials import Credentials, peer_of
from parallax.fabric.errors import LinkBroken, NotAdmitted, PeerMismatch
from parallax.fabric.limits import Limits
from parallax.fabric.members import MembersOnly
from parallax.fabric.tally import HANDSHAKE, Tally
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from tests.trust import identity, member, peer, tally

LIMITS = Limits(connect_s=5.0)
LOOPBACK = Address("127.0.0.1", "lo", Kind.LOOPBACK)


@dataclass
class Host(rpc.RingServicer):
    """A member that says who calls."""

    port: int = 0
    tally: Tally = field(default_factory=tally)
    away: set[str] = field(default_factory=set)
    callers: list[str | None] = field(default_factory=list)

    async def Probe(  # type: ignore[override]
        self,
        request: wire.ProbeRequest,
        context: grpc.aio.ServicerContext[wire.ProbeRequest, wire.ProbeReply],
    ) -> wire.ProbeReply:
        self.callers.append(peer_of(context))
        return wire.ProbeReply(node_id=peer("alice"))

    async def Flow(  # type: ignore[override]
        self, request_iterator: AsyncIterator[wire.FramePiece], context: object
    ) -> AsyncIterator[wire.FlowReply]:
        async for _ in request_iterator:
            yield wire.FlowReply()

    def refused(self) -> dict[str, int]:
        return self.tally.totals(0.0)

    async def ask(self, credentials: Credentials, expected: str = "alice") -> None:
        """One call of a member."""
        place = wire.Endpoint(host="127.0.0.1", port=self.port, kind="loopback")
        channel, _ = await open_channel(
            [place], peer(expected), limits=LIMITS, credentials=credentials
        )
        async with channel:
            await rpc.RingStub(channel).Probe(wire.ProbeRequest(), timeout=10)


@asynccontextmanager
async def host(
    credentials: Credentials | None = None, *, clock: Callable[[], float] = time.time
) -> AsyncIterator[Host]:
    made = Host()
    server, made.port = await listen(
        [LOOPBACK],
        0,
        credentials=credentials or member("alice"),
        gate=MembersOnly(lambda who: who not in made.away, made.tally, clock),
        limits=LIMITS,
        register=lambda server: rpc.add_RingServicer_to_server(made, server),
    )
    try:
        yield made
    finally:
        await stop_listening(server, grace_s=0.1)


async def test_a_member_is_known_by_its_certificate() -> None:
    async with host() as alice:
        await alice.ask(member("me"))
        await alice.ask(member("boss"))
        assert alice.callers == [peer("me"), peer("boss")]
        assert alice.refused() == {}


async def test_a_member_of_another_cluster_is_refused_and_told_so() -> None:
    async with host() as alice:
        with pytest.raises(NotAdmitted, match="another cluster") as caught:
            await alice.ask(member("me", "attic"))
        assert caught.value.fields["reason"] == "authority"
        assert alice.callers == []
        assert alice.refused()[HANDSHAKE] >= 1


async def test_somebody_of_another_cluster_does_not_get_our_calls() -> None:
    async with host(member("alice", "attic")) as alice:
        with pytest.raises(NotAdmitted, match="another cluster"):
            await alice.ask(member("me"))
        assert alice.callers == []


async def test_an_expired_certificate_is_refused_on_both_sides() -> None:
    async with host() as alice:
        with pytest.raises(NotAdmitted, match="This machine's certificate.*clocks") as caught:
            await alice.ask(member("me", life_s=-60))
        assert caught.value.fields["reason"] == "clock"
        assert alice.callers == []
        assert alice.refused()[HANDSHAKE] >= 1
    async with host(member("alice", life_s=-60)) as alice:
        with pytest.raises(NotAdmitted, match="clocks"):
            await alice.ask(member("me"))
        assert alice.callers == []


async def test_a_node_that_is_of_no_cluster_yet_is_refused_and_refuses() -> None:
    async with host() as alice:
        with pytest.raises(NotAdmitted):
            await alice.ask(Credentials(identity("me")))
        assert alice.callers == []
    async with host(Credentials(identity("alice"))) as alice:
        with pytest.raises(NotAdmitted):
            await alice.ask(member("me"))
        assert alice.callers == []


async def test_a_member_does_not_pass_for_another() -> None:
    async with host(member("bob")) as bob:
        with pytest.raises(PeerMismatch) as caught:
            await bob.ask(member("me"), expected="alice")
        assert caught.value.fields == {"expected": peer("alice"), "found": peer("bob")}
        assert bob.callers == []


async def test_plain_callers_and_callers_without_a_certificate_are_refused() -> None:
    async with host() as alice:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{alice.port}") as plain:
            with pytest.raises(grpc.aio.AioRpcError):
                await rpc.RingStub(plain).Probe(wire.ProbeRequest(), timeout=10)
        trusting = grpc.ssl_channel_credentials(member("me").papers.authority.pem)
        async with grpc.aio.secure_channel(f"127.0.0.1:{alice.port}", trusting) as nobody:
            with pytest.raises(grpc.aio.AioRpcError):
                await rpc.RingStub(nobody).Probe(wire.ProbeRequest(), timeout=10)
        assert alice.callers == []
        assert alice.refused()[HANDSHAKE] >= 2


async def test_a_plain_server_is_never_talked_to() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"PRI * HTTP/2.0\r\n")
        heard.append(await reader.read(5))
        writer.close()

    heard: list[bytes] = []
    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        alice = Host(port=server.sockets[0].getsockname()[1])
        with pytest.raises(LinkBroken, match="TLS"):
            await alice.ask(member("me"))
    assert {first[:2] for first in heard} == {b"\x16\x03"}  # a ClientHello, and nothing else


async def test_a_member_that_was_sent_away_is_refused_at_its_next_call() -> None:
    async with host() as alice:
        place = wire.Endpoint(host="127.0.0.1", port=alice.port, kind="loopback")
        me = member("me")
        channel, _ = await open_channel([place], peer("alice"), limits=LIMITS, credentials=me)
        async with channel:
            stub = rpc.RingStub(channel)
            await stub.Probe(wire.ProbeRequest(), timeout=10)
            alice.away.add(peer("me"))
            for call in (stub.Probe(wire.ProbeRequest(), timeout=10), stub.Flow(timeout=10).read()):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(NotAdmitted, match="no member") as refused:
            await alice.ask(me)
        assert refused.value.fields["reason"] == "removed"
        assert alice.refused() == {"not_admitted": 3}
        assert len(alice.callers) == 1


async def test_connections_are_bounded_before_anybody_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_options, "MEMBER_CONNECTIONS", 4)
    async with host() as alice:
        place = wire.Endpoint(host="127.0.0.1", port=alice.port, kind="loopback")
        me = member("me")
        channel, _ = await open_channel([place], peer("alice"), limits=LIMITS, credentials=me)
        async with channel:
            held = [await asyncio.open_connection("127.0.0.1", alice.port) for _ in range(8)]
            ends = {asyncio.create_task(reader.read()) for reader, _ in held}
            ended: set[asyncio.Task[bytes]] = set()
            async with asyncio.timeout(LIMITS.connect_s - 1):  # what handshakes have is longer
                while len(ended) < 5:
                    done, _ = await asyncio.wait(ends - ended, return_when=asyncio.FIRST_COMPLETED)
                    ended |= done
            assert len(ended) == 5, "three and the member's own are taken"
            await rpc.RingStub(channel).Probe(wire.ProbeRequest(), timeout=10)
            for _, writer in held:
                writer.close()
            await asyncio.gather(*ends, return_exceptions=True)
        async with asyncio.timeout(20):  # their places are free once their ends are noticed
            while len(alice.callers) < 2:
                with suppress(LinkBroken):
                    await alice.ask(me)


@pytest.mark.parametrize(
    ("files", "kinds", "most"),
    [
        (10_240, [Kind.LOOPBACK, Kind.ETHERNET, Kind.ETHERNET], 2048),
        (10_240, [Kind.LOOPBACK] + 5 * [Kind.ETHERNET], 1024),
        (1024, [Kind.LOOPBACK], 512),
        (256, 8 * [Kind.ETHERNET], 64),
        (resource.RLIM_INFINITY, 8 * [Kind.ETHERNET], 2048),
    ],
)
def test_connections_take_half_of_the_files_at_most(
    files: int, kinds: list[Kind], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (files, files))
    places = [Address(f"10.0.0.{n}", "en0", kind) for n, kind in enumerate(kinds)]
    options = dict(channel_options.server_options(LIMITS, places, strangers=False))
    assert options["grpc.max_allowed_incoming_connections"] == most


async def test_a_certificate_that_is_replaced_serves_new_connections() -> None:
    credentials = member("alice", life_s=-60)
    async with host(credentials) as alice:
        with pytest.raises(NotAdmitted):
            await alice.ask(member("me"))
        credentials.adopt(member("alice").papers)
        await alice.ask(member("me"))


def test_connections_that_call_nothing_are_counted_when_they_have_had_their_time() -> None:
    counted = Tally(settle_s=10.0)
    assert counted.totals(0.0) == {}
    for _ in range(3):
        counted.begun()
    counted.met("ipv4:127.0.0.1:1")
    counted.met("ipv4:127.0.0.1:1")  # a second call of the same one
    assert counted.totals(1.0) == {}
    assert counted.totals(5.0) == {}
    counted.begun()  # just now: it may still come through
    assert counted.totals(11.5) == {HANDSHAKE: 2}
    assert counted.totals(12.0) == {HANDSHAKE: 2}
    assert counted.totals(30.0) == {HANDSHAKE: 3}


@pytest.mark.parametrize(
    ("peer_name", "host_name"),
    [
        ("ipv4:10.0.0.7:5123", "10.0.0.7"),
        ("ipv6:%5B::1%5D:5123", "::1"),
        ("ipv6:[fe80::1%25eth0]:5123", "fe80::1%eth0"),
        ("unix:", ""),
    ],
)
def test_callers_are_known_by_their_addresses(peer_name: str, host_name: str) -> None:
    assert caller_host(peer_name) == host_name


def test_this_machine_is_told_from_others() -> None:
    assert is_this_machine("127.0.0.1")
    assert is_this_machine("::ffff:127.0.0.1")
    assert not is_this_machine("203.0.113.9")
    assert not is_this_machine("")
    assert not is_this_machine("localhost.evil.example")
