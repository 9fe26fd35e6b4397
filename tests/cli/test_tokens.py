"""``tokens`` and ``nodes`` against a running scheduler, and how they read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallax.cli.tables import span
from parallax.cli.tokens import seconds
from parallax.fabric.errors import BadSetting
from tests.cli.canned import STATUS, canned, message
from tests.cli.processes import parallax
from tests.cluster import Cluster, boot

PENDING = {
    "node_id": "12D3KooWStranger",
    "name": "at\x1b[2Jtic",
    "address": "10.0.0.9",
    "fingerprint": "7KQ2-MX4D-A3TB-ZC3E",
    "since": 1.0,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with boot(None, nodes=0) as cluster:
        yield cluster


def test_a_token_is_made_listed_and_revoked(tmp_path: Path, cluster: Cluster) -> None:
    where = ("--url", cluster.url)
    made = parallax(
        tmp_path, "tokens", "create", "--expires", "90m", "--uses", "3", "--note", "attic", *where
    )
    assert made.returncode == 0, made.stderr
    command = cluster.status()["node_join_command"]
    assert made.stdout.startswith(f"{command} --token pxt_")
    token = made.stdout.split()[-1]
    token_id = made.stderr.split()[1].rstrip(",")
    table = parallax(tmp_path, "tokens", "list", *where)
    (row,) = [line for line in table.stdout.splitlines() if token_id in line]
    assert row.split() == [token_id, "good", "0", "of", "3", "in", "1", "h", "30", "min", "attic"]
    assert "made by parallax run" in table.stdout
    assert token not in table.stdout
    assert parallax(tmp_path, "tokens", "revoke", token_id, *where).returncode == 0
    listed = json.loads(parallax(tmp_path, "tokens", "list", "--json", *where).stdout)
    assert [t["state"] for t in listed if t["id"] == token_id] == ["revoked"]
    missing = parallax(tmp_path, "tokens", "revoke", "beef", *where)
    assert missing.returncode == 2
    assert "parallax tokens list" in missing.stderr
    assert not any(token in line for line in cluster.scheduler.lines)


def test_the_printed_join_command_has_a_token_and_the_status_has_none(cluster: Cluster) -> None:
    printed = cluster.scheduler.wait_for(r"Join: (.*)").group(1)
    assert cluster.get("/node/join/command") == {"type": "node_join_command", "data": printed}
    command, token = printed.split(" --token ")
    status = cluster.status()
    assert status["node_join_command"] == command
    assert status["open"] is False
    assert status["pending_nodes"] == []
    assert token not in json.dumps(status)


def test_open_is_said_loudly(tmp_path: Path) -> None:
    with boot(None, nodes=0, flags=["--open"]) as cluster:
        cluster.scheduler.wait_for("ADMISSION IS OFF")
        assert "--token" not in cluster.scheduler.wait_for("Join: (.*)").group(1)
        status = cluster.status()
        assert status["open"] is True
        assert "ADMISSION IS OFF" in status["notice"]
        assert "ADMISSION IS OFF" in parallax(tmp_path, "status", "--url", cluster.url).stdout


@pytest.mark.parametrize("verb", ["approve", "deny"])
def test_a_node_that_nobody_knows_exits_with_2(tmp_path: Path, cluster: Cluster, verb: str) -> None:
    done = parallax(tmp_path, "nodes", verb, "AAAA-BBBB-CCCC-DDDD", "--url", cluster.url)
    assert done.returncode == 2
    assert "No node 'AAAA-BBBB-CCCC-DDDD' waits here" in done.stderr


def test_who_waits_is_shown_with_its_fingerprint(tmp_path: Path) -> None:
    with canned() as server:
        server.answers["/cluster/status_json"] = (
            200,
            message({**STATUS, "pending_nodes": [PENDING]}),
        )
        for verb in ("nodes", "status"):
            shown = parallax(tmp_path, verb, "--url", server.url).stdout
            assert "\x1b" not in shown
            (row,) = [line for line in shown.splitlines() if "10.0.0.9" in line]
            assert row.split()[:3] == ["at[2Jtic", "10.0.0.9", "7KQ2-MX4D-A3TB-ZC3E"]
        listed = json.loads(parallax(tmp_path, "nodes", "--json", "--url", server.url).stdout)
        assert listed[-1] == {**PENDING, "state": "pending"}


def test_who_was_let_in_and_is_not_here_is_shown_with_its_whole_id(tmp_path: Path) -> None:
    absent = {"node_id": "12D3KooW" + "x" * 44, "name": "at\x1b[2Jtic", "since": 0.0}
    with canned() as server:
        told = (200, message({**STATUS, "absent_nodes": [absent]}))
        server.answers["/cluster/status_json"] = told
        shown = parallax(tmp_path, "nodes", "--url", server.url).stdout
        assert "\x1b" not in shown
        assert absent["node_id"] in shown
        listed = json.loads(parallax(tmp_path, "nodes", "--json", "--url", server.url).stdout)
        assert listed[-1] == {**absent, "state": "absent"}


def test_a_flag_before_the_verb_is_not_swallowed(tmp_path: Path) -> None:
    done = parallax(tmp_path, "nodes", "--url", "http://127.0.0.1:1", "approve", "X")
    assert done.returncode == 2
    assert "behind the verb" in done.stderr


@pytest.mark.parametrize(
    ("text", "length"),
    [("90s", 90), ("30m", 1800), ("24h", 86_400), ("7d", 604_800), ("1.5H", 5400)],
)
def test_lengths_of_time_are_understood(text: str, length: float) -> None:
    assert seconds(text) == length


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "0h", "1w", "inf"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(BadSetting, match="no length of time"):
        seconds(text)


def test_lengths_of_time_are_written_as_people_do() -> None:
    told = [span(s) for s in (0, 59, 3 * 3600 + 12 * 60, -(2 * 86_400 + 4 * 3600 + 60), 60)]
    assert told == ["in 0 min", "in 1 min", "in 3 h 12 min", "2 d 4 h ago", "in 1 min"]
