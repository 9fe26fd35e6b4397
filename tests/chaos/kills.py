"""Kill -9 a stage in the middle of an answer: what its client sees of it."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import aiohttp

from parallax.proto import wire_pb2 as wire
from tests.chaos.arena import Arena
from tests.chaos.history import History, ask
from tests.chaos.verdicts import wrong_with
from tests.reference import Reference

TOKENS = 96
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {
    "temperature": 2.0,
    "top_p": 0.99,
    "top_k": 100,
    "presence_penalty": 1.5,
    "frequency_penalty": 1.0,
    "seed": 1234,
}  # penalties make a random model's text varied
KINDS = {"greedy": GREEDY, "seeded": SEEDED}
MOMENTS = ("first", "middle", "last")
FRAME_TOKENS = 24  # what the chat template adds, at most


@dataclass(frozen=True, slots=True)
class Kill:
    """One run of a campaign."""

    stage: int
    moment: str
    kind: str
    context: int  # tokens of prompt and answer when the plug is pulled, about


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    kill: Kill
    history: History
    right: bool
    pause_s: float
    why: str = ""


class Expected:
    """What the undisturbed model says: mlx-lm in one process, with our sampler."""

    def __init__(self, reference: Reference, model: Path) -> None:
        self.reference = reference
        self.model = model
        self._text = lru_cache(maxsize=512)(self._sampled)

    def text(self, prompt: str, kind: str, tokens: int = TOKENS) -> str:
        """The answer to one user message."""
        return self._text(prompt, kind, tokens)

    def of_tokens(self, tokens: Sequence[int]) -> str:
        """What tokens say."""
        return self.reference.text(list(tokens))

    def _sampled(self, prompt: str, kind: str, tokens: int) -> str:
        values = {"top_p": 1.0, "repetition_penalty": 1.0, **KINDS[kind]}
        sampling = wire.Sampling(**values)
        return self.reference.text(self.reference.sampled(prompt, tokens, sampling, ends=False))


def prompt_of(context: int, moment: str) -> str:
    """A prompt with which the context at the kill is about so long."""
    before = {"first": 1, "middle": TOKENS // 2, "last": TOKENS - 1}[moment]
    length = max(8, context - before - FRAME_TOKENS)
    words = "the river that runs uphill and nobody minds but the miller of the town. "
    return (words * (length // len(words) + 1))[:length]


def patience_s(context: int) -> float:
    """How long an answer may take that is prefilled twice, on a machine that others use too."""
    return 240.0 + context / 5


def body_of(prompt: str, kind: str, tokens: int = TOKENS) -> dict[str, Any]:
    """What is asked for."""
    return {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "ignore_eos": True,
        **KINDS[kind],
    }


def run_kill(arena: Arena, expected: Expected, kill: Kill) -> Outcome:
    """One answer, one kill; afterwards the ring is whole again, without a spare."""
    prompt = prompt_of(kill.context, kill.moment)
    victim = arena.stage(kill.stage)
    text = expected.text(prompt, kill.kind)
    # The client sees text, not tokens: these many characters are about that many tokens.
    share = {"first": 0.0, "middle": 0.5, "last": 1.0}[kill.moment]
    wanted = max(1, round(share * (len(text) - 1)))
    killed_s: list[float] = []

    def seen(history: History) -> None:
        if not killed_s and len(history.text) >= wanted:
            killed_s.append(arena.kill(victim))

    async def client() -> History:
        async with aiohttp.ClientSession() as session:
            body = body_of(prompt, kill.kind)
            return await ask(
                session,
                arena.cluster.url,
                body,
                name=str(kill),
                seen=seen,
                timeout_s=patience_s(kill.context),
            )

    history = asyncio.run(client())
    if not killed_s:
        arena.kill(victim)
    why = wrong_with(history, text, TOKENS)
    after = [at for at in history.arrivals if killed_s and at > killed_s[0]]
    pause_s = max(history.pause_s, after[0] - killed_s[0] if after else 0.0)
    return Outcome(kill, history, not why, pause_s, why)


def table(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Pauses by context."""
    rows = []
    for context in sorted({outcome.kill.context for outcome in outcomes}):
        chosen = [o for o in outcomes if o.kill.context == context]
        pauses = [o.pause_s for o in chosen]
        rows.append(
            {
                "context": context,
                "runs": len(chosen),
                "failed": sum(not o.right for o in chosen),
                "median_s": round(statistics.median(pauses), 3),
                "worst_s": round(max(pauses), 3),
            }
        )
    return rows
