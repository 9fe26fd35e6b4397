"""What serving costs beside the ring: HTTP, the list of models, memory."""

from __future__ import annotations

import asyncio
import re
import statistics
import subprocess
import sys
import time

from benchmarks.bench import Bench
from benchmarks.client import open_session
from benchmarks.figures import Part, Row, Sheet, at_least, at_most

MODELS_REQUESTS = 500
LONG_S = 600

HTTP = Row(
    "through HTTP with 64 streams, without a ring", "tokens/s on one core", goal=at_least(20000)
)
MODELS = Row("GET /v1/models, p50", "ms", goal=at_most(1.0))
SCHEDULER_SLOPE = Row(
    "memory for a request after the first 1,000, scheduler", "bytes", goal=at_most(100), timed=False
)
NODE_SLOPE = Row(
    "memory for a request after the first 1,000, the worst node",
    "bytes",
    goal=at_most(100),
    timed=False,
)
STAGE = Row("memory of a stage, of its share", "", goal=at_most(1.15), timed=False)


def measure_http(bench: Bench, sheet: Sheet) -> None:
    """``benchmarks/http_streams.py``, in each round."""
    for _ in sheet.rounds(bench.rounds):
        text = run_module("benchmarks.http_streams")
        found = re.search(r"([\d,]+) tokens/s per core", text)
        if found is None:
            raise RuntimeError(f"it says: {text[-200:]}")
        sheet.value(HTTP.name, float(found[1].replace(",", "")))


def measure_models(bench: Bench, sheet: Sheet) -> None:
    """One request after the other over one connection."""

    async def ask(url: str) -> list[float]:
        found = []
        async with open_session() as session:
            for _ in range(MODELS_REQUESTS):
                begin = time.perf_counter()
                async with session.get(f"{url}/v1/models") as answer:
                    answer.raise_for_status()
                    await answer.read()
                found.append(time.perf_counter() - begin)
        return found

    with bench.cluster(bench.model) as cluster:
        asyncio.run(ask(cluster.url))
        for _ in sheet.rounds(bench.rounds):
            sheet.value(MODELS.name, statistics.median(asyncio.run(ask(cluster.url))) * 1e3)


def measure_slope(bench: Bench, sheet: Sheet) -> None:
    """``benchmarks/memory_slope.py``, once: it takes minutes."""
    text = run_module("benchmarks.memory_slope")
    slopes = {
        found[1]: float(found[2])
        for found in re.finditer(r"^(.+): (-?\d+) bytes a request", text, re.M)
    }
    nodes = [slope for name, slope in slopes.items() if name.startswith("node")]
    if not nodes or "scheduler" not in slopes:
        raise RuntimeError(f"it says: {text[-200:]}")
    sheet.value(SCHEDULER_SLOPE.name, slopes["scheduler"])
    sheet.value(NODE_SLOPE.name, max(nodes))


def measure_memory(bench: Bench, sheet: Sheet) -> None:
    """``benchmarks/memory.py``, once."""
    text = run_module("benchmarks.memory")
    ratios = [float(ratio) for ratio in re.findall(r"ratio ([\d.]+)", text)]
    if not ratios:
        raise RuntimeError(f"it says: {text[-200:]}")
    for ratio in ratios:
        sheet.value(STAGE.name, ratio)


def run_module(module: str, *arguments: str) -> str:
    """What a script of this folder prints.

    Raises:
        RuntimeError: it fails in another way than by missing its own goal.
    """
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    if run.returncode and not run.stdout.strip():
        raise RuntimeError((run.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return run.stdout


PARTS = (
    Part("http", (HTTP,), measure_http),
    Part("models", (MODELS,), measure_models),
    Part("memory", (STAGE,), measure_memory),
    Part("slope", (SCHEDULER_SLOPE, NODE_SLOPE), measure_slope),
)
