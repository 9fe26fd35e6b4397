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
    "please tell me, ",
    "i want to know, ",
    "i wonder, ",
    "a question: ",
    "can you tell me: ",
    "for my notes: ",
    "i am new here, ",
    "my friend asks: ",
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
_SUFFIXES = (
    *(" please", " thanks", " thank you", " exactly", " then", " here", " again", " in parallax"),
    *(" in short", " in simple words", " for me", " now", " actually", " in this cluster"),
)
_FILLERS = listed("actually really just exactly now then maybe please also even simply")
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "mac": ("machine", "computer", "box"),
    "macs": ("machines", "computers", "boxes"),
    "machine": ("computer", "mac"),
    "machines": ("computers", "macs"),
    "answer": ("reply", "response"),
    "request": ("call", "query"),
    "use": ("take", "employ"),
    "show": ("display", "list"),
    "start": ("begin", "launch"),
    "stop": ("end", "halt"),
    "happens": ("goes on", "occurs"),
    "does": ("will", "can"),
    "can": ("could", "may"),
    "explain": ("describe", "clarify"),
    "big": ("large", "huge"),
    "fast": ("quick", "speedy"),
    "which": ("what",),
    "what": ("which",),
    "i": ("we", "one"),
    "my": ("our", "the"),
    "model": ("llm", "network"),
    "find": ("discover", "locate"),
    "need": ("require", "want"),
    "command": ("verb", "instruction"),
    "a": ("the", "one"),
    "the": ("a", "this"),
}


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


def _reworded(text: str, rng: random.Random) -> str:
    """Drop, add, replace or move a word."""
    words = text.split()
    place = rng.randrange(len(words))
    kind = rng.randrange(4)
    if kind == 0 and len(words) > 3:
        del words[place]
    elif kind == 1:
        words.insert(place, rng.choice(_FILLERS))
    elif kind == 2 and len(words) > 4:
        words.insert(rng.randrange(len(words)), words.pop(place))
    else:
        words = [
            rng.choice(_SYNONYMS[word]) if word in _SYNONYMS and rng.random() < 0.5 else word
            for word in words
        ]
    return " ".join(words)


def _keywords(text: str, rng: random.Random) -> str:
    """Keep the words that matter, as in a search box, sometimes in another order."""
    kept = [word for word in text.split() if word.lower() not in _DROPPABLE]
    if rng.random() < 0.3:
        rng.shuffle(kept)
    return " ".join(kept) if len(kept) >= 2 else text


def dressed(text: str, rng: random.Random, *, noise: bool = True) -> str:
    """Write a bare request with a polite prefix at times, and nothing else changed."""
    if noise and rng.random() < 0.12:
        text = rng.choice(_PREFIXES) + text
    return sentence(text, rng)


_PROPER = {
    word.lower(): word
    for word in listed(
        "Parallax Mac Macs I API HTTP KV mDNS gRPC MLX OpenAI Anthropic JSON TPS TTFT TLS SDK CPU"
        " GPU LLM URL Linux Wi-Fi Thunderbolt Qwen ReAct Python"
    )
}


def proper(text: str) -> str:
    """Write names and abbreviations as they are written with care."""
    return " ".join(_PROPER.get(word, word) for word in text.split(" "))


def typed(text: str, rng: random.Random, *, noise: bool = True) -> str:
    """Write a bare phrasing as somebody would type it.

    With ``noise`` it may also be reworded, cut to its keywords, dressed with a polite prefix or
    suffix, or misspelt; held-out phrasings are written without.
    """
    if noise:
        if rng.random() < 0.12:
            text = _keywords(text, rng)
        while rng.random() < 0.3:
            text = _reworded(text, rng)
        if rng.random() < 0.14:
            text = rng.choice(_PREFIXES) + text
        if rng.random() < 0.1 and text[-1:] not in "?.!":
            text += rng.choice(_SUFFIXES)
        if rng.random() < 0.06:
            text = _misspell(text, rng)
    return sentence(proper(text) if rng.random() < 0.5 else text, rng)


def is_held_out(value: str, *, one_in: int = 10) -> bool:
    """Say whether a value (a sum, an expression, a name) is kept for the evaluation only."""
    return zlib.crc32(value.encode()) % one_in == 0


def choose(options: Sequence[str], rng: random.Random, *, held_out: bool, share: int = 8) -> str:
    """Draw from a word list, of which every ``share``-th word is held out."""
    pool = [word for word in options if is_held_out(word, one_in=share) is held_out]
    return rng.choice(pool or list(options))
