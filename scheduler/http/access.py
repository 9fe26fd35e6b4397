"""Which requests HTTP lets through, before anybody reads them: host, site, kind of key.

Decisions without I/O. What they are against: a page of another site in a browser on this
network. It may send simple requests to any address (cross-site request forgery), and by
DNS rebinding it may make its own name point here, so that the browser takes us for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from parallax.fabric.errors import CrossSite, ThroughProxy, WrongHost
from parallax.fabric.hosts import address, host_of, is_loopback
from parallax.fabric.settings import SchedulerSettings

METHODS = "GET, HEAD, POST, DELETE"
PREFLIGHT_S = 600

_ADMIN = frozenset({"/scheduler/init", "/node/join/command"})
_FREE = frozenset({"/health"})
_OF_PROXIES = frozenset({"forwarded", "via", "x-real-ip"})
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+( *, *[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")


class Level(Enum):
    """Who may ask, where keys are required."""

    FREE = "anybody"
    KEY = "whoever has a key"
    ADMIN = "whoever has an admin key"


@dataclass(frozen=True, slots=True)
class Access:
    """How a server is to be reached."""

    keys_required: bool = False
    direct: bool = False  # loopback stands in for keys, so nobody may ask through a proxy
    secure: bool = False  # it speaks TLS
    names: frozenset[str] = frozenset()  # in Host, besides localhost and addresses; lower case
    origins: frozenset[str] = frozenset()  # whose pages may ask besides our own; lower case

    @classmethod
    def of(cls, settings: SchedulerSettings, own_names: frozenset[str]) -> Access:
        """As the settings say, on a machine of these names.

        On loopback no other machine asks, so the names by which those know this one do not count.
        """
        theirs = own_names if settings.beyond_loopback else frozenset()
        names = {*theirs, settings.host.lower(), *settings.allowed_host}
        return cls(
            keys_required=settings.keys_required,
            direct=settings.keys == "auto" and not settings.keys_required,
            secure=settings.tls_cert is not None,
            names=frozenset(names),
            origins=frozenset(settings.cors_origin),
        )


def level_of(resource: str | None, page: frozenset[str]) -> Level:
    """Who may ask for a resource.

    Args:
        resource: the route that the path led to, in its canonical form; None: to none.
        page: the page and its files.
    """
    if resource is None:
        return Level.KEY  # who has no key shall not learn what there is
    if resource in _FREE or resource in page:
        return Level.FREE
    if resource in _ADMIN or resource == "/admin" or resource.startswith("/admin/"):
        return Level.ADMIN
    return Level.KEY


def is_limited(resource: str | None) -> bool:
    """Whether a request counts against its key's limits and in its usage."""
    return resource is not None and resource.startswith("/v1/")


def check_host(access: Access, hosts: Sequence[str], *, may_lack: bool) -> None:
    """Let through what names this server.

    An address in place of a name is as good as ours: no DNS answer can forge it.

    Args:
        hosts: the ``Host`` headers.
        may_lack: none is needed (HTTP/1.0).

    Raises:
        WrongHost: it names somebody else, or nobody.
    """
    if not hosts and may_lack:
        return
    host = host_of(hosts[0]) if len(hosts) == 1 else None
    if host is not None and (
        address(host) is not None or is_loopback(host) or host in access.names
    ):
        return
    raise WrongHost(
        f"This server is not {hosts[0][:100]!r}" if hosts else "The request has no Host",
        "Only this machine's own names and addresses are answered for, lest a foreign page "
        "reaches it under a name of its own (DNS rebinding)",
        "Use its address, or name it: parallax run --allowed-host NAME",
    )


