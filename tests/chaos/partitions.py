"""Machines on a switch, and what cuts them off from each other without a word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.arena import NODE_MEMORY, QUIET
from tests.chaos.history import History
from tests.cluster import Process
from tests.network.namespaces import Machine, network, shape

NOBODY = "02:00:00:00:00:01"  # a hardware address that no machine has


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def _tc(*arguments: str) -> None:
    subprocess.run(["tc", *arguments], check=True, capture_output=True, text=True, timeout=20)


@dataclass
class Room:
    """A scheduler and nodes, each on a machine of its own."""

    machines: list[Machine]  # the scheduler's first
    journal: Path
    environment: dict[str, str]
    scheduler: Process
    http_port: int
    nodes: dict[str, Process]

    @property
    def url(self) -> str:
        """Where HTTP is, for processes on the scheduler's machine."""
        return f"http://127.0.0.1:{self.http_port}"

    def status(self) -> dict[str, Any]:
        """The cluster's status."""
        done = subprocess.run(
            [
                *self.machines[0].prefix,
                *(sys.executable, "-c"),
                "import sys, urllib.request as r; "
                "print(r.urlopen(sys.argv[1], timeout=30).read().decode())",
                self.url + "/cluster/status_json",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        data: dict[str, Any] = json.loads(done.stdout)["data"]
        return data

    def machine(self, name: str) -> Machine:
        """The machine of a node."""
        return self.machines[1 + int(name.removeprefix("node"))]

    @contextmanager
    def asking(self, body: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
        """A client on the scheduler's machine; its first text has come when this is entered."""
        client = subprocess.Popen(
            [*self.machines[0].prefix, sys.executable, "-m", "tests.chaos.asker", self.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            text=True,
        )
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            client.stdin.write(json.dumps(body))
            client.stdin.close()
            client.stdin = None  # or communicate would flush it
            assert client.stdout.readline() == "begun\n"
            yield client
        finally:
            client.kill()
            client.wait()
            client.stdout.close()

    @contextmanager
    def one_way(self, sender: str, receiver: str) -> Iterator[None]:
        """Nothing that one node sends reaches the other; the other way is open."""
        here, there = self.machine(sender), self.machine(receiver)
        entry = (there.address, "lladdr", NOBODY, "dev", "eth0", "nud", "permanent")
        _ip("-n", here.namespace, "neigh", "replace", *entry)
        try:
            yield
        finally:
            _ip("-n", here.namespace, "neigh", "del", there.address, "dev", "eth0")

    @contextmanager
    def slowed(self, machine: Machine, bits_s: int, queue_s: float) -> Iterator[None]:
        """A machine's cable carries so much, each way, behind queues that hold so many seconds."""
        ends = ((machine.namespace, "eth0"), self._port(machine))
        with ExitStack() as stack:
            for namespace, device in ends:
                where = ("dev", device, "root")
                _tc("-n", namespace, "qdisc", "add", *where, *shape(bits_s, queue_s))
                stack.callback(_tc, "-n", namespace, "qdisc", "del", *where)
            yield

    def _port(self, machine: Machine) -> tuple[str, str]:
        """Where a machine's cable ends: the switch's namespace, and its port."""
        run = machine.namespace.rpartition("-")[0]
        return f"{run}-switch", f"port{self.machines.index(machine) + 1}"

    @contextmanager
    def cut_off(self, machine: Machine) -> Iterator[None]:
        """Neither does anything reach this machine, nor does it reach anybody."""
        switch, port = self._port(machine)
        cable = ("-n", switch, "link", "set", port)
        _ip(*cable, "nomaster")  # its cable leads nowhere now, and nobody's light goes out
        try:
            yield
        finally:
            _ip(*cable, "master", "br0")


def seen_by(client: subprocess.Popen[str], timeout_s: float = 150.0) -> History:
    """What a client saw, once it has ended."""
    out, _ = client.communicate(timeout=timeout_s)
    return History(**json.loads(out.splitlines()[-1]))


@contextmanager
def room(
    model: Path, folder: Path, nodes: int, variables: dict[str, str] | None = None
) -> Iterator[Room]:
    """A scheduler that wants two stages, and so many nodes; a ring serves."""
    journal = folder / "journal"
    journal.mkdir()
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        **QUIET,
        **(variables or {}),
        "HOME": str(folder),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join((str(root / ".typing"), str(root))),
    }
    with network(1 + nodes) as machines, ExitStack() as stack:
        for machine in machines:  # one address each, or there were ways around a cut
            off = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"
            subprocess.run([*machine.prefix, "sh", "-c", off], check=True, timeout=20)
        run = ["run", "-m", str(model), "-n", "2", "--open", "--port", "0", "--grpc-port", "0"]
        run += ["--state-dir", str(folder / "scheduler")]
        run += ["--journal", str(journal), "--journal-tokens"]
        scheduler = Process(run, environment, prefix=machines[0].prefix)
        stack.callback(scheduler.stop)
        ports = scheduler.wait_for(r"Listening: http=(\d+) enrol=(\d+)")
        made: dict[str, Process] = {}
        for number, machine in enumerate(machines[1:]):
            name = f"node{number}"
            join = ["join", "-s", f"{machines[0].address}:{ports.group(2)}", "--name", name]
            join += ["--state-dir", str(folder / name), "--memory", NODE_MEMORY]
            made[name] = Process(join, environment, prefix=machine.prefix)
            stack.callback(made[name].stop)
            made[name].wait_for("Joined ")
        scheduler.wait_for("Ready: ")
        yield Room(machines, journal, environment, scheduler, int(ports.group(1)), made)
