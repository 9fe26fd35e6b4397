"""The real ``parallax`` command in processes of its own, away from this user's settings."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

COMMAND = [sys.executable, "-m", "parallax.cli.main"]


def environment(home: Path) -> dict[str, str]:
    """A home of its own and no ``PARALLAX_*`` variables; tables as wide as they like."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PARALLAX_")}
    return kept | {"HOME": str(home), "COLUMNS": "200"}


def parallax(
    home: Path, *arguments: str, text: str | None = None, timeout_s: float = 60, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end, in ``home``."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=home,
        env=environment(home) | variables,
        input=text if text is not None else "",
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


class Running:
    """A command that goes on, and the lines it has printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._news: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._news.put(line.rstrip("\n"))
        self._news.put(None)

    def wait_for(self, beginning: str, timeout_s: float = 60) -> str:
        """The rest of the first line that begins so, once it is there."""
        for line in self.lines:
            if line.startswith(beginning):
                return line.removeprefix(beginning).strip()
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._news.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                raise AssertionError(f"no line begins with {beginning!r} in {self.lines}")
            self.lines.append(line)
            if line.startswith(beginning):
                return line.removeprefix(beginning).strip()

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 30) -> int:
        """Sends a signal and returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """Kills what is left, and closes its pipes."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def running(home: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> Iterator[Running]:
    """A command in the background; both its outputs are read together.

    Args:
        prefix: what to start it with, such as ``ip netns exec NAME``.
    """
    process = subprocess.Popen(
        [*prefix, *COMMAND, *arguments],
        cwd=home,
        env=environment(home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started = Running(process)
    try:
        yield started
    finally:
        started.close()
