"""Several clients with many requests each, while something happens in their middle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from tests.chaos.arena import Arena
from tests.chaos.history import History, ask
from tests.chaos.kills import KINDS, Expected, body_of
from tests.chaos.verdicts import wrong_with

PROMPTS = tuple(
    f"Question {number}: what does {word} say to {number} friends?"
    for number, word in enumerate(
        ("the miller", "a river", "my neighbour", "some child", "that bird", "the night")
    )
)


@dataclass(slots=True)
class Crowd:
    """What came of it."""

    histories: list[History] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return len(self.wrong)


def run_crowd(
    arena: Arena,
    expected: Expected,
    *,
    clients: int,
    requests: int,
    tokens: int,
    midway: Callable[[], None],
    patient: bool = False,
) -> Crowd:
    """So many clients, so many requests each; ``midway`` is called when half of them are over.

    Patient clients wait a moment after a request that failed, and ask again.
    """
    crowd = Crowd()
    half = clients * requests // 2

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        for turn in range(requests):
            at = number + turn
            prompt, kind = PROMPTS[at % len(PROMPTS)], tuple(KINDS)[at % 2]
            body = body_of(prompt, kind, tokens)
            name = f"{number}.{turn} {kind}"
            while True:
                history = await ask(session, arena.cluster.url, body, name=name)
                crowd.histories.append(history)
                if why := wrong_with(history, expected.text(prompt, kind, tokens), tokens):
                    crowd.wrong.append(f"{history.name}: {why}")
                if len(crowd.histories) == half:
                    await asyncio.to_thread(midway)
                if not patient or not history.error:
                    break
                await asyncio.sleep(0.1)

    async def everyone() -> None:
        connector = aiohttp.TCPConnector(limit=clients)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(client(number, session) for number in range(clients)))

    warm(expected, tokens)
    asyncio.run(everyone())
    return crowd


def warm(expected: Expected, tokens: int) -> None:
    """Finds out what is expected before the clock runs."""
    for prompt in PROMPTS:
        for kind in KINDS:
            expected.text(prompt, kind, tokens)


def pauses(histories: Sequence[History]) -> list[float]:
    """The longest pause that each client saw within an answer."""
    return sorted(history.pause_s for history in histories)
