"""Which of a machine's addresses count, as plain data."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from parallax.fabric.addresses import (
    Address,
    Kind,
    by_kind,
    host_port,
    is_this_machine,
    machine_addresses,
    parse_hardware_ports,
    to_listen,
    with_own_scopes,
)
from parallax.proto import wire_pb2 as wire


@dataclass(frozen=True)
class Entry:
    family: int
    address: str


@dataclass(frozen=True)
class State:
    isup: bool


def v4(address: str) -> Entry:
    return Entry(socket.AF_INET, address)


def v6(address: str) -> Entry:
    return Entry(socket.AF_INET6, address)


UP = State(True)

MAC = {
    "lo0": [v4("127.0.0.1"), v6("::1"), v6("fe80::1%lo0")],
    "en0": [v4("192.168.1.20"), v6("fe80::aa%en0"), v6("2001:db8::20")],
    "bridge0": [v4("169.254.7.7"), v6("fe80::bb%bridge0")],
    "bridge100": [v4("192.168.64.1")],
    "en7": [v4("10.0.0.5")],
    "utun3": [v4("100.64.0.1"), v6("fe80::cc%utun3")],
    "awdl0": [v6("fe80::dd%awdl0")],
}
MAC_PORTS = """
Hardware Port: Ethernet Adapter (en7)
Device: en7
Ethernet Address: 00:00:00:00:00:01

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 00:00:00:00:00:02

Hardware Port: Wi-Fi
Device: en0
Ethernet Address: 00:00:00:00:00:03
"""


def test_a_macs_addresses_come_thunderbolt_first_and_loopback_last() -> None:
    found = machine_addresses(MAC, dict.fromkeys(MAC, UP), parse_hardware_ports(MAC_PORTS))
    assert [(a.kind, a.host) for a in found] == [
        (Kind.THUNDERBOLT, "169.254.7.7"),
        (Kind.THUNDERBOLT, "fe80::bb%bridge0"),
        (Kind.ETHERNET, "10.0.0.5"),
        (Kind.WIFI, "192.168.1.20"),
        (Kind.WIFI, "fe80::aa%en0"),
        (Kind.LOOPBACK, "127.0.0.1"),
        (Kind.LOOPBACK, "::1"),
    ]


def test_public_addresses_are_never_listened_on() -> None:
    interfaces = {"eth0": [v4("8.8.8.8"), v4("203.0.113.9"), v4("172.32.0.1"), v6("2001:db8::1")]}
    assert machine_addresses(interfaces, {"eth0": UP}, {}) == []


def test_private_ranges_count_to_their_edges() -> None:
    inside = ["10.255.255.255", "172.16.0.1", "172.31.255.254", "192.168.0.1", "fd00::2"]
    outside = ["11.0.0.0", "172.15.255.255", "192.169.0.1", "fec0::1"]
    entries = [v6(a) if ":" in a else v4(a) for a in inside + outside]
    found = machine_addresses({"eth0": entries}, {"eth0": UP}, {})
    assert {a.host for a in found} == set(inside)


def test_an_interface_that_is_down_has_no_addresses() -> None:
    assert machine_addresses({"eth0": [v4("10.0.0.1")]}, {"eth0": State(False)}, {}) == []
    assert machine_addresses({"eth0": [v4("10.0.0.1")]}, {}, {}) == []


def test_linux_names_tell_the_kind_and_the_system_knows_better() -> None:
    interfaces = {
        "eth0": [v4("10.0.0.1")],
        "wlp3s0": [v4("10.0.0.2")],
        "thunderbolt0": [v4("10.0.0.3")],
        "mystery": [v4("10.0.0.4")],
        "enx1": [v4("10.0.0.5")],
        "docker0": [v4("172.17.0.1")],
    }
    states = dict.fromkeys(interfaces, UP)
    found = {
        a.interface: a.kind for a in machine_addresses(interfaces, states, {"enx1": Kind.WIFI})
    }
    assert found == {
        "eth0": Kind.ETHERNET,
        "wlp3s0": Kind.WIFI,
        "thunderbolt0": Kind.THUNDERBOLT,
        "mystery": Kind.OTHER,
        "enx1": Kind.WIFI,
    }


def test_loopback_only_listens_on_nothing_else() -> None:
    everywhere = machine_addresses(MAC, dict.fromkeys(MAC, UP), {})
    assert [a.host for a in to_listen(everywhere, loopback_only=True)] == ["127.0.0.1"]
    hosts = [a.host for a in to_listen(everywhere, loopback_only=False)]
    assert "192.168.1.20" in hosts
    assert hosts[-1] == "127.0.0.1"


def test_endpoints_are_tried_best_kind_first_and_unknown_kinds_are_other() -> None:
    kinds = ["loopback", "carrier pigeon", "wifi", "thunderbolt"]
    given = [wire.Endpoint(host="h", port=1, kind=kind) for kind in kinds]
    order = ["thunderbolt", "wifi", "carrier pigeon", "loopback"]
    assert [e.kind for e in by_kind(given)] == order


def test_an_address_crosses_the_wire_with_its_kind() -> None:
    address = Address("fe80::aa%en0", "en0", Kind.WIFI)
    assert address.endpoint(7) == wire.Endpoint(host="fe80::aa%en0", port=7, kind="wifi")


def test_a_foreign_scope_becomes_each_of_ours() -> None:
    theirs = wire.Endpoint(host="fe80::99%en5", port=7, kind="wifi")
    assert [e.host for e in with_own_scopes(theirs, MAC)] == ["fe80::99%en0", "fe80::99%bridge0"]


def test_other_endpoints_keep_their_hosts() -> None:
    for host in ("192.168.1.3", "fd00::3", "studio.local"):
        endpoint = wire.Endpoint(host=host, port=7, kind="wifi")
        assert with_own_scopes(endpoint, MAC) == [endpoint]


def test_ipv6_hosts_are_written_in_brackets() -> None:
    assert host_port("fe80::1%en0", 80) == "[fe80::1%en0]:80"
    assert host_port("10.0.0.1", 80) == "10.0.0.1:80"


def test_a_neighbour_with_the_link_local_address_of_our_loopback_is_not_this_machine() -> None:
    for host in ("fe80::1%en0", "fe80::1%bridge0", "fe80::1", "fe80::aa", "fe80::aa%bridge0"):
        assert not is_this_machine(host, MAC), host
    for host in ("fe80::1%lo0", "fe80::aa%en0", "192.168.1.20", "2001:db8::20", "::1"):
        assert is_this_machine(host, MAC), host


def test_a_scope_in_numbers_is_the_interface_of_that_number() -> None:
    index, name = socket.if_nameindex()[0]
    addresses = {name: [v6(f"fe80::1%{name}")], "another": [v6("fe80::2%another")]}
    assert is_this_machine(f"fe80::1%{index}", addresses)
    assert not is_this_machine(f"fe80::2%{index}", addresses)
    for nowhere in ("0", "99999", "9" * 40):
        assert not is_this_machine(f"fe80::1%{nowhere}", addresses)
