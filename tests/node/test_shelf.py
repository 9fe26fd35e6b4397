"""The shelf: ranges that change read only the difference, and no frame waits for a whole load."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from parallax.fabric.models import resolve
from parallax.node import twin
from parallax.node.compute import Compute
from parallax.node.shelf import Shelf, key_of
from parallax.node.stage import Stage
from parallax.proto import wire_pb2 as wire
from tests.models import make_model
from tests.node.rings import TEXTS, Whole

LAYERS = 6


class Holder:
    """A shelf on a thread of its own, and what it told."""

    def __init__(self, folder: Path, state_dir: Path, budget_bytes: int = 0) -> None:
        self.told: list[wire.NodeReport] = []
        self.compute = Compute(asyncio.get_running_loop())
        self.shelf = Shelf(self.compute, state_dir, budget_bytes, self.told.append)
        self._model = wire.ModelSource(
            name="m",
            location=str(folder),
            digest=resolve(str(folder), state_dir=state_dir).digest,
        )

    def range(self, first: int, end: int) -> wire.StageRange:
        return wire.StageRange(model=self._model, first=first, end=end)

    async def load(self, first: int, end: int, *instead_of: tuple[int, int]) -> Stage:
        await self.shelf.load(self.range(first, end), [self.range(*old) for old in instead_of])
        stage = self.shelf.get(self.range(first, end))
        assert stage is not None, self.told[-1]
        return stage

    async def active_bytes(self) -> int:
        def look() -> int:
            gc.collect()  # self-checks leave cycles behind
            mx.clear_cache()
            return mx.get_active_memory()

        return await self.compute.call(look)

    def read_bytes(self) -> int:
        """What the last load had to read."""
        marks = [(r.progress.done_bytes, r.progress.total_bytes) for r in self.told
                 if r.HasField("progress") and r.progress.phase == "reading"]  # fmt: skip
        return max(total for _, total in marks) - min(done for done, _ in marks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "m", layers=LAYERS, hidden=128)


Make = Callable[..., Holder]


@pytest.fixture
async def make(folder: Path, verdicts: Path) -> AsyncIterator[Make]:
    made: list[Holder] = []

    def maker(**options: Any) -> Holder:
        made.append(Holder(folder, verdicts.parent, **options))
        return made[-1]

    yield maker
    for holder in made:
        for held in holder.shelf.held():
            await holder.shelf.unload(held.ready.stage)
        holder.compute.stop(30)


def logits_of(stages: list[Stage]) -> mx.array:
    carry: Any = None
    for stage in stages:
        carry = stage.forward(
            mx.array([TEXTS[0][:9]], mx.uint32), carry, stage.new_cache(), head=True
        )
    mx.eval(carry)
    logits: mx.array = carry[0]
    return logits


async def test_stages_that_overlap_share_their_weights_and_are_right(
    make: Make, folder: Path
) -> None:
    holder = make()
    before = await holder.active_bytes()
    whole = await holder.load(0, LAYERS)
    alone = await holder.active_bytes() - before
    holder.told.clear()
    head = await holder.load(0, 4)
    assert holder.read_bytes() == 0
    holder.told.clear()
    tail = await holder.load(4, LAYERS)
    assert holder.read_bytes() == 0
    assert await holder.active_bytes() - before < alone * 1.02
    expected = await holder.compute.call(lambda: Whole(folder).run(TEXTS[0][:9]))
    found = await holder.compute.call(lambda: logits_of([head, tail]))
    assert await holder.compute.call(lambda: mx.array_equal(found, expected).item())
    await holder.shelf.unload(holder.range(0, LAYERS))
    again = await holder.compute.call(lambda: logits_of([head, tail]))
    assert await holder.compute.call(lambda: mx.array_equal(again, expected).item())
    assert whole.weights == {}


async def test_a_range_that_moves_reads_the_difference_and_lets_the_rest_go(make: Make) -> None:
    holder = make()
    before = await holder.active_bytes()
    old = await holder.load(1, 4)
    layer = old.weight_bytes // 3
    holder.told.clear()
    moved = await holder.load(2, 5, (1, 4))
    assert holder.read_bytes() == layer
    assert moved.weight_bytes == 3 * layer
    assert await holder.active_bytes() - before < 3.1 * layer
    assert [key_of(r.ready.stage)[1:] for r in holder.shelf.held()] == [(2, 5)]


async def test_what_does_not_fit_is_refused_before_anything_is_read(
    make: Make, folder: Path
) -> None:
    size = (folder / "model.safetensors").stat().st_size
    holder = make(budget_bytes=size // 4)
    await holder.shelf.load(holder.range(0, LAYERS))
    fault = holder.told[-1].failed.fault
    assert fault.kind == "ModelTooBig"
    assert int(fault.fields["needed_bytes"]) > size // 2
    phases = {r.progress.phase for r in holder.told if r.HasField("progress")}
    assert phases == {"fetching", "checking"}


async def test_a_load_lets_other_work_in_between_and_can_be_given_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallax.node.weights._SLICE_BYTES", 1)
    holder = make()
    begun, turns = threading.Event(), 0
    loading = asyncio.create_task(holder.shelf.load(holder.range(0, LAYERS)))
    async with asyncio.timeout(60):
        while not loading.done():
            await holder.compute.call(begun.set)
            turns += 1
            if turns == 4:
                await holder.shelf.unload(holder.range(0, LAYERS))
    assert turns >= 4
    assert holder.shelf.held() == []
    assert not any(r.HasField("ready") or r.HasField("failed") for r in holder.told)
    await holder.load(0, LAYERS)


async def test_a_stage_that_is_wanted_again_is_not_let_go_by_the_order_before(make: Make) -> None:
    holder = make()
    wanted = holder.range(0, LAYERS)
    await asyncio.gather(
        holder.shelf.load(wanted), holder.shelf.unload(wanted), holder.shelf.load(wanted)
    )
    assert holder.shelf.get(wanted) is not None
    told = [report.WhichOneof("report") for report in holder.told]
    assert told.count("ready") == 2
    assert "progress" not in told[told.index("ready") :], "it was read twice"


async def test_a_stage_that_was_prepared_is_checked_before_anyone_waits_for_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Holder(folder, tmp_path)
    judged: list[tuple[int, int]] = []
    judge = twin._judge

    def counted(config: dict[str, Any], first: int, end: int) -> twin.Verdict:
        judged.append((first, end))
        return judge(config, first, end)

    monkeypatch.setattr(twin, "_judge", counted)
    await holder.shelf.prepare([holder.range(0, 2), holder.range(2, LAYERS), holder.range(7, 9)])
    prepared = list(judged)
    assert prepared[:2] == [(0, 2), (2, LAYERS)]
    assert holder.told == [], "nothing is loaded, and what cannot be is not told"
    await holder.load(0, 2)
    assert judged == prepared
    await holder.shelf.prepare([holder.range(0, 3)])
    assert judged == prepared, "answers that run here would stand still meanwhile"
    await holder.shelf.unload(holder.range(0, 2))
    await holder.shelf.prepare([holder.range(0, 3)])
    assert judged[len(prepared) :] == [(0, 3)]
    holder.compute.stop(10)
