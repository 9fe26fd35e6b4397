"""Channels and listeners on real sockets of this machine's loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Iterator

import grpc
import grpc.aio
import pytest

from parallax.fabric.addresses import Address, Kind
from parallax.fabric.channels import listen, no_route, open_channel, stop_listening
from parallax.fabric.errors import (
    LinkBroken,
    PeerMismatch,
    PortInUse,
    SchedulerUnreachable,
    SettingsError,
)
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from tests.trust import everyone, member, peer

LIMITS = Limits(connect_s=10.0)
LOOPBACK = Address("127.0.0.1", "lo", Kind.LOOPBACK)
LOOPBACK_6 = Address("::1", "lo", Kind.LOOPBACK)


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as trial:
        try:
            trial.bind(("::1", 0))
        except OSError:
            return False
    return True


class Echo(rpc.RingServicer):
    """Says how much it was sent."""

    async def Probe(  # type: ignore[override]
        self, request: wire.ProbeRequest, context: object
    ) -> wire.ProbeReply:
        return wire.ProbeReply(received_bytes=len(request.payload), node_id="echo")


def register(server: grpc.aio.Server) -> None:
    rpc.add_RingServicer_to_server(Echo(), server)


@contextlib.asynccontextmanager
async def listener(
    name: str = "alice", addresses: tuple[Address, ...] = (LOOPBACK,), port: int = 0
) -> AsyncIterator[int]:
    server, actual = await listen(
        addresses,
        port,
        credentials=member(name),
        gate=everyone(),
        limits=LIMITS,
        register=register,
    )
    try:
        yield actual
    finally:
        await server.stop(None)


async def reach(
    endpoints: list[wire.Endpoint],
    name: str = "alice",
    limits: Limits = LIMITS,
    *,
    scheduler: bool = False,
) -> tuple[grpc.aio.Channel, wire.Endpoint]:
    """A channel of the member "me" to somebody."""
    return await open_channel(
        endpoints, peer(name), limits=limits, credentials=member("me"), scheduler=scheduler
    )


def at(port: int, host: str = "127.0.0.1", kind: str = "loopback") -> wire.Endpoint:
    return wire.Endpoint(host=host, port=port, kind=kind)


@contextlib.contextmanager
def refusing() -> Iterator[int]:
    """A port where connections are refused, and that nobody else gets meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextlib.contextmanager
def deaf() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        yield silent.getsockname()[1]


async def test_a_channel_reaches_the_service_behind_the_listener() -> None:
    async with listener() as port:
        channel, endpoint = await reach([at(port)])
        async with channel:
            reply = await rpc.RingStub(channel).Probe(wire.ProbeRequest(payload=b"x" * 9))
    assert reply.received_bytes == 9
    assert endpoint == at(port)


async def test_a_message_of_the_largest_piece_fits() -> None:
    async with listener() as port:
        channel, _ = await reach([at(port)])
        async with channel:
            payload = bytes(LIMITS.message_bytes)
            reply = await rpc.RingStub(channel).Probe(wire.ProbeRequest(payload=payload))
    assert reply.received_bytes == LIMITS.message_bytes


async def test_one_port_serves_every_address() -> None:
    if not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    async with listener(addresses=(LOOPBACK, LOOPBACK_6)) as port:
        for host in ("127.0.0.1", "::1", "localhost"):
            channel, endpoint = await reach([at(port, host)])
            await channel.close()
            assert endpoint.port == port


async def test_an_address_that_went_away_is_left_out() -> None:
    gone = Address("10.255.255.254", "eth9", Kind.ETHERNET)
    async with listener(addresses=(gone, LOOPBACK)) as port:
        channel, endpoint = await reach([at(port)])
        await channel.close()
    assert endpoint == at(port)


async def test_no_address_at_all_is_an_error() -> None:
    gone = Address("10.255.255.254", "eth9", Kind.ETHERNET)
    with pytest.raises(SettingsError, match=r"no address to listen on.*10\.255"):
        await listen(
            (gone,), 0, credentials=member("a"), gate=everyone(), limits=LIMITS, register=register
        )


async def test_a_port_in_use_is_named() -> None:
    async with listener() as port:
        with pytest.raises(PortInUse, match=f"Port {port} is in use") as caught:
            await listen(
                (LOOPBACK,),
                port,
                credentials=member("b"),
                gate=everyone(),
                limits=LIMITS,
                register=register,
            )
    assert caught.value.fields == {"port": str(port)}


async def test_a_port_is_free_again_after_its_listener_stopped() -> None:
    async with listener() as port:
        channel, _ = await reach([at(port)])
        await channel.close()
    async with listener(port=port) as again:
        assert again == port


