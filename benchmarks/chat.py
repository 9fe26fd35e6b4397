"""The second turn of a chat: what is kept of the first one counts."""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.client import metrics, one
from benchmarks.figures import Part, Row, Sheet, at_most
from benchmarks.model import prompt_of

TURN_TOKENS = 1000
ANSWER_TOKENS = 16

SECOND = Row("first token, second turn of a 1,000-token chat", "s", "first turn", at_most(0.10))


def measure_chat(bench: Bench, sheet: Sheet) -> None:
    """Two turns of a fresh chat in each round."""
    with bench.cluster(bench.model) as cluster:
        one(cluster.url, prompt_of(bench.fresh(), 64), 8)
        before = metrics(cluster.url)
        for _ in sheet.rounds(bench.rounds):
            question = prompt_of(bench.fresh(), TURN_TOKENS - bench.overhead_tokens)
            first = one(cluster.url, question, ANSWER_TOKENS)
            chat = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": first.text},
                {"role": "user", "content": "Go on."},
            ]
            second = one(cluster.url, chat, ANSWER_TOKENS)
            sheet.compare(SECOND.name, second.first_s, first.first_s)
        after = metrics(cluster.url)
    saved = "parallax_prefix_saved_tokens_total"
    sheet.note(SECOND.name, f"{after.get(saved, 0) - before.get(saved, 0):,.0f} tokens were kept")


PARTS = (Part("chat", (SECOND,), measure_chat),)
