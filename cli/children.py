"""Child processes of ``parallax demo``: started, watched, and ended by their own ids."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from parallax.cli.console import printable
from parallax.fabric.errors import ClusterError

POLL_S = 0.05
END_S = 20.0  # to finish what is in flight, before it is killed
TAIL_LINES = 12


class Child:
    """One ``parallax`` process with its output in a file.

    It is told to end with its standard input, so that it cannot outlive this
    process, and has a session of its own, so that Ctrl-C reaches only us.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "parallax.cli.main", *arguments, "--with-parent"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def line(self, beginning: str, timeout_s: float) -> str:
        """Waits for a line of its output and returns what follows ``beginning``.

        Raises:
            ClusterError: it ended, or did not say so in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            for line in self._said():
                if line.startswith(beginning):
                    return line.removeprefix(beginning).strip()
            self.check()
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"The {self.name} did not start within {timeout_s:g} s", self._tail()
                )
            time.sleep(POLL_S)

    def check(self, wait_s: float = 0.0) -> None:
        """Sees that it still runs.

        Args:
            wait_s: how long an end that is near may take.

        Raises:
            ClusterError: it has ended.
        """
        try:
            status = self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return
        raise ClusterError(
            f"The {self.name} ended with exit status {status}",
            self._tail() or "It said nothing",
            "See what it says above; 'parallax doctor' checks this machine",
        )

    def ask_to_end(self) -> None:
        """Sends SIGTERM, once."""
        if self._process.poll() is None:
            self._process.terminate()

    def end(self, deadline: float) -> None:
        """Waits until ``deadline`` (monotonic seconds), then kills it."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _said(self) -> list[str]:
        return self._log.read_text(encoding="utf-8", errors="replace").splitlines()

    def _tail(self) -> str:
        return printable("\n".join(self._said()[-TAIL_LINES:])).strip()


def end_all(children: Sequence[Child]) -> None:
    """Ends all of them, the last started first asked, within one bounded wait."""
    for child in reversed(children):
        child.ask_to_end()
    deadline = time.monotonic() + END_S
    for child in reversed(children):
        child.end(deadline)
