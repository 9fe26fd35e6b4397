"""Resident memory of a scheduler and its nodes while short requests come and go.

    python -m benchmarks.memory_slope [--requests 11000] [--memory 16MB]

A real cluster of two nodes with a tiny random model, sixteen requests at a time, each with
another prompt; half are streamed, and of those a third are left by their clients. Nodes may hold
so little that kept prefixes fill them well within the warm-up, and the prompts are made of few
words, of which the tokenizer remembers up to 10,000 (3 MB). Resident memory is read every 500
requests; what counts is the least-squares slope after the first 1,000. Exits with 1 where it
reaches 100 bytes a request.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import aiohttp
import psutil

from tests.cluster import Cluster, boot
from tests.models import make_model

CONCURRENCY = 16
EVERY = 500
WARM_UP = 1000
MOST_BYTES = 100.0
MIB = 1 << 20


@dataclass
class Samples:
    """Resident bytes of one process by the number of requests that have ended."""

    name: str
    process: psutil.Process
    points: list[tuple[int, int]] = field(default_factory=list)

    def take(self, requests: int) -> None:
        """One more point."""
        self.points.append((requests, self.process.memory_info().rss))

    def slope(self) -> float:
        """Bytes per request after the warm-up, by least squares."""
        points = [point for point in self.points if point[0] >= WARM_UP]
        mean_x = sum(x for x, _ in points) / len(points)
        mean_y = sum(y for _, y in points) / len(points)
        rise = sum((x - mean_x) * (y - mean_y) for x, y in points)
        return rise / sum((x - mean_x) ** 2 for x, _ in points)


async def ask(session: aiohttp.ClientSession, url: str, number: int) -> None:
    """One short request; some clients go before its end."""
    streams = number % 2 == 0
    body = {
        "messages": [{"role": "user", "content": "Say " + " ".join(str(number))}],
        "max_tokens": 4,
        "stream": streams,
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        if streams and number % 6 == 0:
            await answer.content.readany()
            answer.close()
        else:
            await answer.read()


async def load(url: str, requests: int, samples: list[Samples]) -> None:
    """All requests, so many at a time; a sample of each process every now and then."""
    numbers = iter(range(1, requests + 1))
    done = 0

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal done
        for number in numbers:
            await ask(session, url, number)
            done += 1
            if done % EVERY == 0:
                for each in samples:
                    each.take(done)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(worker(session) for _ in range(CONCURRENCY)))


def measure(cluster: Cluster, requests: int) -> list[Samples]:
    """Samples of the scheduler and of each node."""
    named = {"scheduler": cluster.scheduler.pid}
    named |= {f"node {i}": node.pid for i, node in enumerate(cluster.nodes)}
    samples = [Samples(name, psutil.Process(pid)) for name, pid in named.items()]
    asyncio.run(load(cluster.url, requests, samples))
    return samples


def main() -> int:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=11_000)
    parser.add_argument("--memory", default="16MB")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "tiny", layers=2, hidden=32)
        with boot(model, 0, wanted=2) as cluster:
            for name in ("a", "b"):
                cluster.join(name, "--memory", flags.memory)
            cluster.wait_ready()
            began = perf_counter()
            samples = measure(cluster, flags.requests)
            took_s = perf_counter() - began
    print(f"{flags.requests} requests in {took_s:.0f} s, {CONCURRENCY} at a time")
    for each in samples:
        track = " ".join(f"{rss / MIB:.1f}" for _, rss in each.points)
        print(f"{each.name}: {each.slope():.0f} bytes a request; MiB: {track}")
    return int(any(each.slope() >= MOST_BYTES for each in samples))


if __name__ == "__main__":
    sys.exit(main())
