"""Something happens to a stage while an answer runs; then it is looked at what came of it."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import aiohttp

from tests.chaos.arena import Arena
from tests.chaos.history import History, ask
from tests.chaos.kills import Expected, body_of
from tests.chaos.verdicts import wrong_with

PROMPT = "Tell me about the river that runs uphill, and why nobody minds."


def run_disturbed(
    arena: Arena,
    expected: Expected,
    disturb: Callable[[], Any],
    *,
    tokens: int = 200,
    kind: str = "seeded",
    after: int = 20,
) -> tuple[History, str]:
    """One answer; ``disturb`` is called once so many characters are there.

    Returns:
        What its client saw, and what is wrong with it: "" if nothing is.
    """
    text = expected.text(PROMPT, kind, tokens)
    done: list[asyncio.Task[Any]] = []

    def seen(history: History) -> None:
        if not done and len(history.text) >= after:
            done.append(asyncio.create_task(asyncio.to_thread(disturb)))

    async def client() -> History:
        async with aiohttp.ClientSession() as session:
            body = body_of(PROMPT, kind, tokens)
            history = await ask(session, arena.cluster.url, body, name=kind, seen=seen)
            await asyncio.gather(*done)
            return history

    history = asyncio.run(client())
    assert done, "the answer was over before anything happened"
    return history, wrong_with(history, text, tokens)


def stale_frames(arena: Arena) -> float:
    """What was refused so far because its epoch is over, all together."""
    with urllib.request.urlopen(arena.cluster.url + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("parallax_stale_frames_total")
    )


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.02)
