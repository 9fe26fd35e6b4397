"""Timed requests to a running cluster over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

Messages = Sequence[dict[str, str]]


@dataclass
class Timed:
    """One streamed answer: when it was asked, when each event with text or an end came."""

    asked: float
    events: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.events[0] - self.asked

    @property
    def tokens(self) -> int:
        """How many tokens the answer has."""
        return int(self.usage["completion_tokens"])

    @property
    def decode_tokens_s(self) -> float:
        """Tokens per second after the first."""
        return float((self.tokens - 1) / (self.events[-1] - self.events[0]))


def asking(prompt: str | Messages, tokens: int, **fields: Any) -> dict[str, Any]:
    """The body of a greedy streamed request."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return {
        "messages": messages,
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


async def stream(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], into: Timed | None = None
) -> Timed:
    """One streamed chat completion; ``into`` can be looked at while it grows."""
    timed = into or Timed(0.0)
    timed.asked = time.perf_counter()
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {await answer.text()}")
        async for raw in answer.content:
            line = raw.decode().strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the answer broke off: {event['error']}")
            if event.get("usage"):
                timed.usage = event["usage"]
            for choice in event["choices"]:
                delta = choice["delta"].get("content")
                if delta or choice["finish_reason"]:
                    timed.events.append(time.perf_counter())
                    timed.text += delta or ""
    return timed


def open_session() -> aiohttp.ClientSession:
    """A session of any number of connections."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)
    )


def one(url: str, prompt: str | Messages, tokens: int, **fields: Any) -> Timed:
    """One request, alone."""
    return many(url, [prompt], tokens, **fields)[0][0]


def many(
    url: str, prompts: Sequence[str | Messages], tokens: int, **fields: Any
) -> tuple[list[Timed], float]:
    """All prompts at once; also the seconds from start to end."""

    async def run() -> tuple[list[Timed], float]:
        async with open_session() as session:
            begin = time.perf_counter()
            answers = await asyncio.gather(
                *(stream(session, url, asking(prompt, tokens, **fields)) for prompt in prompts)
            )
            return list(answers), time.perf_counter() - begin

    return asyncio.run(run())


def metrics(url: str) -> dict[str, float]:
    """The cluster's metrics, keyed as they are written: ``name{label="value"}``."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def summed(found: dict[str, float], name: str, *labels: str) -> float:
    """All samples of one metric that carry these labels (``kind="decode"``), added up."""
    return sum(
        value
        for key, value in found.items()
        if key.split("{")[0] == name and all(label in key for label in labels)
    )
