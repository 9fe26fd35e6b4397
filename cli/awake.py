"""Keeps a Mac from falling asleep for want of a user while it serves."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator

log = logging.getLogger(__name__)

COMMAND = "caffeinate"
END_S = 2.0


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Holds an assertion against idle sleep until the block, or this process, ends.

    The assertion is that of ``caffeinate -i``, which comes with macOS. It lets the display sleep,
    and the machine when its lid is closed or its user says so. Without the command nothing is
    held, and the log says so.
    """
    path = shutil.which(COMMAND)
    if path is None:
        log.warning("%s was not found: this machine may fall asleep while it serves", COMMAND)
        yield
        return
    # -w: it ends with this process, however that ends.
    holder = subprocess.Popen(
        [path, "-i", "-w", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        holder.terminate()
        try:
            holder.wait(END_S)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.wait()
