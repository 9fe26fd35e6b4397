"""Who is lost again and again, for how long it has no layers then, and when that is forgotten."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from parallax.fabric.limits import Limits
from parallax.scheduler.blame import Blame
from parallax.scheduler.losses import (
    FORGIVEN_S,
    LONGEST_CUT_OFF_S,
    LONGEST_S,
    MEMORY_S,
    MOST_NODES,
    WINDOW_S,
    Losses,
)

LIMITS = Limits(aside_s=60)


class Room:
    """Nodes that are lost and come back, some seconds apart."""

    def __init__(self) -> None:
        self.losses = Losses(LIMITS)
        self.now = 1000.0
        self.process = 1

    def wait(self, seconds: float) -> list[str]:
        """Time passes, second by second, and nobody serves; who is taken back."""
        back = []
        for _ in range(round(seconds)):
            self.now += 1
            self.losses.serving((), self.now)
            back += self.losses.over(self.now)
        return back

    def serves(self, seconds: float, node: str = "a") -> None:
        for _ in range(round(seconds)):
            self.now += 1
            self.losses.serving({node}, self.now)
            self.losses.over(self.now)

    def dies(self, node: str = "a") -> float | None:
        """A process dies and another comes back; for how long that is aside."""
        self.losses.lost(node, self.process, "its connection broke", self.now)
        self.wait(5)
        self.process += 1
        return self.losses.back(node, self.process, self.now)

    def is_cut_off(self, node: str = "a") -> float | None:
        """The same process comes back."""
        self.losses.lost(node, self.process, "it was silent for 3 s", self.now)
        self.wait(5)
        return self.losses.back(node, self.process, self.now)

    def again(self, asleep_s: float = 0.0) -> None:
        """Another scheduler, whose clock begins anew, knows what this one told."""
        told = json.loads(json.dumps(self.losses.told()))
        self.losses = Losses(LIMITS)
        shift_s = 7.0 - asleep_s - self.now
        self.now = 7.0
        self.losses.recall(told, shift_s, self.now)


@pytest.fixture
def room() -> Room:
    return Room()


def test_the_third_loss_within_ten_minutes_costs_a_node_its_layers_for_half_a_minute(
    room: Room,
) -> None:
    assert [room.dies(), room.dies(), room.dies()] == [None, None, 30.0]
    assert room.losses.aside == {"a"}
    assert room.losses.left_s("a", room.now) == 30.0
    why = "It was lost 3 times within 10 minutes while it had layers; "
    assert room.losses.why("a") == why + "the last time its connection broke"
    assert room.losses.back("a", room.process, room.now) is None, "it is told once"
    assert room.wait(29) == []
    assert room.wait(1) == ["a"]
    assert room.losses.aside == frozenset()
    assert room.losses.why("a") is None


def test_losses_far_apart_are_nobodys_fault(room: Room) -> None:
    for _ in range(6):
        assert room.dies() is None
        room.wait(WINDOW_S / 2)
        assert "a" not in room.losses.often
    assert room.losses.aside == frozenset()


def test_nodes_are_told_apart(room: Room) -> None:
    assert [room.dies(name) for name in "abcabca"] == [None] * 6 + [30.0]
    assert room.losses.aside == {"a"}


def test_a_spare_comes_before_a_node_that_was_lost_twice_lately(room: Room) -> None:
    room.dies()
    assert room.losses.often == frozenset()
    room.dies()
    assert room.losses.often == {"a"}
    room.wait(WINDOW_S)
    assert room.losses.often == frozenset()


def test_one_loss_more_after_a_time_aside_doubles_it_up_to_ten_minutes(room: Room) -> None:
    room.dies()
    room.dies()
    spent = []
    for _ in range(7):
        seconds = room.dies()
        assert seconds is not None
        spent.append(seconds)
        assert room.wait(seconds) == ["a"]
    assert spent == [30.0, 60.0, 120.0, 240.0, 480.0, LONGEST_S, LONGEST_S]
    room.dies()
    assert "again (it has been put aside 8 times now)" in str(room.losses.why("a"))


def test_who_was_only_cut_off_waits_for_a_minute_at_most(room: Room) -> None:
    spent = []
    for _ in range(6):
        seconds = room.is_cut_off()
        spent.append(seconds)
        room.wait(seconds or 0)
    assert spent == [None, None, 30.0, LONGEST_CUT_OFF_S, LONGEST_CUT_OFF_S, LONGEST_CUT_OFF_S]


def test_ten_minutes_of_service_without_a_loss_make_good_what_was(room: Room) -> None:
    for _ in range(3):
        room.dies()
    room.wait(30)
    for _ in range(3):
        room.serves(FORGIVEN_S - 100)
        room.wait(1)
    assert room.losses.told(), "it was never for ten minutes"
    room.serves(FORGIVEN_S + 1)
    assert room.losses.told() == []
    assert [room.dies(), room.dies(), room.dies()] == [None, None, 30.0]


def test_what_is_old_is_forgotten_also_without_service(room: Room) -> None:
    room.dies("b")
    for _ in range(3):
        room.dies()
    room.wait(30 + WINDOW_S)
    assert [entry[0] for entry in room.losses.told()] == ["a"]  # type: ignore[index]
    assert room.dies() == 60.0, "it is watched for an hour"
    room.wait(61 + MEMORY_S)
    assert room.losses.told() == []


def test_those_put_aside_least_often_are_taken_back_first_when_they_are_needed(room: Room) -> None:
    for name in "aaabbbccc":
        room.dies(name)
    room.losses.lost("a", 1, "its connection broke", room.now)
    assert room.losses.back("a", 2, room.now) == 60.0
    assert room.losses.needed() == ["b", "c"]
    assert room.losses.aside == {"a"}
    assert room.losses.needed() == ["a"]
    assert room.losses.needed() == []
    assert room.dies() == 120.0, "and when it is not needed any more, it counts"


def test_people_may_forgive(room: Room) -> None:
    for _ in range(3):
        room.dies()
    assert room.losses.forgive("a")
    assert not room.losses.forgive("a")
    assert room.losses.aside == frozenset()
    assert [room.dies(), room.dies(), room.dies()] == [None, None, 30.0]


def test_a_loss_shortly_before_the_scheduler_dies_counts_with_the_next_one(room: Room) -> None:
    room.dies()
    room.dies()
    room.losses.lost("a", room.process, "its connection broke", room.now)
    room.again(asleep_s=60)
    assert room.losses.often == {"a"}
    assert room.losses.aside == frozenset()
    assert room.losses.back("a", room.process + 1, room.now) == 30.0


def test_who_is_aside_stays_so_over_a_restart_of_the_scheduler_and_not_longer(room: Room) -> None:
    for _ in range(3):
        room.dies()
    why = room.losses.why("a")
    room.again(asleep_s=10)
    assert room.losses.aside == {"a"}
    assert room.losses.left_s("a", room.now) == 20.0
    assert room.losses.why("a") == why
    assert room.wait(20) == ["a"]
    assert room.dies() == 60.0
    room.again(asleep_s=MEMORY_S + 61)
    room.wait(1)
    assert room.losses.told() == []


def test_nothing_new_is_told_while_nothing_happens(room: Room) -> None:
    for _ in range(3):
        room.dies()
    told = room.losses.told()
    room.wait(10)
    assert room.losses.told() == told


def test_no_more_nodes_are_remembered_than_there_may_be(room: Room) -> None:
    for number in range(MOST_NODES + 5):
        room.losses.lost(f"n{number}", 1, "x" * 10_000, room.now)
    told: Any = room.losses.told()
    assert len(told) == MOST_NODES
    assert told[0][0] == "n5"
    assert len(json.dumps(told)) < 600 * MOST_NODES


GOOD: list[Any] = ["a", [990.0, 995.0], 7, "its connection broke", 1, True, 1020.0, 995.0]


def losses_of(told: object) -> Losses:
    losses = Losses(LIMITS)
    losses.recall(told, 0.0, 1000.0)
    return losses


@pytest.mark.parametrize(
    "told",
    [
        None,
        7,
        "text",
        {"a": 1},
        [None, 7, "12345678", [], {}, dict.fromkeys(range(8)), GOOD[:-1], [*GOOD, 1]],
        *(
            [[*GOOD[:place], wrong, *GOOD[place + 1 :]]]
            for place, wrongs in {
                0: [None, 7, "x" * 1000, ["a"]],
                1: [None, 7, ["x"], [math.nan], [math.inf], [10**400], [True], {"a": 1}],
                2: [None, "x", math.inf, [1]],
                4: [None, "x", math.nan, math.inf],
                6: ["x", math.nan, -math.inf, 10**400, True, [1]],
                7: [None, "x", math.nan, 10**400],
            }.items()
            for wrong in wrongs
        ),
    ],
)
def test_what_makes_no_sense_is_not_taken_up(told: object) -> None:
    assert losses_of([GOOD]).told() == [GOOD]
    assert losses_of(told).told() == []
    if isinstance(told, list):
        other = ["b", *GOOD[1:]]
        assert losses_of([*told, other]).told() == [other], "the rest is"


def test_what_is_taken_up_is_within_bounds() -> None:
    wild = ["a", [5000.0] * 99, 7, "x" * 10_000, 10**9, 1, 1e300, 1e300]
    losses = losses_of([wild, *([f"n{n}", *GOOD[1:]] for n in range(2 * MOST_NODES)), wild])
    told: Any = losses.told()
    assert len(told) <= MOST_NODES
    assert losses.left_s("a", 1000.0) == LONGEST_S
    assert losses.over(1000.0 + LONGEST_S) == ["a", *sorted(n for n, *_ in told if n != "a")]
    assert losses.back("a", 8, 2000.0) is None, "only what is true is owed"
    losses.lost("a", 8, "its connection broke", 2000.0)
    assert losses.back("a", 9, 2000.0) == LONGEST_S


# ---------------------------------------------------------------------- blame

ABSENT: list[Any] = ["a", 7, 2, 1100.0, "Rings with it broke", True, False]


def blame_of(told: object, shift_s: float = 0.0) -> Blame:
    blame = Blame(LIMITS)
    blame.recall(json.loads(json.dumps(told)), shift_s, 1000.0)
    return blame


def test_who_is_aside_for_its_rings_stays_so_over_a_restart_of_the_scheduler() -> None:
    blame = Blame(LIMITS)
    assert blame.put_aside("a", 7, "Rings with it broke", 5000.0) == 60.0
    new = blame_of(blame.told(), shift_s=-4000.0 - 10.0)
    assert new.aside == {"a"}
    assert new.left_s("a", 1000.0) == 50.0
    assert new.why("a") == "Rings with it broke"
    new.arrived("a", 7)
    assert new.aside == {"a"}
    assert new.over(1050.0) == ["a"]
    assert new.put_aside("a", 7, "again", 1060.0) == 120.0
    new.arrived("a", 8)
    assert new.aside == frozenset(), "a new process begins with a clean slate"


@pytest.mark.parametrize(
    "told",
    [
        None,
        {"a": 1},
        [None, 7, "1234567", [], ABSENT[:-1]],
        *(
            [[*ABSENT[:place], wrong, *ABSENT[place + 1 :]]]
            for place, wrongs in {
                0: [None, 7, "x" * 1000],
                1: [None, "x", math.inf],
                2: [None, "x", math.nan],
                3: [None, "x", math.nan, math.inf, 10**400, True],
            }.items()
            for wrong in wrongs
        ),
    ],
)
def test_of_blame_what_makes_no_sense_is_not_taken_up_either(told: object) -> None:
    assert blame_of([ABSENT]).told() == [ABSENT]
    assert blame_of(told).told() == []
    assert blame_of([["a", 7, 10**9, 1e300, "x" * 10_000, 1, 0]]).aside == frozenset()
    wild = blame_of([["a", 7, 10**9, 1e300, "x" * 10_000, 1, False]])
    assert wild.left_s("a", 1000.0) == 480.0
    assert wild.put_aside("a", 7, "again", 1000.0) == 480.0
