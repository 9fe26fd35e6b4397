"""Finding and being found: real mDNS, on this machine's loopback only."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import AsyncExitStack

import pytest
from zeroconf.asyncio import AsyncServiceInfo

from parallax.fabric.discovery import (
    MOST_PLACES,
    SERVICE,
    Found,
    advertise,
    choose,
    find_scheduler,
    find_schedulers,
    merged,
    parse_target,
    read,
)
from parallax.fabric.errors import (
    BadSetting,
    ClusterError,
    SchedulerNotFound,
    VersionMismatch,
)
from parallax.fabric.identity import peer_id_of
from parallax.fabric.version import PROTOCOL
from parallax.proto import wire_pb2 as wire

ALICE = peer_id_of(bytes(32))


def new_peer_id() -> str:
    """Other tests, and other runs of this one, advertise on the same loopback."""
    return peer_id_of(secrets.token_bytes(32))


def found(peer_id: str, name: str = "studio", protocol: int = PROTOCOL) -> Found:
    return Found(peer_id, name, protocol, (wire.Endpoint(host="10.0.0.1", port=3002),))


async def test_a_scheduler_is_found_by_its_peer_id_as_soon_as_it_answers() -> None:
    peer_id = new_peer_id()
    async with advertise(peer_id=peer_id, name="studio", enrol_port=4321, loopback_only=True):
        begin = time.monotonic()
        target = await find_scheduler(peer_id, 20, loopback_only=True)
        assert time.monotonic() - begin < 10
    assert target.peer_id == peer_id
    assert [(e.host, e.port, e.kind) for e in target.endpoints] == [("127.0.0.1", 4321, "loopback")]


async def test_two_schedulers_are_both_found_with_their_names() -> None:
    first, second = new_peer_id(), new_peer_id()
    async with AsyncExitStack() as stack:
        for peer_id, name in ((first, "zoé's mac"), (second, "attic")):
            await stack.enter_async_context(
                advertise(peer_id=peer_id, name=name, enrol_port=4000, loopback_only=True)
            )
        seen = await find_schedulers(2, loopback_only=True)
    ours = [(f.name, f.peer_id, f.protocol) for f in seen if f.peer_id in (first, second)]
    assert ours == [("attic", second, PROTOCOL), ("zoé's mac", first, PROTOCOL)]


async def test_a_scheduler_that_comes_later_is_still_found() -> None:
    peer_id = new_peer_id()
    search = asyncio.create_task(find_scheduler(peer_id, 20, loopback_only=True))
    await asyncio.sleep(0)
    async with advertise(peer_id=peer_id, name="late", enrol_port=4000, loopback_only=True):
        assert (await search).peer_id == peer_id


async def test_one_that_stopped_is_not_found() -> None:
    peer_id = new_peer_id()
    async with advertise(peer_id=peer_id, name="gone", enrol_port=4000, loopback_only=True):
        pass
    with pytest.raises(SchedulerNotFound, match=f"No scheduler {peer_id} was found") as caught:
        await find_scheduler(peer_id, 1, loopback_only=True)
    assert "parallax join -s host:3002" in caught.value.fix


async def test_one_identity_cannot_be_advertised_twice() -> None:
    peer_id = new_peer_id()
    async with advertise(peer_id=peer_id, name="one", enrol_port=4000, loopback_only=True):
        with pytest.raises(ClusterError, match="already on the network"):
            async with advertise(peer_id=peer_id, name="two", enrol_port=4001, loopback_only=True):
                pass


async def test_an_address_is_taken_as_it_is_and_nobody_asked() -> None:
    begin = time.monotonic()
    target = await find_scheduler("studio.local:3002", 20)
    assert time.monotonic() - begin < 10  # it would look around for 20
    assert target.peer_id is None
    assert target.endpoints == (wire.Endpoint(host="studio.local", port=3002, kind="other"),)


@pytest.mark.parametrize(
    ("text", "peer_id", "host", "port"),
    [
        ("127.0.0.1:3002", None, "127.0.0.1", 3002),
        (f"{ALICE}@10.0.0.7:80", ALICE, "10.0.0.7", 80),
        ("[fd00::2]:3002", None, "fd00::2", 3002),
        (f"{ALICE}@[fe80::1%en0]:3002", ALICE, "fe80::1%en0", 3002),
        (" my-mac:65535 ", None, "my-mac", 65535),
    ],
)
def test_addresses_are_read(text: str, peer_id: str | None, host: str, port: int) -> None:
    who, endpoint = parse_target(text)
    assert who == peer_id
    assert endpoint is not None
    assert (endpoint.host, endpoint.port) == (host, port)


def test_a_peer_id_alone_is_read() -> None:
    assert parse_target(ALICE) == (ALICE, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "studio",
        "12D3KooWnonsense",
        "studio:",
        ":3002",
        "studio:0",
        "studio:65536",
        "studio:http",
        "fd00::2:3002",
        "12D3KooWnonsense@studio:3002",
        f"{ALICE}@studio",
        "@studio:3002",
        "http://studio:3002",
        "a b:3002",
    ],
)
def test_what_is_no_target_is_a_bad_setting(text: str) -> None:
    with pytest.raises(BadSetting) as caught:
        parse_target(text)
    assert caught.value.fields == {"setting": "scheduler"}


def test_the_only_scheduler_is_chosen() -> None:
    assert choose([found(ALICE)], None).peer_id == ALICE


def test_several_schedulers_are_listed_with_the_commands_that_join_them() -> None:
    other = new_peer_id()
    with pytest.raises(BadSetting) as caught:
        choose([found(ALICE, "studio"), found(other, "attic")], None)
    assert "2 schedulers" in caught.value.what
    assert f"parallax join -s {other}   (attic)\n" in caught.value.fix
    assert f"parallax join -s {ALICE}   (studio)" in caught.value.fix


def test_the_wanted_one_of_several_is_chosen() -> None:
    assert choose([found(new_peer_id()), found(ALICE)], ALICE).peer_id == ALICE


def test_a_scheduler_of_another_protocol_is_told_from_none() -> None:
    with pytest.raises(VersionMismatch, match="studio"):
        choose([found(ALICE, protocol=PROTOCOL + 1)], None)
    with pytest.raises(SchedulerNotFound):
        choose([], None)


def test_one_of_this_protocol_is_preferred() -> None:
    other = found(new_peer_id(), protocol=PROTOCOL + 1)
    assert choose([other, found(ALICE)], None).peer_id == ALICE


def advertisement(addresses: list[str], **text: str) -> AsyncServiceInfo:
    properties = {"id": ALICE, "protocol": "1", "name": "studio"} | text
    return AsyncServiceInfo(
        SERVICE, f"x.{SERVICE}", port=1, properties=properties, parsed_addresses=addresses
    )


def test_public_addresses_in_an_advertisement_are_not_believed() -> None:
    scheduler = read(advertisement(["8.8.8.8", "192.168.1.2"]))
    assert scheduler is not None
    assert [e.host for e in scheduler.endpoints] == ["192.168.1.2"]
    assert read(advertisement(["8.8.8.8"])) is None


def test_an_advertisement_that_makes_no_sense_is_nobody() -> None:
    assert read(advertisement(["10.0.0.1"], id="12D3KooWnonsense")) is None
    assert read(advertisement(["10.0.0.1"], protocol="new")) is None


def test_a_name_cannot_write_to_the_terminal() -> None:
    scheduler = read(advertisement(["10.0.0.1"], name="a\x1b[2Jb\n"))
    assert scheduler is not None
    assert scheduler.name == "a[2Jb"


def test_a_forged_record_does_not_push_out_the_right_one() -> None:
    def record(port: int) -> Found:
        return Found(ALICE, "studio", PROTOCOL, (wire.Endpoint(host="10.0.0.1", port=port),))

    both = merged(merged(None, record(3002)), record(666))  # TLS says which is right
    assert [e.port for e in both.endpoints] == [3002, 666]
    assert merged(both, record(666)) == both
    many = both
    for port in range(1, 1000):
        many = merged(many, record(port))
    assert len(many.endpoints) == MOST_PLACES
    assert many.endpoints[0].port == 3002
