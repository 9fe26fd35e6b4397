"""Nodes that are put aside and spares that take their place, with nodes that are only told of."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from parallax.fabric.errors import InternalError, LinkBroken, ParallaxError, to_fault
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.cluster import ClusterService
from parallax.scheduler.losses import WINDOW_S
from tests.scheduler.test_dispatch import Link
from tests.scheduler.told import Node, running, share, until


@pytest.fixture
async def cluster(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ClusterService]:
    """A cluster that is to serve a model which two nodes hold, and no single one does."""
    monkeypatch.setattr("parallax.scheduler.dispatch.HeadLink", Link)
    async with running(tmp_path, silence_s=1000) as made:
        await made.choose(str(model), 2, True)
        yield made


class Room:
    """Told nodes by name."""

    def __init__(self, cluster: ClusterService, names: str) -> None:
        self.cluster = cluster
        self.nodes = {name: share(cluster, name) for name in names}

    @property
    def ring(self) -> tuple[str, ...]:
        (ring,) = self.cluster.reconciler.rings
        return ring.nodes

    async def serve(self) -> int:
        """The ring's nodes load and join it; its epoch."""
        for name in self.ring:
            self.nodes[name].load_all()
        return await self.join()

    async def join(self) -> int:
        (ring,) = self.cluster.reconciler.rings
        await until(lambda: ring.state.value == "forming")
        for name in ring.nodes:
            self.nodes[name].report(joined=wire.RingJoined(epoch=ring.epoch))
        assert ring.state.value == "ready"
        return ring.epoch

    def breaks(self, reporter: str, error: ParallaxError, epoch: int) -> None:
        broken = wire.RingBroken(epoch=epoch, fault=to_fault(error))
        self.nodes[reporter].report(broken=broken)

    def speak(self, names: str) -> None:
        """These have something to say after what happened, and the scheduler judges."""
        for name in names:
            self.nodes[name].report(heartbeat=wire.Heartbeat())
        self.cluster._tick(time.monotonic())

    async def break_twice(self, reporter: str, error: ParallaxError) -> None:
        for _ in range(2):
            (ring,) = self.cluster.reconciler.rings
            self.breaks(reporter, error, ring.epoch)
            await self.join()

    def node(self, name: str) -> dict[str, Any]:
        nodes: Any = self.cluster.status()["node_list"]
        return next(node for node in nodes if node["name"] == name)


def link(peer: str) -> LinkBroken:
    return LinkBroken("The stream broke", peer=peer)


async def test_a_node_whose_frames_fail_is_put_aside_and_a_spare_takes_its_layers(
    cluster: ClusterService,
) -> None:
    room = Room(cluster, "abc")
    await room.serve()
    assert room.ring == ("a", "b")
    await room.break_twice("b", InternalError("Stage 1 failed"))
    room.speak("ac")
    assert room.ring == ("a", "b"), "b has not spoken yet: it may have been killed"
    room.speak("b")
    assert set(room.ring) == {"a", "c"}
    assert room.node("b")["state"] == "aside"
    why = "Rings with it broke 2 times in a row; b: Stage 1 failed"
    told = room.node("b")["aside"]
    assert told["why"] == why
    assert 30 < told["seconds"] <= 60
    assert room.node("a")["aside"] is None
    assert "b is put aside for 60 s" in str(cluster.status()["problem"])
    assert why in str(cluster.status()["problem"])
    assert b'parallax_nodes_put_aside_total{node="b"} 1.0' in cluster._metrics.page()
    await room.serve()
    cluster._wishes.look(time.monotonic() + 30)
    assert set(room.ring) == {"a", "c"}, "nothing better is made of b"
    assert len(room.nodes["b"].orders("unload")) == 1
    cluster._tick(time.monotonic() + 61)
    assert room.node("b")["state"] == "ready"
    assert set(room.ring) == {"a", "c"}, "a spare again"
    assert cluster.status()["problem"] is None


async def test_of_two_that_do_not_reach_each_other_one_is_put_aside(
    cluster: ClusterService,
) -> None:
    room = Room(cluster, "abc")
    await room.serve()
    await room.break_twice("a", link("b"))
    room.speak("abc")
    assert set(room.ring) == {"a", "c"}
    assert room.node("b")["state"] == "aside"


