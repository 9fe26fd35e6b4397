"""What a scheduler or node tells, as it is printed where there is no terminal."""

from __future__ import annotations

import pytest

from parallax.cli.reporter import Reporter
from parallax.fabric.errors import SchedulerUnreachable
from parallax.fabric.events import (
    AwaitsApproval,
    Joined,
    Loading,
    NodeAsks,
    NodeJoined,
    NodeLeft,
    NodeStarted,
    Problem,
    Ready,
    Started,
    Stopped,
)


def test_programs_can_read_where_a_scheduler_listens(capsys: pytest.CaptureFixture[str]) -> None:
    command = "parallax join -s " + "1" * 100  # longer than a terminal is wide
    Reporter()(Started("id", 1, 2, 3, "http://127.0.0.1:1", command, "Not for open networks."))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "Page: http://127.0.0.1:1",
        f"Join: {command}",
        "Listening: http=1 enrol=2 cluster=3",
    ]
    assert err == "Not for open networks.\n"


def test_programs_can_read_where_a_node_listens(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter()(NodeStarted("12D3", "studio", 77, ""))
    assert capsys.readouterr() == ("Node 12D3 studio listening on 77\n", "")


def test_members_come_and_go_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    report = Reporter()
    report(NodeJoined("stu\x1bdio"))
    report(NodeLeft("studio", "silent for 3 s"))
    report(Joined("12D3", "10.0.0.1:3002"))
    report(Ready("builtin", 1))
    report(Ready("builtin", 2))
    report(Ready("builtin", 0))
    report(Loading("builtin layers 0 to 3: reading", 0.5))  # bars are for terminals
    report(Stopped())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Node studio joined",
        "Node studio left: silent for 3 s",
        "Joined 12D3 at 10.0.0.1:3002",
        "Ready: builtin, on 1 ring",
        "Ready: builtin, on 2 rings",
        "Ready: builtin",
    ]


def test_a_problem_that_stays_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    report = Reporter()
    gone = Problem(SchedulerUnreachable("The scheduler is gone", "refused", "wait"))
    for _ in range(3):
        report(gone)
    assert capsys.readouterr().err == "Problem: The scheduler is gone. refused. wait.\n"
    report(Joined("12D3", "10.0.0.1:3002"))
    report(gone)
    assert "Problem" in capsys.readouterr().err


def test_who_waits_and_who_decides_are_shown_the_same_fingerprint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = Reporter()
    report(AwaitsApproval("12D3", "7KQ2-MX4D-A3TB-ZC3E"))
    said = capsys.readouterr().err
    assert "Waiting to be let in. Fingerprint: 7KQ2-MX4D-A3TB-ZC3E" in said
    assert "parallax nodes approve 7KQ2-MX4D-A3TB-ZC3E" in said
    report(NodeAsks("stu\x1b[2Jdio", "10.0.0.9", "7KQ2-MX4D-A3TB-ZC3E"))
    said = capsys.readouterr().err
    assert "Node stu[2Jdio at 10.0.0.9 asks to be let in." in said
    assert "parallax nodes approve 7KQ2-MX4D-A3TB-ZC3E" in said
