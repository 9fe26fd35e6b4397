"""The one place that opens gRPC channels and the listeners they lead to.

Whoever listens says who it is (:data:`WHO`), and whoever connects asks before
anything else: an address that meanwhile belongs to another node, or to another
program, is noticed there. Nothing is encrypted and nobody has to prove who he
is, hence :data:`OPEN_NETWORK_NOTICE`; TLS will take this place.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Iterable, Sequence

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
from parallax.fabric.errors import (
    BadSetting,
    ClusterError,
    LinkBroken,
    PeerMismatch,
    PortInUse,
    SchedulerUnreachable,
    SettingsError,
)
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire

OPEN_NETWORK_NOTICE = (
    "Connections are not encrypted and anyone on this network can join: "
    "use Parallax only on a network that you trust."
)

WHO = "/parallax.v1.Peer/Who"
HEAD_START_S = 0.25  # before the next endpoint is tried too (RFC 8305, happy eyeballs)
MESSAGE_SLACK_BYTES = 64 << 10  # what surrounds a piece in its message
PORT_TRIES = 20

_ADVICE = (
    "Check that both machines are on the same network and that no firewall stands between them"
)
_ADVICE_NO_ROUTE = (
    "On macOS allow the terminal, or Parallax, in System Settings > Privacy & Security > "
    "Local Network; elsewhere check that both machines are on the same network"
)


def _options(limits: Limits) -> list[tuple[str, int | str]]:
    """What both sides set. gRPC turns Nagle's algorithm off by itself."""
    return [
        ("grpc.max_send_message_length", limits.message_bytes + MESSAGE_SLACK_BYTES),
        ("grpc.max_receive_message_length", limits.message_bytes + MESSAGE_SLACK_BYTES),
        # Together: whoever is silent for so long is gone.
        ("grpc.keepalive_time_ms", int(limits.heartbeat_s * 1000)),
        ("grpc.keepalive_timeout_ms", int((limits.silence_s - limits.heartbeat_s) * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _client_options(limits: Limits) -> list[tuple[str, int | str]]:
    return [
        *_options(limits),
        ("grpc.enable_http_proxy", 0),  # neighbours are never behind a proxy
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own for each channel
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", int(limits.connect_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(limits.connect_s * 1000)),
    ]


def _server_options(limits: Limits) -> list[tuple[str, int | str]]:
    return [
        *_options(limits),
        ("grpc.so_reuseport", 0),  # a port that is taken must be noticed
        # Pings as often as clients send them are welcome.
        ("grpc.http2.min_ping_interval_without_data_ms", int(limits.heartbeat_s * 500)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(limits.heartbeat_s * 500)),
        ("grpc.http2.max_ping_strikes", 0),
    ]


async def open_channel(
    endpoints: Iterable[wire.Endpoint],
    expected_peer_id: str | None,
    *,
    limits: Limits,
    scheduler: bool = False,
) -> tuple[grpc.aio.Channel, wire.Endpoint]:
    """Connects to the first endpoint that answers, the best kind of interface first.

    Endpoints are tried one after the other with a short head start, so that a
    dead one costs a quarter of a second and not the whole time.

    Args:
        endpoints: where the peer listens; hosts are addresses or names.
        expected_peer_id: who must answer there; None takes anyone.
        limits: ``connect_s`` bounds the whole.
        scheduler: whether the peer is a scheduler, for the error's words.

    Returns:
        The open channel, to be closed by the caller, and the endpoint that answered.

    Raises:
        PeerMismatch: somebody else answers, and nobody expected does.
        SchedulerUnreachable, LinkBroken: nobody answers.
    """
    given = by_kind(endpoints)
    shown = ", ".join(host_port(e.host, e.port) for e in given) or "no address"
    failures: list[ClusterError | str] = []
    try:
        async with asyncio.timeout(limits.connect_s):
            won = await _race(given, expected_peer_id, limits, failures)
            if won is not None:
                return won
    except TimeoutError:
        failures.append(f"no answer within {limits.connect_s:g} s")
    for failure in failures:
        if isinstance(failure, PeerMismatch):
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
    given: Sequence[wire.Endpoint],
    expected_peer_id: str | None,
    limits: Limits,
    failures: list[ClusterError | str],
) -> tuple[grpc.aio.Channel, wire.Endpoint] | None:
    """The first endpoint that answers as expected; None, with reasons, if all fail."""
    waiting = [place for endpoint in given for place in await _places(endpoint, failures)]
    running: set[asyncio.Task[tuple[grpc.aio.Channel, wire.Endpoint]]] = set()
    won = None
    try:
        while won is None and (waiting or running):
            if waiting:
                attempt = _connect(waiting.pop(0), expected_peer_id, limits)
                running.add(asyncio.create_task(attempt))
            done, running = await asyncio.wait(
                running,
                timeout=HEAD_START_S if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                try:
                    line = task.result()
                except ClusterError as error:
                    failures.append(error if isinstance(error, PeerMismatch) else error.what)
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


async def _connect(
    endpoint: wire.Endpoint, expected_peer_id: str | None, limits: Limits
) -> tuple[grpc.aio.Channel, wire.Endpoint]:
    channel = grpc.aio.insecure_channel(_target(endpoint), options=_client_options(limits))
    try:
        found = await _who(channel, limits)
        if expected_peer_id is not None and found != expected_peer_id:
            raise PeerMismatch(
                f"Somebody else answers at {host_port(endpoint.host, endpoint.port)}",
                f"it is {found}, not {expected_peer_id}",
                "Copy the join command anew from the page or from 'parallax run'",
                expected=expected_peer_id,
                found=found,
            )
    except BaseException:
        await channel.close()
        raise
    return channel, endpoint


async def _who(channel: grpc.aio.Channel, limits: Limits) -> str:
    ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(WHO)
    try:
        answer = await ask(b"", timeout=limits.connect_s)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            raise LinkBroken("another program answers there") from None
        details = error.details() or error.code().name
        raise LinkBroken(details.split("last error: ")[-1].removeprefix("UNKNOWN: ")) from None
    return answer.decode("ascii", "replace")


def _target(endpoint: wire.Endpoint) -> str:
    if ":" in endpoint.host:
        return f"ipv6:[{endpoint.host.replace('%', '%25')}]:{endpoint.port}"
    return f"ipv4:{endpoint.host}:{endpoint.port}"


class _Who(grpc.GenericRpcHandler):
    """Answers :data:`WHO` with a peer id."""

    def __init__(self, peer_id: str) -> None:
        self._answer = peer_id.encode("ascii")

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if handler_call_details.method != WHO:
            return None
        return grpc.unary_unary_rpc_method_handler(self._reply)

    async def _reply(self, request: bytes, context: object) -> bytes:
        return self._answer


async def listen(
    addresses: Sequence[Address],
    port: int,
    *,
    peer_id: str,
    limits: Limits,
    register: Callable[[grpc.aio.Server], object],
) -> tuple[grpc.aio.Server, int]:
    """Starts a listener on all addresses, at one port.

    Args:
        addresses: where to listen; those that meanwhile went away are left out.
        port: 0 takes a free one.
        peer_id: who the listener says it is.
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
        server = grpc.aio.server(options=_server_options(limits))
        try:
            for address in usable:
                server.add_insecure_port(_bind_target(address, chosen))
        except RuntimeError:  # taken between the trial and now
            await server.stop(None)
            continue
        server.add_generic_rpc_handlers((_Who(peer_id),))
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