def check_direct(access: Access, headers: Iterable[str]) -> None:
    """Where loopback stands in for keys, let through what no proxy says it has sent on.

    A proxy on this machine makes everybody's requests come from loopback. One that says
    nothing of itself cannot be told from a program of this machine.

    Args:
        headers: their names.

    Raises:
        ThroughProxy: a proxy wrote one of them.
    """
    if not access.direct:
        return
    for name in map(str.lower, headers):
        if name in _OF_PROXIES or name.startswith("x-forwarded-"):
            raise ThroughProxy(
                "A proxy asks for somebody else, and no key is asked for here",
                f"The request has {name[:100]!r}; through a proxy everybody would be taken for "
                "this machine",
                "Ask for keys behind a proxy: parallax run --keys (or --no-keys, if it lets in "
                "only who may)",
            )


def allowed_origin(access: Access, origin: str | None) -> str | None:
    """The origin if its pages may read our answers (CORS), else None."""
    return origin if origin is not None and origin.lower() in access.origins else None


def check_site(access: Access, headers: Mapping[str, str], host: str, *, visits_page: bool) -> None:
    """Let through what comes from our own page, from allowed ones, or from no page at all.

    Args:
        host: the ``Host`` header.
        visits_page: the page itself, or a file of it, is asked for by GET.

    Raises:
        CrossSite: another site's page asks.
    """
    origin = headers.get("Origin")
    if origin is not None:
        if allowed_origin(access, origin) or _is_own(access, origin, host):
            return
        raise _cross_site(f"The page asks from {origin[:100]!r}")
    site = headers.get("Sec-Fetch-Site", "none").lower()
    if site in ("none", "same-origin"):
        return
    # A link to our page may stand anywhere; what it shows is ours alone.
    how = (headers.get("Sec-Fetch-Mode", "").lower(), headers.get("Sec-Fetch-Dest", "").lower())
    if visits_page and how == ("navigate", "document"):
        return
    raise _cross_site("The browser says that the request comes from another site")


def _is_own(access: Access, origin: str, host: str) -> bool:
    scheme, separator, rest = origin.lower().partition("://")
    if not separator or rest != host.strip().lower():
        return False
    # Without TLS here, a proxy before us may speak it.
    return scheme == "https" or (scheme == "http" and not access.secure)


def _cross_site(why: str) -> CrossSite:
    return CrossSite(
        "Pages of other sites may not ask here",
        why,
        "Let one in by its origin: parallax run --cors-origin https://example.org",
    )


def preflight_headers(origin: str, headers: Mapping[str, str]) -> dict[str, str]:
    """The answer to an allowed origin that asks what it may send (Fetch standard, CORS)."""
    asked = headers.get("Access-Control-Request-Headers", "")
    answer = {
        **cors_headers(origin),
        "Access-Control-Allow-Methods": METHODS,
        "Access-Control-Max-Age": str(PREFLIGHT_S),
    }
    if _HEADER_NAMES.fullmatch(asked):
        answer["Access-Control-Allow-Headers"] = asked
    if headers.get("Access-Control-Request-Private-Network") == "true":
        answer["Access-Control-Allow-Private-Network"] = "true"
    return answer


def cors_headers(origin: str) -> dict[str, str]:
    """What lets an allowed origin read an answer."""
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": "Retry-After",
    }


def key_in(headers: Mapping[str, str]) -> str | None:
    """The API key that a request brings: ``Authorization: Bearer`` or ``x-api-key``."""
    scheme, _, secret = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and secret.strip():
        return secret.strip()
    return headers.get("x-api-key", "").strip() or None


def notices(settings: SchedulerSettings) -> list[str]:
    """What whoever starts this server, or looks at its status, has to know."""
    found = []
    if settings.keys_required:
        found.append(
            "HTTP asks for an API key: 'parallax keys create' makes one, with --admin for "
            "the page's settings."
        )
    if settings.beyond_loopback and not settings.keys_required:
        found.append(
            "API KEYS ARE SWITCHED OFF: everybody who reaches this machine's HTTP can use and "
            "steer the cluster."
        )
    if settings.beyond_loopback and settings.tls_cert is None:
        found.append(
            "HTTP is not encrypted: keys and answers can be read on the way. --tls-cert and "
            "--tls-key change that."
        )
    return found
