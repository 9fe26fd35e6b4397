"""Resident memory of a scheduler and its nodes while short requests come and go.

    python -m benchmarks.memory_slope [--requests 11000] [--memory 16MB] [--leak 200]

A real cluster of two nodes with a tiny random model, sixteen requests at a time, each with
another prompt; half are streamed, and of those a third are left by their clients. Nodes may hold
so little that kept prefixes fill them well within the warm-up, and the prompts are made of few
words, of which the tokenizer remembers up to 10,000 (3 MB). Resident memory is read every 25
requests, and of each 250 the median is taken: MLX keeps buffers and lets them go every now and
then, several times in such a window.

What counts is the slope after the first 1,000 requests: the median of the slopes between any two of
these (Theil, 1950; Sen, 1968) that are 1,000 to 2,500 requests apart. A pool that grows once lies
between few of them and moves it little; what every request leaves behind moves it by just that.
The least-squares slope of all readings, which one step of half a megabyte can move by 80 bytes a
request, is printed beside it, and so is what the last tenth of the readings is above the first.
Exits with 1 where the slope reaches 100 bytes a request.

``--leak`` shows that growth is seen: every process then keeps so many bytes of each request.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import aiohttp
import psutil

from benchmarks.leaking import LEAK
from tests.cluster import Cluster, boot
from tests.models import make_model

CONCURRENCY = 16
EVERY = 25
WINDOW = 250
APART = (1_000, 2_500)
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

    @property
    def counted(self) -> list[tuple[int, int]]:
        """The points after the warm-up."""
        return [point for point in self.points if point[0] > WARM_UP]

    def medians(self) -> list[tuple[float, float]]:
        """The middle of each window after the warm-up: of its requests, and of its readings."""
        windows: dict[int, list[tuple[int, int]]] = {}
        for point in self.counted:
            windows.setdefault((point[0] - 1) // WINDOW, []).append(point)
        return [
            (statistics.fmean(done for done, _ in points), statistics.median(r for _, r in points))
            for points in windows.values()
        ]

    def slope(self) -> float:
        """Bytes per request: the median of the slopes of such pairs of :meth:`medians`.

        Raises:
            StatisticsError: there are none: too few requests after the warm-up.
        """
        points = self.medians()
        return statistics.median(
            (late[1] - early[1]) / (late[0] - early[0])
            for early in points
            for late in points
            if APART[0] <= late[0] - early[0] <= APART[1]
        )

    def fitted_slope(self) -> float:
        """Bytes per request of all points after the warm-up, by least squares."""
        requests, resident = zip(*self.counted, strict=True)
        return statistics.linear_regression(requests, resident).slope

    def rise(self) -> float:
        """What the median of the last tenth of these points is above that of the first, bytes."""
        resident = [rss for _, rss in self.counted]
        tenth = max(1, len(resident) // 10)
        return statistics.median(resident[-tenth:]) - statistics.median(resident[:tenth])


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
    parser.add_argument("--leak", type=int, default=0, metavar="BYTES")
    flags = parser.parse_args()
    module = "benchmarks.leaking" if flags.leak else "parallax.cli.main"
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "tiny", layers=2, hidden=32)
        with boot(
            model, 0, wanted=2, variables={LEAK: str(flags.leak)}, scheduler_module=module
        ) as cluster:
            for name in ("a", "b"):
                cluster.join(name, "--memory", flags.memory, module=module)
            cluster.wait_ready()
            began = perf_counter()
            samples = measure(cluster, flags.requests)
            took_s = perf_counter() - began
    print(f"{flags.requests} requests in {took_s:.0f} s, {CONCURRENCY} at a time")
    for each in samples:
        track = " ".join(f"{rss / MIB:.1f}" for _, rss in each.medians())
        print(
            f"{each.name}: {each.slope():.0f} bytes a request "
            f"(least squares: {each.fitted_slope():.0f}; "
            f"the last tenth is {each.rise() / MIB:.2f} MiB above the first); MiB: {track}"
        )
    return int(any(each.slope() >= MOST_BYTES for each in samples))


if __name__ == "__main__":
    sys.exit(main())
