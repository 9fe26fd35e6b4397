"""Rings as they served, over restarts."""

from __future__ import annotations

import json

import pytest

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.layouts import REMEMBERED, WAIT_S, Layout, Layouts
from parallax.scheduler.reconciler import Place, Ring

MODEL = wire.ModelSource(name="m", location="/m", digest="d")


def ring(*cuts: tuple[str, int, int]) -> Ring:
    return Ring(MODEL, tuple(Place(*cut) for cut in cuts), 10.0)


AB = ring(("a", 0, 3), ("b", 3, 8))
C = ring(("c", 0, 8))


def again(layouts: Layouts) -> Layouts:
    """What the next process knows."""
    new = Layouts()
    new.recall(json.loads(json.dumps(layouts.told())))
    return new


def test_the_rings_that_served_last_are_taken_up_once_each_when_their_nodes_are_here() -> None:
    layouts = Layouts()
    layouts.served([AB])
    layouts.served([AB, C])
    new = again(layouts)
    assert new.take_up("d", {"a"}, now=0) == []
    assert new.awaited == {"a", "b", "c"}
    assert new.take_up("d", {"a", "b"}, now=1) == [Layout("d", AB.places, 10.0)]
    assert new.take_up("d", {"a", "b"}, now=1) == []
    assert [layout.nodes for layout in new.take_up("d", {"c"}, now=1)] == [{"c"}]
    assert new.awaited == set()
    assert not new.over(now=1000)


def test_a_ring_that_did_not_serve_last_is_remembered_and_not_waited_for() -> None:
    layouts = Layouts()
    layouts.served([AB])
    layouts.served([ring(("a", 0, 8))])
    new = again(layouts)
    assert new.awaited == {"a"}
    assert new.places_of("d", ["b", "a"]) == AB.places
    assert new.places_of("other", ["b", "a"]) is None
    assert new.places_of("d", ["a", "b", "c"]) is None


def test_the_wait_for_the_others_begins_with_the_first_and_ends() -> None:
    layouts = Layouts()
    layouts.served([AB])
    new = again(layouts)
    new.take_up("d", {"c"}, now=0)
    assert not new.over(now=1000), "nobody of theirs was here"
    new.take_up("d", {"a"}, now=1000)
    assert not new.over(now=1000 + WAIT_S - 0.1)
    assert not new.waited
    assert new.over(now=1000 + WAIT_S)
    assert new.waited
    assert not new.over(now=1000 + WAIT_S), "once"
    assert new.awaited == set()
    assert new.take_up("d", {"a", "b"}, now=1010) == []


def test_of_another_model_nothing_is_waited_for() -> None:
    layouts = Layouts()
    layouts.served([AB])
    new = again(layouts)
    assert new.take_up("other", {"a", "b"}, now=0) == []
    assert new.awaited == set()


def test_the_latest_cut_of_the_same_nodes_counts() -> None:
    layouts = Layouts()
    assert layouts.served([AB])
    assert not layouts.served([AB]), "no news"
    later = ring(("a", 0, 5), ("b", 5, 8))
    assert layouts.served([later])
    assert layouts.places_of("d", "ab") == later.places
    assert len(layouts.told()) == 1


def test_only_so_many_are_remembered() -> None:
    layouts = Layouts()
    for number in range(REMEMBERED + 5):
        layouts.served([ring((f"n{number}", 0, 8))])
    assert len(layouts.told()) == REMEMBERED
    assert layouts.places_of("d", ["n4"]) is None
    assert layouts.places_of("d", ["n5"]) is not None


@pytest.mark.parametrize(
    "told",
    [None, 3, "x", [3], [["d"]], [["d", [], 1.0, True]], [["d", [["a", "x", 2]], 1.0, True]]],
)
def test_what_makes_no_sense_is_left_out(told: object) -> None:
    layouts = Layouts()
    layouts.recall(told)
    assert layouts.awaited == set()
    assert layouts.told() == []


def test_a_ring_is_mended_where_it_broke() -> None:
    layouts = Layouts()
    layouts.served([AB])
    assert layouts.places_of("d", ["c", "b"]) == (Place("c", 0, 3), Place("b", 3, 8))
    assert layouts.places_of("d", ["a", "c"]) == (Place("a", 0, 3), Place("c", 3, 8))
    assert layouts.places_of("d", ["c", "e"]) is None, "nobody of it is left"
    assert layouts.places_of("d", ["a", "b", "c"]) is None
    assert layouts.places_of("other", ["a", "c"]) is None
    layouts.served([ring(("a", 0, 2), ("c", 2, 8))])
    assert layouts.places_of("d", ["a", "c"]) == (Place("a", 0, 2), Place("c", 2, 8))
