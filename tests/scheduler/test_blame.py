"""Who is put aside when rings break again and again, and who is not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from parallax.fabric.errors import (
    FrameRefused,
    InternalError,
    LinkBroken,
    MessageRefused,
    ParallaxError,
    PeerMismatch,
    StageStuck,
)
from parallax.fabric.limits import Limits
from parallax.scheduler.blame import (
    ALIKE_S,
    LONGEST_S,
    MEMORY_S,
    Blame,
    Judgement,
    is_work,
    suspects_of,
)

LIMITS = Limits(aside_s=60)
AB = ("a", "b")
FAILED = InternalError("Stage 1 failed")
REFUSED = FrameRefused("What came is no frame")


def link(peer: str) -> LinkBroken:
    return LinkBroken("The stream broke", peer=peer)


class Room:
    """Nodes that speak, rings that break, one second after the other."""

    def __init__(self) -> None:
        self.blame = Blame(LIMITS)
        self.now = 0.0
        self.epoch = 0
        self.mute: set[str] = set()

    def breaks(
        self, nodes: Sequence[str], reporter: str | None, error: ParallaxError, times: int = 1
    ) -> None:
        for _ in range(times):
            self.now += 1
            self.epoch += 1
            self.blame.broke(tuple(nodes), self.epoch, error, self.now, reporter=reporter)

    def heard(self, node: str) -> float | None:
        return None if node in self.mute else self.now

    def judge(self) -> list[tuple[str, ...]]:
        """Everybody has spoken again, a second later."""
        return [judged.suspects for judged in self.judgements()]

    def judgements(self) -> list[Judgement]:
        self.now += 1
        return self.blame.due(self.heard)

    def put(self, node: str, incarnation: int = 1) -> float:
        return self.blame.put_aside(node, incarnation, "it broke", self.now)


@pytest.fixture
def room() -> Room:
    return Room()


@pytest.mark.parametrize(
    ("reporter", "error", "suspects"),
    [
        ("b", FAILED, ("b",)),
        ("b", link("c"), ("c", "b")),
        ("b", link("b"), ("b",)),
        ("b", LinkBroken("who?"), ("a", "c", "b")),
        ("b", link("z"), ("a", "c", "b")),
        ("a", PeerMismatch("who?", expected="b", found="z"), ("c", "b", "a")),
        ("a", REFUSED, ("c", "a")),
        ("c", REFUSED, ("b", "c")),
        ("c", StageStuck("nothing comes back"), ("a", "b", "c")),
        (None, link("a"), ("a",)),
        ("z", FAILED, ("a",)),
    ],
)
def test_a_fault_names_its_suspects(
    reporter: str | None, error: ParallaxError, suspects: tuple[str, ...]
) -> None:
    assert suspects_of(("a", "b", "c"), reporter, error) == suspects


def test_frames_are_told_from_links() -> None:
    assert [is_work(e) for e in (FAILED, REFUSED, link("a"), StageStuck("x"))] == [
        True,
        True,
        False,
        False,
    ]


def test_one_break_is_nobodys_fault_and_two_in_a_row_are_judged_once(room: Room) -> None:
    room.breaks(AB, "a", link("b"))
    assert room.judge() == []
    room.breaks(AB, "b", link("a"))
    assert room.judge() == [("a", "b")]
    assert room.judge() == [], "until it breaks again"
    room.breaks(AB, "a", link("b"))
    assert room.judge() == [("b", "a")]


def test_a_node_whose_frames_fail_is_the_only_suspect(room: Room) -> None:
    room.breaks(AB, "b", FAILED, times=2)
    (judgement,) = room.judgements()
    assert judgement == Judgement(AB, ("b",), 2, "Stage 1 failed", work=True)


def test_breaks_of_other_rings_do_not_count(room: Room) -> None:
    room.breaks(AB, "a", link("b"))
    room.breaks(("c", "b"), "c", link("b"))
    assert room.judge() == []


def test_two_accidents_of_different_nodes_are_nobodys_fault(room: Room) -> None:
    room.breaks(("a", "b", "c", "d"), "a", link("b"))
    room.breaks(("a", "b", "c", "d"), "c", link("d"))
    assert room.judge() == []


def test_who_is_common_to_two_links_comes_first(room: Room) -> None:
    room.breaks(("a", "b", "c"), "a", link("b"))
    room.breaks(("a", "b", "c"), "b", link("c"))
    assert room.judge() == [("b",)]


# ------------------------------------------------------------- kills and stops


def test_a_node_that_never_speaks_again_lets_nobody_be_judged(room: Room) -> None:
    room.mute.add("b")
    room.breaks(AB, "a", link("b"), times=2)
    assert room.judge() == []
    room.mute.clear()
    assert room.judge() == [("b", "a")]


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_kill_is_not_the_survivors_fault_whenever_it_is_noticed(room: Room, when: str) -> None:
    """Kill after kill: the survivor says each time that its neighbour is gone."""
    for victim in "bcdefgh":
        if when == "before":
            room.blame.excuse(victim)  # its ring is no more, and reports on it are not heard
        else:
            room.breaks(("a", victim), "a", link(victim))
            if when == "after":
                room.breaks(("a", victim), "a", link(victim))
            room.blame.excuse(victim)
        assert room.judge() == []
    room.breaks(("a", "i"), "i", link("a"))
    assert room.judge() == []


def test_a_head_that_loses_its_stream_with_a_killed_neighbour_is_not_at_fault(room: Room) -> None:
    for victim in "bcd":
        room.breaks(("a", victim), None, link("a"), times=2)
        room.blame.excuse(victim)
        assert room.judge() == []


def test_a_head_says_why_although_the_scheduler_had_noticed_first(room: Room) -> None:
    for _ in range(2):
        room.breaks(AB, None, LinkBroken("the head ended it", peer="a"))
        room.blame.corrected("b", room.epoch, link("a"))  # left alone by the order to leave
        room.blame.corrected("a", room.epoch, link("b"))
    (judgement,) = room.judgements()
    assert (judgement.suspects, judgement.why) == (("b", "a"), "The stream broke")
    room.blame.corrected("a", room.epoch, FAILED)
    room.breaks(AB, "b", link("a"))
    assert room.judge() == [("a", "b")], "what a node has said stays said"


def test_a_head_that_reports_what_cannot_be_cannot_name_another(room: Room) -> None:
    for _ in range(2):
        room.breaks(AB, None, MessageRefused("The head of the ring reports what cannot be"))
        room.blame.corrected("a", room.epoch, link("b"))
    assert room.judge() == [("a",)]


def test_a_starved_node_takes_back_what_broke_while_it_did_not_run(room: Room) -> None:
    room.breaks(AB, "a", link("b"))
    long_ago = room.now
    room.breaks(AB, "a", link("b"))
    room.blame.excuse("b", since=long_ago + 0.5)
    assert room.judge() == []
    room.breaks(AB, "a", link("b"))
    assert room.judge() == [("b", "a")], "what broke before that counts"


def test_steady_service_wipes_the_slate(room: Room) -> None:
    room.breaks(AB, "a", link("b"))
    room.blame.served(AB)
    room.breaks(AB, "a", link("b"))
    assert room.judge() == []


def test_breaks_of_long_ago_do_not_count(room: Room) -> None:
    room.breaks(AB, "a", link("b"))
    room.now += MEMORY_S
    room.blame.over(room.now + 1)
    room.breaks(AB, "a", link("b"))
    assert room.judge() == []


# ----------------------------------------------------------------------- pairs


def test_a_wrong_guess_of_a_pair_is_put_right_and_excused(room: Room) -> None:
    """Nothing leaves b; a was put aside for it, and c has taken its place."""
    room.breaks(AB, "b", link("a"), times=2)
    assert room.judge() == [("a", "b")]
    room.put("a")
    room.breaks(("c", "b"), "b", link("c"))
    assert room.judge() == [], "these two have not been tried twice yet"
    room.breaks(("c", "b"), "c", link("b"))
    assert room.judge() == [("b", "c")], "b was suspected with both"
    assert room.blame.instead("b") == {"b"}, "a is planned with again"
    room.put("b")
    assert room.blame.aside == {"b"}
    for other in "dc":
        room.breaks(("a", other), "a", link(other))
        assert room.judge() == []
    room.breaks(("a", "d"), "a", link("d"))
    assert room.judge() == [("a", "d")], "a has broken with c too"
    room.breaks(("e", "c"), "c", link("e"), times=2)
    assert room.judge() == [("c", "e")]


def test_what_one_is_put_aside_for_is_not_held_against_its_neighbours(room: Room) -> None:
    room.breaks(AB, "b", link("a"), times=2)
    room.breaks(("c", "b"), "c", link("b"), times=2)
    assert room.judge() == [("b", "a"), ("b", "c")]
    room.put("b")
    room.breaks(("a", "d"), "a", link("d"), times=2)
    assert room.judge() == [("d", "a")]
    room.breaks(("c", "e"), "c", link("e"), times=2)
    assert room.judge() == [("e", "c")]


def test_who_has_served_steadily_with_others_was_not_the_one(room: Room) -> None:
    room.breaks(AB, "b", link("a"), times=2)
    room.judge()
    room.put("b")
    room.blame.served(("a", "c"))
    room.blame.take_back("b")
    room.breaks(("b", "d"), "d", link("b"), times=2)
    assert room.judge() == [("b", "d")]
    room.breaks(("d", "b"), "d", link("b"), times=2)
    assert room.judge() == [("b", "d")]
    room.breaks(("a", "e"), "a", link("e"), times=2)
    assert room.judge() == [("e", "a")]


def test_two_that_are_aside_for_their_own_faults_excuse_nobody(room: Room) -> None:
    room.breaks(AB, "b", FAILED, times=2)
    room.judge()
    room.put("b")
    room.breaks(("a", "c"), "a", link("c"), times=2)
    room.judge()
    assert room.blame.instead("c") == {"b", "c"}


# ------------------------------------------------------- work that nobody can do


def test_what_fails_on_one_node_after_another_is_no_nodes_fault(room: Room) -> None:
    room.breaks(AB, "b", FAILED, times=2)
    (judgement,) = room.judgements()
    room.blame.put_aside("b", 1, judgement.why, room.now, work=judgement.work)
    room.breaks(("a", "c"), "c", FAILED, times=2)
    assert room.judge() == []
    assert room.blame.aside == frozenset(), "one request would have them all put aside"


def test_refused_frames_lead_to_the_one_that_is_always_there(room: Room) -> None:
    room.breaks(AB, "b", REFUSED, times=2)
    (judgement,) = room.judgements()
    assert judgement.suspects == AB
    room.blame.put_aside("a", 1, judgement.why, room.now, work=judgement.work)
    room.breaks(("c", "b"), "b", REFUSED, times=2)
    assert room.judge() == [("b",)]
    assert room.blame.instead("b") == {"b"}


def test_the_same_failure_much_later_counts_as_one_of_its_own(room: Room) -> None:
    room.breaks(AB, "b", FAILED, times=2)
    room.judge()
    room.put("b")
    room.now += ALIKE_S
    room.breaks(("a", "c"), "c", FAILED, times=2)
    assert room.judge() == [("c",)]


# ------------------------------------------------------------------ time aside


def test_the_time_aside_is_doubled_each_time_up_to_some_minutes(room: Room) -> None:
    times = []
    for _ in range(6):
        times.append(room.put("b"))
        assert room.blame.aside == {"b"}
        assert room.blame.over(room.now + times[-1] - 0.1) == []
        room.now += times[-1]
        assert room.blame.over(room.now) == ["b"]
        assert room.blame.over(room.now) == []
        assert room.blame.aside == frozenset()
    assert times == [60, 120, 240, LONGEST_S, LONGEST_S, LONGEST_S]


def test_steady_service_a_new_process_and_long_peace_forgive(room: Room) -> None:
    def again() -> float:
        room.put("b")
        room.now += LONGEST_S
        assert room.blame.over(room.now) == ["b"]
        return room.put("b")

    assert again() == 120
    room.blame.take_back("b")
    room.blame.served(("b", "c"))
    assert again() == 120, "it began anew"
    room.blame.arrived("b", 1)
    assert room.blame.aside == {"b"}, "the same process, over a new connection"
    room.blame.arrived("b", 2)
    assert room.blame.aside == frozenset()
    assert again() == 120
    room.now += LONGEST_S
    room.blame.over(room.now)
    room.blame.over(room.now + MEMORY_S + 1)
    assert room.put("b") == 60


def test_who_is_aside_can_be_asked_why_and_for_how_long(room: Room) -> None:
    assert (room.blame.why("b"), room.blame.left_s("b", 0)) == (None, 0)
    room.put("b")
    assert (room.blame.why("b"), room.blame.left_s("b", 20)) == ("it broke", 40)
    assert room.blame.take_back("b")
    assert not room.blame.take_back("b")
    assert not room.blame.take_back("never seen")
    assert room.blame.why("b") is None
