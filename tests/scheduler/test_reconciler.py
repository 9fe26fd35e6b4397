"""The reconciler with plain events: what it orders, and in which order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.reconciler import (
    Instruction,
    NeedEpoch,
    Order,
    Place,
    Reconciler,
    Ring,
    RingDown,
    RingState,
    RingUp,
)

MODEL = wire.ModelSource(name="m", location="/m", digest="d")
OTHER = wire.ModelSource(name="n", location="/n", digest="e")


def make(has_room: Callable[[Ring, Place], bool] = lambda _ring, _place: True) -> Reconciler:
    def form(ring: Ring, reports: list[wire.StageReady]) -> list[wire.FormRing]:
        assert [r.stage.first for r in reports] == [p.first for p in ring.places]
        return [wire.FormRing(epoch=ring.epoch, index=i) for i in range(len(ring.places))]

    reconciler = Reconciler(form, has_room)
    for node in ("a", "b", "c"):
        reconciler.node_up(node, 100)
    return reconciler


def ring_of(model: wire.ModelSource = MODEL, nodes: str = "ab") -> Ring:
    return Ring(model, tuple(Place(node, 4 * i, 4 * i + 4) for i, node in enumerate(nodes)))


def ready(ring: Ring, index: int) -> wire.StageReady:
    place = ring.places[index]
    stage = wire.StageRange(model=ring.model, first=place.first, end=place.end)
    return wire.StageReady(stage=stage)


def orders(instructions: list[Instruction]) -> list[tuple[str, str | None]]:
    return [(i.node_id, i.order.WhichOneof("order")) for i in instructions if isinstance(i, Order)]


def bring_up(reconciler: Reconciler, ring: Ring, epoch: int) -> list[Instruction]:
    reconciler.want(ring)
    for index, place in enumerate(ring.places):
        reconciler.stage_ready(place.node_id, ready(ring, index))
    reconciler.epoch_issued(ring, epoch)
    out: list[Instruction] = []
    for place in ring.places:
        out += reconciler.joined(place.node_id, epoch)
    return out


def test_a_ring_loads_then_gets_an_epoch_then_forms_then_serves() -> None:
    reconciler, ring = make(), ring_of()
    assert orders(reconciler.want(ring)) == [("a", "load"), ("b", "load")]
    assert reconciler.stage_ready("a", ready(ring, 0)) == []
    assert reconciler.stage_ready("b", ready(ring, 1)) == [NeedEpoch(ring)]
    assert orders(reconciler.epoch_issued(ring, 5)) == [("a", "form"), ("b", "form")]
    assert reconciler.joined("a", 5) == []
    assert reconciler.joined("b", 5) == [RingUp(ring)]
    assert ring.state is RingState.READY
    assert reconciler.by_epoch(5) is ring


def test_a_broken_epoch_is_left_by_all_and_forms_anew_under_the_next() -> None:
    reconciler, ring = make(), ring_of()
    bring_up(reconciler, ring, 5)
    out = reconciler.broken(5)
    assert orders(out) == [("a", "leave"), ("b", "leave")]
    assert RingDown(ring, 5) in out
    assert out[-1] == NeedEpoch(ring)
    assert reconciler.broken(5) == [], "the same news twice changes nothing"
    assert orders(reconciler.epoch_issued(ring, 6)) == [("a", "form"), ("b", "form")]
    assert reconciler.joined("a", 5) == [], "an old epoch is not joined"


def test_a_lost_node_takes_its_rings_with_it() -> None:
    reconciler, ring = make(), ring_of()
    bring_up(reconciler, ring, 5)
    out = reconciler.node_down("b")
    assert orders(out) == [("a", "leave")]
    assert RingDown(ring, 5) in out
    assert reconciler.rings == []
    assert reconciler.busy_nodes() == set()


def test_an_epoch_that_comes_too_late_is_not_used() -> None:
    reconciler, ring = make(), ring_of()
    reconciler.want(ring)
    reconciler.stage_ready("a", ready(ring, 0))
    reconciler.stage_ready("b", ready(ring, 1))
    reconciler.node_down("a")
    assert reconciler.epoch_issued(ring, 9) == []


def test_weights_that_nobody_wants_make_room_before_new_ones_come() -> None:
    reconciler, ring = make(), ring_of()
    bring_up(reconciler, ring, 5)
    reconciler.want_none()
    out = orders(reconciler.want(ring_of(OTHER)))
    assert out.index(("a", "unload")) < out.index(("a", "load"))
    assert out.index(("b", "unload")) < out.index(("b", "load"))


def test_weights_that_are_held_are_not_loaded_again() -> None:
    reconciler, ring = make(), ring_of()
    bring_up(reconciler, ring, 5)
    reconciler.want_none()
    again = ring_of()
    assert reconciler.want(again) == [NeedEpoch(again)]


def test_a_stage_that_cannot_load_gives_its_ring_up() -> None:
    reconciler, ring = make(), ring_of()
    reconciler.want(ring)
    reconciler.stage_failed("b", ready(ring, 1).stage)
    assert reconciler.rings == []
    assert reconciler.stage_ready("a", ready(ring, 0)) == []


def test_what_a_spare_node_still_holds_is_let_go_once_every_ring_serves() -> None:
    reconciler = make()
    spare = ring_of(nodes="c")
    reconciler.stage_ready("c", ready(spare, 0))
    out = bring_up(reconciler, ring_of(), 5)
    assert ("c", "unload") in orders(out)


def test_a_load_names_the_nodes_that_have_the_models_files_those_with_its_layers_first() -> None:
    reconciler = make()
    out = reconciler.want(ring_of())
    named = [[s.node_id for s in i.order.load.sources] for i in out if isinstance(i, Order)]
    assert named == [[], ["a"]], "a node is named as soon as it loads"
    reconciler.stage_ready("b", ready(ring_of(), 1))
    reconciler.stage_ready("b", ready(ring_of(OTHER), 1))
    (load,) = [
        i.order.load
        for i in reconciler.want(Ring(MODEL, (Place("c", 5, 7),)))
        if isinstance(i, Order) and i.order.HasField("load")
    ]
    assert [(s.node_id, s.first, s.end) for s in load.sources] == [("b", 4, 8), ("a", 0, 4)]
    (other,) = [
        i.order.load
        for i in reconciler.want(Ring(OTHER, (Place("a", 0, 4),)))
        if isinstance(i, Order) and i.order.HasField("load")
    ]
    assert [s.node_id for s in other.sources] == ["b"], "of another model they have nothing"


# ------------------------------------------------------------------------ moves


def three() -> Ring:
    """What a ring of two becomes when a third node is there."""
    return Ring(MODEL, (Place("a", 0, 3), Place("b", 3, 6), Place("c", 6, 8)))


def loads(instructions: list[Instruction]) -> dict[str, list[tuple[int, int]]]:
    """By node: the ranges that a load takes the place of."""
    return {
        i.node_id: [(old.first, old.end) for old in i.order.load.instead_of]
        for i in instructions
        if isinstance(i, Order) and i.order.HasField("load")
    }


def test_a_move_makes_the_new_while_the_old_serves_and_then_lets_it_go() -> None:
    reconciler, old, new = make(), ring_of(), three()
    bring_up(reconciler, old, 5)
    out = reconciler.move([old], [new])
    assert loads(out) == {"a": [], "b": [], "c": []}
    assert len(out) == 3
    for index, place in enumerate(new.places):
        out = reconciler.stage_ready(place.node_id, ready(new, index))
    assert out == [NeedEpoch(new)]
    reconciler.epoch_issued(new, 6)
    reconciler.joined("a", 6)
    reconciler.joined("b", 6)
    assert old.state is RingState.READY
    assert reconciler.moving
    out = reconciler.joined("c", 6)
    assert out.index(RingUp(new)) < out.index(RingDown(old, 5, moved=True))
    assert orders(out) == [("a", "leave"), ("b", "leave"), ("a", "unload"), ("b", "unload")]
    assert reconciler.rings == [new]
    assert not reconciler.moving


def test_what_cannot_be_held_twice_is_loaded_last_in_the_place_of_the_old() -> None:
    old, new = ring_of(), three()
    reconciler = make(lambda ring, place: not (ring is new and place.node_id == "b"))
    bring_up(reconciler, old, 5)
    assert set(loads(reconciler.move([old], [new]))) == {"a", "c"}
    assert reconciler.stage_ready("a", ready(new, 0)) == []
    assert old.state is RingState.READY, "it serves as long as it can"
    out = reconciler.stage_ready("c", ready(new, 2))
    assert orders(out) == [("a", "leave"), ("b", "leave"), ("b", "load")]
    assert RingDown(old, 5, moved=True) in out
    assert loads(out) == {"b": [(4, 8)]}
    assert reconciler.stage_ready("b", ready(new, 1)) == [NeedEpoch(new)]
    reconciler.epoch_issued(new, 6)
    for node in "abc":
        out = reconciler.joined(node, 6)
    assert RingUp(new) in out
    assert ("a", "unload") in orders(out)
    assert not reconciler.moving


@pytest.mark.parametrize("broken", [False, True])
def test_a_move_to_a_node_that_is_lost_is_given_up_and_the_old_ring_stays(broken: bool) -> None:
    reconciler, old, new = make(), ring_of(), three()
    bring_up(reconciler, old, 5)
    reconciler.move([old], [new])
    reconciler.stage_ready("a", ready(new, 0))
    if broken:
        stage = ready(new, 2).stage
        out = reconciler.stage_failed("c", stage)
    else:
        out = reconciler.node_down("c")
    assert out == []
    assert reconciler.rings == [old]
    assert old.state is RingState.READY
    assert not reconciler.moving


def test_an_old_ring_that_is_lost_during_a_move_does_not_end_the_move() -> None:
    old = ring_of(nodes="ab")
    new = Ring(MODEL, (Place("a", 0, 4), Place("c", 4, 8)))
    reconciler = make(lambda ring, _place: ring is not new)
    bring_up(reconciler, old, 5)
    assert RingDown(old, 5, moved=True) in reconciler.move([old], [new]), "there is no room at all"
    assert reconciler.moving
    reconciler = make(lambda ring, place: ring is not new or place.node_id == "c")
    old = ring_of(nodes="ab")
    new = Ring(MODEL, (Place("a", 0, 5), Place("c", 5, 8)))
    bring_up(reconciler, old, 5)
    assert set(loads(reconciler.move([old], [new]))) == {"c"}
    out = reconciler.node_down("b")
    assert RingDown(old, 5) in out
    assert loads(out) == {"a": [(0, 4)]}
    reconciler.stage_ready("c", ready(new, 1))
    assert reconciler.stage_ready("a", ready(new, 0)) == [NeedEpoch(new)]


def test_a_new_ring_that_breaks_while_it_forms_forms_again_and_the_old_one_serves_on() -> None:
    reconciler, old, new = make(), ring_of(), three()
    bring_up(reconciler, old, 5)
    reconciler.move([old], [new])
    for index, place in enumerate(new.places):
        reconciler.stage_ready(place.node_id, ready(new, index))
    reconciler.epoch_issued(new, 6)
    out = reconciler.broken(6)
    assert out[-1] == NeedEpoch(new)
    assert not any(isinstance(i, RingDown) for i in out)
    assert old.state is RingState.READY


def test_a_ring_that_is_wanted_no_more_ends_a_move_too() -> None:
    reconciler, old, new = make(), ring_of(), three()
    bring_up(reconciler, old, 5)
    reconciler.move([old], [new])
    reconciler.want_none()
    assert reconciler.rings == []
    assert not reconciler.moving


def test_a_stage_that_was_let_go_while_it_loaded_is_not_believed_to_be_there() -> None:
    reconciler, ring = make(), ring_of()
    reconciler.want(ring)
    reconciler.retire(ring)
    longer = Ring(MODEL, (Place("a", 0, 6), Place("c", 6, 8)))
    assert orders(reconciler.want(longer)) == [("a", "unload"), ("a", "load"), ("c", "load")]
    reconciler.stage_ready("a", ready(ring, 0))  # before it read that it is to let it go
    reconciler.node_down("c")
    again = ring_of()
    assert ("a", "load") in orders(reconciler.want(again))
    reconciler.stage_ready("b", ready(again, 1))
    assert again.state is RingState.LOADING
    assert reconciler.stage_ready("a", ready(again, 0)) == [NeedEpoch(again)]
