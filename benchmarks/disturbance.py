"""What other processes did to the machine while something was measured."""

from __future__ import annotations

import time

import psutil

MOST_CORES = 0.15  # of other work, above which a sample says little


class Disturbance:
    """Processor time that went to others than this process and its children."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._last = self._read()

    def cores(self) -> float:
        """How many cores others kept busy since the last call, a hypervisor's share included."""
        wall, busy, own = self._read()
        last_wall, last_busy, last_own = self._last
        self._last = wall, busy, own
        return max(0.0, (busy - last_busy - (own - last_own)) / max(1e-9, wall - last_wall))

    def _read(self) -> tuple[float, float, float]:
        whole = psutil.cpu_times()
        busy = whole.user + whole.system
        for name in ("nice", "irq", "softirq", "steal"):
            busy += getattr(whole, name, 0.0)
        mine = self._process.cpu_times()
        # Of children that have ended and been waited for.
        own = mine.user + mine.system + mine.children_user + mine.children_system
        for child in self._process.children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.Error:
                continue
            own += times.user + times.system
        return time.monotonic(), busy, own
