"""Three machines on one network: a scheduler and two nodes find each other by themselves."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.processes import COMMAND, Running, environment, running
from tests.models import make_model
from tests.network.namespaces import Machine, network, require

pytestmark = pytest.mark.network_namespaces

SCHEDULER_ID = "12D3KooWM6CgA9iBFZmcYAHA6A2qvbAxqfkmrYiRQuz3XEsk4Ksv"
OTHER_ID = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"

ADVERTISE = """
import asyncio, sys
from parallax.fabric.discovery import advertise

async def main():
    async with advertise(
        peer_id=sys.argv[1], name=sys.argv[2], enrol_port=3002, loopback_only=False
    ):
        print("advertised", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""
FIND = """
import asyncio, json, sys
from parallax.fabric.discovery import find_scheduler
from parallax.fabric.errors import ParallaxError

try:
    target = asyncio.run(find_scheduler(None, float(sys.argv[1])))
    found = {"peer_id": target.peer_id, "hosts": [e.host for e in target.endpoints]}
except ParallaxError as error:
    found = {"error": type(error).__name__, "fix": error.fix}
print(json.dumps(found))
"""


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    require()
    with network(3) as made:
        yield made


@contextlib.contextmanager
def advertising(home: Path, machine: Machine, peer_id: str, name: str) -> Iterator[None]:
    process = subprocess.Popen(
        [*machine.prefix, sys.executable, "-c", ADVERTISE, peer_id, name],
        env=environment(home),
        cwd=home,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "advertised\n"
        yield
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def find(home: Path, machine: Machine, timeout_s: float) -> dict[str, object]:
    done = subprocess.run(
        [*machine.prefix, sys.executable, "-c", FIND, str(timeout_s)],
        env=environment(home),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_only_scheduler_is_found_from_every_machine(
    tmp_path: Path, machines: list[Machine]
) -> None:
    with advertising(tmp_path, machines[0], SCHEDULER_ID, "studio"):
        for machine in machines:
            found = find(tmp_path, machine, 20)
            assert found["peer_id"] == SCHEDULER_ID
            assert "10.77.0.1" in found["hosts"]  # type: ignore[operator]
            assert "127.0.0.1" not in found["hosts"]  # type: ignore[operator]


def test_two_schedulers_have_to_be_told_apart(tmp_path: Path, machines: list[Machine]) -> None:
    with (
        advertising(tmp_path, machines[0], SCHEDULER_ID, "studio"),
        advertising(tmp_path, machines[1], OTHER_ID, "attic"),
    ):
        found = find(tmp_path, machines[2], 20)
    assert found["error"] == "BadSetting"
    assert f"parallax join -s {SCHEDULER_ID}   (studio)" in str(found["fix"])
    assert f"parallax join -s {OTHER_ID}   (attic)" in str(found["fix"])


def test_a_scheduler_on_another_network_is_not_found(
    tmp_path: Path, machines: list[Machine]
) -> None:
    with network(1) as (elsewhere,), advertising(tmp_path, elsewhere, SCHEDULER_ID, "far"):
        assert find(tmp_path, machines[0], 2)["error"] == "SchedulerNotFound"


def test_the_doctor_sees_the_interface_and_the_scheduler(
    tmp_path: Path, machines: list[Machine]
) -> None:
    with advertising(tmp_path, machines[0], SCHEDULER_ID, "studio"):
        done = subprocess.run(
            [*machines[1].prefix, *COMMAND, "doctor"],
            cwd=tmp_path,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stdout
    assert "ok    ethernet: 10.77.0.2 (eth0)" in done.stdout
    assert f"ok    schedulers: studio ({SCHEDULER_ID})" in done.stdout


def ask(home: Path, machine: Machine, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command on one machine, run to its end."""
    done = subprocess.run(
        [*machine.prefix, *COMMAND, *arguments],
        cwd=home,
        env=environment(home / machine.namespace),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_node_that_is_let_in_and_one_with_the_join_command_serve_a_chat(
    tmp_path: Path, machines: list[Machine]
) -> None:
    model = make_model(tmp_path / "tiny", layers=4, hidden=32)
    brain, *muscles = machines
    with ExitStack() as stack:

        def start(machine: Machine, *arguments: str) -> Running:
            home = tmp_path / machine.namespace
            home.mkdir()
            return stack.enter_context(running(home, *arguments, prefix=machine.prefix))

        scheduler = start(brain, "run", "-m", str(model), "-n", "2")
        command = shlex.split(scheduler.wait_for("Join: "))
        scheduler.wait_for("Listening: ")
        told_nothing = start(muscles[0], "join", "--name", muscles[0].address)
        mark = told_nothing.wait_for("Waiting to be let in. Fingerprint: ")
        invited = start(muscles[1], *command[1:], "--name", muscles[1].address)
        invited.wait_for("Joined 12D3KooW")
        approval = ask(tmp_path, brain, "nodes", "approve", mark)
        assert muscles[0].address in approval.stdout
        told_nothing.wait_for("Joined 12D3KooW")
        nodes = [told_nothing, invited]
        scheduler.wait_for("Ready: ", timeout_s=120)
        prompt = ("chat", "hello", "--temperature", "0", "--max-tokens", "16")
        assert ask(tmp_path, brain, *prompt).stdout.strip()
        status = ask(tmp_path, brain, "status", "--json")
        cluster = json.loads(status.stdout)
        assert {node["name"] for node in cluster["node_list"]} == {"10.77.0.2", "10.77.0.3"}
        (first, cut), (again, last) = sorted(node["layers"] for node in cluster["node_list"])
        assert (first, again, last) == (0, cut, 4)
        for process in (*nodes, scheduler):
            assert process.end() == 0
            assert not any("Traceback" in line for line in process.lines)
