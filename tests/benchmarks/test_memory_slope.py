"""The slope of resident memory: growth is seen, a pool that grows once is not taken for it."""

from __future__ import annotations

import random
from collections.abc import Callable

import psutil
import pytest

from benchmarks.memory_slope import EVERY, MOST_BYTES, WARM_UP, Samples
from benchmarks.memory_slope import MIB as MIB_BYTES

REQUESTS = 11_000


def readings(resident: Callable[[int], float]) -> Samples:
    """Readings of a process whose memory is a function of the requests so far."""
    points = [(done, round(resident(done))) for done in range(EVERY, REQUESTS + 1, EVERY)]
    return Samples("node", psutil.Process(), points)


def buffers(done: int) -> float:
    """What MLX keeps and lets go: a saw tooth, with some chance in it."""
    return 97 * MIB_BYTES + done * 7013 % MIB_BYTES + random.Random(done).random() * MIB_BYTES / 4


@pytest.mark.parametrize("at", [1_500, 3_000, 6_000, 9_000])
def test_a_pool_that_grows_once_is_no_slope(at: int) -> None:
    step = 0.5 * MIB_BYTES
    samples = readings(lambda done: buffers(done) + step * (done >= at))
    assert samples.slope() < MOST_BYTES / 2
    assert samples.rise() == pytest.approx(step, rel=0.5)


@pytest.mark.parametrize("leaked", [0, 50, 200])
def test_what_every_request_leaves_behind_is_the_slope(leaked: int) -> None:
    samples = readings(lambda done: buffers(done) + leaked * done)
    assert samples.slope() == pytest.approx(leaked, abs=20)
    assert samples.fitted_slope() == pytest.approx(leaked, abs=20)


def test_growth_is_seen_through_a_pool_that_shrinks() -> None:
    samples = readings(lambda done: buffers(done) + 200 * done - MIB_BYTES * (done >= 6_000))
    assert samples.slope() > MOST_BYTES


def test_what_is_before_the_warm_up_does_not_count() -> None:
    samples = readings(lambda done: buffers(done) + 5_000 * min(done, WARM_UP))
    assert samples.slope() == pytest.approx(0, abs=20)
