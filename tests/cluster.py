"""A whole cluster of real processes on loopback, for tests and benchmarks.

``with boot(model, nodes=2) as cluster:`` starts ``parallax run`` and so many
``parallax join``, all on free ports with state directories of their own, waits
until the model answers, and ends every process it started.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

READY_S = 60.0
# What nodes have found out of this machine's speed and of cuts of models, as their state
# directories keep it for the next start. Of a start without it, it is half of the time.
_found_out: dict[Path, bytes] | None = None


def share_what_nodes_find_out() -> None:
    """From now on, only the first nodes of this process measure and check for themselves."""
    global _found_out  # noqa: PLW0603
    _found_out = {}


class Process:
    """One child process and what it has printed; ``module`` may stand in for the command.

    ``prefix`` is what it is started with, such as ``ip netns exec NAME``.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: dict[str, str],
        module: str = "parallax.cli.main",
        prefix: Sequence[str] = (),
    ) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self.child = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = READY_S) -> re.Match[str]:
        """The first line that matches; fails when the process ends before it."""
        deadline = time.monotonic() + timeout_s
        seen = 0
        with self._changed:
            while True:
                for line in self.lines[seen:]:
                    found = re.search(pattern, line)
                    if found:
                        return found
                seen = len(self.lines)
                if not self._reader.is_alive():
                    raise AssertionError(f"it ended without {pattern!r}:\n{self.output}")
                self._changed.wait(max(0.0, min(1.0, deadline - time.monotonic())))
                if time.monotonic() >= deadline:
                    raise AssertionError(f"no {pattern!r} in {timeout_s} s:\n{self.output}")

    def stop(self, timeout_s: float = 20.0) -> int:
        """Asks it to end, insists after ``timeout_s``, and returns its exit status."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
        try:
            self.child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self._reader.join(5)
        if self.child.stdout is not None:
            self.child.stdout.close()
        return self.child.returncode

    def ended(self, timeout_s: float = READY_S) -> int:
        """Its exit status, once it has ended by itself and all it printed has been read."""
        status = self.child.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def kill(self) -> None:
        """Ends it at once, as a pulled plug does."""
        self.child.kill()
        self.child.wait()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


@dataclass
class Cluster:
    """Processes and addresses of a running cluster."""

    folder: Path
    environment: dict[str, str]
    scheduler: Process
    http_port: int
    enrol_port: int
    nodes: list[Process] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def join(self, name: str, *flags: str, module: str = "parallax.cli.main") -> Process:
        """Starts one more node."""
        self._learn()
        for found, content in (_found_out or {}).items():
            file = self.folder / name / found
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        node = Process(
            [
                "join",
                "-s",
                f"127.0.0.1:{self.enrol_port}",
                "--state-dir",
                str(self.folder / name),
                "--name",
                name,
                *flags,
            ],
            self.environment,
            module,
        )
        self.nodes.append(node)
        return node

    @property
    def headers(self) -> dict[str, str]:
        """What lets this user in, as it does the command."""
        told = json.loads((self.folder / "scheduler" / "cli.key").read_text())
        return {"Authorization": f"Bearer {told['key']}"}

    def process(self, name: str) -> Process:
        """The newest process of a node."""
        named = [n for n in self.nodes if name in map(str, n.child.args)]  # type: ignore[arg-type]
        return named[-1]

    def holder(self, stage: int) -> Process:
        """The process of the node that has this stage of the first ring."""
        return self.process(self.status()["rings"][0]["stages"][stage]["name"])

    def start_scheduler_again(self) -> None:
        """With the same state and ports, once the one before has ended."""
        self.scheduler.stop()
        arguments = [str(argument) for argument in self.scheduler.child.args[3:]]  # type: ignore[index]
        arguments[arguments.index("--grpc-port") + 1] = str(self.enrol_port)
        arguments[arguments.index("--port") + 1] = str(self.http_port)
        self.scheduler = Process(arguments, self.environment)

    def get(self, path: str, timeout_s: float = 60.0) -> Any:
        """A JSON answer."""
        return self._ask(urllib.request.Request(self.url + path, headers=self.headers), timeout_s)

    def post(self, path: str, body: object, timeout_s: float = 300.0) -> Any:
        """A JSON answer to a JSON body."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers=self.headers | {"Content-Type": "application/json"},
        )
        return self._ask(request, timeout_s)

    def _ask(self, request: urllib.request.Request, timeout_s: float) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                error.add_note(error.read().decode())
            raise

    def chat(self, prompt: str, **fields: Any) -> Any:
        """One chat completion, not streamed."""
        body = {"messages": [{"role": "user", "content": prompt}], **fields}
        return self.post("/v1/chat/completions", body)

    def stream(self, prompt: str, seen: Callable[[], object], **fields: Any) -> str:
        """The text of one streamed answer; ``seen`` is called whenever more of it is there."""
        body = {"messages": [{"role": "user", "content": prompt}], "stream": True, **fields}
        request = urllib.request.Request(
            self.url + "/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers=self.headers | {"Content-Type": "application/json"},
        )
        text = ""
        with urllib.request.urlopen(request, timeout=300) as answer:
            for line in answer:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                if more := event["choices"][0]["delta"].get("content"):
                    text += more
                    seen()
        return text

    def answers_in_full(self, prompt: str, tokens: int) -> bool:
        """Whether an answer has so many tokens; what would end it sooner does not count."""
        said = self.chat(prompt, max_tokens=tokens, ignore_eos=True)
        return bool(said["usage"]["completion_tokens"] == tokens)

    def status(self) -> dict[str, Any]:
        """The ``data`` of the cluster's status."""
        data: dict[str, Any] = self.get("/cluster/status_json")["data"]
        return data

    def wait(
        self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = READY_S
    ) -> dict[str, Any]:
        """The first status that meets a condition."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.status()
            if condition(status):
                return status
            processes = (self.scheduler, *self.nodes)
            ended = {p.child.pid: p.child.poll() for p in processes if p.child.poll() is not None}
            if time.monotonic() > deadline:
                logs = "\n---\n".join(p.output for p in (self.scheduler, *self.nodes))
                raise AssertionError(f"never: {json.dumps(status, indent=1)}\n{ended}\n{logs}")
            time.sleep(0.05)

    def wait_ready(self, rings: int = 1) -> dict[str, Any]:
        """Waits until so many rings serve."""
        return self.wait(
            lambda s: sum(r["status"] == "ready" for r in s["rings"]) >= rings,
        )

    def _learn(self) -> None:
        if _found_out is None:
            return
        for place in self.folder.iterdir():
            for file in (place / "measurements.json", *(place / "verdicts").glob("*.json")):
                with suppress(FileNotFoundError):
                    _found_out.setdefault(file.relative_to(place), file.read_bytes())

    def stop(self) -> None:
        """Ends every process."""
        self._learn()
        for process in (*self.nodes, self.scheduler):
            if process.child.poll() is None:
                process.child.send_signal(signal.SIGTERM)
        for process in (*self.nodes, self.scheduler):
            process.stop()


@contextmanager
def boot(
    model: str | Path | None,
    nodes: int = 2,
    *,
    wanted: int | None = None,
    flags: Sequence[str] = (),
    variables: dict[str, str] | None = None,
    scheduler_variables: dict[str, str] | None = None,
    scheduler_module: str = "parallax.cli.main",
    module: str = "parallax.cli.main",
) -> Iterator[Cluster]:
    """A running cluster; with a model and nodes, one whose model answers.

    Args:
        model: what ``-m`` gets; None starts without a model.
        nodes: how many nodes to start.
        wanted: what ``-n`` gets, if not ``nodes``.
        flags: more flags of ``parallax run``.
        variables: more environment variables, for every process.
        scheduler_variables: more environment variables of the scheduler alone.
        module: what the nodes run in place of the command.
        scheduler_module: what stands in for the scheduler's command (``tests.strangers``).
    """
    environment = {
        **os.environ,
        "PARALLAX_LOOPBACK_ONLY": "true",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        **(variables or {}),
    }
    with tempfile.TemporaryDirectory(prefix="parallax-test-") as name:
        folder = Path(name)
        chosen = ["-m", str(model)] if model is not None else []
        scheduler = Process(
            [
                "run",
                *chosen,
                "-n",
                str(wanted or max(1, nodes)),
                "--port",
                "0",
                "--grpc-port",
                "0",
                "--state-dir",
                str(folder / "scheduler"),
                *flags,
            ],
            {**environment, **(scheduler_variables or {})},
            scheduler_module,
        )
        cluster = None
        try:
            ports = scheduler.wait_for(r"Listening: http=(\d+) enrol=(\d+)")
            cluster = Cluster(
                folder, environment, scheduler, int(ports.group(1)), int(ports.group(2))
            )
            for number in range(nodes):
                cluster.join(f"node{number}", module=module)
            if model is not None and nodes:
                cluster.wait_ready()
            yield cluster
        finally:
            if cluster is not None:
                cluster.stop()
            else:
                scheduler.stop()
