"""How long frames of a lone answer take, and how far ahead of it drafts are worth sending.

Pure. A frame of k tokens keeps the slowest stage busy for c(k) and comes back after R(k). If each
draft is right with probability p, an answer goes forward by 1 / (1 - p) tokens between two wrong
ones, in 1 / (1 - p^k) frames: the first takes R(k), the others follow at the pace of the slowest
stage, and the right token waits half a c(k) on average behind a wrong frame. Block size and
depth are those with the most tokens per second; without drafts it is one in R(1).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

SIZES = (1, 2, 4, 8, 16)  # tokens in a frame
# Until two sizes have been measured: on MLX's CPU backend four tokens take as long as three frames.
GROWTH = 2 / 3
SAMPLES = 7
ENOUGH_SAMPLES = 3  # the first one may contain the compilation of kernels
REVIEW_FRAMES = 8  # how often times are worked out anew
FRESH_FRAMES = 512  # a size that was not sent for so long is tried anew
SUREST = 0.98
WORTH = 1.1  # drafts must promise so many times the speed without them
DOUBT = 0.25  # nothing is sent that is less probable than this


@dataclass(frozen=True, slots=True)
class Plan:
    """How to send drafts: tokens in a frame, frames in the ring, tokens not yet confirmed."""

    block: int
    depth: int
    ahead: int


class Pace:
    """Measured times of one ring.

    Args:
        stages: how many the ring has.
        largest: the most tokens a frame may have.
    """

    def __init__(self, stages: int, largest: int) -> None:
        self._stages = stages
        self._sizes = [size for size in SIZES if size <= max(1, largest)]
        self._samples: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}
        self._round_trips: deque[float] = deque(maxlen=SAMPLES)
        self._frames = 0
        self._known: dict[int, float] = {}
        self._paces = self._work_out()

    def observe(self, tokens: int, stage_s: float) -> None:
        """A frame kept its slowest stage busy for so long."""
        if tokens not in self._sizes or stage_s <= 0:
            return
        self._frames += 1
        samples = self._samples.setdefault(tokens, deque(maxlen=SAMPLES))
        samples.append(stage_s)
        self._seen[tokens] = self._frames
        if len(samples) == ENOUGH_SAMPLES or self._frames % REVIEW_FRAMES == 0:
            self._paces = self._work_out()

    def observe_round_trip(self, seconds: float) -> None:
        """A frame of one token went round a ring where no other was."""
        self._round_trips.append(seconds)
        if len(self._round_trips) == 1:
            self._paces = self._work_out()

    def plan(self, probability: float) -> Plan | None:
        """What to send if each draft is right with this probability; None: no drafts."""
        sure = min(SUREST, probability)
        if sure <= 0:
            return None
        best = WORTH / self._paces[0].round_trip_s
        plan = None
        for pace in self._paces:
            depth = pace.depth
            if pace.size * depth == 1:
                continue
            frames = 1 / (1 - sure**pace.size)
            period_s = max(pace.stage_s, pace.round_trip_s / depth)
            wait_s = pace.stage_s / 2 if depth > 1 else 0.0
            speed = 1 / (1 - sure) / (pace.round_trip_s + (frames - 1) * period_s + wait_s)
            if speed > best:
                ahead = 1 + int(math.log(DOUBT) / math.log(sure))
                best, plan = speed, Plan(pace.size, depth, ahead)
        return plan

    def _work_out(self) -> list[_Pace]:
        self._known = {
            size: statistics.median(samples)
            for size, samples in self._samples.items()
            if len(samples) >= ENOUGH_SAMPLES and self._frames - self._seen[size] < FRESH_FRAMES
        }
        one_s = self._stage_s(1)
        whole_s = self._stages * one_s
        if self._round_trips:
            whole_s = max(statistics.median(self._round_trips), one_s)
        paces = []
        for size in self._sizes:
            stage_s = self._stage_s(size)
            around_s = whole_s + self._stages * max(0.0, stage_s - one_s)
            depth = min(self._stages + 2, math.ceil(around_s / stage_s))
            paces.append(_Pace(size, stage_s, around_s, max(1, depth)))
        return paces

    def _stage_s(self, tokens: int) -> float:
        """How long a frame of ``tokens`` keeps the slowest stage busy.

        Sizes that have not been measured lie on the line through the nearest two that have.
        """
        known = self._known
        if tokens in known:
            return known[tokens]
        if not known:
            return 1 + GROWTH * (tokens - 1)
        nearest = sorted(known, key=lambda size: abs(size - tokens))
        size = nearest[0]
        unit_s = known[size] / (1 + GROWTH * (size - 1))
        growth_s = unit_s * GROWTH
        if len(nearest) > 1:
            growth_s = (known[nearest[1]] - known[size]) / (nearest[1] - size)
        return max(unit_s / 2, known[size] + growth_s * (tokens - size))


@dataclass(frozen=True, slots=True)
class _Pace:
    """Frames of one size: how long in the slowest stage, and around the ring."""

    size: int
    stage_s: float
    round_trip_s: float
    depth: int  # frames that keep the slowest stage busy
