"""Phrasings: a small pattern language, how people vary what they type, and what is held out."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SPACES = re.compile(r" {2,}")


def listed(text: str, mark: str | None = None) -> tuple[str, ...]:
    """Return the items of a list that is written as one text."""
    return tuple(text.split(mark))


_QUESTION_WORDS = frozenset(
    listed(
        "what what's which who who's whose where when why how can could do does did is are will"
        " would should has have may must am"
    )
)
_DROPPABLE = frozenset(listed("the a an do does is are of to can could i my me please"))

_PREFIXES = (
    "please: ",
    "hi, ",
    "hello! ",
    "quick question: ",
    "so, ",
    "ok, ",
    "hey, ",
    "one more thing: ",
    "sorry, ",
    "and ",
    "well, ",
)
_SUFFIXES = (" please", " thanks", " thank you", " exactly", " then", " here")


def expand(pattern: str, rng: random.Random) -> str:
    """Replace each ``[a|b|]`` of a pattern by one of its alternatives."""
    text = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), pattern)
    return _SPACES.sub(" ", text).strip()


def every(pattern: str) -> list[str]:
    """Return all the phrasings that a pattern stands for."""
    match = _CHOICE.search(pattern)
    if match is None:
        return [_SPACES.sub(" ", pattern).strip()]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [text for option in match.group(1).split("|") for text in every(head + option + tail)]


def sentence(text: str, rng: random.Random) -> str:
    """Give a bare phrasing a capital and a closing mark, most of the time."""
    words = text.split()
    question = words[0].lower() in _QUESTION_WORDS if words else False
    if text[-1:] not in "?.!":
        closing = "?" if question else "."
        text += closing if rng.random() < (0.8 if question else 0.5) else ""
    if rng.random() < 0.7:
        text = text[:1].upper() + text[1:]
    return text


def _misspell(text: str, rng: random.Random) -> str:
    """Swap, drop or double one letter."""
    places = [i for i in range(1, len(text) - 2) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    if kind == 1:
        return text[:i] + text[i + 1 :]
    return text[:i] + text[i] + text[i:]


def typed(text: str, rng: random.Random, *, noise: bool = True) -> str:
    """Write a bare phrasing as somebody would type it.

    With ``noise`` it may also lose small words, gain a polite prefix or suffix, or hold a
    misspelling; held-out phrasings are written without.
    """
    if noise:
        if rng.random() < 0.12:
            kept = [word for word in text.split() if word.lower() not in _DROPPABLE]
            text = " ".join(kept) if len(kept) >= 2 else text
        if rng.random() < 0.12:
            text = rng.choice(_PREFIXES) + text
        if rng.random() < 0.08 and text[-1:] not in "?.!":
            text += rng.choice(_SUFFIXES)
        if rng.random() < 0.06:
            text = _misspell(text, rng)
    return sentence(text, rng)


def is_held_out(value: str, *, one_in: int = 10) -> bool:
    """Say whether a value (a sum, an expression, a name) is kept for the evaluation only."""
    return zlib.crc32(value.encode()) % one_in == 0


def choose(options: Sequence[str], rng: random.Random, *, held_out: bool, share: int = 8) -> str:
    """Draw from a word list, of which every ``share``-th word is held out."""
    pool = [word for word in options if is_held_out(word, one_in=share) is held_out]
    return rng.choice(pool or list(options))
