from __future__ import annotations

import dataclasses
import random

import pytest

from parallax.fabric.limits import Limits
from parallax.scheduler.membership import (
    FORGET_S,
    STARVED_PATIENCE,
    Change,
    Membership,
    NodeArrived,
    NodeFacts,
    NodeGone,
    NodeReady,
    NodeRecovered,
    NodeState,
    NodeSuspected,
    Refused,
    Versions,
)

OURS = Versions(protocol=1, mlx="0.32.4", mlx_lm="0.32.2")
LIMITS = Limits(heartbeat_s=1.0, silence_s=3.0)


def facts(node_id: str = "a") -> NodeFacts:
    return NodeFacts(node_id, f"Mac {node_id}", "M9", "macOS", 16 << 30, 12 << 30, 1e11, 1e12)


def membership() -> Membership:
    return Membership(OURS, LIMITS)


def ready(now: float = 0.0) -> Membership:
    """One node "a", ready, on stream 1."""
    members = membership()
    members.hello(facts(), OURS, 7, stream=1, now=now)
    members.heartbeat(1, starved=False, now=now)
    members.tick(now)
    return members


def run_clock(members: Membership, begin: float, end: float) -> list[Change]:
    changes: list[Change] = []
    for half_seconds in range(int(begin * 2), int(end * 2) + 1):
        changes += members.tick(half_seconds / 2)
    return changes


def state(members: Membership, node_id: str = "a") -> NodeState:
    member = members.get(node_id)
    assert member is not None
    return member.state


def test_a_hello_brings_a_node_in_and_a_heartbeat_makes_it_ready() -> None:
    members = membership()
    assert members.hello(facts(), OURS, 7, stream=1, now=0.0) == [NodeArrived("a", 1)]
    assert state(members) is NodeState.JOINING
    assert members.heartbeat(1, starved=False, now=1.0) == [NodeReady("a", 1)]
    assert members.heartbeat(1, starved=False, now=2.0) == []
    assert state(members) is NodeState.READY


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [("protocol", 2, "protocol"), ("mlx", "0.32.5", "mlx"), ("mlx_lm", "0.31.0", "mlx-lm")],
)
def test_a_node_of_another_version_is_refused_with_both_versions(
    field: str, value: object, name: str
) -> None:
    members = membership()
    theirs = dataclasses.replace(OURS, **{field: value})
    (change,) = members.hello(facts(), theirs, 7, stream=1, now=0.0)
    assert isinstance(change, Refused)
    assert (change.node_id, change.stream) == ("a", 1)
    assert change.error.fields == {
        "ours": change.error.fields["ours"],
        "theirs": change.error.fields["theirs"],
    }
    assert name in change.error.what
    assert str(value) in change.error.fields["theirs"]
    assert str(getattr(OURS, field)) in change.error.fields["ours"]
    assert change.error.fix
    assert members.members() == []
    assert members.heartbeat(1, starved=False, now=1.0) == []


def test_a_refused_hello_leaves_the_present_node_of_that_id_alone() -> None:
    members = ready()
    members.hello(facts(), dataclasses.replace(OURS, mlx="9"), 8, stream=2, now=1.0)
    assert state(members) is NodeState.READY
    assert members.broken(2, now=1.0) == []
    assert state(members) is NodeState.READY


def test_silence_makes_a_suspect_and_then_takes_the_node_out() -> None:
    members = ready()
    assert run_clock(members, 0.5, 2.5) == []
    assert members.tick(3.0) == [NodeSuspected("a", 1, 3.0)]
    assert run_clock(members, 3.5, 5.5) == []
    (change,) = members.tick(6.0)
    assert isinstance(change, NodeGone)
    assert "silent" in change.reason
    assert state(members) is NodeState.GONE


def test_a_suspect_that_speaks_recovers() -> None:
    members = ready()
    run_clock(members, 0.5, 4.0)
    assert state(members) is NodeState.SUSPECT
    assert members.heartbeat(1, starved=False, now=4.2) == [NodeRecovered("a", 1)]
    assert run_clock(members, 4.5, 7.0) == []


def test_a_node_that_never_beats_after_its_hello_goes_too() -> None:
    members = membership()
    members.hello(facts(), OURS, 7, stream=1, now=0.0)
    changes = run_clock(members, 0.0, 6.0)
    assert [type(change) for change in changes] == [NodeSuspected, NodeGone]


