"""A child process that answers JSON, line by line."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any

ANSWER_S = 240.0


class Worker:
    """``python -m MODULE ARGUMENTS``; ended by its id if it does not end by itself.

    Its first line says that it is ready. Lines that are not JSON objects are kept for errors.
    """

    def __init__(self, module: str, *arguments: str, **variables: str) -> None:
        self._name = module
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._noise: list[str] = []
        self._child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **variables},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        self.tell(**request)
        return self.answer()

    def tell(self, **request: Any) -> None:
        """Sends a request."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()

    def answer(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """The next answer.

        Raises:
            RuntimeError: the process ended, or says nothing for ``timeout_s``.
        """
        while True:
            try:
                line = self._lines.get(timeout=timeout_s)
            except queue.Empty:
                raise RuntimeError(f"{self._name} does not answer") from None
            if line is None:
                last = "\n".join(self._noise[-8:])
                raise RuntimeError(f"{self._name} ended:\n{last}")
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
            self._noise.append(line.rstrip())

    def close(self) -> None:
        """Ends it: by the end of its input, or after a while by its id."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.close()
            self._child.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._child.kill()
            self._child.wait()
        self._reader.join(5)
        assert self._child.stdout is not None
        self._child.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put(None)
