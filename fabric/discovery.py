"""Finding schedulers on the local network, and being found: mDNS (RFC 6762, RFC 6763).

A scheduler advertises ``PEER_ID._parallax._tcp.local.`` with its enrol port
and, in TXT, its peer id, protocol and name. Only private addresses are told
and believed. What is found is a hint, never a proof: whoever connects checks
the peer id.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from zeroconf import Error as ZeroconfError
from zeroconf import NonUniqueNameException, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from parallax.fabric.addresses import (
    Address,
    Kind,
    host_port,
    is_private,
    listening_addresses,
)
from parallax.fabric.channels import no_route
from parallax.fabric.errors import (
    BadSetting,
    ClusterError,
    SchedulerNotFound,
    VersionMismatch,
)
from parallax.fabric.identity import public_key_of
from parallax.fabric.version import PROTOCOL
from parallax.proto import wire_pb2 as wire

SERVICE = "_parallax._tcp.local."
FIND_S = 10.0  # how long a node looks around
SETTLE_S = 1.0  # what others get to answer once one has
RESOLVE_S = 3.0
MAX_FOUND = 256  # more are not schedulers but noise
MOST_PLACES = 32  # of one scheduler


@dataclass(frozen=True, slots=True)
class Found:
    """A scheduler that advertises itself."""

    peer_id: str
    name: str
    protocol: int
    endpoints: tuple[wire.Endpoint, ...]  # of its enrol listener


@dataclass(frozen=True, slots=True)
class Target:
    """The scheduler to join: who it must be (None: whoever answers), and where."""

    peer_id: str | None
    endpoints: tuple[wire.Endpoint, ...]


def parse_target(wanted: str) -> tuple[str | None, wire.Endpoint | None]:
    """Reads ``PEER_ID``, ``host:port``, ``PEER_ID@host:port``; IPv6 hosts stand in brackets.

    Raises:
        BadSetting: it is none of these.
    """
    peer_id, at, address = wanted.strip().rpartition("@")
    if not at and ":" not in address:
        public_key_of(address)
        return address, None
    if at:
        public_key_of(peer_id)
    match = re.fullmatch(
        r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([^\s:@\[\]/]+)):(\d{1,5})", address
    )
    if not match or not 0 < int(match[3]) < 65536:
        raise BadSetting(
            f"'{wanted}' does not say where a scheduler is",
            "It has to be PEER_ID, host:port or PEER_ID@host:port",
            "Write for example 192.168.1.20:3002, studio.local:3002 or [fd00::2]:3002",
            setting="scheduler",
        )
    host = match[1] or match[2]
    kind = Kind.LOOPBACK if host in ("127.0.0.1", "::1", "localhost") else Kind.OTHER
    return peer_id or None, wire.Endpoint(host=host, port=int(match[3]), kind=kind.value)


@contextlib.asynccontextmanager
async def advertise(
    *, peer_id: str, name: str, enrol_port: int, loopback_only: bool
) -> AsyncIterator[None]:
    """Is found as a scheduler, for as long as the block lasts.

    Raises:
        ClusterError: mDNS is not possible here, or this identity is already advertised.
            The scheduler can still be joined with ``-s host:port``.
    """
    addresses = listening_addresses(loopback_only=loopback_only)
    outside = [a for a in addresses if a.kind is not Kind.LOOPBACK]
    info = AsyncServiceInfo(
        SERVICE,
        f"{peer_id}.{SERVICE}",
        port=enrol_port,
        properties={"id": peer_id, "protocol": str(PROTOCOL), "name": name[:200]},
        server=f"parallax-{peer_id[-12:].lower()}.local.",
        parsed_addresses=[a.host.split("%")[0] for a in outside or addresses],
    )
    network = _open(addresses)
    try:
        try:
            await network.async_register_service(info)
        except NonUniqueNameException:
            raise ClusterError(
                "This scheduler is already on the network",
                f"Another process advertises the identity {peer_id}",
                "Stop it, or start this one with a --state-dir of its own",
            ) from None
        except (ZeroconfError, OSError) as error:
            raise _impossible(error) from None
        yield
    finally:
        await network.async_close()


async def find_schedulers(timeout_s: float, *, loopback_only: bool = False) -> list[Found]:
    """Everyone who answers within the time, by name.

    Raises:
        ClusterError: mDNS is not possible here.
    """
    found = await _search(timeout_s, loopback_only=loopback_only)
    return sorted(found, key=lambda f: (f.name, f.peer_id))


async def find_scheduler(
    wanted: str | None, timeout_s: float = FIND_S, *, loopback_only: bool = False
) -> Target:
    """The scheduler that a node is to join.

    Args:
        wanted: ``PEER_ID``, ``host:port``, ``PEER_ID@host:port``, or None for the only
            scheduler of the network. Where an address is given, nothing is asked.
        timeout_s: how long to look around.

    Raises:
        BadSetting: ``wanted`` cannot be read, or it is None and there are several schedulers.
        SchedulerNotFound: nobody answers.
        VersionMismatch: the only ones that answer speak another protocol.
    """
    peer_id = None
    if wanted is not None:
        peer_id, endpoint = parse_target(wanted)
        if endpoint is not None:
            return Target(peer_id, (endpoint,))
    found = await _search(
        timeout_s, loopback_only=loopback_only, peer_id=peer_id, settle_s=SETTLE_S
    )
    return choose(found, peer_id)


def choose(found: Sequence[Found], peer_id: str | None) -> Target:
    """The one scheduler that is meant, of those found.

    Raises:
        BadSetting, SchedulerNotFound, VersionMismatch: as :func:`find_scheduler`.
    """
    candidates = [f for f in found if peer_id in (None, f.peer_id)]
    speaking = [f for f in candidates if f.protocol == PROTOCOL]
    if len(speaking) > 1:
        commands = "\n".join(
            f"  parallax join -s {f.peer_id}   ({f.name})"
            for f in sorted(speaking, key=lambda f: (f.name, f.peer_id))
        )
        raise BadSetting(
            f"There are {len(speaking)} schedulers on this network",
            "Without -s a node joins the only one",
            f"Say which:\n{commands}",
            setting="scheduler",
        )
    if speaking:
        return Target(speaking[0].peer_id, speaking[0].endpoints)
    if candidates:
        theirs = candidates[0]
        raise VersionMismatch(
            f"The scheduler on '{theirs.name}' speaks another version of the protocol",
            f"it speaks {theirs.protocol}, this node {PROTOCOL}",
            "Install the same version of Parallax on both",
            ours=PROTOCOL,
            theirs=theirs.protocol,
        )
    raise SchedulerNotFound(
        f"No scheduler {peer_id} was found" if peer_id else "No scheduler was found",
        "None answered over mDNS on this machine's private networks",
        "Start one with 'parallax run' on a machine of the same network; see that firewalls let "
        "UDP port 5353 and the scheduler's ports through; on macOS allow Parallax in System "
        "Settings > Privacy & Security > Local Network; or name its address: "
        "parallax join -s host:3002",
    )


async def _search(
    timeout_s: float,
    *,
    loopback_only: bool,
    peer_id: str | None = None,
    settle_s: float | None = None,
) -> list[Found]:
    """Who answers: until ``peer_id`` did, or ``settle_s`` after the first, or the time is up."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    network = _open(listening_addresses(loopback_only=loopback_only))
    found: dict[str, Found] = {}
    resolving: dict[str, asyncio.Task[None]] = {}
    news = asyncio.Event()

    async def resolve(name: str) -> None:
        info = AsyncServiceInfo(SERVICE, name)
        if await info.async_request(network.zeroconf, RESOLVE_S * 1000):
            scheduler = read(info)
            if scheduler is not None:
                found[scheduler.peer_id] = merged(found.get(scheduler.peer_id), scheduler)
                news.set()

    def on_change(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        wanted = resolving[name].done() if name in resolving else len(resolving) < MAX_FOUND
        if wanted and state_change is not ServiceStateChange.Removed:
            resolving[name] = asyncio.create_task(resolve(name))

    browser = None
    try:
        browser = AsyncServiceBrowser(network.zeroconf, SERVICE, handlers=[on_change])
        with contextlib.suppress(TimeoutError):
            while peer_id is None or peer_id not in found:
                async with asyncio.timeout_at(deadline):
                    await news.wait()
                news.clear()
                if settle_s is not None and peer_id is None:
                    deadline = min(deadline, loop.time() + settle_s)
                    settle_s = None
    except OSError as error:
        raise _impossible(error) from None
    finally:
        if browser is not None:
            await browser.async_cancel()
        for task in resolving.values():
            task.cancel()
        await asyncio.gather(*resolving.values(), return_exceptions=True)
        await network.async_close()
    return list(found.values())


def merged(known: Found | None, scheduler: Found) -> Found:
    """Two records of one peer id: one may be forged, so the places of both are tried."""
    if known is None:
        return scheduler
    places = [*known.endpoints]
    places += [e for e in scheduler.endpoints if e not in places]
    return replace(scheduler, endpoints=tuple(places[:MOST_PLACES]))


def read(info: AsyncServiceInfo) -> Found | None:
    """What an advertisement says; None if it makes no sense. Anyone can send one."""
    text = info.decoded_properties
    peer_id, protocol = text.get("id") or "", text.get("protocol") or ""
    try:
        public_key_of(peer_id)
    except BadSetting:
        return None
    endpoints = tuple(
        wire.Endpoint(
            host=host,
            port=info.port or 0,
            kind=(Kind.LOOPBACK if host.startswith("127.") else Kind.OTHER).value,
        )
        for host in info.parsed_scoped_addresses()
        if is_private(host)
    )
    if not endpoints or not info.port or not re.fullmatch(r"\d{1,9}", protocol):
        return None
    # The name is shown on terminals: nothing unprintable gets there.
    name = "".join(c for c in text.get("name") or "" if c.isprintable())[:63]
    return Found(peer_id, name or "unnamed", int(protocol), endpoints)


def _open(addresses: Sequence[Address]) -> AsyncZeroconf:
    """mDNS sockets on one address per interface.

    Loopback is taken along with IPv4, for schedulers that listen only there.
    Families are not mixed: macOS refuses IPv4 membership on an IPv6 socket.
    """
    outside = [a for a in addresses if a.kind is not Kind.LOOPBACK]
    chosen = {a.interface: a.host for a in outside if not a.ipv6}
    if chosen:
        interfaces = [*chosen.values(), "127.0.0.1"]
    else:
        chosen = {a.interface: a.host.split("%")[0] for a in outside}
        interfaces = list(chosen.values()) or ["127.0.0.1"]
    try:
        return AsyncZeroconf(interfaces=interfaces)
    except (OSError, RuntimeError) as error:
        raise _impossible(error) from None


def _impossible(error: Exception) -> ClusterError:
    advice = (
        "On macOS allow Parallax in System Settings > Privacy & Security > Local Network"
        if no_route(str(error))
        else "See 'parallax doctor'"
    )
    return ClusterError(
        "mDNS is not possible on this machine",
        str(error),
        f"{advice}; nodes can still join with -s host:port",
    )


def shown(target: Target) -> str:
    """A target in people's words."""
    where = ", ".join(host_port(e.host, e.port) for e in target.endpoints)
    return f"{target.peer_id} at {where}" if target.peer_id else where
