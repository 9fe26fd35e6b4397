"""Small sums in the head: additions and subtractions up to 20, and ten times a number.

A held-out sum is one whose operands were never seen in this order; for additions and products the
swapped order may have been seen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from parallax.demo.corpus.counting import LAST, spoken
from parallax.demo.corpus.document import Document, assistant, user
from parallax.demo.corpus.phrases import dressed, expand, is_held_out

_WORDS = {"+": ("plus", "and", "+"), "-": ("minus", "-"), "*": ("times", "x", "*")}

_ASKS = (
    "what is {}",
    "what's {}",
    "how much is {}",
    "[can|could] you [calculate|compute|work out] {}",
    "[calculate|compute|solve|add up] {}",
    "{}",
    "{} =",
    "[tell me|say] [what|how much] {} is",
    "what does {} [make|give]",
    "i need [the sum|the result of] {}",
    "do you know {}",
    "what do you get for {}",
)
_COMMANDS = {
    "+": ("add {} and {}", "add {} to {}"),
    "-": ("take {} minus {}",),
    "*": ("multiply {} by {}", "multiply {} and {}"),
}
_HELD_OUT_ASKS = (
    "work out {} for me",
    "please tell me the result of {}",
    "how much do you get for {}",
    "what would {} be",
)


@dataclass(frozen=True, slots=True)
class Sum:
    """Two small operands and what to do with them."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        """The value of the sum."""
        if self.sign == "+":
            return self.left + self.right
        return self.left - self.right if self.sign == "-" else self.left * self.right

    @property
    def text(self) -> str:
        """The sum as the answers write it."""
        return f"{self.left} {self.sign} {self.right}"

    @property
    def held_out(self) -> bool:
        """Whether the sum is kept for the evaluation; never both orders of the same operands."""
        swapped = f"{self.right} {self.sign} {self.left}"
        if not is_held_out(self.text, one_in=8):
            return False
        return self.sign == "-" or self.text < swapped or not is_held_out(swapped, one_in=8)


def draw(rng: random.Random, *, held_out: bool) -> Sum:
    """Draw a sum from the values to train on, or from those that are held out."""
    while True:
        sign = rng.choice("++++---*")
        left, right = rng.randrange(0, LAST + 1), rng.randrange(0, LAST + 1)
        candidate = Sum(max(left, right), sign, min(left, right))
        if sign == "+":
            candidate = Sum(left, sign, right)
        if sign == "*":
            tens = rng.sample((10, rng.randrange(0, 11)), 2)
            candidate = Sum(tens[0], sign, tens[1])
        if candidate.held_out is held_out and (sign == "*" or candidate.result <= LAST):
            return candidate


def written(item: Sum, rng: random.Random) -> str:
    """Write a sum as somebody would type it: digits or words, signs or words."""
    sign = rng.choice(_WORDS[item.sign])
    left, right = str(item.left), str(item.right)
    if sign.isalpha() and sign != "x" and max(item.left, item.right) <= 20:
        left, right = spoken(item.left, rng), spoken(item.right, rng)
    if not sign.isalpha() and rng.random() < 0.4:
        return f"{left}{sign}{right}"
    return f"{left} {sign} {right}"


def sample(rng: random.Random, *, held_out: bool = False) -> Document:
    """Return one sum and its value, repeated as an equation."""
    item = draw(rng, held_out=held_out)
    ask = expand(rng.choice(_HELD_OUT_ASKS if held_out else _ASKS), rng)
    text = ask.format(written(item, rng))
    if not held_out and rng.random() < 0.1:
        text = rng.choice(_COMMANDS[item.sign]).format(item.left, item.right)
    text = dressed(text, rng, noise=not held_out)
    answer = f"{item.text} = {item.result}."
    return Document("sums", [user(text), assistant(answer)], must=(f"= {item.result}.",))
