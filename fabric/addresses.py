"""The addresses of this machine: which there are, what they run over, which to listen on."""

from __future__ import annotations

import ipaddress
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

import psutil

from parallax.proto import wire_pb2 as wire


class Kind(Enum):
    """What an address runs over, the best for tensors first."""

    THUNDERBOLT = "thunderbolt"
    ETHERNET = "ethernet"
    WIFI = "wifi"
    OTHER = "other"
    LOOPBACK = "loopback"


_ORDER = [kind.value for kind in Kind]


@dataclass(frozen=True, slots=True)
class Address:
    """One address of one interface. IPv6 link-local hosts carry their scope ("fe80::1%en0")."""

    host: str
    interface: str
    kind: Kind

    @property
    def ipv6(self) -> bool:
        return ":" in self.host

    def endpoint(self, port: int) -> wire.Endpoint:
        """As it crosses the wire."""
        return wire.Endpoint(host=self.host, port=port, kind=self.kind.value)


def socket_address(address: Address, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """What sockets bind to; an IPv6 scope becomes its number."""
    if "%" not in address.host:
        return address.host, port
    host, _, interface = address.host.partition("%")
    return host, port, 0, socket.if_nametoindex(interface)


class InterfaceAddress(Protocol):
    """What psutil tells of an address (``psutil._common.snicaddr``)."""

    @property
    def family(self) -> int: ...
    @property
    def address(self) -> str: ...


class InterfaceState(Protocol):
    """What psutil tells of an interface (``psutil._common.snicstats``)."""

    @property
    def isup(self) -> bool: ...


# Addresses that routers keep inside: RFC 1918, RFC 3927, RFC 6598, RFC 4193, RFC 4291.
_PRIVATE = [
    ipaddress.ip_network(net)
    for net in (
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "100.64.0.0/10",
        "::1/128",
        "fc00::/7",
        "fe80::/10",
    )
]

# Interfaces that lead nowhere but to this machine's own guests, or out through a tunnel: their
# addresses repeat on other machines, so a neighbour that tries them reaches itself.
_PRIVATE_TO_US = re.compile(
    r"(docker|br-|virbr|vmnet|vboxnet|lxc|cni|flannel|cali|podman|utun|tun|tap|wg|ppp|gif|stf"
    r"|awdl|llw|anpi|ap\d|bridge1\d\d)"
)


def is_private(host: str) -> bool:
    """Whether a host is an address that does not leave the local network."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return any(ip in net for net in _PRIVATE)


def machine_addresses(
    addresses: Mapping[str, Sequence[InterfaceAddress]],
    states: Mapping[str, InterfaceState],
    kinds: Mapping[str, Kind],
) -> list[Address]:
    """The private addresses of interfaces that are up, best kind first.

    Args:
        addresses: as ``psutil.net_if_addrs`` gives them.
        states: as ``psutil.net_if_stats`` gives them.
        kinds: what the system says an interface is; names decide about the others.
    """
    found = []
    for interface, entries in addresses.items():
        state = states.get(interface)
        if state is None or not state.isup or _PRIVATE_TO_US.match(interface):
            continue
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            bare = entry.address.split("%")[0]
            ip = ipaddress.ip_address(bare)
            if not is_private(bare):
                continue
            scoped = ip.version == 6 and ip.is_link_local
            host = f"{bare}%{interface}" if scoped else bare
            kind = Kind.LOOPBACK if ip.is_loopback else kinds.get(interface) or _named(interface)
            if (kind is Kind.LOOPBACK) != ip.is_loopback:
                continue  # macOS gives lo0 a link-local address too
            found.append(Address(host, interface, kind))
    return sorted(found, key=lambda a: (_ORDER.index(a.kind.value), a.ipv6, a.interface, a.host))


def to_listen(addresses: Iterable[Address], *, loopback_only: bool) -> list[Address]:
    """Where gRPC listens: 127.0.0.1 always, and the private addresses unless told otherwise."""
    loopback = Address("127.0.0.1", "lo", Kind.LOOPBACK)
    others = [] if loopback_only else [a for a in addresses if a.kind is not Kind.LOOPBACK]
    return [*others, loopback]


def listening_addresses(*, loopback_only: bool) -> list[Address]:
    """:func:`to_listen` of this machine, now."""
    if loopback_only:
        return to_listen((), loopback_only=True)
    addresses = machine_addresses(psutil.net_if_addrs(), psutil.net_if_stats(), _system_kinds())
    return to_listen(addresses, loopback_only=False)


def by_kind(endpoints: Iterable[wire.Endpoint]) -> list[wire.Endpoint]:
    """Endpoints in the order in which to try them."""
    return sorted(
        endpoints, key=lambda e: _ORDER.index(e.kind if e.kind in _ORDER else Kind.OTHER.value)
    )


def with_own_scopes(
    endpoint: wire.Endpoint, addresses: Mapping[str, Sequence[InterfaceAddress]]
) -> list[wire.Endpoint]:
    """A link-local endpoint as seen from here, once per interface it may lie behind.

    A scope names an interface of the machine that wrote it down; another
    machine has to put its own in its place. Other endpoints come back unchanged.
    """
    bare = endpoint.host.split("%")[0]
    if not bare.lower().startswith("fe80:"):
        return [endpoint]
    interfaces = [
        name
        for name, entries in addresses.items()
        if not _PRIVATE_TO_US.match(name)
        and _named(name) is not Kind.LOOPBACK
        and any(e.family == socket.AF_INET6 and e.address.startswith("fe80:") for e in entries)
    ]
    return [
        wire.Endpoint(host=f"{bare}%{name}", port=endpoint.port, kind=endpoint.kind)
        for name in interfaces
    ]


def caller_host(peer: str) -> str:
    """The address in gRPC's name of a caller, as "ipv4:10.0.0.7:5123" or "ipv6:%5B::1%5D:5123"."""
    return unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")


def is_this_machine(
    host: str, addresses: Mapping[str, Sequence[InterfaceAddress]] | None = None
) -> bool:
    """Whether an address is one of this machine's own, now.

    A link-local address is unique on its link alone, so it counts only with its scope, and only
    if that very interface has it: a neighbour may well be called what our ``lo0`` is.

    Args:
        host: with its scope, if it has one, as a name or as a number ("fe80::1%3").
        addresses: as ``psutil.net_if_addrs`` gives them; None asks it.
    """
    bare, _, scope = host.partition("%")
    bare = bare.removeprefix("::ffff:")
    try:
        ip = ipaddress.ip_address(bare)
    except ValueError:
        return False
    if ip.is_loopback:
        return not scope
    if addresses is None:
        addresses = psutil.net_if_addrs()
    interfaces: Iterable[str] = addresses
    if scope:
        interfaces = [_interface_of(scope)]
    elif ip.version == 6 and ip.is_link_local:
        return False
    own = (e.address.partition("%")[0] for name in interfaces for e in addresses.get(name, ()))
    return bare in own


def _interface_of(scope: str) -> str:
    """An interface's name by its IPv6 scope; empty: there is none of that number."""
    try:
        return socket.if_indextoname(int(scope)) if scope.isdecimal() else scope
    except (OSError, OverflowError):
        return ""


def host_port(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _named(interface: str) -> Kind:
    """What an interface's name gives away."""
    if interface.startswith("lo"):
        return Kind.LOOPBACK
    if interface.startswith(("thunderbolt", "bridge")):
        return Kind.THUNDERBOLT
    if interface.startswith(("wl", "wifi")):
        return Kind.WIFI
    if interface.startswith(("en", "eth")):
        return Kind.ETHERNET
    return Kind.OTHER


def parse_hardware_ports(listing: str) -> dict[str, Kind]:
    """Kinds from macOS's ``networksetup -listallhardwareports``."""
    kinds = {}
    port = ""
    for line in listing.splitlines():
        key, _, value = line.partition(": ")
        if key == "Hardware Port":
            port = value.lower()
        elif key == "Device":
            if "thunderbolt" in port:
                kinds[value] = Kind.THUNDERBOLT
            elif "wi-fi" in port or "airport" in port:
                kinds[value] = Kind.WIFI
            elif "ethernet" in port or "lan" in port:
                kinds[value] = Kind.ETHERNET
            else:
                kinds[value] = Kind.OTHER
    return kinds


def _system_kinds() -> dict[str, Kind]:
    if sys.platform == "darwin":
        try:
            listing = subprocess.run(
                ["/usr/sbin/networksetup", "-listallhardwareports"],
                capture_output=True,
                text=True,
                timeout=2,
                check=False,
            ).stdout
        except (OSError, subprocess.TimeoutExpired):
            return {}
        return parse_hardware_ports(listing)
    wireless = Path("/sys/class/net").glob("*/wireless")
    return {path.parent.name: Kind.WIFI for path in wireless}
