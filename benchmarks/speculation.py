"""One stream that copies its context, and one whose drafts are always wrong."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from benchmarks.bench import Bench, knows_speculation
from benchmarks.client import metrics, one
from benchmarks.copier import make_copier, make_counter, misleading, passage_of
from benchmarks.figures import Part, Row, Sheet, at_least
from benchmarks.speed import mlx_lm_decode

PASSAGE = 500
COPIED_TOKENS = 256
COUNTED_TOKENS = 90  # fewer than the alphabet has signs: no context comes twice
COUNTS = 4  # answers in one round, because they are short
BLOCK = 4  # signs that agree before the one that does not
REPORT_S = 2.5  # stages report each second

COPY = Row("one stream that copies its context", "tokens/s", "mlx-lm", at_least(1.4))
ACCEPTED = Row("drafted tokens accepted while it copies", "%")
WRONG = Row("drafts that always fail", "tokens/s", "speculation off", at_least(0.97))
WRONG_ACCEPTED = Row("drafted tokens accepted while they fail", "%")


def measure_copying(bench: Bench, sheet: Sheet) -> None:
    """A passage said again, on a model that copies by construction."""
    if not knows_speculation():
        sheet.close("this build has no speculation")
        return
    model = make_copier(bench.folder / "copier", bench.dtype)
    with bench.whole(model) as whole, bench.cluster(model) as cluster:
        before = metrics(cluster.url)
        for round_ in sheet.rounds(bench.rounds, warm_up=1):
            passage = passage_of(bench.fresh(), PASSAGE)
            prompt = f"assistant\n{passage}"  # so that the answer's beginning has been seen
            theirs = mlx_lm_decode(bench, whole, prompt, COPIED_TOKENS)
            answer = one(cluster.url, prompt, COPIED_TOKENS)
            if answer.text != passage[: len(answer.text)]:
                raise RuntimeError(f"it does not copy: {answer.text!r}")
            if round_ >= 0:
                sheet.compare(COPY.name, answer.decode_tokens_s, theirs)
        note_acceptance(sheet, ACCEPTED, before, lambda: metrics(cluster.url))


def measure_wrong(bench: Bench, sheet: Sheet) -> None:
    """Speculation on against off, where no draft is ever right."""
    if not knows_speculation():
        sheet.close("this build has no speculation")
        return
    model = make_counter(bench.folder / "counter", bench.dtype)
    prompt = misleading(BLOCK)
    with (
        bench.cluster(model) as on,
        bench.cluster(model, speculation=False) as off,
    ):
        before = metrics(on.url)
        for round_ in sheet.rounds(bench.rounds, warm_up=1):
            speeds: dict[str, list[float]] = {on.url: [], off.url: []}
            for count in range(2 * COUNTS):
                url = (on.url, off.url)[(count + count // 2) % 2]  # on off off on …
                speeds[url].append(one(url, prompt, COUNTED_TOKENS).decode_tokens_s)
            if round_ >= 0:
                with_, without = (statistics.median(speeds[c.url]) for c in (on, off))
                sheet.compare(WRONG.name, with_, without)
        note_acceptance(sheet, WRONG_ACCEPTED, before, lambda: metrics(on.url))


def note_acceptance(
    sheet: Sheet, row: Row, before: dict[str, float], read: Callable[[], dict[str, float]]
) -> None:
    """The share of drafted tokens that were accepted, once the ring has reported them."""
    time.sleep(REPORT_S)
    after = read()
    counts = {
        kind: sum(
            after[name] - before.get(name, 0.0)
            for name in after
            if "draft" in name and ("accepted" in name) == (kind == "accepted")
            if "_created" not in name
        )
        for kind in ("drafted", "accepted")
    }
    if counts["drafted"]:
        sheet.value(row.name, 100 * counts["accepted"] / counts["drafted"])
        sheet.note(row.name, f"{counts['drafted']:g} tokens drafted")
    else:
        sheet.missing(row.name, "nothing was drafted")


PARTS = (
    Part("copying", (COPY, ACCEPTED), measure_copying),
    Part("drafts", (WRONG, WRONG_ACCEPTED), measure_wrong),
)