def test_a_starved_node_gets_more_patience() -> None:
    members = ready()
    members.heartbeat(1, starved=True, now=0.0)
    patience = 3.0 * STARVED_PATIENCE
    assert run_clock(members, 0.5, patience - 0.5) == []
    assert members.tick(patience) == [NodeSuspected("a", 1, patience)]
    members.heartbeat(1, starved=False, now=patience)
    assert [type(c) for c in run_clock(members, patience, patience + 3)] == [NodeSuspected]


def test_a_broken_stream_is_gone_at_once_and_may_come_back() -> None:
    members = ready()
    (gone,) = members.broken(1, now=0.1)
    assert gone == NodeGone("a", 1, "its connection broke", 7)
    assert members.usable() == []
    assert members.hello(facts(), OURS, 7, stream=2, now=0.2) == [NodeArrived("a", 2)]
    assert [m.stream for m in members.usable()] == [2]


def test_a_goodbye_gives_its_reason() -> None:
    members = ready()
    assert members.goodbye(1, "shutting down", now=1.0) == [
        NodeGone("a", 1, "shutting down", 7, farewell=True)
    ]
    assert members.broken(1, now=1.1) == []


def test_a_restarted_node_replaces_itself() -> None:
    members = ready()
    gone, arrived = members.hello(facts(), OURS, 8, stream=2, now=1.0)
    assert gone == NodeGone("a", 1, "it was started again", 7)
    assert arrived == NodeArrived("a", 2)
    assert len(members.members()) == 1


def test_late_words_of_an_old_stream_do_not_touch_the_new_one() -> None:
    members = ready()
    members.hello(facts(), OURS, 7, stream=2, now=1.0)
    members.heartbeat(2, starved=False, now=1.0)
    assert members.broken(1, now=1.1) == []
    assert members.goodbye(1, "bye", now=1.1) == []
    assert members.heartbeat(1, starved=True, now=1.2) == []
    member = members.get("a")
    assert member is not None
    assert (member.state, member.stream, member.starved) == (NodeState.READY, 2, False)


def test_a_scheduler_that_slept_blames_nobody() -> None:
    members = ready()
    members.heartbeat(1, starved=False, now=1.0)
    members.tick(1.0)
    assert members.tick(61.0) == []
    assert members.tick(62.0) == []
    assert run_clock(members, 62.5, 63.5) == []
    assert [type(c) for c in run_clock(members, 64.0, 67.5)] == [NodeSuspected, NodeGone]


def test_a_node_that_is_gone_is_listed_for_a_while_and_then_forgotten() -> None:
    members = ready()
    members.broken(1, now=1.0)
    members.tick(FORGET_S)
    assert state(members) is NodeState.GONE
    members.tick(FORGET_S + 1.0)
    assert members.members() == []


def test_members_are_listed_by_id() -> None:
    members = membership()
    for stream, node_id in enumerate("cab"):
        members.hello(facts(node_id), OURS, 1, stream=stream, now=0.0)
    assert [m.facts.node_id for m in members.members()] == ["a", "b", "c"]


@pytest.mark.parametrize("seed", range(30))
def test_arrivals_and_departures_always_alternate(seed: int) -> None:
    """In whatever order things happen, a node arrives, goes, arrives, …, one stream at a time."""
    chance = random.Random(seed)
    members = membership()
    present: dict[str, int] = {}
    stream = 0
    now = 0.0
    for _ in range(400):
        now += chance.choice([0.0, 0.3, 1.0, 2.0])
        which = chance.randint(1, stream + 1)
        event = chance.randrange(6)
        if event == 0:
            stream += 1
            theirs = chance.choice([OURS, OURS, dataclasses.replace(OURS, mlx="9")])
            node_id = chance.choice("abc")
            changes = members.hello(
                facts(node_id), theirs, chance.randrange(3), stream=stream, now=now
            )
        elif event == 1:
            changes = members.broken(which, now=now)
        elif event == 2:
            changes = members.goodbye(which, "", now=now)
        elif event == 3:
            changes = members.tick(now)
        else:
            changes = members.heartbeat(which, starved=chance.random() < 0.2, now=now)
        for change in changes:
            if isinstance(change, NodeArrived):
                assert change.node_id not in present
                present[change.node_id] = change.stream
            elif isinstance(change, NodeGone):
                assert present.pop(change.node_id) == change.stream
            elif not isinstance(change, Refused):
                assert present[change.node_id] == change.stream
        assert {m.facts.node_id: m.stream for m in members.usable()} == present
