"""``parallax run`` and ``parallax join`` as real processes on loopback."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.canned import canned
from tests.cli.processes import Running, parallax, running

STRANGER = "12D3KooWM6CgA9iBFZmcYAHA6A2qvbAxqfkmrYiRQuz3XEsk4Ksv"
LOOPBACK = ("--loopback-only", "--grpc-port", "0")


@dataclass(frozen=True)
class Scheduler:
    """A running scheduler and what it printed."""

    process: Running
    page: str
    peer_id: str
    ports: dict[str, int]


@contextmanager
def scheduler(home: Path, *flags: str) -> Iterator[Scheduler]:
    home.mkdir(exist_ok=True)
    with running(home, "run", "--port", "0", *LOOPBACK, *flags) as process:
        page = process.wait_for("Page: ")
        join = process.wait_for("Join: ")
        ports = dict(pair.split("=") for pair in process.wait_for("Listening: ").split())
        match = re.fullmatch(r"parallax join -s (12D3KooW\w+) --token pxt_\w+", join)
        assert match, join
        yield Scheduler(process, page, match[1], {name: int(p) for name, p in ports.items()})


@contextmanager
def node(home: Path, *flags: str) -> Iterator[Running]:
    home.mkdir(exist_ok=True)
    with running(home, "join", *LOOPBACK, *flags) as process:
        yield process


def names(page: str, home: Path) -> list[str]:
    done = parallax(home, "nodes", "--json", "--url", page)
    assert done.returncode == 0, done.stderr
    return [entry["name"] for entry in json.loads(done.stdout)]


def test_a_scheduler_prints_where_it_listens_and_ends_cleanly(tmp_path: Path) -> None:
    with scheduler(tmp_path) as started:
        assert started.page == f"http://127.0.0.1:{started.ports['http']}"
        assert parallax(tmp_path, "status", "--url", started.page).returncode == 0
        assert started.process.end(signal.SIGTERM) == 0
    assert not any("Traceback" in line for line in started.process.lines)
    for port in started.ports.values():  # free again
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


def test_a_schedulers_identity_stays_with_its_state_directory(tmp_path: Path) -> None:
    with scheduler(tmp_path) as first:
        first.process.end()
    with scheduler(tmp_path) as again:
        again.process.end()
    with scheduler(tmp_path, "--state-dir", str(tmp_path / "other")) as other:
        other.process.end()
    assert first.peer_id == again.peer_id
    assert first.peer_id != other.peer_id


@pytest.mark.parametrize("form", ["{id}", "127.0.0.1:{enrol}", "{id}@127.0.0.1:{enrol}"])
def test_a_node_joins_by_every_form_of_the_schedulers_address(tmp_path: Path, form: str) -> None:
    with scheduler(tmp_path / "scheduler") as brain:
        target = form.format(id=brain.peer_id, enrol=brain.ports["enrol"])
        with node(tmp_path / "node", "-s", target, "--name", "attic", "--memory", "1GB") as member:
            listening = member.wait_for("Node 12D3KooW")
            assert re.fullmatch(r"\w+ attic listening on \d+", listening)
            assert member.wait_for(f"Joined {brain.peer_id} at 127.0.0.1:")
            brain.process.wait_for("Node attic joined")
            assert names(brain.page, tmp_path) == ["attic"]
            assert member.end(signal.SIGTERM) == 0


def test_two_clusters_live_on_one_machine(tmp_path: Path) -> None:
    with scheduler(tmp_path / "a") as first, scheduler(tmp_path / "b") as second:
        target = f"127.0.0.1:{second.ports['enrol']}"
        with node(tmp_path / "node", "-s", target, "--name", "attic") as member:
            second.process.wait_for("Node attic joined")
            assert names(first.page, tmp_path) == []
            assert names(second.page, tmp_path) == ["attic"]
            member.end()


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_taken_port_exits_with_6_and_names_it(tmp_path: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = str(taken.getsockname()[1])
        ports = {"--port": "0", "--grpc-port": "0"} | {flag: port}
        flags = [word for pair in ports.items() for word in pair]
        done = parallax(tmp_path, "run", "--loopback-only", *flags)
    assert done.returncode == 6
    assert f"Port {port}" in done.stderr
    assert flag in done.stderr
    assert "Traceback" not in done.stderr


def test_joining_nobody_exits_with_5_and_advice(tmp_path: Path) -> None:
    with socket.socket() as deaf:  # bound and not listening: refused
        deaf.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{deaf.getsockname()[1]}"
        done = parallax(tmp_path, "join", *LOOPBACK, "-s", target)
    assert done.returncode == 5
    assert f"The scheduler at {target} does not answer" in done.stderr
    assert "parallax run" in done.stderr


def test_joining_a_peer_that_is_not_on_the_network_exits_with_5(tmp_path: Path) -> None:
    done = parallax(
        tmp_path, "join", *LOOPBACK, "-s", STRANGER, PARALLAX_LIMITS__CALL_S="1", timeout_s=60
    )
    assert done.returncode == 5
    assert f"No scheduler {STRANGER} was found" in done.stderr


def test_joining_a_web_server_exits_with_5(tmp_path: Path) -> None:
    with canned() as web:
        done = parallax(tmp_path, "join", *LOOPBACK, "-s", web.url.removeprefix("http://"))
    assert done.returncode == 5
    assert "Traceback" not in done.stderr


def test_joining_another_scheduler_than_was_meant_exits_with_5(tmp_path: Path) -> None:
    with scheduler(tmp_path / "scheduler") as brain:
        target = f"{STRANGER}@127.0.0.1:{brain.ports['enrol']}"
        done = parallax(tmp_path, "join", *LOOPBACK, "-s", target)
        assert done.returncode == 5
        assert f"it is {brain.peer_id}, not {STRANGER}" in done.stderr
        brain.process.end()
