"""Drains, removals, other numbers of stages and restarts, with nodes that are only told of."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from parallax.fabric.errors import BadSetting, ModelTooBig, UnknownNode
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.cluster import ClusterService
from parallax.scheduler.generation import Generation, Sampling
from parallax.scheduler.layouts import WAIT_S
from parallax.scheduler.leaving import REMOVE_S
from parallax.scheduler.store import FILE_NAME
from tests.scheduler.test_dispatch import Link
from tests.scheduler.told import Node, running, serving, until


@pytest.fixture(autouse=True)
def heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallax.scheduler.dispatch.HeadLink", Link)


@pytest.fixture
async def cluster(model: Path, tmp_path: Path) -> AsyncIterator[ClusterService]:
    """A cluster that is to serve a model of four layers on two nodes."""
    async with running(tmp_path) as made:
        await made.choose(str(model), 2, True)
        yield made


def states(cluster: ClusterService) -> dict[str, str]:
    return {m.facts.node_id: cluster.state_of(m) for m in cluster.members.members()}


def held(node: Node, first: int, end: int) -> wire.StageReady:
    assert node.cluster.chosen is not None
    stage = wire.StageRange(model=node.cluster.chosen.source, first=first, end=end)
    return wire.StageReady(stage=stage, weight_bytes=1000, batches=True)


async def test_a_drained_node_serves_until_the_others_have_its_layers(
    cluster: ClusterService,
) -> None:
    a, b, epoch = await serving(cluster)
    assert await cluster.departures.drain("b") == "b"
    assert states(cluster) == {"a": "ready", "b": "draining"}
    assert cluster.status()["status"] == "available"
    a.load_all()
    new = await a.join(2)
    assert [order.epoch for order in b.orders("leave")] == [epoch]
    assert [order.stage.end for order in b.orders("unload")] == [
        ready.stage.end for ready in b.orders("load")
    ]
    assert states(cluster) == {"a": "ready", "b": "drained"}
    assert [ring.epoch for ring in cluster.reconciler.rings] == [new]
    cluster._wishes.tick(time.monotonic() + 60)
    assert len(b.orders("load")) == 1, "it is planned with no more"
    await cluster.departures.undrain("b")
    assert states(cluster)["b"] == "ready"
    assert len(b.orders("load")) == 2


async def test_a_request_on_a_drained_ring_goes_on_where_it_was(
    cluster: ClusterService, model: Path
) -> None:
    a, _, epoch = await serving(cluster)
    generation = Generation(model.name, (1, 2), Sampling(seed=1), 4, frozenset())
    stream = cluster.generate(generation)
    first = asyncio.ensure_future(anext(stream))
    await until(lambda: cluster.requests.running == 1)
    token = wire.TokenEvent(request=1, attempt=1, index=0, token=7)
    cluster.requests.head_report(wire.HeadReport(epoch=epoch, tokens=[token]))
    await first
    await cluster.departures.drain("b")
    a.load_all()
    new = await a.join(2)
    link = next(link for link in reversed(Link.made) if link.epoch == new)
    (submit,) = link.submitted
    assert (submit.attempt, list(submit.generated)) == (2, [7])
    await stream.aclose()


async def test_the_last_node_is_drained_by_force_alone_and_the_status_says_what_is_missing(
    cluster: ClusterService,
) -> None:
    a, _, _ = await serving(cluster)
    await cluster.departures.drain("b")
    a.load_all()
    await a.join(2)
    with pytest.raises(ModelTooBig, match=r"Without a .* bytes are missing.*--force") as caught:
        await cluster.departures.drain("a")
    assert int(caught.value.fields["missing_bytes"]) > 0
    assert states(cluster)["a"] == "ready"
    assert cluster.status()["missing_bytes"] is None
    await cluster.departures.drain("a", force=True)
    assert cluster.reconciler.rings == []
    assert states(cluster)["a"] == "drained"
    assert len(a.orders("unload")) == 2
    missing = cluster.status()["missing_bytes"]
    assert isinstance(missing, int)
    assert missing > 0
    await cluster.departures.undrain("a")
    assert cluster.reconciler.busy_nodes() == {"a"}
    assert cluster.status()["missing_bytes"] is None


async def test_where_another_ring_serves_a_drained_one_just_ends(
    model: Path, tmp_path: Path
) -> None:
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 1, True)
        nodes = [Node(cluster, n).attend() for n in "ab"]
        for node in nodes:
            node.load_all()
            await node.join()
        assert len(cluster.reconciler.rings) == 2
        await cluster.departures.drain("a")
        assert [ring.nodes for ring in cluster.reconciler.rings] == [("b",)]
        assert states(cluster) == {"a": "drained", "b": "ready"}


async def test_two_short_rings_that_a_drain_leaves_become_one_of_the_length_asked_for(
    cluster: ClusterService,
) -> None:
    a, _, _ = await serving(cluster)
    c = Node(cluster, "c").attend()
    c.load_all()
    await c.join()
    await cluster.departures.drain("b")
    a.load_all()
    await a.join(2)
    assert sorted(ring.nodes for ring in cluster.reconciler.rings) == [("a",), ("c",)]
    cluster._wishes.look(time.monotonic())
    a.load_all()
    c.load_all()
    await a.join(3)
    await c.join(2)
    assert [set(ring.nodes) for ring in cluster.reconciler.rings] == [{"a", "c"}]


async def test_a_drain_asked_for_while_rings_move_comes_after_the_move(
    cluster: ClusterService,
) -> None:
    a, b, _ = await serving(cluster)
    c = Node(cluster, "c").attend()
    await cluster.departures.drain("a")
    assert cluster.reconciler.moving
    await cluster.departures.drain("b")
    assert states(cluster)["b"] == "draining"
    for node in (b, c):
        node.load_all()
    await b.join(2)
    await c.join(1)
    assert not cluster.reconciler.moving
    cluster._tick(time.monotonic())
    assert [ring.nodes for ring in cluster.reconciler.rings] == [("c",)]
    assert states(cluster) == {"a": "drained", "b": "drained", "c": "ready"}
    assert a.orders("unload")
    assert b.orders("unload")


async def test_a_removed_node_is_refused_from_then_on_over_restarts(
    model: Path, tmp_path: Path
) -> None:
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 2, True)
        a, b, _ = await serving(cluster)
        with pytest.raises(UnknownNode):
            await cluster.departures.remove("x")
        await cluster.departures.remove("b")
        assert b.orders("dismiss") == [], "its layers are still needed"
        a.load_all()
        await a.join(2)
        await cluster.departures.cut_off(time.monotonic())
        assert b.orders("dismiss")[0].fault.kind == "Dismissed"
        assert states(cluster) == {"a": "ready", "b": "gone"}
        with pytest.raises(Exception, match="removed"):
            Node(cluster, "b", incarnation=2).hello()
    async with running(tmp_path) as cluster:
        with pytest.raises(Exception, match="removed"):
            Node(cluster, "b", incarnation=3).hello()


def absent(cluster: ClusterService) -> list[str]:
    told = cluster.status()["absent_nodes"]
    assert isinstance(told, list)
    return [node["node_id"] for node in told]


async def test_a_member_that_is_not_here_is_removed_all_the_same(
    cluster: ClusterService,
) -> None:
    await cluster.gate.ask("stolen", "laptop", "", local=True, address="127.0.0.1")
    await cluster.gate.ask("lost", "laptop2", "", local=True, address="127.0.0.1")
    assert absent(cluster) == ["lost", "stolen"], "or nobody would know what to remove"
    Node(cluster, "lost").attend()
    assert absent(cluster) == ["stolen"]
    await cluster.departures.remove("laptop")
    assert absent(cluster) == []
    assert cluster.gate.removed("stolen")
    assert not cluster.gate.allowed("stolen")
    with pytest.raises(UnknownNode):
        await cluster.departures.remove("laptop")


async def test_a_node_that_is_removed_at_once_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallax.scheduler.store._BUSY_S", 0.05)
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 2, True)
        a, b, epoch = await serving(cluster)
        with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(BadSetting, match=r"b is refused from now on, but"):
                await cluster.departures.remove("b", at_once=True)
            assert b.orders("dismiss")
            assert not cluster.gate.allowed("b")
            assert cluster.reconciler.by_epoch(epoch) is None, "it sees the answers of its ring"
            assert a.orders("leave")
            other.execute("ROLLBACK")
        await cluster.departures.cut_off(time.monotonic())  # which the clock does
        assert cluster.departures.state_of("b") is None
    async with running(tmp_path) as cluster:
        assert cluster.gate.removed("b")


async def test_a_removal_does_not_wait_for_ever(cluster: ClusterService) -> None:
    a, b, epoch = await serving(cluster)
    await cluster.departures.remove("b")
    await cluster.departures.cut_off(time.monotonic() + REMOVE_S - 1)
    assert cluster.reconciler.by_epoch(epoch) is not None
    await cluster.departures.cut_off(time.monotonic() + REMOVE_S)
    assert cluster.reconciler.by_epoch(epoch) is None
    assert b.orders("dismiss")
    a.load_all()
    await a.join(2)
    assert cluster.status()["status"] == "available"


async def test_a_drained_node_is_drained_after_a_restart(model: Path, tmp_path: Path) -> None:
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 1, True)
        Node(cluster, "a").attend()
        await cluster.departures.drain("a", force=True)
    async with running(tmp_path) as cluster:
        a = Node(cluster, "a").attend()
        assert states(cluster) == {"a": "drained"}
        assert a.orders("load") == []


async def test_another_number_of_stages_moves_the_rings_and_drains_nothing(
    cluster: ClusterService, model: Path
) -> None:
    a, b, epoch = await serving(cluster)
    await cluster.choose(str(model), 1, True)
    assert cluster.reconciler.by_epoch(epoch) is not None, "it serves until the new ones do"
    assert cluster.status()["status"] == "available"
    for node in (a, b):
        node.load_all()
        await node.join(2)
    assert sorted(ring.nodes for ring in cluster.reconciler.rings) == [("a",), ("b",)]
    assert [order.epoch for order in a.orders("leave")] == [epoch]
    await cluster.choose(str(model), 2, True)
    a.load_all()
    b.load_all()
    await a.join(3)
    await b.join(3)
    assert [len(ring.places) for ring in cluster.reconciler.rings] == [2]


async def test_more_stages_than_nodes_leave_the_ring_as_it_is_until_one_comes(
    cluster: ClusterService, model: Path
) -> None:
    _, _, epoch = await serving(cluster)
    await cluster.choose(str(model), 3, True)
    assert [ring.epoch for ring in cluster.reconciler.rings] == [epoch]
    Node(cluster, "c").attend()
    assert [len(ring.places) for ring in cluster.reconciler.rings] == [2, 3]


async def settle(cluster: ClusterService, *nodes: Node) -> int:
    for node in nodes:
        await node.join()
    await cluster._wishes.remember()
    return cluster.reconciler.rings[0].epoch


async def test_after_a_restart_the_rings_that_served_are_taken_up_as_they_were(
    model: Path, tmp_path: Path
) -> None:
    """Their cut is none that a plan made anew would choose."""
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 2, True)
        assert cluster.chosen is not None
        cluster.chosen.cuts = frozenset({1})
        nodes = [Node(cluster, name).attend() for name in "ab"]
        for node in nodes:
            node.load_all()
        epoch = await settle(cluster, *nodes)
        places = cluster.reconciler.rings[0].places
        assert {(p.first, p.end) for p in places} == {(0, 1), (1, 4)}
    async with running(tmp_path) as cluster:
        again = [Node(cluster, p.node_id) for p in places]
        for node, place in zip(again, places, strict=True):
            node.attend(held(node, place.first, place.end))
        assert await settle(cluster, *again) > epoch
        assert cluster.reconciler.rings[0].places == places
        assert [node.orders("load") for node in again] == [[], []]


async def test_after_a_restart_a_node_that_does_not_come_back_is_waited_for_only_a_while(
    model: Path, tmp_path: Path
) -> None:
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 2, True)
        a, b, _ = await serving(cluster)
        await cluster._wishes.remember()
    async with running(tmp_path) as cluster:
        a = Node(cluster, "a").attend()
        cluster._wishes.tick(time.monotonic() + WAIT_S - 1)
        assert a.orders("load") == []
        cluster._wishes.tick(time.monotonic() + WAIT_S)
        assert [(o.stage.first, o.stage.end) for o in a.orders("load")] == [(0, 4)]
        assert b.orders("load")


async def test_after_a_restart_a_ring_with_a_drained_node_is_not_waited_for(
    model: Path, tmp_path: Path
) -> None:
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 2, True)
        await serving(cluster)
        await cluster._wishes.remember()
        await cluster.departures.drain("b", force=True)
    async with running(tmp_path) as cluster:
        Node(cluster, "b").attend()
        Node(cluster, "a").attend()
        c = Node(cluster, "c").attend()
        assert c.orders("load"), "two nodes are there that may be planned with"


async def test_totals_go_on_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as cluster:
        cluster._metrics.accepted(5)
        cluster._metrics.ended("stop", 7, 0.1)
    async with running(tmp_path) as cluster:
        cluster._metrics.accepted(1)
        totals = {"requests": 2, "prompt_tokens": 6, "completion_tokens": 7}
        assert cluster.status()["totals"] == totals
    async with running(tmp_path) as cluster:
        assert cluster.status()["totals"] == totals
        cluster.totals.recall({"requests": "x", "prompt_tokens": -1, "more": 3})
        assert cluster.totals.told() == totals


async def test_a_node_that_comes_back_takes_its_old_place(model: Path, tmp_path: Path) -> None:
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 2, True)
        assert cluster.chosen is not None
        cluster.chosen.cuts = frozenset({1})
        a, b = (Node(cluster, name).attend() for name in "ab")
        for node in (a, b):
            node.load_all()
        await settle(cluster, a, b)
        old = cluster.reconciler.rings[0].places
        cluster.chosen.cuts = None  # a plan made anew would cut in the middle
        cluster.node_lost("b", b.link, "gone")
        assert [ring.nodes for ring in cluster.reconciler.rings] == [("a",)]
        a.load_all()
        await a.join(2)
        Node(cluster, "b", incarnation=2).attend()
        assert cluster.reconciler.rings[-1].places == old


async def test_when_every_node_is_gone_the_status_says_what_is_missing(
    cluster: ClusterService,
) -> None:
    a, b, _ = await serving(cluster)
    for node in (a, b):
        cluster.node_lost(node.id, node.link, "gone")
    assert cluster.chosen is not None
    missing = cluster.status()["missing_bytes"]
    assert isinstance(missing, int)
    assert missing >= cluster.chosen.facts.weight_bytes


async def test_http_takes_what_the_roomiest_ring_holds(model: Path, tmp_path: Path) -> None:
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 1, True)
        large, small = Node(cluster, "a"), Node(cluster, "b", budget_bytes=1 << 26)
        cost = wire.CacheCost(bytes_per_token=1 << 18)
        for node in (large, small):
            node.attend()
            await until(lambda node=node: bool(node.orders("load")))  # type: ignore[misc]
            (stage,) = (order.stage for order in node.orders("load"))
            node.report(
                ready=wire.StageReady(stage=stage, weight_bytes=1000, batches=True, cache=cost)
            )
            await node.join()
        contexts = [ring.context_tokens for ring in cluster.reconciler.rings]
        assert cluster.chosen is not None
        assert len(contexts) == 2
        assert min(contexts) < max(contexts) / 8
        assert cluster.chosen.served.context_tokens == max(contexts)
        serving_rings = cluster.requests._router._rings.values()
        assert [ring.chunk_tokens for ring in serving_rings] == [Limits().chunk_tokens] * 2
        cluster.node_lost("a", large.link, "gone")
        assert cluster.chosen.served.context_tokens == min(contexts), "it went with its node"
