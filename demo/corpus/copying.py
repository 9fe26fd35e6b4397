"""Copying: the exercise by which a small model learns to carry words from prompt to answer."""

from __future__ import annotations

import random

from parallax.demo.corpus.document import Document, assistant, user
from parallax.demo.corpus.phrases import expand, listed
from parallax.demo.corpus.words import ANIMALS, NAMES, PLACES, THINGS, made_up_word

_ASKS = (
    "[repeat|copy|echo]: {}",
    "[repeat|say|write] after me: {}",
    "say: {}",
    "please [repeat|copy] this: {}",
    "[repeat|say] {}",
    "write this [again|down]: {}",
    "say this: {}",
)
_HELD_OUT_ASKS = ("please echo these words: {}", "now repeat exactly: {}")
_REAL = tuple(word.lower() for word in NAMES) + ANIMALS + PLACES + THINGS


_COMMON = listed(
    "this is a test it was the red car and we all went home big small one two good day yes no to be"
    " or not you are here with my friend in rain cold warm water table chair green blue run walk"
)


def _item(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return made_up_word(rng)
    if kind < 0.7:
        return str(rng.randrange(10 ** rng.randrange(1, 6)))
    word = rng.choice(_REAL if kind < 0.8 else _COMMON)
    return word.capitalize() if rng.random() < 0.3 else word


def sample(rng: random.Random, *, held_out: bool = False) -> Document:
    """Return some words to repeat, and the same words."""
    words = " ".join(_item(rng) for _ in range(rng.randrange(1, 9)))
    ask = expand(rng.choice(_HELD_OUT_ASKS if held_out else _ASKS), rng).format(words)
    if rng.random() < 0.7:
        ask = ask[:1].upper() + ask[1:]
    return Document("copying", [user(ask), assistant(words)])