async def test_without_a_spare_the_same_nodes_try_again(
    cluster: ClusterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallax.scheduler.setbacks.FIRST_PAUSE_S", 0.01)
    room = Room(cluster, "ab")
    await room.serve()
    for _ in range(2):
        await room.break_twice("a", link("b"))
        room.speak("ab")
        assert room.ring == ("a", "b")
    assert [room.node(name)["state"] for name in "ab"] == ["ready", "ready"]
    assert b"nodes_put_aside_total{" not in cluster._metrics.page()
    room.nodes["c"] = share(cluster, "c")
    await room.break_twice("a", link("b"))
    room.speak("abc")
    assert set(room.ring) == {"a", "c"}, "now there is one"


async def test_who_is_aside_is_planned_with_when_nothing_else_fits(
    cluster: ClusterService,
) -> None:
    room = Room(cluster, "abc")
    await room.serve()
    await room.break_twice("a", link("b"))
    room.speak("abc")
    await room.serve()
    cluster.node_lost("c", room.nodes["c"].link, "killed")
    assert set(room.ring) == {"a", "b"}
    assert room.node("b")["state"] == "ready"


async def test_kills_are_nobodys_fault(cluster: ClusterService) -> None:
    """Each time the survivor says twice that it has lost its neighbour, before it is seen gone."""
    gone = set()
    room = Room(cluster, "abc")
    for spare in "defg":
        await room.serve()
        victim = room.ring[1]
        await room.break_twice("a", link(victim))
        room.speak("a")
        cluster.node_lost(victim, room.nodes[victim].link, "killed")
        gone.add(victim)
        room.nodes[spare] = share(cluster, spare)
        room.speak("a" + spare)
        assert "a" in room.ring
        assert room.node("a")["state"] == "ready"
        assert victim not in room.ring
    assert b"nodes_put_aside_total{" not in cluster._metrics.page()
    await room.serve()
    last = room.ring[1]
    await room.break_twice("a", link(last))
    room.speak("".join(n for n in room.nodes if n not in gone))
    assert room.node(last)["state"] == "aside", "kills of before were held against a"


async def test_why_a_heads_stream_ended_is_heard_of_the_head(cluster: ClusterService) -> None:
    room = Room(cluster, "abc")
    for _ in range(2):
        await room.serve()
        (ring,) = cluster.reconciler.rings
        epoch = ring.epoch
        cluster._formation.broke(epoch, LinkBroken("The head ended it", peer="a"))
        room.breaks("a", link("b"), epoch)
    room.speak("abc")
    assert room.node("b")["state"] == "aside"
    assert room.node("b")["aside"]["why"].endswith("a: The stream broke")


async def test_breaks_with_steady_service_in_between_are_nobodys_fault(
    cluster: ClusterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallax.scheduler.setbacks.STEADY_S", 0.0)
    room = Room(cluster, "abc")
    epoch = await room.serve()
    for _ in range(3):
        room.speak("abc")
        room.breaks("a", link("b"), epoch)
        epoch = await room.join()
    room.speak("abc")
    assert room.ring == ("a", "b")


async def test_a_starved_node_is_not_put_aside(cluster: ClusterService) -> None:
    room = Room(cluster, "abc")
    await room.serve()
    await room.break_twice("a", link("b"))
    room.nodes["b"].report(heartbeat=wire.Heartbeat(starved=True))
    room.speak("abc")
    assert room.ring == ("a", "b")


async def test_a_new_process_of_a_node_is_planned_with_at_once(cluster: ClusterService) -> None:
    room = Room(cluster, "abc")
    await room.serve()
    await room.break_twice("b", InternalError("Stage 1 failed"))
    room.speak("abc")
    room.nodes["b"] = share(cluster, "b")
    assert room.node("b")["state"] == "aside", "the same one, over a new connection"
    room.nodes["b"] = share(cluster, "b", incarnation=2)
    assert room.node("b")["state"] == "ready"


async def test_people_may_take_a_node_back_before_its_time(cluster: ClusterService) -> None:
    room = Room(cluster, "abc")
    await room.serve()
    await room.break_twice("b", InternalError("Stage 1 failed"))
    room.speak("abc")
    await cluster.departures.undrain("b")
    assert room.node("b")["state"] == "ready"
    await cluster.departures.drain("c")
    assert set(room.ring) == {"a", "b"}


async def test_a_drain_whose_new_ring_breaks_costs_the_ring_that_serves_nothing(
    cluster: ClusterService,
) -> None:
    room = Room(cluster, "abc")
    old = await room.serve()
    await cluster.departures.drain("b")
    (new,) = (ring for ring in cluster.reconciler.rings if ring.epoch != old)
    assert set(new.nodes) == {"a", "c"}
    for _ in range(2):
        for name in new.nodes:
            room.nodes[name].load_all()
        await until(lambda: new.state.value == "forming")
        room.breaks("c", link("a"), new.epoch)
    room.speak("abc")
    assert room.node("c")["state"] == "aside", "with a the ring that serves would be lost"
    assert [ring.epoch for ring in cluster.reconciler.rings] == [old]
    assert room.node("b")["state"] == "draining"
    room.nodes["d"] = share(cluster, "d")
    room.speak("abcd")
    assert cluster.reconciler.by_epoch(old) is not None
    assert [set(ring.nodes) for ring in cluster.reconciler.rings] == [{"a", "b"}, {"a", "d"}]


# ---------------------------------------------------- nodes that are lost again and again


async def lose(room: Room, name: str, incarnation: int, *, spares: bool = False) -> None:
    """A node dies, and another process of it attends; with spares, others serve meanwhile."""
    room.cluster.node_lost(name, room.nodes[name].link, "killed")
    if spares:
        await room.serve()
    room.nodes[name] = share(room.cluster, name, incarnation)
    if not spares:
        await room.serve()


async def worn(cluster: ClusterService) -> Room:
    """A node died three times; since before the third there is a spare, which serves now."""
    room = Room(cluster, "ab")
    await room.serve()
    await lose(room, "a", 2)
    await lose(room, "a", 3)
    room.nodes["c"] = share(cluster, "c")
    assert set(room.ring) == {"a", "b"}
    await lose(room, "a", 4, spares=True)
    assert set(room.ring) == {"b", "c"}
    return room


async def test_a_node_that_dies_again_and_again_has_no_layers_for_a_while(
    cluster: ClusterService,
) -> None:
    room = await worn(cluster)
    assert room.node("a")["state"] == "aside"
    why = "It was lost 3 times within 10 minutes while it had layers; "
    why += "the last time its connection broke"
    told = room.node("a")["aside"]
    assert told["why"] == why
    assert 0 < told["seconds"] <= 30
    assert b'parallax_nodes_put_aside_total{node="a"} 1.0' in cluster._metrics.page()
    assert cluster.status()["problem"] is None, "all is served"
    cluster._tick(time.monotonic() + 5)
    assert room.nodes["a"].orders("prepare") == []
    cluster.node_lost("a", room.nodes["a"].link, "killed")
    room.nodes["a"] = share(cluster, "a", 5)
    assert 0 < room.node("a")["aside"]["seconds"] <= 30, "without layers nobody minds"
    cluster._tick(time.monotonic() + 31)
    assert room.node("a")["state"] == "ready"
    assert set(room.ring) == {"b", "c"}, "a spare again"


async def test_who_dies_again_and_again_serves_while_the_model_does_not_fit_without(
    cluster: ClusterService,
) -> None:
    room = await worn(cluster)
    cluster.node_lost("c", room.nodes["c"].link, "killed")
    assert set(room.ring) == {"a", "b"}
    assert room.node("a")["state"] == "ready"
    await room.serve()
    for incarnation in (5, 6, 7):
        await lose(room, "a", incarnation)
        assert set(room.ring) == {"a", "b"}
    assert room.node("a")["aside"] is None


async def test_people_may_say_that_a_node_is_mended(cluster: ClusterService) -> None:
    room = await worn(cluster)
    await cluster.departures.undrain("a")
    assert room.node("a")["state"] == "ready"
    await cluster.departures.drain("b")
    for name in "ac":
        room.nodes[name].load_all()
    assert {node for ring in cluster.reconciler.rings for node in ring.nodes} == {"a", "b", "c"}
    assert cluster._formation.losses.told() == []


@pytest.mark.parametrize(("deaths", "others"), [(1, set("abce")), (2, set("bcef"))])
async def test_a_spare_is_preferred_before_a_node_that_died_twice_is_put_aside(
    deaths: int, others: set[str], cluster: ClusterService
) -> None:
    room = Room(cluster, "")
    small = partial(share, cluster, part=0.4)  # four of them hold the model
    room.nodes = {name: small(name) for name in "abcd"}
    await room.serve()
    for death in range(deaths):
        cluster.node_lost("a", room.nodes["a"].link, "killed")
        room.nodes["a"] = small("a", death + 2)
        await room.serve()
        assert set(room.ring) == set("abcd")
    room.nodes |= {name: small(name) for name in "ef"}
    room.nodes["d"].report(goodbye=wire.Goodbye(reason="stopped"))
    assert set(room.ring) == others
    room.nodes["f"].report(goodbye=wire.Goodbye(reason="stopped"))
    assert set(room.ring) == set("abce"), "there is nobody else"
    assert room.node("a")["state"] == "ready"


async def test_nothing_moves_to_a_node_that_died_twice_lately(cluster: ClusterService) -> None:
    """Not even to come nearer to the number of stages that was asked for."""
    room = Room(cluster, "")
    rings = cluster.reconciler.rings
    room.nodes = {name: Node(cluster, name).attend() for name in "ab"}

    async def settle() -> None:
        async with asyncio.timeout(30):
            while cluster.reconciler.moving or any(r.state.value != "ready" for r in rings):
                for node in room.nodes.values():
                    node.load_all()
                for ring in rings:
                    for name in ring.nodes:
                        room.nodes[name].report(joined=wire.RingJoined(epoch=ring.epoch))
                await asyncio.sleep(0.002)

    await settle()
    for incarnation in (2, 3):
        assert room.ring == ("a", "b")
        cluster.node_lost("a", room.nodes["a"].link, "killed")
        await settle()
        assert room.ring == ("b",)
        room.nodes["a"] = Node(cluster, "a", incarnation).attend()
        cluster._wishes.look(time.monotonic())
        await settle()
    assert [ring.nodes for ring in rings] == [("b",), ("a",)], "its fall would be its own"
    cluster._tick(time.monotonic() + WINDOW_S + 1)
    await settle()
    assert room.ring == ("a", "b"), "that was long ago"


async def test_a_farewell_is_no_loss_unless_something_broke(cluster: ClusterService) -> None:
    room = Room(cluster, "ab")
    await room.serve()
    for incarnation in (2, 3, 4):
        room.nodes["a"].report(goodbye=wire.Goodbye(reason="stopped"))
        room.nodes["a"] = share(cluster, "a", incarnation)
        await room.serve()
    assert cluster._formation.losses.told() == []
    room.nodes["a"].report(goodbye=wire.Goodbye(reason="its compute thread died", failed=True))
    assert [entry[0] for entry in cluster._formation.losses.told()] == ["a"]  # type: ignore[index]


async def test_silence_counts_once_and_spares_do_not(cluster: ClusterService) -> None:
    room = Room(cluster, "abc")
    await room.serve()
    for name in "ac":
        member = cluster.members.get(name)
        assert member is not None
        late = replace(member, heard_s=member.heard_s - 1500)
        cluster.members._members[name] = late
    cluster._tick(time.monotonic())
    assert [room.node(name)["state"] for name in "abc"] == ["suspect", "ready", "suspect"]
    for name in "ac":
        cluster.node_lost(name, room.nodes[name].link, "its stream ended")
    told: Any = cluster._formation.losses.told()
    assert [(entry[0], len(entry[1])) for entry in told] == [("a", 1)]
    assert re.fullmatch(r"it was silent for 15\d\d s", told[0][3])
