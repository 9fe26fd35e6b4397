"""A cluster that is there to be hurt: a ring that needs several nodes, and nodes to spare."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster import Cluster, Process, boot
from tests.models import make_model

CONTEXT = 12_288
NODE_MEMORY = "22MB"  # two layers of the model and their caches, and not four
NEVER = "1000000"

QUIET = {
    # A spare stays one, whatever the plan thinks of a ring over all of them.
    "PARALLAX_LIMITS__REPLAN_MARGIN": NEVER,
}


def make_arena_model(folder: Path) -> Path:
    """A random float32 model of four heavy layers with small caches."""
    return make_model(
        folder,
        layers=4,
        hidden=256,
        intermediate_size=2048,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=CONTEXT,
    )


@dataclass
class Arena:
    """A cluster, and which process is which node."""

    cluster: Cluster
    model: Path
    journal: Path
    processes: dict[str, Process] = field(default_factory=dict)
    joined: int = 0

    def join(self, *flags: str, module: str = "parallax.cli.main") -> str:
        """Starts one more node and returns its name."""
        name = f"node{self.joined}"
        self.joined += 1
        self._start(name, *flags, module=module)
        return name

    def restart(self, name: str, *flags: str, module: str = "parallax.cli.main") -> None:
        """Kills a node and starts it again at once, as a service manager does."""
        self.kill(name)
        self._start(name, *flags, module=module)

    def _start(self, name: str, *flags: str, module: str) -> None:
        memory = ("--memory", NODE_MEMORY)
        self.processes[name] = self.cluster.join(name, *memory, *flags, module=module)

    def stage(self, number: int) -> str:
        """The node that has this stage of the first ring."""
        name: str = self.cluster.status()["rings"][0]["stages"][number]["name"]
        return name

    def let_go(self, name: str) -> Process:
        """A node's process, which the arena looks after no more."""
        process = self.processes.pop(name)
        self.cluster.nodes.remove(process)
        return process

    def kill(self, name: str) -> float:
        """Pulls a node's plug and says when."""
        process = self.let_go(name)
        at_s = time.monotonic()
        process.kill()
        process.stop()
        return at_s

    def restart_scheduler(self) -> float:
        """Kills the scheduler and starts it again at its ports; returns when it was killed."""
        cluster = self.cluster
        given = cluster.scheduler.child.args
        assert isinstance(given, list)
        arguments = [str(part) for part in given[3:]]
        arguments[arguments.index("--grpc-port") + 1] = str(cluster.enrol_port)
        arguments[arguments.index("--port") + 1] = str(cluster.http_port)
        at_s = time.monotonic()
        cluster.scheduler.kill()
        cluster.scheduler.stop()
        cluster.scheduler = Process(arguments, cluster.environment)
        cluster.scheduler.wait_for("Listening:")
        return at_s

    def leave(self, name: str) -> None:
        """Asks a node to end, and waits for it."""
        process = self.let_go(name)
        process.stop()

    def wait_prepared(self, timeout_s: float = 60.0) -> None:
        """Waits until the spares have made their self-checks for every stage that serves."""

        def prepared(status: dict[str, Any]) -> bool:
            stages = [stage["name"] for ring in status["rings"] for stage in ring["stages"]]
            spares = [name for name in self.processes if name not in stages]
            made = [list((self.cluster.folder / s / "verdicts").glob("*.json")) for s in spares]
            return all(len(verdicts) >= len(stages) for verdicts in made)

        self.cluster.wait(prepared, timeout_s)

    def wait_whole(self, stages: int, spares: int, timeout_s: float = 60.0) -> dict[str, Any]:
        """Waits for a ring of so many stages that serves, and so many nodes beside it."""

        def whole(status: dict[str, Any]) -> bool:
            rings = status["rings"]
            ready = sum(node["state"] == "ready" for node in status["node_list"])
            places = [stage["name"] for ring in rings for stage in ring["stages"]]
            return (
                bool(rings)
                and all(ring["status"] == "ready" for ring in rings)
                and all(len(ring["stages"]) == stages for ring in rings)
                and all(name in self.processes for name in places)
                and ready >= stages + spares
            )

        return self.cluster.wait(whole, timeout_s)


@contextmanager
def start(
    model: Path,
    *,
    wanted: int,
    flags: Sequence[str] = (),
    variables: dict[str, str] | None = None,
) -> Iterator[Arena]:
    """A scheduler that waits for so many nodes, and none of them yet."""
    journal = model.parent / f"journal-{time.monotonic_ns()}"
    journal.mkdir()
    given = ("--journal", str(journal), "--journal-tokens", *flags)
    with boot(
        model, 0, wanted=wanted, flags=given, variables={**QUIET, **(variables or {})}
    ) as cluster:
        yield Arena(cluster, model, journal)


@contextmanager
def arena(
    model: Path,
    *,
    stages: int = 2,
    spares: int = 1,
    flags: Sequence[str] = (),
    variables: dict[str, str] | None = None,
    module: str = "parallax.cli.main",
) -> Iterator[Arena]:
    """A ring of two stages at least, and nodes that have nothing to do."""
    with start(model, wanted=stages, flags=flags, variables=variables) as made:
        for _ in range(stages):
            made.join(module=module)
        made.wait_whole(stages, 0)
        for _ in range(spares):
            made.join(module=module)
        made.wait_whole(stages, spares)
        yield made
