"""The cluster with nodes that are only told of: hellos and reports in, orders out."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from parallax.fabric.errors import (
    BadSetting,
    CutRefused,
    ModelBroken,
    ModelNotFound,
    ModelTooBig,
    NoRing,
    OutOfMemory,
    to_fault,
)
from parallax.fabric.models import resolve
from parallax.fabric.settings import SchedulerSettings
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.app import serve_scheduler
from parallax.scheduler.cluster import ClusterService
from parallax.scheduler.generation import Generation, Sampling
from parallax.scheduler.reconciler import Place, Ring
from parallax.scheduler.stage_costs import LinkFacts
from tests.models import make_model
from tests.scheduler.test_dispatch import Link
from tests.scheduler.told import Node, running, serving, share, until


async def test_reports_of_a_replaced_stream_are_too_late(cluster: ClusterService) -> None:
    old = Node(cluster, "a").attend()
    Node(cluster, "b").attend()
    old.orders("load")
    new = Node(cluster, "a", incarnation=2).attend()
    assert len(new.orders("load")) == 1
    old.load_all()
    old.report(goodbye=wire.Goodbye(reason="stopped"))
    cluster.node_lost("a", old.link, "its stream ended")
    assert cluster.state_of(cluster.members.members()[0]) == "ready"
    place = cluster.reconciler.place_of("a")
    assert place is not None
    assert cluster.reconciler.report_of(cluster.reconciler.rings[0], place) is None


async def test_what_a_node_holds_is_known_before_it_is_planned_with(
    cluster: ClusterService,
) -> None:
    assert cluster.chosen is not None
    source = cluster.chosen.source
    nodes = []
    for name, first in (("a", 0), ("b", 2)):
        stage = wire.StageRange(model=source, first=first, end=first + 2)
        spare = wire.StageRange(model=source, first=first, end=first + 1)
        held = [wire.StageReady(stage=s, batches=True) for s in (stage, spare)]
        nodes.append(Node(cluster, name).attend(*held))
    for node in nodes:
        await node.join()
    assert [node.orders("load") for node in nodes] == [[], []]
    assert [node.orders("unload")[0].stage.end for node in nodes] == [1, 3]
    again = Node(cluster, "a", incarnation=2)
    again.hello()
    assert again.orders("load") == [], "it has not said what it holds"
    again.report(heartbeat=wire.Heartbeat())
    assert cluster.reconciler.place_of("a") is not None


async def test_a_cut_that_both_nodes_refuse_is_not_held_against_either(
    cluster: ClusterService,
) -> None:
    a, b = Node(cluster, "a").attend(), Node(cluster, "b").attend()
    refused = CutRefused("no", working_cuts="1")
    stages = [(n.orders("load")[0].stage.first, n.orders("load")[0].stage.end) for n in (a, b)]
    assert sorted(stages) == [(0, 2), (2, 4)]
    a.fail(refused)
    b.fail(refused, which=0)
    ring = cluster.reconciler.rings[0]
    assert {(p.first, p.end) for p in ring.places} == {(0, 1), (1, 4)}
    assert cluster.chosen is not None
    assert cluster.chosen.failed == {}
    assert set(ring.nodes) == {"a", "b"}
    a.load_all()
    b.load_all()
    await a.join()
    await b.join()
    assert cluster.status()["status"] == "available"


async def test_a_node_whose_files_are_broken_is_left_out(cluster: ClusterService) -> None:
    a, b = Node(cluster, "a").attend(), Node(cluster, "b").attend()
    b.fail(ModelBroken("cut short"))
    assert [ring.nodes for ring in cluster.reconciler.rings] == [("a",)]
    assert "cut short" in str(cluster.status()["problem"])
    a.load_all()
    await a.join()
    assert cluster.status()["status"] == "available"


async def test_a_node_that_could_not_load_tries_again_after_a_while(
    model: Path, tmp_path: Path
) -> None:
    async with running(tmp_path, reload_s=20.0, silence_s=100.0) as cluster:
        await cluster.choose(str(model), 2, True)
        Node(cluster, "a").attend()
        b = Node(cluster, "b").attend()
        b.fail(ModelBroken("cut short"))
        cluster._tick(time.monotonic() + 5)
        assert cluster.reconciler.busy_nodes() == {"a"}
        assert cluster.status()["problem"] is not None
        cluster._tick(time.monotonic() + 25)
        assert cluster.reconciler.busy_nodes() == {"a", "b"}
        assert cluster.status()["problem"] is None, "nobody knows that it still cannot"
        assert len(b.orders("load")) == 2
        b.fail(ModelTooBig("no room"))
        cluster._tick(time.monotonic() + 50)
        assert len(b.orders("load")) == 2, "memory does not come by waiting"


async def test_that_the_model_does_not_fit_is_no_problem_any_more_once_another_node_is_there(
    model: Path, tmp_path: Path
) -> None:
    async with running(tmp_path, reload_s=20.0, silence_s=100.0) as cluster:
        await cluster.choose(str(model), 2, True)
        _, b = share(cluster, "a"), share(cluster, "b")
        b.fail(ModelBroken("cut short"))
        assert "does not fit" in str(cluster.status()["problem"])
        share(cluster, "c")
        assert cluster.reconciler.busy_nodes() == {"a", "c"}
        assert str(cluster.status()["problem"]).startswith("b could not load")
        cluster._tick(time.monotonic() + 25)
        assert cluster.status()["problem"] is None


async def test_it_is_told_which_node_could_not_load_what_and_why(
    cluster: ClusterService,
) -> None:
    a, b = Node(cluster, "a").attend(), Node(cluster, "b").attend()
    b.fail(ModelBroken("Loading failed", "it broke", "Check the disk"))
    told = "b could not load layers 2 to 3 of tiny: Loading failed. it broke. Check the disk."
    assert cluster.status()["problem"] == told
    a.fail(OutOfMemory("Loading failed", "there was no memory left"))
    problem = str(cluster.status()["problem"])
    assert "does not fit" in problem
    for name, why in (("a", "there was no memory left"), ("b", "it broke")):
        assert f"{name} could not load" in problem
        assert why in problem


async def test_a_ring_that_breaks_is_told_with_the_node_that_broke_it(
    cluster: ClusterService, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, epoch = await serving(cluster)
    fault = to_fault(OutOfMemory("Stage 1 failed", "there was no memory left"))
    b.report(broken=wire.RingBroken(epoch=epoch, fault=fault))
    assert "b: Stage 1 failed. there was no memory left" in caplog.text
    await a.join(2)
    await b.join(2)


async def test_a_ring_that_breaks_after_each_start_does_not_spin(
    cluster: ClusterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallax.scheduler.blame.ENOUGH", 99)  # nobody is put aside for it
    a, b, epoch = await serving(cluster)
    for count in (2, 3):
        a.report(broken=wire.RingBroken(epoch=epoch))
        await a.join(count)
        epoch = await b.join(count)
    began = time.monotonic()
    a.report(broken=wire.RingBroken(epoch=epoch))
    assert cluster.status()["problem"] is not None
    await a.join(4)
    assert time.monotonic() - began > 0.9
    await b.join(4)
    assert cluster.status()["problem"] is not None, "it has to hold first"
    for node in (a, b):
        node.report(heartbeat=wire.Heartbeat())
    cluster._tick(time.monotonic() + 1)
    assert cluster.status()["problem"] is not None
    monkeypatch.setattr("parallax.scheduler.setbacks.STEADY_S", 1.0)
    cluster._tick(time.monotonic() + 1)
    assert cluster.status()["problem"] is None


async def test_a_node_that_hangs_gets_no_work_until_it_goes_on(cluster: ClusterService) -> None:
    _, b, epoch = await serving(cluster)
    health = wire.StageHealth(epoch=epoch, stage=1, decode_frames=5, since_progress_s=31)
    b.report(health=health)
    assert [ring.nodes for ring in cluster.reconciler.rings] == [("a",)]
    assert b.orders("leave")[-1].epoch == epoch
    states = {n["name"]: n["state"] for n in cluster.status()["node_list"]}  # type: ignore[attr-defined]
    assert states == {"a": "ready", "b": "suspect"}
    assert "b hangs" in str(cluster.status()["problem"])
    b.report(heartbeat=wire.Heartbeat(since_progress_s=40))
    assert cluster.reconciler.busy_nodes() == {"a"}
    b.report(heartbeat=wire.Heartbeat())
    assert cluster.reconciler.busy_nodes() == {"a", "b"}


async def test_a_silent_node_is_replaced_while_it_is_suspect_and_planned_with_when_it_speaks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallax.scheduler.dispatch.HeadLink", Link)
    async with running(tmp_path, heartbeat_s=0.2, silence_s=1.0) as cluster:
        await cluster.choose(str(model), 2, True)
        a, b, epoch = await serving(cluster)

        def left() -> bool:
            a.report(heartbeat=wire.Heartbeat())
            return any(leave.epoch == epoch for leave in a.orders("leave"))

        await until(left)
        states = {m.facts.name: m.state.value for m in cluster.members.members()}
        assert states == {"a": "ready", "b": "suspect"}, "it was waited for until it was gone"
        assert cluster.reconciler.busy_nodes() == {"a"}
        b.report(heartbeat=wire.Heartbeat())
        assert cluster.members.members()[1].state.value == "ready"


async def test_loads_of_a_ring_that_is_over_are_not_counted(cluster: ClusterService) -> None:
    _, b, epoch = await serving(cluster)
    b.report(broken=wire.RingBroken(epoch=epoch))
    b.report(health=wire.StageHealth(epoch=epoch, stage=1))
    assert cluster._formation.stage_metrics._last == {}


async def test_a_ring_of_which_a_node_says_nothing_forms_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallax.scheduler.dispatch.HeadLink", Link)
    async with running(tmp_path, form_s=0.1, call_s=0.1) as cluster:
        await cluster.choose(str(model), 1, True)
        a = Node(cluster, "a").attend()
        a.load_all()
        await until(lambda: len(a.orders("form")) >= 2)
        first, second, *_ = a.orders("form")
        assert a.orders("leave")[0].epoch == first.epoch < second.epoch


async def test_a_prompt_of_the_model_before_is_not_given_to_the_new_one(
    cluster: ClusterService,
) -> None:
    await serving(cluster)
    generation = Generation("before", (1,), Sampling(seed=1), 4, frozenset())
    with pytest.raises(NoRing, match="before"):
        await anext(cluster.generate(generation))


async def test_the_newest_choice_wins_over_one_that_takes_long_to_fetch(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = threading.Event()

    def slowly(location: str, *, state_dir: Path) -> Any:
        if location == "slow":
            assert fetched.wait(10)
            location = str(model)
        return resolve(location, state_dir=state_dir)

    monkeypatch.setattr("parallax.scheduler.choosing.resolve", slowly)
    other = make_model(tmp_path / "other", layers=2, hidden=32)
    async with running(tmp_path / "state") as cluster:
        slow = asyncio.create_task(cluster.choose("slow", 1, True))
        await until(lambda: cluster.choosing == "slow")
        async with asyncio.timeout(60):
            await cluster.choose(str(other), 1, True)
            with pytest.raises(ModelNotFound):
                await cluster.choose(str(tmp_path / "nowhere"), 1, True)
        fetched.set()
        await slow
        served = cluster.served()
        assert served is not None
        assert served.name == "other"


async def test_a_model_that_is_chosen_twice_serves_on(cluster: ClusterService, model: Path) -> None:
    _, _, epoch = await serving(cluster)
    await asyncio.gather(*(cluster.choose(str(model), 2, True) for _ in range(2)))
    assert cluster.reconciler.by_epoch(epoch) is not None
    assert cluster.status()["status"] == "available"


async def test_a_model_of_the_last_run_that_is_gone_is_told_in_the_status(tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", layers=2, hidden=32)
    async with running(tmp_path / "state") as cluster:
        await cluster.choose(str(other), 1, True)
    other.rename(tmp_path / "away")
    async with running(tmp_path / "state") as cluster:
        assert "other" in str(cluster.status()["problem"])


async def test_a_scheduler_that_fetches_its_model_at_start_still_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching, never = threading.Event(), threading.Event()

    def fetch(location: str, *, state_dir: Path) -> Any:
        fetching.set()
        never.wait(30)
        raise ModelNotFound("given up")

    monkeypatch.setattr("parallax.scheduler.choosing.resolve", fetch)
    settings = SchedulerSettings(
        state_dir=tmp_path, model="big", port=0, grpc_port=0, loopback_only=True
    )
    stop = asyncio.Event()
    serving = asyncio.create_task(serve_scheduler(settings, on_event=print, stop=stop))
    await until(fetching.is_set)
    stop.set()
    try:
        async with asyncio.timeout(60):
            await serving
        assert not never.is_set(), "it waited for the fetch"
    finally:
        never.set()


async def test_a_better_plan_is_waited_for_and_then_made_beside_the_ring_that_serves(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes that hold the model only together, and a third that takes the half of each."""
    monkeypatch.setattr("parallax.scheduler.dispatch.HeadLink", Link)
    monkeypatch.setattr("parallax.scheduler.observed_speeds.DEFAULT_LINK", LinkFacts(1e-9, 1e15))
    async with running(tmp_path, replan_hold_s=10, replan_pause_s=60) as cluster:
        await cluster.choose(str(model), 1, True)
        assert cluster.chosen is not None
        facts = cluster.chosen.facts
        reserve = 4 * 4096 * facts.kv_bytes_per_token_per_layer
        budget = (facts.weight_bytes + reserve) * 3 // 4
        a, b = (Node(cluster, n, budget_bytes=budget).attend() for n in "ab")
        a.load_all()
        b.load_all()
        await a.join()
        old = await b.join()
        c = Node(cluster, "c", budget_bytes=budget).attend()
        now = time.monotonic()
        cluster._wishes.look(now)
        cluster._wishes.look(now + 9)
        assert c.orders("load") == [], "it has not been better for long enough"
        cluster._wishes.look(now + 10)
        assert len(c.orders("load")) == 1
        assert cluster.status()["status"] == "available"
        assert a.orders("leave") == []
        for node in (a, b, c):
            node.load_all()
        await c.join()
        await a.join(2)
        new = await b.join(2)
        assert [order.epoch for order in a.orders("leave")] == [old]
        assert [ring.epoch for ring in cluster.reconciler.rings] == [new]
        assert len(cluster.reconciler.rings[0].places) == 3
        assert cluster.status()["problem"] is None


