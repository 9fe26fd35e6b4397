"""Where the time of a decode step goes, from token to token."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path

from benchmarks.bench import OFF, Bench
from benchmarks.client import one
from benchmarks.figures import Part, Row, Sheet
from benchmarks.model import prompt_of
from tests.cluster import boot

TOKENS = 256
KEPT = 0.8  # of the steps: the slowest and the quickest tenth are left out

STEP = Row("a decode step, traced", "ms")
INSIDE = Row("of it in the stages", "%")

Record = dict[str, float]


def measure_step(bench: Bench, sheet: Sheet) -> None:
    """One stream through two nodes that note when each frame is where."""
    folder = bench.folder / "traces"
    folder.mkdir()
    variables = {**OFF, "TRACE_FOLDER": str(folder)}
    with boot(bench.model, nodes=0, wanted=2, variables=variables) as cluster:
        for name in ("node0", "node1"):
            cluster.join(name, module="benchmarks.traced")
        cluster.wait_ready()
        for _ in sheet.rounds(bench.rounds):
            one(cluster.url, prompt_of(bench.fresh(), 32), TOKENS)
    bars = parts_of(read(folder))
    for name, seconds in bars.items():
        sheet.bar(name, seconds)
    whole = sum(bars.values())
    sheet.value(STEP.name, whole * 1e3)
    inside = sum(seconds for name, seconds in bars.items() if name.startswith("compute"))
    sheet.value(INSIDE.name, 100 * inside / whole)


def read(folder: Path) -> list[tuple[Record, Record]]:
    """Each decode frame's record on the head and on the second stage, in order."""
    sides = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    first = next(side for side in sides if any("taken" in record for record in side.values()))
    second = next(side for side in sides if side is not first)
    names = sorted(first.keys() & second.keys(), key=lambda name: [int(n) for n in name.split(".")])
    return [(first[name], second[name]) for name in names]


def parts_of(frames: list[tuple[Record, Record]]) -> dict[str, float]:
    """Mean seconds of each part of a step; together they are the whole of it.

    Raises:
        ValueError: the traces hold no two steps in a row.
    """
    steps: list[dict[str, float]] = []
    for (head, last), (following, _) in pairwise(frames):
        if not _whole(head, last) or "posted" not in following:
            continue
        found: dict[str, float] = {}
        for name, side in (("first", head), ("last", last)):
            running = side["ended"] - side["begun"]
            evaluating, building = side.get("evaluating", 0.0), side.get("building", 0.0)
            packing = side.get("packing", 0.0) + side.get("unpacking", 0.0)
            found[f"thread hand-over, {name} stage"] = side["begun"] - side["posted"]
            found[f"compute, {name} stage: building, layers begin"] = building
            found[f"compute, {name} stage: layers to their end"] = evaluating
            found[f"compute, {name} stage: packing"] = packing
            found[f"compute, {name} stage: the rest"] = running - evaluating - building - packing
            found[f"serialising, {name} stage"] = side["sent"] - side["ended"]
            to = last if side is head else head
            found[f"socket and waking up, after the {name} stage"] = to["received"] - side["sent"]
            if side is head:
                found["parsing, last stage"] = last["posted"] - last["received"]
        found["parsing, head"] = head["taken"] - head["received"]
        found["conductor"] = following["posted"] - head["taken"]
        steps.append(found)
    if not steps:
        raise ValueError("no step was traced from end to end")
    steps.sort(key=lambda step: sum(step.values()))
    cut = round(len(steps) * (1 - KEPT) / 2)
    kept = steps[cut : len(steps) - cut] or steps
    return {name: statistics.fmean(step[name] for step in kept) for name in kept[0]}


def _whole(head: Record, last: Record) -> bool:
    places = {"posted", "begun", "ended", "sent", "received"}
    return places <= last.keys() and places | {"taken"} <= head.keys()


PARTS = (Part("step", (STEP, INSIDE), measure_step),)
