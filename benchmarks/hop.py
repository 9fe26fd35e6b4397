"""From one stage's compute to the next one's, against a bare gRPC echo in the same run."""

from __future__ import annotations

import asyncio
import statistics
import time

from benchmarks.bench import Bench
from benchmarks.client import metrics, one, summed
from benchmarks.echo import round_trips
from benchmarks.figures import Part, Row, Sheet, at_most
from benchmarks.model import prompt_of
from benchmarks.worker import Worker
from tests.cluster import Cluster

MESSAGE_BYTES = 8192
ECHOES = 1000
WARM_UP = 50
PACED = 200
TOKENS = 256
SETTLE_S = 10.0

HOP = Row(
    "around the ring of two without compute", "ms", "gRPC echo of 8 KB, back to back", at_most(1.5)
)
PACED_HOP = Row(
    "around the ring of two, both sides idle in between", "ms", "gRPC echo of 8 KB, paced alike"
)
BEAT = Row("a beat around the ring, otherwise idle", "ms")


def measure_hop(bench: Bench, sheet: Sheet) -> None:
    """What is left of a decode step when the stages' own time is taken away.

    Two hops, as an echo has: to the second stage and back. The echo is measured once with one
    message right after the other, and once with pauses as long as a stage's compute, in which
    processor and threads go to sleep as they do in a ring.
    """
    with (
        Worker("benchmarks.echo") as echo,
        bench.cluster(bench.model, 2, speculation=False) as cluster,
    ):
        port = int(echo.answer()["port"])
        one(cluster.url, prompt_of(bench.fresh(), 32), 16)
        for _ in sheet.rounds(bench.rounds):
            hop_s, compute_s = ring_overhead(cluster, prompt_of(bench.fresh(), 32))
            straight = _echo(port, ECHOES, 0.0)
            paced = _echo(port, PACED, compute_s / 2)
            sheet.compare(HOP.name, hop_s * 1e3, straight * 1e3)
            sheet.compare(PACED_HOP.name, hop_s * 1e3, paced * 1e3)
            beat_s = summed(metrics(cluster.url), "parallax_ring_round_trip_seconds")
            sheet.value(BEAT.name, beat_s * 1e3)


def ring_overhead(cluster: Cluster, prompt: str) -> tuple[float, float]:
    """Of a decode step of one stream: seconds outside the stages, and inside them, all together."""
    before = settled(cluster, 0)
    answer = one(cluster.url, prompt, TOKENS)
    step_s = 1 / answer.decode_tokens_s
    frames = summed(before, "parallax_stage_frames_total", 'stage="0"', 'kind="decode"')
    after = settled(cluster, frames + TOKENS)
    compute_s = 0.0
    for stage in ('stage="0"', 'stage="1"'):
        name = "parallax_stage_{}_total"
        labels = (stage, 'kind="decode"')
        seconds, count = (
            summed(after, name.format(kind), *labels) - summed(before, name.format(kind), *labels)
            for kind in ("compute_seconds", "frames")
        )
        compute_s += seconds / count
    return step_s - compute_s, compute_s


def settled(cluster: Cluster, frames: float) -> dict[str, float]:
    """Metrics once both stages have reported so many decode frames; they report each second.

    Raises:
        RuntimeError: they do not.
    """
    deadline = time.monotonic() + SETTLE_S
    last: list[float] = []
    while time.monotonic() < deadline:
        found = metrics(cluster.url)
        now = [
            summed(found, "parallax_stage_frames_total", stage, 'kind="decode"')
            for stage in ('stage="0"', 'stage="1"')
        ]
        if min(now) >= frames and now == last and now[0] == now[1]:
            return found
        last = now
        time.sleep(1.1)
    raise RuntimeError(f"the stages report {last} decode frames, not {frames:g}")


def _echo(port: int, count: int, pause_s: float) -> float:
    return statistics.median(
        asyncio.run(round_trips(port, MESSAGE_BYTES, count + WARM_UP, pause_s))[WARM_UP:]
    )


PARTS = (Part("hop", (HOP, PACED_HOP, BEAT), measure_hop),)