async def test_a_ring_with_a_node_that_could_not_load_something_else_stays(
    cluster: ClusterService,
) -> None:
    _, _, epoch = await serving(cluster)
    assert cluster.chosen is not None
    cluster.chosen.failed["b"] = "it could not load other layers"
    cluster._wishes.look(time.monotonic())
    assert cluster.reconciler.by_epoch(epoch) is not None


async def test_what_was_loaded_for_a_move_that_is_given_up_is_let_go(
    cluster: ClusterService,
) -> None:
    a, b, epoch = await serving(cluster)
    assert cluster.chosen is not None
    better = Ring(cluster.chosen.source, (Place("a", 0, 3), Place("b", 3, 4)))
    cluster._do(cluster.reconciler.move(cluster.reconciler.rings, [better]))
    a.load_all()
    b.fail(ModelBroken("a file of layer 3 is broken"))
    assert cluster.reconciler.by_epoch(epoch) is not None
    cluster._wishes.look(time.monotonic())
    assert [unload.stage.end for unload in a.orders("unload")] == [3]


async def test_requests_wait_for_a_ring_that_is_planned_and_not_for_one_that_cannot_be(
    cluster: ClusterService, model: Path
) -> None:
    generation = Generation(model.name, (1,), Sampling(seed=1), 4, frozenset())
    with pytest.raises(NoRing):
        await anext(cluster.generate(generation))
    Node(cluster, "a").attend()
    b = Node(cluster, "b").attend()
    waiting = asyncio.ensure_future(anext(cluster.generate(generation)))
    await until(lambda: cluster.requests.waiting == 1)
    b.fail(ModelTooBig("no room"))
    a = next(m for m in cluster.members.members() if m.facts.node_id == "a")
    assert cluster.state_of(a) == "ready"
    assert not waiting.done(), "another ring is planned"
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_an_asked_for_number_of_stages_is_made_good_when_a_node_comes(
    cluster: ClusterService,
) -> None:
    a, _, _ = await serving(cluster)
    cluster.node_lost("b", Node(cluster, "b").link, "another link's end is no matter")
    b = next(m for m in cluster.members.members() if m.facts.node_id == "b")
    cluster._follow(cluster.members.broken(b.stream, now=time.monotonic()))
    a.load_all()
    await until(lambda: len(a.orders("form")) == 2)
    await a.join(2)
    assert [ring.nodes for ring in cluster.reconciler.rings] == [("a",)]
    back = Node(cluster, "b", incarnation=2).attend()
    rings = [set(ring.nodes) for ring in cluster.reconciler.rings]
    assert rings == [{"a"}, {"a", "b"}]
    assert len(back.orders("load")) == 1
    assert cluster.status()["status"] == "available"


async def test_nodes_are_cut_off_although_the_disk_is_full(
    cluster: ClusterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster._store.run(
        "CREATE TRIGGER full BEFORE INSERT ON node"
        " BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
    )
    cluster.gate._admission.approve("a", 0.0)
    with pytest.raises(BadSetting, match="disk is full"):
        await cluster.gate.write()
    looked = asyncio.Event()

    async def cut_off(now: float) -> None:
        looked.set()

    monkeypatch.setattr(cluster.departures, "cut_off", cut_off)
    await asyncio.wait_for(looked.wait(), 20)


async def test_cuts_that_are_no_numbers_are_no_cuts(cluster: ClusterService) -> None:
    first, second = Node(cluster, "a").attend(), Node(cluster, "b").attend()
    for node in (first, second):
        node.report(heartbeat=wire.Heartbeat())
    await until(lambda: bool(first.orders("load")))
    refusal = CutRefused("No", working_cuts="1, x, 99999999999999, -3")
    first.fail(refusal)
    assert cluster.chosen is not None
    assert cluster.chosen.cuts == {1, 3}
