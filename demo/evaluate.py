"""Score the built-in model on phrasings and values that its training never held.

Run ``python -m parallax.demo.evaluate``: it prints one row for each behaviour and exits with 1 if
a gate fails. It needs mlx-lm only. Answers are greedy; an answer that does not end its turn by
itself counts as wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_lm

from parallax.demo import model_path
from parallax.demo.corpus import (
    copying,
    counting,
    fresh,
    questions,
    react,
    refusals,
    stories,
    sums,
    tools,
)
from parallax.demo.corpus.document import Document, Message

SEED = 77
LONGEST_ANSWER_TOKENS = 200
GATES: dict[str, float] = {
    "questions": 0.85,
    "refusals": 0.95,
    "tool calls": 0.80,
    "tool finishes": 0.80,
    "react calls": 0.80,
    "react finishes": 0.80,
    "counting": 0.90,
    "sums": 0.80,
}


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said, and whether it ended its turn by itself."""

    text: str
    ended: bool


@dataclass(slots=True)
class Score:
    """How many cases of one behaviour were right."""

    right: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        """The right ones of all, from 0 to 1."""
        return self.right / self.total if self.total else 0.0


class Model:
    """A model loaded by mlx-lm, asked greedily."""

    def __init__(self, folder: Path) -> None:
        self._model: Any
        self.tokenizer: Any
        self._model, self.tokenizer = mlx_lm.load(str(folder))[:2]

    def ask(self, messages: list[Message], functions: list[dict[str, Any]] | None = None) -> Reply:
        """Return the greedy answer to a conversation."""
        prompt = self.tokenizer.apply_chat_template(
            messages, tools=functions or None, add_generation_prompt=True
        )
        text, reason = "", None
        for piece in mlx_lm.stream_generate(
            self._model, self.tokenizer, prompt, max_tokens=LONGEST_ANSWER_TOKENS
        ):
            text, reason = text + piece.text, piece.finish_reason
        return Reply(text, reason == "stop")

    def call(self, text: str) -> Any:
        """Return the tool call in an answer as mlx-lm parses it, or nothing."""
        begin, end = self.tokenizer.tool_call_start, self.tokenizer.tool_call_end
        if not text.startswith(begin) or not text.rstrip().endswith(end):
            return None
        try:
            return self.tokenizer.tool_parser(text.removeprefix(begin).rstrip()[: -len(end)])
        except ValueError:
            return None


def cases(share: float) -> list[Document]:
    """Return the held-out cases, or a ``share`` of them."""
    rng = random.Random(SEED)
    samplers: tuple[tuple[Callable[..., Document], int], ...] = (
        (refusals.sample, 150),
        (counting.sample, 100),
        (sums.sample, 150),
        (stories.sample, 60),
        (copying.sample, 60),
    )
    found = questions.held_out_cases()
    for sampler, count in samplers:
        found += [sampler(rng, held_out=True) for _ in range(count)]
    found += tools.held_out_cases(rng, 160) + react.held_out_cases(rng, 120)
    found += fresh.cases()
    return [case for case in found if rng.random() < share]


def right(case: Document, reply: Reply, model: Model) -> bool:
    """Judge one reply."""
    if not reply.ended:
        return False
    calls = case.answer.get("tool_calls")
    if calls:
        return bool(model.call(reply.text) == calls[0]["function"])
    if not case.must:
        return bool(reply.text == case.answer["content"])
    if case.kind == "stories":
        return all(word in reply.text for word in case.must) and reply.text.count(".") >= 3
    return all(word in reply.text for word in case.must) and reply.text.endswith(case.must[-1])


def table(scores: dict[str, Score]) -> str:
    """Return the scores against their gates, as a table in Markdown."""
    lines = ["| behaviour | right | share | gate | |", "|---|---|---|---|---|"]
    for kind, score in scores.items():
        gate = GATES.get(kind)
        verdict = "" if gate is None else "pass" if score.share >= gate else "FAIL"
        wanted = "" if gate is None else f"{gate:.0%}"
        right_ones = f"{score.right} of {score.total}"
        lines.append(f"| {kind} | {right_ones} | {score.share:.1%} | {wanted} | {verdict} |")
    return "\n".join(lines)


def main() -> int:
    """Score the model and compare with the gates."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--only", default="", help="score the behaviours with this word only")
    parser.add_argument("--share", type=float, default=1.0, help="score a part of the cases")
    parser.add_argument("--show", type=int, default=0, help="print so many misses of each kind")
    options = parser.parse_args()
    model, scores, begun = Model(options.model), dict[str, Score](), time.monotonic()
    for case in cases(options.share):
        if options.only not in case.kind:
            continue
        score = scores.setdefault(case.kind, Score())
        reply = model.ask(case.prompt, case.tools)
        score.total += 1
        if right(case, reply, model):
            score.right += 1
        elif score.total - score.right <= options.show:
            print(f"[{case.kind}] {case.prompt[-1]['content'][-200:]!r}\n    {reply.text!r}")
    print(table(scores))
    total = sum(score.total for score in scores.values())
    print(f"{total} cases, {time.monotonic() - begun:.0f} s")
    return int(any(scores[kind].share < GATES[kind] for kind in scores if kind in GATES))


if __name__ == "__main__":
    sys.exit(main())
