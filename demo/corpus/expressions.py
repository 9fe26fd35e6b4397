"""Expressions for the calculator: how people ask for them, how they are passed, their values."""

from __future__ import annotations

import random
from dataclasses import dataclass

from parallax.demo.corpus.phrases import expand, is_held_out

_SPOKEN = {
    "+": ("{} plus {}", "{} and {} added", "the sum of {} and {}", "{} added to {}"),
    "-": ("{} minus {}", "{} less {}", "the difference of {} and {}"),
    "*": ("{} times {}", "{} multiplied by {}", "the product of {} and {}", "{} x {}"),
    "/": ("{} divided by {}", "{} over {}", "the quotient of {} and {}"),
    "**": ("{} to the power of {}", "{} to the power {}"),
}
_COMMANDS = {
    "+": ("add {} and {}", "add {} to {}", "sum up {} and {}"),
    "-": ("take {} minus {}", "compute {} minus {}"),
    "*": ("multiply {} by {}", "multiply {} and {}", "multiply {} with {}"),
    "/": ("divide {} by {}",),
    "**": ("raise {} to the power of {}", "raise {} to the power {}"),
}
_ASKS = (
    "what is {}",
    "what's {}",
    "[please|] [calculate|compute|evaluate|solve] {}",
    "how much is {}",
    "{}",
    "[can|could] you [calculate|compute|work out] {} [for me|]",
    "[use the|with the|take the] calculator[:| for|] {}",
    "[tell me|give me|find] {}",
    "ask the calculator for {}",
    "[have|make] the calculator [compute|solve|evaluate] {}",
    "the calculator should [compute|do|get] {}",
    "calculator[,|:|] {}",
    "{} [by|on] the calculator",
    "i need [the value of|] {}",
    "use a tool to [compute|calculate|get] {}",
)
_HELD_OUT_ASKS = (
    "work out {} with the calculator",
    "please find the value of {}",
    "how much do i get for {}",
    "let the calculator do {}",
)


@dataclass(frozen=True, slots=True)
class Expression:
    """One expression: as asked, as the tool gets it, and its value.

    ``command`` says that the spoken form is a whole request already.
    """

    spoken: str
    code: str
    value: str
    command: bool = False


def _number(rng: random.Random) -> int:
    return rng.randrange(2, 10 ** rng.choice((1, 2, 2, 2, 3, 3, 4)) + 1)


def _value(code: str) -> str:
    """Evaluate an expression of our own making, which holds digits, signs and brackets only."""
    value = eval(code, {"__builtins__": {}})  # noqa: S307
    return str(round(value, 4)).removesuffix(".0")


def _draw(rng: random.Random) -> Expression:
    sign = rng.choice(("+", "+", "-", "*", "*", "*", "/", "**"))
    left, right = _number(rng), _number(rng)
    if sign == "**":
        left, right = rng.randrange(2, 13), rng.randrange(2, 11)
    kind = rng.random()
    if kind < 0.2:
        third, other = _number(rng), rng.choice("+-*")
        first = sign if sign != "**" else "*"
        shapes = ("({}{}{}){}{}", "{}{}{}{}{}", "{}{}({}{}{})")
        code = rng.choice(shapes).format(left, first, right, other, third)
        try:
            value = _value(code)
        except ZeroDivisionError:
            return _draw(rng)
        spaced = code
        for mark in "+-*/":
            spaced = spaced.replace(mark, f" {mark} ")
        return Expression(rng.choice((code, spaced)), code, value)
    code = f"{left}{sign}{right}"
    if kind < 0.6:
        return Expression(rng.choice((code, f"{left} {sign} {right}")), code, _value(code))
    if kind < 0.75:
        command = rng.choice(_COMMANDS[sign]).format(left, right)
        return Expression(command, code, _value(code), command=True)
    spoken = rng.choice(_SPOKEN[sign]).format(left, right)
    return Expression(spoken, code, _value(code))


def draw(rng: random.Random, *, held_out: bool) -> Expression:
    """Draw an expression from those to train on, or from those that are held out."""
    while True:
        item = _draw(rng)
        if is_held_out(item.code) is held_out:
            return item


def ask(item: Expression, rng: random.Random, *, held_out: bool) -> str:
    """Write a bare request for the value of an expression."""
    if item.command:
        politely = ("[can|could] you please {}",) if held_out else ("{}", "{}", "please {}")
        return expand(rng.choice(politely), rng).format(item.spoken)
    pattern = expand(rng.choice(_HELD_OUT_ASKS if held_out else _ASKS), rng)
    return pattern.format(item.spoken)
