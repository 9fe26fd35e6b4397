"""Which hosts, sites and paths are let through; without a server."""

from __future__ import annotations

import pytest

from parallax.fabric.errors import CrossSite, ThroughProxy, WrongHost
from parallax.fabric.hosts import own_names
from parallax.fabric.settings import SchedulerSettings
from parallax.scheduler.http.access import (
    Access,
    Level,
    allowed_origin,
    check_direct,
    check_host,
    check_site,
    key_in,
    level_of,
    notices,
    preflight_headers,
)

PAGE = frozenset({"/", "/main.js"})
HERE = Access(names=frozenset({"studio.local"}), origins=frozenset({"https://chat.example"}))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:3001",
        "localhost:3001",
        "LOCALHOST.",
        "[::1]:3001",
        "192.168.1.20:3001",
        "[fe80::1]",
        "Studio.Local:3001",
    ],
)
def test_addresses_and_own_names_are_answered(host: str) -> None:
    check_host(HERE, [host], may_lack=False)


@pytest.mark.parametrize(
    "hosts",
    [
        ["evil.example"],
        ["evil.example:3001"],
        ["127.0.0.1.evil.example"],
        ["localhost.evil.example"],
        ["studio.local.evil.example"],
        ["127.0.0.1@evil.example"],
        ["evil.example#127.0.0.1"],
        ["[::1].evil.example"],
        ["[evil.example]"],
        ["127.0.0.1:3001:80"],
        ["127.0.0.1", "evil.example"],
        [""],
        [],
    ],
)
def test_other_names_are_not(hosts: list[str]) -> None:
    with pytest.raises(WrongHost):
        check_host(HERE, hosts, may_lack=False)


def test_only_http_1_0_may_lack_a_host() -> None:
    check_host(HERE, [], may_lack=True)
    with pytest.raises(WrongHost):
        check_host(HERE, ["evil.example"], may_lack=True)


