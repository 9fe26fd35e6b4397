"""The one place that opens gRPC channels and the listeners they lead to.

Everything is TLS 1.3, and there is no way around it. Between members both sides show certificates
of the cluster's authority, and TLS itself checks that the peer is the expected one. A stranger that
wants to enrol meets the scheduler first (``handshake.py``), compares its peer id, and expects that
very certificate from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import grpc
import grpc.aio
import psutil

from parallax.fabric.addresses import (
    Address,
    by_kind,
    host_port,
    socket_address,
    with_own_scopes,
)
from parallax.fabric.certificates import dns_name
from parallax.fabric.channel_options import client_options, server_options
from parallax.fabric.credentials import Credentials
from parallax.fabric.errors import (
    BadSetting,
    ClusterError,
    LinkBroken,
    NotAdmitted,
    PeerMismatch,
    PortInUse,
    SchedulerUnreachable,
    SettingsError,
)
from parallax.fabric.handshake import meet, mismatch, why_refused
from parallax.fabric.limits import Limits
from parallax.fabric.members import Anybody, MembersOnly
from parallax.proto import wire_pb2 as wire

WHO = "/parallax.v1.Peer/Who"
HEAD_START_S = 0.25  # before the next endpoint is tried too (RFC 8305, happy eyeballs)
PORT_TRIES = 20
STRANGER_CALLS = 256  # at once, of the enrol listener

Connect = Callable[[wire.Endpoint], Coroutine[Any, Any, tuple[grpc.aio.Channel, wire.Endpoint]]]

_ADVICE = (
    "Check that both machines are on the same network and that no firewall stands between them"
)
_ADVICE_NO_ROUTE = (
    "On macOS allow the terminal, or Parallax, in System Settings > Privacy & Security > "
    "Local Network; elsewhere check that both machines are on the same network"
)


async def open_channel(
    endpoints: Iterable[wire.Endpoint],
    expected_peer_id: str,
    *,
    limits: Limits,
    credentials: Credentials,
    scheduler: bool = False,
    receive_bytes: int | None = None,
) -> tuple[grpc.aio.Channel, wire.Endpoint]:
    """Connects to a member of the cluster: to the first endpoint that answers, the best kind first.

    Endpoints are tried one after the other with a short head start, so that a
    dead one costs a quarter of a second and not the whole time.

    Args:
        endpoints: where the peer listens; hosts are addresses or names.
        expected_peer_id: who must answer there, and prove it.
        limits: ``connect_s`` bounds the whole.
        credentials: what is shown to the peer, and what its certificate must come from.
        scheduler: whether the peer is a scheduler, for the error's words.
        receive_bytes: the largest message that is taken; None: what ``limits`` say.

    Returns:
        The open channel, to be closed by the caller, and the endpoint that answered.

    Raises:
        PeerMismatch: somebody else answers, and nobody expected does.
        NotAdmitted: one side does not accept the other's certificate, or the peer this caller.
        SchedulerUnreachable, LinkBroken: nobody answers.
    """

    async def connect(endpoint: wire.Endpoint) -> tuple[grpc.aio.Channel, wire.Endpoint]:
        shown = credentials.for_channel()
        channel = _channel(endpoint, expected_peer_id, shown, limits, receive_bytes)
        try:
            await _who(channel, limits)
        except LinkBroken as error:
            await channel.close()
            raise await why_refused(endpoint, expected_peer_id, credentials, limits) or error from (
                None
            )
        except BaseException:
            await channel.close()
            raise
        return channel, endpoint

    return await _first(endpoints, expected_peer_id, connect, limits, scheduler=scheduler)


async def open_to_scheduler(
    endpoints: Iterable[wire.Endpoint], expected_peer_id: str | None, *, limits: Limits
) -> tuple[grpc.aio.Channel, wire.Endpoint, str]:
    """Connects to a scheduler's enrol listener, as a stranger does.

    Nothing is sent before it is known who answers: see :mod:`parallax.fabric.handshake`.

    Args:
        endpoints: where it listens.
        expected_peer_id: who it must be; None takes anyone.
        limits: ``connect_s`` bounds the whole.

    Returns:
        The open channel, to be closed by the caller, the endpoint that answered, and who it is.

    Raises:
        PeerMismatch: somebody else answers, or somebody who proves no identity.
        SchedulerUnreachable: nobody answers.
    """
    peers: dict[int, str] = {}

    async def connect(endpoint: wire.Endpoint) -> tuple[grpc.aio.Channel, wire.Endpoint]:
        met = await meet(endpoint, limits)
        if expected_peer_id is not None and met.peer_id != expected_peer_id:
            where = host_port(endpoint.host, endpoint.port)
            raise mismatch(where, expected_peer_id, met.peer_id)
        pinned = grpc.ssl_channel_credentials(met.pem)
        channel = _channel(endpoint, met.peer_id, pinned, limits)
        try:
            await _who(channel, limits)
        except BaseException:
            await channel.close()
            raise
        peers[id(channel)] = met.peer_id
        return channel, endpoint

    channel, endpoint = await _first(endpoints, expected_peer_id, connect, limits, scheduler=True)
    return channel, endpoint, peers[id(channel)]


async def _first(
    endpoints: Iterable[wire.Endpoint],
    expected_peer_id: str | None,
    connect: Connect,
    limits: Limits,
    *,
    scheduler: bool,
) -> tuple[grpc.aio.Channel, wire.Endpoint]:
    given = by_kind(endpoints)
    shown = ", ".join(host_port(e.host, e.port) for e in given) or "no address"
    failures: list[ClusterError | str] = []
    try:
        async with asyncio.timeout(limits.connect_s):
            won = await _race(given, connect, failures)
            if won is not None:
                return won
    except TimeoutError:
        failures.append(f"no answer within {limits.connect_s:g} s")
    for kind in (PeerMismatch, NotAdmitted):
        for failure in failures:
            if isinstance(failure, kind):
                raise failure
    why = "; ".join(dict.fromkeys(str(f) for f in failures))
    advice = _ADVICE_NO_ROUTE if no_route(why) else _ADVICE
    if scheduler:
        raise SchedulerUnreachable(
            f"The scheduler at {shown} does not answer",
            why,
            f"See that 'parallax run' is running there. {advice}",
            address=shown,
        )
    raise LinkBroken(
        f"The node at {shown} does not answer", why, advice, peer=expected_peer_id or shown
    )


def no_route(why: str) -> bool:
    """Whether a failure is the one that macOS's Local Network privacy gives (EHOSTUNREACH)."""
    return os.strerror(errno.EHOSTUNREACH).lower() in why.lower()


