"""What running streams feel when a long prompt arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import pairwise

from benchmarks.bench import Bench
from benchmarks.client import Timed, asking, open_session, stream
from benchmarks.figures import Part, Row, Sheet, at_most, quantile
from benchmarks.model import prompt_of

STREAMS = 8
PROMPT_TOKENS = 2048
CALM_S = 3.0  # how long the streams run before the prompt arrives
STREAM_TOKENS = 3000  # more than they will say: they are hung up on

ARRIVAL = Row(
    "8 streams while a 2,048-token prompt arrives: p99 between tokens",
    "ms",
    "p50 without it",
    at_most(3.0),
)
FIRST = Row("first token of that prompt", "s")


def measure_arrivals(bench: Bench, sheet: Sheet) -> None:
    """Gaps between the streams' tokens, before the prompt and until its first token."""
    with bench.cluster(bench.model) as cluster:
        for _ in sheet.rounds(bench.rounds):
            streams, prompt = asyncio.run(_run(bench, cluster.url))
            end = prompt.events[0]
            calm = list(_gaps(streams, max(s.events[0] for s in streams), prompt.asked))
            busy = list(_gaps(streams, prompt.asked, end))
            sheet.compare(ARRIVAL.name, quantile(busy, 0.99) * 1e3, quantile(calm, 0.5) * 1e3)
            sheet.value(FIRST.name, prompt.first_s)


async def _run(bench: Bench, url: str) -> tuple[list[Timed], Timed]:
    async with open_session() as session:
        streams = [Timed(0.0) for _ in range(STREAMS)]
        tasks = [
            asyncio.create_task(
                stream(
                    session, url, asking(prompt_of(bench.fresh(), 32), STREAM_TOKENS), into=timed
                )
            )
            for timed in streams
        ]
        try:
            while not all(len(timed.events) > 8 for timed in streams):
                await asyncio.sleep(0.05)
                for task in tasks:
                    if task.done():
                        task.result()
            await asyncio.sleep(CALM_S)
            text = prompt_of(bench.fresh(), PROMPT_TOKENS - bench.overhead_tokens)
            prompt = await stream(session, url, asking(text, 2))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return streams, prompt


def _gaps(streams: Iterable[Timed], begin: float, end: float) -> Iterable[float]:
    """Seconds between neighbouring tokens, of pairs that end within [begin, end]."""
    for timed in streams:
        for before, after in pairwise(timed.events):
            if begin <= after <= end:
                yield after - before


PARTS = (Part("arrivals", (ARRIVAL, FIRST), measure_arrivals),)
