"""The latest measurements of one duration, by the size of frames. Pure.

A median of several: single frames are late for reasons of the machine's own, and the first one of a
size may contain the compilation of kernels. What was not measured lately is not known any more.
"""

from __future__ import annotations

import statistics
from collections import deque

SAMPLES = 9
ENOUGH_SAMPLES = 3
FRESH_FRAMES = 128  # a size that was not sent for so long is tried anew


class Times:
    """Measured values of each size; ``frame`` counts those of all sizes.

    Args:
        fresh_frames: for how many of these a value counts.
    """

    def __init__(self, fresh_frames: int = FRESH_FRAMES) -> None:
        self._fresh_frames = fresh_frames
        self._samples: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}

    def add(self, size: int, value: float, frame: int) -> bool:
        """Whether with this one there are enough of them."""
        samples = self._samples.setdefault(size, deque(maxlen=SAMPLES))
        if samples and frame - self._seen[size] >= self._fresh_frames:
            samples.clear()
        samples.append(value)
        self._seen[size] = frame
        return len(samples) == ENOUGH_SAMPLES

    def known(self, frame: int) -> dict[int, float]:
        """Medians of sizes that were measured often enough, and not long before ``frame``."""
        return {
            size: statistics.median(samples)
            for size, samples in sorted(self._samples.items())
            if len(samples) >= ENOUGH_SAMPLES and frame - self._seen[size] < self._fresh_frames
        }
