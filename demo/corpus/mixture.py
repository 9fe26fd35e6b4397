"""What the model sees while it trains: which behaviours, how often, and how they are dressed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from parallax.demo.corpus import (
    copying,
    counting,
    questions,
    react,
    refusals,
    stories,
    sums,
    tools,
)
from parallax.demo.corpus.document import Document, system

Sampler = Callable[[random.Random], Document]

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that answers briefly.",
    "You are a friendly chat model.",
    "Answer in one or two sentences.",
    "You are the model of a Parallax cluster.",
    "Be brief.",
)
Table = tuple[tuple[float, Sampler], ...]
CHAT: Table = (
    (0.50, questions.sample),
    (0.13, refusals.sample),
    (0.10, stories.sample),
    (0.12, counting.sample),
    (0.15, sums.sample),
)
EARLY: Table = (
    (0.40, questions.sample),
    (0.05, refusals.sample),
    (0.08, counting.sample),
    (0.12, sums.sample),
    (0.35, copying.sample),
)
LATE_CHAT: Table = (
    (0.50, questions.sample),
    (0.20, refusals.sample),
    (0.05, stories.sample),
    (0.05, counting.sample),
    (0.20, sums.sample),
)
SHORT: Table = (
    (0.47, questions.sample),
    (0.20, refusals.sample),
    (0.03, stories.sample),
    (0.07, counting.sample),
    (0.20, sums.sample),
    (0.03, copying.sample),
)
EARLY_SHARE, LATE_SHARE, LAST_SHARE = 0.1, 0.35, 0.7
SHORT_ANSWER = frozenset(("questions", "refusals"))


def _draw(table: Table, rng: random.Random) -> Document:
    weights = [weight for weight, _ in table]
    return rng.choices([sampler for _, sampler in table], weights)[0](rng)


def _chat(table: Table, rng: random.Random) -> Document:
    """Return one to three exchanges, seldom many, sometimes below a system message."""
    turns = rng.choice((1, 1, 1, 2, 3)) if rng.random() < 0.98 else rng.randrange(4, 15)
    messages = [message for _ in range(turns) for message in _draw(table, rng).messages]
    if rng.random() < 0.3:
        messages.insert(0, system(rng.choice(SYSTEMS)))
    return Document("chat", messages)


def document(rng: random.Random, progress: float) -> Document:
    """Draw a document. ``progress`` goes from 0 to 1 over the training.

    The first tenth holds short questions and copying only; then everything comes; from about a
    third on, chat comes more often, because its many answers are learned last. The last part is
    for telling questions apart: most documents are one question each.
    """
    if progress < EARLY_SHARE:
        return _draw(EARLY, rng)
    if progress >= LAST_SHARE and rng.random() < 0.9:
        return _draw(SHORT, rng)
    late = progress >= LATE_SHARE
    chat, tool, react_share = (0.83, 0.06, 0.06) if late else (0.60, 0.17, 0.13)
    kind = rng.random()
    if kind < chat:
        return _chat(LATE_CHAT if late else CHAT, rng)
    if kind < chat + tool:
        return tools.sample(rng)
    if kind < chat + tool + react_share:
        return react.sample(rng)
    return copying.sample(rng)


def stream(seed: int, count: int) -> Iterator[Document]:
    """Yield ``count`` documents of a whole training in small, for the tokenizer and tests."""
    rng = random.Random(seed)
    for index in range(count):
        yield document(rng, index / count)
