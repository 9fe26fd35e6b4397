"""How long frames of a lone answer take, and how far ahead of it drafts are worth sending.

Pure. Without drafts an answer goes forward by one token in the time that a frame takes around the
ring alone. If each draft is right with probability p, it goes forward by 1 / (1 - p) tokens between
two wrong ones, in 1 / (1 - p^k) frames of k tokens: the first takes a way around a busy ring, the
others follow at the pace at which frames come back then. Block size and depth are those with the
most tokens per second. All times are measured, busy and alone apart: where stages share cores, a
ring that is kept busy is slower at everything.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from parallax.node.times import Times

SIZES = (1, 2, 4, 8, 16)  # tokens in a frame
# Until two sizes have been measured: on MLX's CPU backend four tokens take as long as three frames.
GROWTH = 2 / 3
REVIEW_FRAMES = 8  # how often times are worked out anew
SUREST = 0.98
WORTH = 1.1  # drafts must promise so many times the speed without them
LARGER = 1.05  # and larger frames so many times that of smaller ones
DOUBT = 0.25  # nothing is sent that is less probable than this


@dataclass(frozen=True, slots=True)
class Plan:
    """How to send drafts: tokens in a frame, frames in the ring, tokens not yet confirmed."""

    block: int
    depth: int
    ahead: int


@dataclass(frozen=True, slots=True)
class _Pace:
    """Frames of one size in a busy ring: how often they come back, and after how long."""

    size: int
    period_s: float
    round_trip_s: float
    depth: int  # frames that keep the slowest stage busy


class Pace:
    """Measured times of one ring.

    Args:
        stages: how many the ring has.
        largest: the most tokens a frame may have.
    """

    def __init__(self, stages: int, largest: int) -> None:
        self._stages = stages
        self._sizes = [size for size in SIZES if size <= max(1, largest)]
        self._frames = 0
        self._stage_s = Times()
        self._period_s = Times()
        self._alone_s = Times()
        self._busy_s = Times()
        self._work_out()

    def observe(self, tokens: int, stage_s: float) -> None:
        """A frame kept its slowest stage busy for so long."""
        self._frames += 1
        if tokens in self._sizes and stage_s > 0:
            self._add(self._stage_s, tokens, stage_s)
        if self._frames % REVIEW_FRAMES == 0:
            self._work_out()

    def observe_period(self, tokens: int, seconds: float) -> None:
        """A frame of drafts came back so long after the frame before it."""
        if tokens in self._sizes:
            self._add(self._period_s, tokens, seconds)

    def observe_round_trip(self, seconds: float, *, alone: bool) -> None:
        """A frame of one token took so long around the ring, alone there or not."""
        self._add(self._alone_s if alone else self._busy_s, 1, seconds)

    def plan(self, probability: float) -> Plan | None:
        """What to send if each draft is right with this probability; None: no drafts."""
        sure = min(SUREST, probability)
        if sure <= 0:
            return None
        best = WORTH / self._without_s
        plan = None
        for pace in self._paces:
            if pace.size * pace.depth == 1:
                continue
            frames = 1 / (1 - sure**pace.size)
            speed = 1 / (1 - sure) / (pace.round_trip_s + (frames - 1) * pace.period_s)
            if speed > best * (1 if plan is None else LARGER):
                ahead = 1 + int(math.log(DOUBT) / math.log(sure))
                best, plan = speed, Plan(pace.size, pace.depth, ahead)
        return plan

    def _add(self, times: Times, size: int, seconds: float) -> None:
        if times.add(size, seconds, self._frames):
            self._work_out()

    def _work_out(self) -> None:
        stage_s = self._stage_s.known(self._frames)
        period_s = self._period_s.known(self._frames)
        one_s = _extrapolated(stage_s, 1)
        alone_s = max(self._alone_s.known(self._frames).get(1, self._stages * one_s), one_s)
        # How much slower frames are that follow each other closely; 1 before that is measured.
        ratios = [period_s[s] / stage_s[s] for s in period_s if s in stage_s]
        slower = max(1.0, statistics.median(ratios)) if ratios else 1.0
        paces = []
        for size in self._sizes:
            busy_s = _extrapolated(stage_s, size)
            around_s = alone_s + self._stages * max(0.0, busy_s - one_s)
            depth = max(1, min(self._stages + 2, math.ceil(around_s / busy_s)))
            # Behind a wrong frame, a right one waits half a frame on average.
            wait_s = busy_s / 2 if depth > 1 else 0.0
            measured_s = self._busy_s.known(self._frames).get(1)
            if measured_s is not None:
                around_s += max(0.0, measured_s - alone_s)
            else:
                around_s += wait_s
            period = max(period_s.get(size, busy_s * slower), around_s / depth if depth == 1 else 0)
            paces.append(_Pace(size, period, around_s, depth))
        self._without_s = alone_s
        self._paces = paces


def _extrapolated(known: dict[int, float], tokens: int) -> float:
    """The time of a size: measured, or on the line through the nearest two that were."""
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
