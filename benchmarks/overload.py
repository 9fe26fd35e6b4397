"""What ten times too many requests do to those that are being answered, and how soon they know.

    python -m benchmarks.overload [--times 10] [--tokens 300]

A real cluster of two nodes with a tiny random model. First as many streams as it has rows, alone;
then the same while so many times what rows and queue take are sent besides, evenly over their run.
Prints the time between tokens of the streams in both, and how long the refusals took.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import aiohttp

from tests.cluster import boot
from tests.models import make_model

ROWS = 4  # of each of two lanes
PLACES = 16
STREAMS = 2 * ROWS
BURST_S = 0.05


async def stream(session: aiohttp.ClientSession, url: str, tokens: int) -> list[float]:
    """The moments at which something came of one streamed answer."""
    came = []
    async with session.post(url, json=_body(tokens)) as answer:
        answer.raise_for_status()
        async for _ in answer.content.iter_any():
            came.append(perf_counter())
    return came


async def knock(session: aiohttp.ClientSession, url: str) -> tuple[int, float, bool]:
    """Status of a short request, seconds until it was known, and whether it says when to retry."""
    began_s = perf_counter()
    async with session.post(url, json=_body(2)) as answer:
        took_s = perf_counter() - began_s
        await answer.read()
        return answer.status, took_s, "Retry-After" in answer.headers


async def measure(url: str, times: int, tokens: int) -> None:
    """Both runs, and what they show."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def streams() -> tuple[list[float], float]:
            began_s = perf_counter()
            runs = await asyncio.gather(*(stream(session, url, tokens) for _ in range(STREAMS)))
            gaps = [b - a for run in runs for a, b in pairwise(run)]
            return gaps, perf_counter() - began_s

        await streams()
        alone, took_s = await streams()
        running = asyncio.create_task(streams())
        await asyncio.sleep(BURST_S)
        knocks: list[asyncio.Task[tuple[int, float, bool]]] = []
        count, bursts = times * (STREAMS + PLACES), max(1, round(took_s / BURST_S) - 2)
        for burst in range(bursts):
            due = count * (burst + 1) // bursts
            knocks += [asyncio.create_task(knock(session, url)) for _ in range(due - len(knocks))]
            await asyncio.sleep(BURST_S)
        crowded, _ = await running
        answers = await asyncio.gather(*knocks)
    refused = [took_s for status, took_s, retry in answers if status == 429 and retry]
    print(f"{STREAMS} streams of {tokens} tokens, then {count} requests besides in {took_s:.1f} s")
    print(f"between tokens, alone: {_spread(alone)}; crowded: {_spread(crowded)}")
    print(f"{len(refused)} refused with Retry-After, known in {_spread(refused)}")
    print(f"{sum(status == 200 for status, _, _ in answers)} of the others were answered")


def _body(tokens: int) -> dict[str, object]:
    messages = [{"role": "user", "content": "Hi"}]
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": True}


def _spread(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds) or [0.0]
    p50, p99 = (ordered[int(len(ordered) * q)] for q in (0.5, 0.99))
    return f"p50 {p50 * 1000:.1f}, p99 {p99 * 1000:.1f}, most {ordered[-1] * 1000:.1f} ms"


def main() -> None:
    """Read the flags and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=300)
    flags = parser.parse_args()
    variables = {
        "PARALLAX_LIMITS__LANE_ROWS": str(ROWS),
        "PARALLAX_LIMITS__QUEUE_REQUESTS": str(PLACES),
    }
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "tiny", layers=2, hidden=32)
        with boot(model, 2, variables=variables) as cluster:
            url = f"{cluster.url}/v1/chat/completions"
            asyncio.run(measure(url, flags.times, flags.tokens))


if __name__ == "__main__":
    main()
