"""Hosts as people and browsers write them: which are this machine, which are mere names."""

from __future__ import annotations

import ipaddress
import platform
import re
import socket

ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  where to reach who listens so

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?")


def is_loopback(host: str) -> bool:
    """Whether a host can only be this machine, whatever the network says."""
    name = host.lower().strip("[]").rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):  # RFC 6761, 6.3
        return True
    found = address(name)
    return found is not None and found.is_loopback


def address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The host as an address, or None where it is a name."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return None


def host_of(header: str) -> str | None:
    """The host of a ``Host`` header or of the end of an origin, in lower case; None: it is none.

    The port after it may be missing, and is checked for its form alone.
    """
    text = header.strip().lower()
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or address(host) is None:
            return None
    else:
        host, colon, digits = text.partition(":")
        rest = colon + digits
    if rest and not re.fullmatch(r":[0-9]{1,5}", rest):
        return None
    host = host.rstrip(".")
    return host if address(host) is not None or _NAME.fullmatch(host) else None


def own_names() -> frozenset[str]:
    """What this machine is called on its network, in lower case: its first name, and in mDNS.

    Not the whole of a longer name. A network may hand one out (DHCP), under a domain whose
    owner can then make a page of that very name lead here.
    """
    firsts = {n.lower().partition(".")[0] for n in (socket.gethostname(), platform.node())} - {""}
    return frozenset({*firsts, *(f"{first}.local" for first in firsts)})
