"""Speed by stages, by concurrency and by prompt length: what the plots show."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.client import many, one
from benchmarks.figures import Part, Sheet
from benchmarks.model import prompt_of
from benchmarks.speed import PREFILL_STEPS, best_steps, mlx_lm_first

STAGES = (1, 2, 3, 4)
CROWDS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 3072)
TOKENS = 64
CROWD_TOKENS = 32
MANY = 16  # streams, above which one round is steady enough, and long
MOST_ROUNDS = 3  # many points: fewer rounds than the table has

BY_STAGES = "tokens/s by stages"
FIRST_BY_STAGES = "first token of 512 tokens by stages, s"
BY_CROWD = "tokens/s by streams"
BY_LENGTH = "first token by prompt length, s"


def measure_stages(bench: Bench, sheet: Sheet) -> None:
    """Rings of one to four stages on this one machine; speculation is off."""
    rounds = min(bench.rounds, MOST_ROUNDS)
    for nodes in STAGES:
        with bench.cluster(bench.model, nodes, speculation=False) as cluster:
            one(cluster.url, prompt_of(bench.fresh(), 64), 8)
            alone, crowd, first = [], [], []
            for _ in range(rounds):
                prompt = prompt_of(bench.fresh(), 32)
                alone.append(one(cluster.url, prompt, TOKENS).decode_tokens_s)
                prompts = [prompt_of(bench.fresh(), 32) for _ in range(16)]
                answers, seconds = many(cluster.url, prompts, CROWD_TOKENS)
                crowd.append(sum(a.tokens for a in answers) / seconds)
                text = prompt_of(bench.fresh(), 512 - bench.overhead_tokens)
                first.append(one(cluster.url, text, 2).first_s)
        sheet.point(BY_STAGES, "1 stream", nodes, alone)
        sheet.point(BY_STAGES, "16 streams", nodes, crowd)
        sheet.point(FIRST_BY_STAGES, "cluster", nodes, first)


def measure_concurrency(bench: Bench, sheet: Sheet) -> None:
    """1 to 64 streams at once, prompts included, and mlx-lm's batch of as many."""
    rounds = min(bench.rounds, MOST_ROUNDS)
    with (
        bench.whole(bench.model) as whole,
        bench.cluster(bench.model, speculation=False) as cluster,
    ):
        one(cluster.url, prompt_of(bench.fresh(), 64), 8)
        for streams in CROWDS:
            ours, theirs = [], []
            for _ in range(rounds if streams <= MANY else 1):
                crowd = [prompt_of(bench.fresh(), 8) for _ in range(streams)]
                answers, seconds = many(cluster.url, crowd, CROWD_TOKENS)
                ours.append(sum(a.tokens for a in answers) / seconds)
                prompts = [bench.ids(prompt) for prompt in crowd]
                answer = whole.ask(do="batch", prompts=prompts, tokens=CROWD_TOKENS)
                theirs.append(answer["tokens"] / answer["seconds"])
            sheet.point(BY_CROWD, "cluster", streams, ours)
            sheet.point(BY_CROWD, "mlx-lm", streams, theirs)


def measure_lengths(bench: Bench, sheet: Sheet) -> None:
    """Time to the first token, mlx-lm's at its best chunk size for that length."""
    rounds = min(bench.rounds, MOST_ROUNDS)
    with bench.whole(bench.model) as whole, bench.cluster(bench.model) as cluster:
        one(cluster.url, prompt_of(bench.fresh(), 64), 8)
        steps = best_steps(bench, whole, 512, PREFILL_STEPS)[:2]
        for tokens in LENGTHS:
            step = best_steps(bench, whole, min(tokens, 512), steps)[0]
            ours, theirs = [], []
            for _ in range(rounds):
                prompt = prompt_of(bench.fresh(), tokens - bench.overhead_tokens)
                ours.append(one(cluster.url, prompt, 2).first_s)
                theirs.append(mlx_lm_first(bench, whole, prompt, step))
            sheet.point(BY_LENGTH, "cluster", tokens, ours)
            sheet.point(BY_LENGTH, "mlx-lm", tokens, theirs)


PARTS = (
    Part("stages", (), measure_stages),
    Part("concurrency", (), measure_concurrency),
    Part("lengths", (), measure_lengths),
)
