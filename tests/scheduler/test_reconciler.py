"""The reconciler with plain events: what it orders, and in which order."""

from __future__ import annotations

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


def make() -> Reconciler:
    def form(ring: Ring, reports: list[wire.StageReady]) -> list[wire.FormRing]:
        assert [r.stage.first for r in reports] == [p.first for p in ring.places]
        return [wire.FormRing(epoch=ring.epoch, index=i) for i in range(len(ring.places))]

    reconciler = Reconciler(form)
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
