"""What a scheduler remembers while its disk takes nothing, or is slow; rings and watch go on."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from parallax.fabric.errors import BadSetting
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.aside import NOTE as ASIDE
from parallax.scheduler.cluster import ClusterService
from parallax.scheduler.layouts import WAIT_S
from parallax.scheduler.store import FILE_NAME, Store
from parallax.scheduler.wishes import NOTE
from tests.scheduler.test_dispatch import Link
from tests.scheduler.told import Node, running, serving, share, until


@pytest.fixture(autouse=True)
def heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallax.scheduler.dispatch.HeadLink", Link)


@pytest.fixture
async def cluster(model: Path, tmp_path: Path) -> AsyncIterator[ClusterService]:
    """A cluster that is to serve a model of four layers on two nodes."""
    async with running(tmp_path, heartbeat_s=0.2, silence_s=1.0) as made:
        await made.choose(str(model), 2, True)
        yield made


@contextmanager
def no_notes(state_dir: Path) -> Iterator[None]:
    """Meanwhile the disk takes no notes."""
    db = sqlite3.connect(state_dir / FILE_NAME, isolation_level=None)
    try:
        db.execute(
            "CREATE TRIGGER full BEFORE INSERT ON note"
            " BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
        )
        yield
        db.execute("DROP TRIGGER full")
    finally:
        db.close()


async def test_what_cannot_be_written_down_is_not_done(
    cluster: ClusterService, tmp_path: Path
) -> None:
    a, b, _ = await serving(cluster)
    departures = cluster.departures
    with no_notes(tmp_path):
        for leave in (departures.drain, departures.remove):
            with pytest.raises(BadSetting, match="disk is full"):
                await leave("b", force=True)
            assert departures.state_of("b") is None
    await departures.drain("b", force=True)
    with no_notes(tmp_path), pytest.raises(BadSetting):
        await departures.undrain("b")
    assert departures.state_of("b") == "draining"
    assert a.orders("dismiss") == b.orders("dismiss") == []


async def test_rings_that_a_full_disk_did_not_take_are_written_later(
    cluster: ClusterService, tmp_path: Path
) -> None:
    a, b = Node(cluster, "a").attend(), Node(cluster, "b").attend()
    a.load_all()
    b.load_all()
    await a.join()
    with no_notes(tmp_path):
        await b.join()
        with pytest.raises(BadSetting):
            await cluster._wishes.remember()
    await cluster._wishes.remember()
    told = await cluster._store.note(NOTE)
    assert isinstance(told, list)
    assert [layout[1] for layout in told] == [[["a", 0, 2], ["b", 2, 4]]]


async def test_a_disk_that_takes_long_makes_nobody_blind(
    cluster: ClusterService, tmp_path: Path
) -> None:
    a, _, epoch = await serving(cluster)
    await cluster._wishes.remember()
    db = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    try:
        db.execute("BEGIN EXCLUSIVE")  # every write waits now, for up to 5 s
        began = time.monotonic()
        cluster.totals.requests += 1
        cluster._ledger._due = 0.0

        def left() -> bool:
            a.report(heartbeat=wire.Heartbeat())
            return any(leave.epoch == epoch for leave in a.orders("leave"))

        await until(left)
        assert time.monotonic() - began < 4.0, "a silent node is noticed after a second"
    finally:
        db.close()


async def test_a_defect_beside_the_watch_does_not_end_it(
    cluster: ClusterService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cluster.fence, "tell", broken)
    _, b, _ = await serving(cluster)

    def state() -> str:
        return cluster.members.members()[0].state.value

    def noticed() -> bool:
        b.report(heartbeat=wire.Heartbeat())
        return state() != "ready"

    await until(noticed)
    assert state() == "suspect"


async def test_nodes_of_the_last_run_that_never_come_hold_up_no_better_ring(
    model: Path, tmp_path: Path
) -> None:
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 2, True)
        await serving(cluster)
        await cluster._wishes.remember()
    async with running(tmp_path) as cluster:
        c, d = Node(cluster, "c").attend(), Node(cluster, "d").attend()
        c.load_all()
        d.load_all()
        await c.join()
        await d.join()
        cluster.node_lost("d", d.link, "its stream ended")
        c.load_all()
        await c.join(2)
        Node(cluster, "d", incarnation=2).attend()
        rings = [set(ring.nodes) for ring in cluster.reconciler.rings]
        assert rings == [{"c"}, {"c", "d"}]


async def test_figures_of_a_ring_that_never_forms_are_not_kept(cluster: ClusterService) -> None:
    a, b = Node(cluster, "a").attend(), Node(cluster, "b").attend()
    a.load_all()
    b.load_all()
    await until(lambda: bool(a.orders("form")))
    epoch = a.orders("form")[0].epoch
    a.report(health=wire.StageHealth(epoch=epoch, stage=0, ring_round_trip_s=0.5))
    assert f'ring="{epoch}"' not in cluster._metrics.page().decode()
    a.report(joined=wire.RingJoined(epoch=epoch))
    await b.join()
    a.report(health=wire.StageHealth(epoch=epoch, stage=0, ring_round_trip_s=0.5))
    assert f'ring="{epoch}"' in cluster._metrics.page().decode()


# ------------------------------------------------------------------- who is aside


def states(cluster: ClusterService) -> dict[str, str]:
    listed: Any = cluster.status()["node_list"]
    return {node["name"]: node["state"] for node in listed}


async def worn(cluster: ClusterService, name: str) -> None:
    """A node that attends was lost three times, and is back."""
    losses, now = cluster._formation.losses, time.monotonic()
    for _ in range(3):
        losses.lost(name, 1, "its connection broke", now)
    losses.back(name, 2, now)
    await cluster.aside.remember()


async def test_who_is_aside_is_known_after_a_restart_and_planned_with_if_nothing_fits(
    model: Path, tmp_path: Path
) -> None:
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 2, True)
        for name in "abcd":
            share(cluster, name)
        await worn(cluster, "a")
        cluster._blame.put_aside("b", 1, "Rings with it broke", time.monotonic())
        await cluster.aside.remember()
    async with running(tmp_path) as cluster:
        for name in "abcd":
            share(cluster, name)
        assert states(cluster) == {"a": "aside", "b": "aside", "c": "ready", "d": "ready"}
        (ring,) = cluster.reconciler.rings
        assert set(ring.nodes) == {"c", "d"}
        told: Any = cluster.status()["node_list"]
        assert told[0]["aside"]["why"].startswith("It was lost 3 times")
        assert 0 < told[0]["aside"]["seconds"] <= 30
        assert told[1]["aside"]["why"] == "Rings with it broke"
    async with running(tmp_path) as cluster:
        share(cluster, "a")
        assert states(cluster) == {"a": "aside"}
        share(cluster, "b")
        assert states(cluster) == {"a": "aside", "b": "aside"}, "others may still come"
        cluster._wishes.tick(time.monotonic() + WAIT_S)
        assert states(cluster) == {"a": "ready", "b": "ready"}
        (ring,) = cluster.reconciler.rings
        assert set(ring.nodes) == {"a", "b"}, "survival comes before comfort"


async def test_losses_are_known_after_a_restart(model: Path, tmp_path: Path) -> None:
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 2, True)
        a = share(cluster, "a")
        share(cluster, "b")
        cluster.node_lost("a", a.link, "killed")
        told = cluster._formation.losses.told()
        assert told
        await until(lambda: cluster.aside._written == ([], told))
    async with running(tmp_path) as cluster:
        assert len(cluster._formation.losses.told()) == 1


@pytest.mark.parametrize(
    "note",
    [
        [],
        {"monotonic_s": "x", "wall_s": 1.0, "blame": [], "losses": []},
        {"monotonic_s": 1.0, "wall_s": float("nan"), "blame": [], "losses": []},
        {"monotonic_s": 1.0, "wall_s": 1.0, "blame": 7, "losses": {"a": [[[]]]}},
    ],
)
async def test_a_damaged_note_of_who_was_aside_stops_nobody(
    note: object, model: Path, tmp_path: Path
) -> None:
    async with await Store.open(tmp_path) as store:
        await store.keep(ASIDE, note)
    async with running(tmp_path) as cluster:
        await cluster.choose(str(model), 2, True)
        await serving(cluster)
        await worn(cluster, "a")
        told: Any = await cluster._store.note(ASIDE)
        assert [entry[0] for entry in told["losses"]] == ["a"]


async def test_a_note_that_no_reader_can_read_counts_as_never_written(tmp_path: Path) -> None:
    async with await Store.open(tmp_path) as store:
        for value in ("[" * 100_000, "{", "9" * 10_000, ""):
            await store.run("INSERT OR REPLACE INTO note (name, value) VALUES ('x', ?)", (value,))
            assert await store.note("x") is None
