"""Background work: failures are seen, and threads hold up no end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap

import pytest

from parallax.fabric.errors import ModelBroken
from parallax.fabric.tasks import Tasks, in_thread


async def test_a_failure_in_the_background_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ZeroDivisionError("by nought")

    tasks = Tasks()
    task = tasks.start(fail())
    await asyncio.wait({task})
    await asyncio.sleep(0)
    assert "by nought" in caplog.text


async def test_stopping_cancels_what_still_runs() -> None:
    tasks = Tasks()
    task = tasks.start(asyncio.Event().wait())
    await tasks.stop()
    assert task.cancelled()


async def test_what_a_thread_returns_or_raises_reaches_the_caller() -> None:
    def fail() -> None:
        raise ModelBroken("cut short")

    assert await in_thread(lambda: 5) == 5
    with pytest.raises(ModelBroken, match="cut short"):
        await in_thread(fail)


def test_a_process_ends_although_a_thread_still_works() -> None:
    script = """
        import asyncio, threading
        from parallax.fabric.tasks import in_thread

        async def main():
            asyncio.create_task(in_thread(threading.Event().wait))
            await asyncio.sleep(0.01)

        asyncio.run(main())
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=30)
    assert ended.returncode == 0
