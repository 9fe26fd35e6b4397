"""Timed requests to a running cluster over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp


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
    def decode_tokens_s(self) -> float:
        """Tokens per second after the first."""
        tokens = self.usage["completion_tokens"] - 1
        return float(tokens / (self.events[-1] - self.events[0]))


async def stream(session: aiohttp.ClientSession, url: str, prompt: str, tokens: int) -> Timed:
    """One greedy streamed chat completion."""
    timed = Timed(time.perf_counter())
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for raw in answer.content:
            line = raw.decode().strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                timed.usage = event["usage"]
            for choice in event["choices"]:
                delta = choice["delta"].get("content")
                if delta or choice["finish_reason"]:
                    timed.events.append(time.perf_counter())
                    timed.text += delta or ""
    return timed


def one(url: str, prompt: str, tokens: int) -> Timed:
    """One request, alone."""
    return many(url, [prompt], tokens)[0][0]


def many(url: str, prompts: list[str], tokens: int) -> tuple[list[Timed], float]:
    """All prompts at once; also the seconds from start to end."""

    async def run() -> tuple[list[Timed], float]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            begin = time.perf_counter()
            answers = await asyncio.gather(
                *(stream(session, url, prompt, tokens) for prompt in prompts)
            )
            return list(answers), time.perf_counter() - begin

    return asyncio.run(run())
