"""``parallax join``, with faults that a test can set off. Only tests start this module.

SIGUSR1 ends the compute thread, SIGUSR2 has it hang for ``CHAOS_HANG_S`` seconds.
``CHAOS_LOAD`` names what happens when weights are read: ``disk`` or ``memory``.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from typing import Any

from parallax.node import shelf
from parallax.node.compute import Compute

_MADE: list[Compute] = []


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


def _broken_load(*_: object, **__: object) -> Any:
    if os.environ["CHAOS_LOAD"] == "disk":
        raise OSError(errno.EIO, "Input/output error")
    raise RuntimeError("[malloc] Unable to allocate 17179869184 bytes.")


def install() -> None:
    """Puts the faults in their places."""
    from parallax.node import service

    service.Compute = _Watched  # type: ignore[misc]
    if "CHAOS_LOAD" in os.environ:
        shelf.load_steps = _broken_load
    signal.signal(signal.SIGUSR1, _die)
    signal.signal(signal.SIGUSR2, _hang)


if __name__ == "__main__":
    from parallax.cli.main import main

    install()
    sys.exit(main())
