"""Room for one more stage beside what a node holds."""

from __future__ import annotations

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.room import has_room
from tests.scheduler.test_planner import GB, model

MODEL = model(8, first=GB, last=GB, tied=GB, cache=GB // 4096)
OURS, OTHERS = wire.ModelSource(digest="d"), wire.ModelSource(digest="e")


def stage(first: int, end: int) -> wire.StageRange:
    return wire.StageRange(model=OURS, first=first, end=end)


def fits(
    wanted: wire.StageRange, held: list[wire.StageReady], budget: float, cache: float = 0
) -> bool:
    return has_room(MODEL, wanted, held, budget_bytes=int(budget * GB), cache_bytes=int(cache * GB))


def test_a_stage_takes_its_layers_and_room_for_their_caches() -> None:
    assert fits(stage(2, 4), [], 4.01)
    assert not fits(stage(2, 4), [], 3.99)


def test_layers_that_are_held_already_are_held_once() -> None:
    held = [wire.StageReady(stage=stage(1, 4), weight_bytes=3 * GB)]
    assert fits(stage(2, 5), held, 4 + 3 + 0.01)
    assert not fits(stage(2, 5), held, 4 + 3 - 0.01)


def test_a_tied_embedding_is_held_once_by_both_ends() -> None:
    held = [wire.StageReady(stage=stage(0, 2), weight_bytes=3 * GB)]
    assert fits(stage(6, 8), held, 2 + 1 + 2 + 2 + 0.01)
    assert not fits(stage(6, 8), held, 2 + 1 + 2 + 2 - 0.01)


def test_other_models_and_caches_in_use_take_room() -> None:
    other = wire.StageReady(
        stage=wire.StageRange(model=OTHERS, first=0, end=8), weight_bytes=5 * GB
    )
    assert fits(stage(2, 3), [other], 7.01)
    assert not fits(stage(2, 3), [other], 6.99)
    assert fits(stage(2, 3), [], 4.01, cache=1)
    assert not fits(stage(2, 3), [], 3.99, cache=1)