async def _race(
    given: Sequence[wire.Endpoint], connect: Connect, failures: list[ClusterError | str]
) -> tuple[grpc.aio.Channel, wire.Endpoint] | None:
    """The first endpoint that answers as expected; None, with reasons, if all fail."""
    waiting = [place for endpoint in given for place in await _places(endpoint, failures)]
    running: set[asyncio.Task[tuple[grpc.aio.Channel, wire.Endpoint]]] = set()
    won = None
    try:
        while won is None and (waiting or running):
            if waiting:
                running.add(asyncio.create_task(connect(waiting.pop(0))))
            done, running = await asyncio.wait(
                running,
                timeout=HEAD_START_S if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                try:
                    line = task.result()
                except ClusterError as error:
                    plain = not isinstance(error, (PeerMismatch, NotAdmitted))
                    failures.append(error.sentence if plain else error)
                else:
                    if won is None:
                        won = line
                    else:
                        await line[0].close()
    finally:
        for task in running:
            task.cancel()
        for line_or_error in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(line_or_error, tuple):
                await line_or_error[0].close()
    return won


async def _places(
    endpoint: wire.Endpoint, failures: list[ClusterError | str]
) -> list[wire.Endpoint]:
    """An endpoint with its name looked up and its scope made ours."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(endpoint.host.partition("%")[0])
        return with_own_scopes(endpoint, psutil.net_if_addrs())
    loop = asyncio.get_running_loop()
    try:
        # The system's own resolver, which knows .local names; gRPC's does not.
        found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        failures.append(f"the name {endpoint.host} is not known: {error}")
        return []
    hosts = dict.fromkeys(str(address[0]) for *_, address in found)
    return [wire.Endpoint(host=host, port=endpoint.port, kind=endpoint.kind) for host in hosts]


def _channel(
    endpoint: wire.Endpoint,
    peer_id: str,
    credentials: grpc.ChannelCredentials,
    limits: Limits,
    receive_bytes: int | None = None,
) -> grpc.aio.Channel:
    named = ("grpc.ssl_target_name_override", dns_name(peer_id))
    options = [*client_options(limits, receive_bytes), named]
    return grpc.aio.secure_channel(_target(endpoint), credentials, options=options)


async def _who(channel: grpc.aio.Channel, limits: Limits) -> None:
    """
    Raises:
        NotAdmitted: the peer does not let this caller call.
        LinkBroken: there is no connection.
    """
    ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(WHO)
    try:
        await ask(b"", timeout=limits.connect_s)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise LinkBroken("another program answers there") from None
        details = error.details() or error.code().name
        if error.code() is grpc.StatusCode.PERMISSION_DENIED:
            raise NotAdmitted(details, reason="removed") from None
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise NotAdmitted(details, reason="certificate") from None
        raise LinkBroken(details.split("last error: ")[-1].removeprefix("UNKNOWN: ")) from None


def _target(endpoint: wire.Endpoint) -> str:
    if ":" in endpoint.host:
        return f"ipv6:[{endpoint.host.replace('%', '%25')}]:{endpoint.port}"
    return f"ipv4:{endpoint.host}:{endpoint.port}"


class _Who(grpc.GenericRpcHandler):
    """Answers :data:`WHO`: whoever hears it has got through."""

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if handler_call_details.method != WHO:
            return None
        return grpc.unary_unary_rpc_method_handler(self._reply)

    async def _reply(self, request: bytes, context: object) -> bytes:
        return b""


async def listen(
    addresses: Sequence[Address],
    port: int,
    *,
    credentials: Credentials,
    gate: Anybody,
    limits: Limits,
    register: Callable[[grpc.aio.Server], object],
) -> tuple[grpc.aio.Server, int]:
    """Starts a listener on all addresses, at one port.

    Args:
        addresses: where to listen; those that meanwhile went away are left out.
        port: 0 takes a free one.
        credentials: what the listener shows.
        gate: who may call; :class:`MembersOnly` also asks for a certificate of the cluster.
        limits: message sizes and keepalive.
        register: adds the services, before the first connection is taken.

    Returns:
        The started server, to be stopped by the caller, and its port.

    Raises:
        PortInUse: another program has the port.
        SettingsError: none of the addresses can be listened on.
    """
    for _ in range(PORT_TRIES):
        try:
            chosen, usable = _bindable(addresses, port)
        except PortInUse:
            if port:
                raise
            continue  # free at one address and taken at another: choose again
        members = isinstance(gate, MembersOnly)
        server = grpc.aio.server(
            options=server_options(limits, usable, strangers=not members),
            interceptors=[gate],
            maximum_concurrent_rpcs=None if members else STRANGER_CALLS,
        )
        try:
            for address in usable:
                shown = (
                    credentials.for_members(gate.tally.begun)
                    if members
                    else credentials.for_strangers()
                )
                server.add_secure_port(_bind_target(address, chosen), shown)
        except RuntimeError:  # taken between the trial and now
            await server.stop(None)
            continue
        server.add_generic_rpc_handlers((_Who(),))
        register(server)
        await server.start()
        return server, chosen
    raise _in_use(port)


async def stop_listening(server: grpc.aio.Server, grace_s: float = 1.0) -> None:
    """Stops a listener and waits, at most ``grace_s`` each time, for its calls and its tasks.

    ``Server.stop`` returns while gRPC's own task of a cancelled call is a turn of the loop
    from its end; a loop that ends between the two has gRPC log a traceback.
    """
    await server.stop(grace_s)
    ending = [task for task in asyncio.all_tasks() if _belongs_to_grpc(task)]
    if ending:
        await asyncio.wait(ending, timeout=grace_s)


def _belongs_to_grpc(task: asyncio.Task[object]) -> bool:
    return getattr(task.get_coro(), "__qualname__", "").endswith("_schedule_rpc_coro")


def _bindable(addresses: Sequence[Address], port: int) -> tuple[int, list[Address]]:
    """A port that is free at every address that is there, and those addresses.

    gRPC says only that a bind failed; plain sockets tell why.
    """
    usable: list[Address] = []
    with contextlib.ExitStack() as stack:
        for address in addresses:
            family = socket.AF_INET6 if address.ipv6 else socket.AF_INET
            trial = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if address.ipv6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                trial.bind(socket_address(address, port))
                trial.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise _in_use(port) from None
                if error.errno == errno.EACCES:
                    raise BadSetting(
                        f"Port {port} may not be used by this user",
                        "Ports below 1024 belong to the administrator",
                        "Take a port from 1024 on",
                        setting="port",
                    ) from None
                continue  # the address went away, or is not ready yet
            port = port or trial.getsockname()[1]
            usable.append(address)
    if not usable:
        raise SettingsError(
            "There is no address to listen on",
            ", ".join(a.host for a in addresses) or "none was found",
            "See 'parallax doctor' for this machine's interfaces",
        )
    return port, usable


def _bind_target(address: Address, port: int) -> str:
    return host_port(address.host.replace("%", "%25"), port)


def _in_use(port: int) -> PortInUse:
    return PortInUse(
        f"Port {port} is in use",
        "Another program, perhaps another Parallax, listens there",
        "Stop it, or choose another port with --port or --grpc-port (0 takes a free one)",
        port=port,
    )