NAVIGATES = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize(
    ("headers", "visits_page"),
    [
        ({}, False),  # no browser
        ({"Sec-Fetch-Site": "none"}, False),
        ({"Sec-Fetch-Site": "same-origin"}, False),
        ({"Origin": "http://127.0.0.1:3001", "Sec-Fetch-Site": "same-origin"}, False),
        ({"Origin": "https://127.0.0.1:3001"}, False),  # a proxy speaks TLS
        ({"Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "cross-site", **NAVIGATES}, True),  # a link to the page
    ],
)
def test_own_and_allowed_pages_and_no_pages_ask(headers: dict[str, str], visits_page: bool) -> None:
    check_site(HERE, headers, "127.0.0.1:3001", visits_page=visits_page)


@pytest.mark.parametrize(
    ("headers", "visits_page"),
    [
        ({"Origin": "null"}, False),
        ({"Origin": "http://evil.example"}, True),
        ({"Origin": "http://127.0.0.1:8080"}, False),
        ({"Origin": "http://127.0.0.1"}, False),
        ({"Origin": "https://chat.example.evil.example"}, False),
        ({"Origin": "http://chat.example"}, False),
        ({"Origin": "ftp://127.0.0.1:3001"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site", **NAVIGATES}, False),
        ({"Sec-Fetch-Site": "cross-site"}, True),  # a script or picture of another page
        ({"Sec-Fetch-Site": "cross-site", **NAVIGATES, "Sec-Fetch-Dest": "iframe"}, True),
    ],
)
def test_pages_of_other_sites_do_not(headers: dict[str, str], visits_page: bool) -> None:
    with pytest.raises(CrossSite):
        check_site(HERE, headers, "127.0.0.1:3001", visits_page=visits_page)


def test_with_tls_a_page_without_it_is_another_site() -> None:
    secure = Access(secure=True)
    check_site(secure, {"Origin": "https://studio:3001"}, "studio:3001", visits_page=False)
    with pytest.raises(CrossSite):
        check_site(secure, {"Origin": "http://studio:3001"}, "studio:3001", visits_page=False)


@pytest.mark.parametrize(
    ("resource", "level"),
    [
        ("/", Level.FREE),
        ("/main.js", Level.FREE),
        ("/health", Level.FREE),
        ("/v1/chat/completions", Level.KEY),
        ("/v1/models/{id}", Level.KEY),
        ("/cluster/status", Level.KEY),
        ("/model/list", Level.KEY),
        ("/metrics", Level.KEY),
        ("/whatever/comes/next", Level.KEY),
        (None, Level.KEY),
        ("/admin/keys/{id}", Level.ADMIN),
        ("/admin/tokens", Level.ADMIN),
        ("/scheduler/init", Level.ADMIN),
        ("/node/join/command", Level.ADMIN),
    ],
)
def test_every_path_has_its_level_and_what_is_not_named_needs_a_key(
    resource: str | None, level: Level
) -> None:
    assert level_of(resource, PAGE) is level


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({}, None),
        ({"Authorization": "Bearer px-a"}, "px-a"),
        ({"Authorization": "bearer  px-a "}, "px-a"),
        ({"Authorization": "Basic px-a"}, None),
        ({"Authorization": "Bearer "}, None),
        ({"Authorization": "px-a"}, None),
        ({"x-api-key": "px-b"}, "px-b"),
        ({"Authorization": "Bearer px-a", "x-api-key": "px-b"}, "px-a"),
    ],
)
def test_a_key_comes_in_either_header(headers: dict[str, str], key: str | None) -> None:
    assert key_in(headers) == key


def test_a_preflight_names_the_origin_and_never_everybody() -> None:
    asked = {
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    answer = preflight_headers("https://chat.example", asked)
    assert answer["Access-Control-Allow-Origin"] == "https://chat.example"
    assert answer["Access-Control-Allow-Headers"] == "authorization,content-type,x-stainless-os"
    assert answer["Access-Control-Allow-Private-Network"] == "true"
    assert "*" not in str(answer)
    broken = preflight_headers("https://chat.example", {"Access-Control-Request-Headers": "a;b"})
    assert "Access-Control-Allow-Headers" not in broken
    assert allowed_origin(HERE, "https://other.example") is None


@pytest.mark.parametrize(
    ("settings", "required", "said"),
    [
        ({}, False, ""),
        ({"keys": "required"}, True, "API key"),
        ({"host": "0.0.0.0"}, True, "API key"),
        ({"host": "192.168.1.20"}, True, "not encrypted"),
        ({"host": "studio.local"}, True, "API key"),
        ({"host": "localhost"}, False, ""),
        ({"host": "::1"}, False, ""),
        ({"host": "127.0.0.9"}, False, ""),
        ({"host": "0.0.0.0", "keys": "off"}, False, "KEYS ARE SWITCHED OFF"),
        ({"keys": "off"}, False, ""),
    ],
)
def test_keys_are_required_beyond_loopback_unless_switched_off_loudly(
    settings: dict[str, str], required: bool, said: str
) -> None:
    made = SchedulerSettings(**settings)  # type: ignore[arg-type]
    assert made.keys_required is required
    assert Access.of(made, frozenset()).keys_required is required
    told = " ".join(notices(made))
    assert said in told
    assert bool(told) is bool(said)


@pytest.mark.parametrize(
    "header", ["Forwarded", "X-Forwarded-For", "x-forwarded-proto", "X-Real-IP", "Via"]
)
def test_loopback_stands_in_for_a_key_only_where_no_proxy_is_between(header: str) -> None:
    names = ["Host", header]
    with pytest.raises(ThroughProxy, match="--keys"):
        check_direct(Access.of(SchedulerSettings(), frozenset()), names)
    for said in ({"keys": "required"}, {"keys": "off"}, {"host": "0.0.0.0"}):
        settings = SchedulerSettings(**said)  # type: ignore[arg-type]
        check_direct(Access.of(settings, frozenset()), names)
    check_direct(Access(direct=True), ["Host", "Accept", "X-Forwarder"])


def test_names_that_the_network_gives_this_machine_do_not_count_on_loopback() -> None:
    names, extra = frozenset({"studio", "studio.local"}), ("chat.example",)
    inside = Access.of(SchedulerSettings(allowed_host=extra), names)
    beyond = Access.of(SchedulerSettings(allowed_host=extra, host="0.0.0.0"), names)
    for host in ("localhost:3001", "127.0.0.1:3001", "chat.example"):
        check_host(inside, [host], may_lack=False)
        check_host(beyond, [host], may_lack=False)
    for host in names:
        check_host(beyond, [host], may_lack=False)
        with pytest.raises(WrongHost):
            check_host(inside, [host], may_lack=False)


def test_a_domain_that_the_network_names_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DHCP may give it: whoever has the domain could make that name lead to any address."""
    for function in ("socket.gethostname", "platform.node"):
        monkeypatch.setattr(function, lambda: "Studio.evil.example.")
    assert own_names() == {"studio", "studio.local"}
    monkeypatch.setattr("socket.gethostname", lambda: "")
    monkeypatch.setattr("platform.node", lambda: "Attic.local")
    assert own_names() == {"attic", "attic.local"}
