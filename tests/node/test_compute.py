"""The MLX thread: it outlives whatever a job does."""

from __future__ import annotations

import asyncio
import time

import pytest

from parallax.node.compute import Compute


async def test_a_job_that_fails_leaves_the_thread_at_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compute = Compute(asyncio.get_running_loop())
    compute.post([].pop)
    assert await compute.call(lambda: 5) == 5
    assert "IndexError" in caplog.text
    assert compute.busy_s(1e9) < 1e9, "it is counted as busy for ever"
    compute.stop(5)


async def test_a_job_that_ends_after_its_loop_tells_nobody() -> None:
    loop = asyncio.new_event_loop()
    compute = Compute(loop)
    loop.close()
    compute.tell(print)
    compute.stop(5)
    assert not compute.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_thread_that_dies_is_told_and_one_that_is_stopped_is_not() -> None:
    def leave() -> None:
        raise SystemExit

    for job, dies in ((leave, True), (None, False)):
        compute = Compute(asyncio.get_running_loop())
        died = asyncio.Event()
        compute.on_death = died.set
        if job is not None:
            compute.post(job)
            async with asyncio.timeout(10):
                await died.wait()
        compute.stop(5)
        await asyncio.sleep(0)
        assert died.is_set() is dies
        assert not compute.alive


async def test_a_job_that_began_after_the_clock_was_read_counts_as_new() -> None:
    compute = Compute(asyncio.get_running_loop())
    before = time.monotonic()
    assert await compute.call(lambda: compute.busy_s(before)) == 0
    compute.stop(5)
