"""Decode, many streams, first token: a cluster through HTTP against mlx-lm in one process."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.bench import Bench
from benchmarks.client import many, one
from benchmarks.figures import Part, Row, Sheet, at_least, at_most
from benchmarks.model import prompt_of
from benchmarks.worker import Worker

STREAMS = 16
DECODE_TOKENS = 128
BATCH_TOKENS = 64
PREFILL_STEPS = (32, 64, 128, 256, 512, 2048)

ONE = Row("decode, one stream", "tokens/s", "mlx-lm", at_least(0.93))
SHIPPED = Row("decode, one stream that repeats itself, as shipped", "tokens/s", "mlx-lm")
SIXTEEN = Row("16 streams", "tokens/s", "mlx-lm, 16 in a batch", at_least(1.55))
SIXTEEN_ONE = Row("16 streams, against one", "tokens/s", "mlx-lm, one stream")
FIRST_512 = Row("first token, 512 tokens", "s", "mlx-lm, best step", at_most(0.60))
FIRST_2048 = Row("first token, 2,048 tokens", "s", "mlx-lm, best step", at_most(0.60))


def measure_decode(bench: Bench, sheet: Sheet) -> None:
    """One stream; without speculation, so that what is compared is the ring itself."""
    for row, speculation in ((ONE, False), (SHIPPED, True)):
        with (
            bench.whole(bench.model) as whole,
            bench.cluster(bench.model, speculation=speculation) as cluster,
        ):
            for round_ in sheet.rounds(bench.rounds, warm_up=1):
                prompt = prompt_of(bench.fresh(), 32)
                theirs = mlx_lm_decode(bench, whole, prompt, DECODE_TOKENS)
                ours = one(cluster.url, prompt, DECODE_TOKENS).decode_tokens_s
                if round_ >= 0:  # the one before warms up
                    sheet.compare(row.name, ours, theirs)


def measure_streams(bench: Bench, sheet: Sheet) -> None:
    """Sixteen at once, prompts included on both sides."""
    with bench.whole(bench.model) as whole, bench.cluster(bench.model) as cluster:
        one(cluster.url, prompt_of(bench.fresh(), 32), 8)
        for _ in sheet.rounds(bench.rounds):
            crowd = [prompt_of(bench.fresh(), 24 + n) for n in range(STREAMS)]
            prompts = [bench.ids(prompt) for prompt in crowd]
            answer = whole.ask(do="batch", prompts=prompts, tokens=BATCH_TOKENS)
            theirs = answer["tokens"] / answer["seconds"]
            answers, seconds = many(cluster.url, crowd, BATCH_TOKENS)
            ours = sum(a.tokens for a in answers) / seconds
            sheet.compare(SIXTEEN.name, ours, theirs)
            alone = mlx_lm_decode(bench, whole, crowd[0], BATCH_TOKENS)
            sheet.compare(SIXTEEN_ONE.name, ours, alone)


def measure_first(bench: Bench, sheet: Sheet) -> None:
    """From the request to its first token, against mlx-lm's best chunk size."""
    with bench.whole(bench.model) as whole, bench.cluster(bench.model) as cluster:
        steps = best_steps(bench, whole, 512, PREFILL_STEPS)
        for row, tokens in ((FIRST_512, 512), (FIRST_2048, 2048)):
            steps = best_steps(bench, whole, tokens, steps[:3])[:2]
            sheet.note(row.name, f"mlx-lm's best prefill_step_size: {steps[0]}")
            for _ in sheet.rounds(bench.rounds):
                prompt = prompt_of(bench.fresh(), tokens - bench.overhead_tokens)
                theirs = min(mlx_lm_first(bench, whole, prompt, step) for step in steps)
                ours = one(cluster.url, prompt, 2).first_s
                sheet.compare(row.name, ours, theirs)


def best_steps(bench: Bench, whole: Worker, tokens: int, steps: Sequence[int]) -> list[int]:
    """mlx-lm's chunk sizes for prompts of this length, the quickest first."""
    prompt = prompt_of(bench.fresh(), tokens - bench.overhead_tokens)
    tried = [step for step in steps if step <= tokens] or [tokens]
    return sorted(tried, key=lambda step: mlx_lm_first(bench, whole, prompt, step))


def mlx_lm_first(bench: Bench, whole: Worker, prompt: str, step: int) -> float:
    """Seconds to mlx-lm's first token."""
    return float(whole.ask(do="first", prompt=bench.ids(prompt), step=step)["seconds"])


def mlx_lm_decode(bench: Bench, whole: Worker, prompt: str, tokens: int) -> float:
    """mlx-lm's tokens per second after the first."""
    answer = whole.ask(do="decode", prompt=bench.ids(prompt), tokens=tokens)
    return float(answer["tokens"] / answer["seconds"])


PARTS = (
    Part("decode", (ONE, SHIPPED), measure_decode),
    Part("streams", (SIXTEEN, SIXTEEN_ONE), measure_streams),
    Part("first-token", (FIRST_512, FIRST_2048), measure_first),
)
