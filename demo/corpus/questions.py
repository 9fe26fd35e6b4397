"""Questions about the model and about Parallax, from the fact sheets in ``facts/``.

A sheet is a text file: ``# key`` begins a fact, ``answer:`` is what the model learns to say,
``topic:`` lists names that the general templates below ask about, ``?`` is a phrasing to train on
and ``!`` one that is kept for the evaluation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from parallax.demo.corpus.document import Document, assistant, user
from parallax.demo.corpus.frames import about
from parallax.demo.corpus.phrases import bare, every, expand, listed, typed

FACTS_FOLDER = Path(__file__).resolve().parent / "facts"
IDENTITY_SHEET = "identity"
CORE = frozenset(
    listed(
        "hello identity parallax start run join demo port plug node ring stage scheduler 429 503"
    )
)

_TOPIC_TEMPLATES = (
    "[what is|what's] {}",
    "what [does|is the meaning of] {} [mean|]",
    "[explain|define|describe|tell me about] {}",
    "[can|could|would] you explain {} [to me|]",
    "what is meant by {}",
    "{}",
    "what exactly is {}",
    "what do you mean by {}",
    "[give me|i need] [a definition|an explanation] of {}",
    "i do not [know|understand] what {} is",
    "tell me what {} is",
    "[help me|i want to] understand {}",
    "remind me what {} is",
    "[what do you know|tell me something] about {}",
)
_HELD_OUT_TOPIC_TEMPLATES = (
    "could you say in short what {} is",
    "i never heard of {}, what is it",
    "please describe {} for a beginner",
)


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing the model can say, and the ways to ask for it."""

    key: str
    sheet: str
    answer: str
    topics: tuple[str, ...]
    phrasings: tuple[str, ...]
    held_out: tuple[str, ...]


def _read(path: Path) -> list[Fact]:
    facts = []
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        lines = block.splitlines()
        rows = [line.partition(" ") for line in lines[1:]]
        texts = {mark: tuple(rest for m, _, rest in rows if m == mark) for mark, _, _ in rows}
        topics = texts.get("topic:", ("",))[0]
        facts.append(
            Fact(
                key=lines[0].removeprefix("# "),
                sheet=path.stem,
                answer=texts["answer:"][0],
                topics=tuple(topic.strip() for topic in topics.split("|") if topic),
                phrasings=texts["?"],
                held_out=texts["!"],
            )
        )
    return facts


@cache
def facts() -> tuple[Fact, ...]:
    """Return every fact of every sheet, in a fixed order."""
    return tuple(fact for path in sorted(FACTS_FOLDER.glob("*.txt")) for fact in _read(path))


def patterns(fact: Fact, *, held_out: bool) -> list[str]:
    """Return the patterns that ask for a fact, written by hand and made from its topics."""
    own = fact.held_out if held_out else fact.phrasings
    templates = _HELD_OUT_TOPIC_TEMPLATES if held_out else _TOPIC_TEMPLATES
    return [*own, *(template.format(topic) for topic in fact.topics for template in templates)]


def phrasings(fact: Fact, *, held_out: bool) -> set[str]:
    """Return every bare phrasing of a fact, in lower case."""
    return {
        text.lower() for pattern in patterns(fact, held_out=held_out) for text in every(pattern)
    }


def _weight(fact: Fact) -> float:
    """Say how often a fact is asked: most often greeting, identity and the first steps."""
    if fact.key in CORE:
        return 3.0
    return 2.0 if fact.sheet == IDENTITY_SHEET else 1.0


@cache
def _weights() -> tuple[float, ...]:
    return tuple(_weight(fact) for fact in facts())


def ask(fact: Fact, rng: random.Random, *, held_out: bool) -> str:
    """Write one question for a fact.

    Patterns written by hand are drawn by the root of what they expand to, up to a limit, and make
    three fifths of the questions where a fact has topics too. No question of the training is one of
    those that are held out, not even by chance.
    """
    own = fact.held_out if held_out else fact.phrasings
    while True:
        if fact.topics and rng.random() < 0.4:
            templates = _HELD_OUT_TOPIC_TEMPLATES if held_out else _TOPIC_TEMPLATES
            topic = rng.choice(fact.topics)
            pattern = rng.choice(templates).format(topic)
            if not held_out and rng.random() < 0.7:
                pattern = about(topic, rng)
        else:
            pattern = rng.choices(own, _shares(own))[0]
        text = typed(expand(pattern, rng), rng, noise=not held_out)
        if held_out or bare(text) not in _all_held_out():
            return text


@cache
def _shares(own: tuple[str, ...]) -> list[float]:
    return [min(len(every(text)), 30) ** 0.5 for text in own]


@cache
def _all_held_out() -> frozenset[str]:
    return frozenset(bare(text) for fact in facts() for text in phrasings(fact, held_out=True))


def sample(rng: random.Random, *, held_out: bool = False) -> Document:
    """Return one question and its answer."""
    fact = rng.choices(facts(), _weights())[0]
    return Document("questions", [user(ask(fact, rng, held_out=held_out)), assistant(fact.answer)])


def held_out_cases() -> list[Document]:
    """Return the phrasings to score by: two of each held-out pattern, and one of each topic."""
    rng = random.Random(0)
    texts = [
        (fact, text)
        for fact in facts()
        for pattern in patterns(fact, held_out=True)[: len(fact.held_out)]
        for text in every(pattern)[:2]
    ]
    texts += [
        (fact, rng.choice(_HELD_OUT_TOPIC_TEMPLATES).format(topic))
        for fact in facts()
        for topic in fact.topics
    ]
    return [
        Document("questions", [user(typed(text, rng, noise=False)), assistant(fact.answer)])
        for fact, text in texts
    ]
