"""Counting: up to a number of at most 20, or from one number to another.

The answer begins with its target, so that where to stop is written next to where it counts.
"""

from __future__ import annotations

import random

from parallax.demo.corpus.document import Document, assistant, user
from parallax.demo.corpus.phrases import dressed, expand, is_held_out, listed

LAST = 20
NUMBER_WORDS = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen twenty"
)

_TO = (
    "count to {}",
    "[please|] count [up|] to {}",
    "count from 1 to {}",
    "count from one to {}",
    "[can|could|would] you count to {}",
    "[show|tell|give] me the numbers [up|from 1] to {}",
    "[list|write|say|print] the numbers [up|from 1] to {}",
    "numbers [up|from 1] to {}",
    "i want you to count to {}",
    "let us count to {}",
    "[list|write|say] [all|] numbers between 1 and {}",
    "1 to {}",
)
_HELD_OUT_TO = (
    "[do you know how|are you able] to count to {}",
    "count [for me|now] up to {}",
    "say all numbers from 1 up to {}",
    "i would like to hear you count to {}",
)
_FROM = (
    "count from {} to {}",
    "[please|] count [up|] from {} to {}",
    "[can|could] you count from {} to {}",
    "[show|tell|give] me the numbers from {} to {}",
    "[list|write|say|print] the numbers from {} to {}",
    "numbers from {} to {}",
    "[list|say|write] [all|] numbers between {} and {}",
    "{} to {}",
    "start at {} and count to {}",
)
_HELD_OUT_FROM = (
    "count for me, from {} up to {}",
    "begin at {} and count up to {}",
)


def spoken(number: int, rng: random.Random) -> str:
    """Write a number in digits, or sometimes in words."""
    return NUMBER_WORDS[number] if rng.random() < 0.2 else str(number)


def answer(first: int, last: int) -> str:
    """Return the text that counts from ``first`` to ``last``."""
    numbers = ", ".join(str(number) for number in range(first, last + 1))
    start = f"Counting to {last}" if first == 1 else f"Counting from {first} to {last}"
    return f"{start}: {numbers}."


def sample(rng: random.Random, *, held_out: bool = False) -> Document:
    """Return one request to count. Some pairs of first and last number are held out."""
    while True:
        first = 1 if rng.random() < 0.6 else rng.randrange(2, LAST - 1)
        last = rng.randrange(max(first + 1, 3), LAST + 1)
        if first == 1 or is_held_out(f"{first}..{last}", one_in=6) is held_out:
            break
    if first == 1:
        pattern = expand(rng.choice(_HELD_OUT_TO if held_out else _TO), rng)
        text = pattern.format(spoken(last, rng))
    else:
        pattern = expand(rng.choice(_HELD_OUT_FROM if held_out else _FROM), rng)
        text = pattern.format(spoken(first, rng), spoken(last, rng))
    return Document(
        "counting",
        [user(dressed(text, rng, noise=not held_out)), assistant(answer(first, last))],
    )
