"""What TLS leaves open, and each call is asked for: its version, its end, its own handshake."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import grpc.aio
import pytest
from grpc.experimental.session_cache import ssl_session_cache_lru

from parallax.fabric.certificates import dns_name
from parallax.fabric.channels import WHO, listen, open_channel, stop_listening
from parallax.fabric.credentials import Credentials, load_chain
from parallax.fabric.limits import Limits
from parallax.fabric.members import Anybody, MembersOnly
from parallax.fabric.weights_service import WeightsService
from parallax.node.fetch import Line, Place
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from tests.fabric.test_members import LIMITS, LOOPBACK, host
from tests.trust import member, peer, tally


@asynccontextmanager
async def behind(port: int, context: ssl.SSLContext) -> AsyncIterator[grpc.aio.Channel]:
    """A channel whose TLS is made by Python: gRPC's own speaks what is newest."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="")
        try:
            await asyncio.gather(pump(reader, inner[1]), pump(inner[0], writer))
        finally:
            for end in (writer, inner[1]):
                end.transport.abort()
                with suppress(OSError):
                    await end.wait_closed()

    def taken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running.append(asyncio.create_task(through(reader, writer)))

    running: list[asyncio.Task[None]] = []
    async with await asyncio.start_server(taken, "127.0.0.1", 0) as proxy:
        near = proxy.sockets[0].getsockname()[1]
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{near}") as channel:
                yield channel
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


def client(version: ssl.TLSVersion, credentials: Credentials | None = None) -> ssl.SSLContext:
    """A client that speaks one version of TLS alone, and believes anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if credentials is not None:
        load_chain(context, credentials.papers)
    return context


async def refused(call: grpc.aio.UnaryUnaryCall[bytes, bytes]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    return caught.value.details() or ""


async def test_a_member_that_speaks_tls_1_2_has_no_answer() -> None:
    me = member("me")
    async with host() as alice:
        async with behind(alice.port, client(ssl.TLSVersion.TLSv1_3, me)) as channel:
            await channel.unary_unary(WHO)(b"", timeout=10)
        async with behind(alice.port, client(ssl.TLSVersion.TLSv1_2, me)) as channel:
            assert "TLS 1.3" in await refused(channel.unary_unary(WHO)(b"", timeout=10))
        assert alice.refused() == {"tls": 1}


async def test_a_stranger_that_speaks_tls_1_2_has_no_answer() -> None:
    counted = tally()
    server, port = await listen(
        [LOOPBACK],
        0,
        credentials=member("boss"),
        gate=Anybody(counted),
        limits=Limits(),
        register=lambda server: None,
    )
    try:
        async with behind(port, client(ssl.TLSVersion.TLSv1_3)) as channel:
            await channel.unary_unary(WHO)(b"", timeout=10)
        async with behind(port, client(ssl.TLSVersion.TLSv1_2)) as channel:
            assert "TLS 1.3" in await refused(channel.unary_unary(WHO)(b"", timeout=10))
        assert counted.totals(0.0) == {"tls": 1}
    finally:
        await stop_listening(server, grace_s=0.1)


async def test_calls_end_with_the_certificate_of_their_connection() -> None:
    ahead_s = 0.0
    place = wire.Endpoint(host="127.0.0.1", kind="loopback")
    async with host(clock=lambda: time.time() + ahead_s) as alice:
        place.port = alice.port
        me = member("me", life_s=3600)
        channel, _ = await open_channel([place], peer("alice"), limits=LIMITS, credentials=me)
        async with channel:
            stub = rpc.RingStub(channel)
            ahead_s = 3590.0
            await stub.Probe(wire.ProbeRequest(), timeout=10)
            ahead_s = 3601.0
            for call in (stub.Probe(wire.ProbeRequest(), timeout=10), stub.Flow(timeout=10).read()):
                with pytest.raises(grpc.aio.AioRpcError, match="has ended") as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            me.adopt(member("me", life_s=7200).papers)
            await alice.ask(me)
            with pytest.raises(grpc.aio.AioRpcError, match="has ended"):
                await stub.Probe(wire.ProbeRequest(), timeout=10)
        assert alice.callers == [peer("me"), peer("me")]
        assert alice.refused() == {"certificate": 3}


async def test_a_session_that_is_taken_up_again_has_no_answer() -> None:
    """Its certificate was looked at by an earlier handshake, and perhaps has ended since."""
    me, cache = member("me"), ssl_session_cache_lru(4)

    def call(port: int) -> None:
        options = [
            ("grpc.ssl_target_name_override", dns_name(peer("alice"))),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.ssl_session_cache", cache),
        ]
        with grpc.secure_channel(f"127.0.0.1:{port}", me.for_channel(), options) as channel:
            stub = rpc.RingStub(channel)
            stub.Probe(wire.ProbeRequest(), timeout=10)

    async with host() as alice:
        await asyncio.to_thread(call, alice.port)
        with pytest.raises(grpc.RpcError, match="not resumed"):
            await asyncio.to_thread(call, alice.port)
        for _ in range(2):  # our own channels look at the certificate each time
            await alice.ask(me)
        assert alice.refused() == {"resumed": 1}
        assert len(alice.callers) == 3


async def test_a_line_to_weights_goes_on_over_a_new_connection_when_its_certificate_ends() -> None:
    ahead_s = 0.0
    asked: list[str] = []
    server, port = await listen(
        [LOOPBACK],
        0,
        credentials=member("alice"),
        gate=MembersOnly(lambda _: True, tally(), lambda: time.time() + ahead_s),
        limits=LIMITS,
        register=lambda server: rpc.add_WeightsServicer_to_server(
            WeightsService(asked.append), server
        ),
    )
    me = member("me", life_s=3600)
    place = wire.Endpoint(host="127.0.0.1", port=port, kind="loopback")
    line = Line(Place(peer("alice"), (place,)), LIMITS, me)
    said = []
    try:
        for later_s in (0.0, 3601.0, 3602.0):
            ahead_s = later_s
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (await line.stub()).Holds(wire.ModelAsked(digest="x"), timeout=10)
            said.append(caught.value.code())
            await line.failed(caught.value)
            me.adopt(member("me", life_s=7200).papers)
    finally:
        await line.close()
        await stop_listening(server, grace_s=0.1)
    there = grpc.StatusCode.NOT_FOUND
    assert said == [there, grpc.StatusCode.UNAUTHENTICATED, there]
    assert asked == ["x", "x"]
