"""``parallax join``, with faults that a test can set off. Only tests start this module.

SIGUSR1 ends the compute thread, SIGUSR2 has it hang for ``CHAOS_HANG_S`` seconds.
``CHAOS_WOUND`` names a file whose words say what is broken just now; without it nothing is:
``disk`` and ``memory`` when weights are read, once the first of them are there; ``frame`` in the
next frame with tokens, after which the word is gone; ``frames-N`` in every frame of process N.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallax.node import seats, shelf
from parallax.node.compute import Compute
from parallax.node.runner import Runner
from parallax.node.stage import Stage
from parallax.node.weights import Steps, load_steps
from parallax.proto import wire_pb2 as wire

NO_MEMORY = "[malloc] Unable to allocate 17179869184 bytes."  # as MLX says it

_MADE: list[Compute] = []


def _wounds() -> list[str]:
    try:
        return Path(os.environ["CHAOS_WOUND"]).read_text().split()
    except (KeyError, FileNotFoundError):
        return []


class _Watched(Compute):
    """A compute thread that can be reached from a signal."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        _MADE.append(self)


def _die(*_: object) -> None:
    def job() -> None:
        raise SystemExit

    for compute in _MADE:
        compute.post(job)


def _hang(*_: object) -> None:
    seconds = float(os.environ.get("CHAOS_HANG_S", "30"))
    for compute in _MADE:
        compute.post(lambda: time.sleep(seconds))


def _wounded_steps(
    *arguments: Any, progress: Callable[[int, int, str], None], **named: Any
) -> Steps:
    def told(done: int, total: int, phase: str) -> None:
        progress(done, total, phase)
        wounds = _wounds() if phase == "reading" and done else []
        if "disk" in wounds:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if "memory" in wounds:
            raise RuntimeError(NO_MEMORY)

    stage: Stage = yield from load_steps(*arguments, progress=told, **named)
    return stage


class _WoundedRunner(Runner):
    """Runs out of memory, or fails for good, when a test says so."""

    def run(self, frame: wire.Frame) -> wire.Frame:
        wounds = _wounds()
        if f"frames-{os.getpid()}" in wounds:
            raise ValueError("every frame fails here")
        if frame.tokens and "frame" in wounds:
            wounds.remove("frame")
            Path(os.environ["CHAOS_WOUND"]).write_text(" ".join(wounds))
            raise RuntimeError(NO_MEMORY)
        return super().run(frame)


def install() -> None:
    """Puts the faults in their places."""
    from parallax.node import service

    service.Compute = _Watched  # type: ignore[misc]
    shelf.load_steps = _wounded_steps
    seats.Runner = _WoundedRunner  # type: ignore[misc]
    signal.signal(signal.SIGUSR1, _die)
    signal.signal(signal.SIGUSR2, _hang)


if __name__ == "__main__":
    from parallax.cli.main import main

    install()
    sys.exit(main())