async def test_the_better_kind_is_preferred() -> None:
    async with listener() as slow, listener() as fast:
        endpoints = [at(slow, kind="wifi"), at(fast, kind="thunderbolt")]
        channel, endpoint = await reach(endpoints)
        await channel.close()
    assert endpoint.kind == "thunderbolt"


async def test_dead_and_deaf_endpoints_do_not_hold_up_a_living_one() -> None:
    with deaf() as silent, refusing() as dead:
        async with listener() as port:
            endpoints = [
                at(dead, kind="thunderbolt"),
                at(silent, kind="ethernet"),
                at(port, kind="wifi"),
            ]
            begin = time.monotonic()
            limits = Limits(connect_s=30)
            channel, endpoint = await reach(endpoints, limits=limits)
            await channel.close()
    assert endpoint.kind == "wifi"
    assert time.monotonic() - begin < limits.connect_s


async def test_somebody_else_at_the_address_is_passed_over() -> None:
    async with listener("mallory") as wrong, listener("alice") as right:
        endpoints = [at(wrong, kind="thunderbolt"), at(right, kind="wifi")]
        channel, endpoint = await reach(endpoints)
        await channel.close()
    assert endpoint.port == right


async def test_only_somebody_else_is_a_peer_mismatch() -> None:
    async with listener("mallory") as port:
        with refusing() as dead, pytest.raises(PeerMismatch) as caught:
            await reach([at(port), at(dead)])
    assert caught.value.fields == {"expected": peer("alice"), "found": peer("mallory")}


async def test_nobody_there_is_noticed_at_once() -> None:
    begin = time.monotonic()
    with refusing() as dead, pytest.raises(LinkBroken, match="(?i)connection refused"):
        await reach([at(dead)], limits=Limits(connect_s=60))
    assert time.monotonic() - begin < 30


async def test_a_deaf_port_costs_no_more_than_the_limit() -> None:
    begin, limits = time.monotonic(), Limits(connect_s=1.0)
    with deaf() as silent, pytest.raises(LinkBroken):
        await reach([at(silent)], limits=limits)
    assert limits.connect_s * 0.9 < time.monotonic() - begin < limits.connect_s + 20


async def test_a_scheduler_that_is_not_there_is_an_error_with_its_address() -> None:
    with refusing() as port, pytest.raises(SchedulerUnreachable, match="parallax run") as caught:
        await reach([at(port)], scheduler=True)
    assert caught.value.fields == {"address": f"127.0.0.1:{port}"}


async def test_no_endpoint_at_all_is_an_error() -> None:
    with pytest.raises(LinkBroken, match="no address"):
        await reach([])


async def test_an_unknown_name_is_an_error() -> None:
    name = "a" * 70 + ".invalid"  # too long to be asked for, so nothing leaves this machine
    with pytest.raises(SchedulerUnreachable, match=f"{name} is not known"):
        await reach([at(1, name, "other")], scheduler=True)


async def test_a_peer_without_tls_is_refused() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        with pytest.raises(LinkBroken, match="another program answers there, or an older Parallax"):
            await reach([at(port)])
    finally:
        await server.stop(None)


async def test_a_stopped_listener_leaves_no_task_behind() -> None:
    """A loop that ends before gRPC's own tasks do has gRPC log a traceback."""
    began, let_go = asyncio.Event(), asyncio.Event()

    class Patient(rpc.RingServicer):
        async def Flow(  # type: ignore[override]
            self, request_iterator: AsyncIterator[wire.FramePiece], context: object
        ) -> AsyncIterator[wire.FlowReply]:
            try:
                began.set()
                await asyncio.Event().wait()
                yield wire.FlowReply()
            finally:
                await asyncio.sleep(0.2)  # longer than the stop itself takes
                let_go.set()

    before = asyncio.all_tasks()
    server, port = await listen(
        [LOOPBACK],
        0,
        credentials=member("alice"),
        gate=everyone(),
        limits=LIMITS,
        register=lambda server: rpc.add_RingServicer_to_server(Patient(), server),
    )
    channel, _ = await reach([at(port)])
    async with channel:
        call = rpc.RingStub(channel).Flow()
        await call.write(wire.FramePiece())
        await began.wait()
        await stop_listening(server, grace_s=0.5)
        left = asyncio.all_tasks() - before
        assert let_go.is_set()
        assert [task for task in left if "_schedule_rpc_coro" in repr(task)] == []


async def test_a_program_that_is_no_grpc_server_is_an_error() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    web = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with web:
        with pytest.raises(LinkBroken):
            await reach([at(web.sockets[0].getsockname()[1])])


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing() as dead:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{dead}")
        monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{dead}")
        async with listener() as port:
            channel, endpoint = await reach([at(port)])
            await channel.close()
    assert endpoint == at(port)


def test_macs_local_network_privacy_is_recognised() -> None:
    assert no_route("connect: No route to host (65)")
    assert not no_route("Connection refused")
