"""What one rendering of a template may still do, and what looking at its values costs."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined
from jinja2.utils import Namespace

MOST_INTEGER_BITS = 4096
_ROWS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TooMuch(jinja2.TemplateError):
    """A template wants to do or make more than a chat is worth."""


class Budget:
    """What one rendering may still do: steps (turns, calls, elements) and characters."""

    __slots__ = ("characters", "steps")

    def __init__(self, steps: int, characters: int) -> None:
        self.steps = steps
        self.characters = characters

    def spend(self, steps: int = 1, characters: int = 0) -> None:
        """Pays, or raises :class:`TooMuch`."""
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0 or self.characters < 0:
            raise TooMuch("it does too much work for these messages")

    def glance(self, value: object) -> None:
        """Pays for copying a value: by what it holds itself, not by what is in that.

        Raises:
            TooMuch: it is more than is left, or a huge number.
        """
        if isinstance(value, str):
            self.spend(1, len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(1 + len(value))
        elif isinstance(value, int):
            self._is_small(value)

    def look(self, value: object, *, deep: bool) -> None:
        """Pays for walking through a value; ``deep``: for reading its strings as well.

        Raises:
            TooMuch: it is more than is left, or a huge number.
            SecurityError: ``deep``, and what it holds is no data: a macro, a loop.
        """
        kind = type(value)
        if kind is str:
            self.spend(1, len(value) if deep else 0)  # type: ignore[arg-type]
        elif kind is dict:
            self.spend(1 + len(value))  # type: ignore[arg-type]
            for key, item in value.items():  # type: ignore[attr-defined]
                self.look(key, deep=deep)
                self.look(item, deep=deep)
        elif kind is list or kind is tuple:
            self.spend(1 + len(value))  # type: ignore[arg-type]
            for item in value:  # type: ignore[attr-defined]
                self.look(item, deep=deep)
        elif not self._is_small(value):
            self._look_at_rarer(value, deep=deep)

    def _is_small(self, value: object) -> bool:
        if isinstance(value, int):
            if value.bit_length() > MOST_INTEGER_BITS:
                raise TooMuch("it makes huge numbers")
            return True
        return value is None or isinstance(value, (float, complex, Undefined))

    def _look_at_rarer(self, value: object, *, deep: bool) -> None:
        if isinstance(value, Mapping):
            self.spend(1 + len(value))
            for key, item in value.items():
                self.look(key, deep=deep)
                self.look(item, deep=deep)
        elif isinstance(value, _ROWS):
            self.spend(1 + len(value))
            for item in value:
                self.look(item, deep=deep)
        elif isinstance(value, str):
            self.spend(1, len(value) if deep else 0)
        elif isinstance(value, range):
            self.spend(1 + len(value) if deep else 1)
        elif deep and isinstance(value, Namespace):
            self.look(_inside(value), deep=True)
        elif deep and not isinstance(value, ONCE):
            raise SecurityError(f"a {type(value).__name__} is no text and no data")

    def shown(self, value: object) -> int:
        """Pays for ``str(value)`` before it is made; how many characters that has at most.

        Raises:
            TooMuch, SecurityError: as :meth:`look`.
        """
        if type(value) is str:
            self.spend(1, len(value))
            return len(value)
        return self.written_out(value)

    def written_out(self, value: object) -> int:
        """Pays for ``repr(value)``, in which strings have quotes and escapes; see :meth:`shown`."""
        made = 0
        if isinstance(value, str):
            # repr leaves what can be printed as it is; an escape has 4 characters in ASCII, else 10
            each = 4 if value.isascii() else 2 if value.isprintable() else 10
            made = 2 + each * len(value)
            self.spend(1, made)
        elif isinstance(value, Mapping):
            self.spend(1 + len(value), made := 32 + 4 * len(value))
            for key, item in value.items():
                made += self.written_out(key) + self.written_out(item)
        elif isinstance(value, _ROWS):
            self.spend(1 + len(value), made := 32 + 2 * len(value))
            for item in value:
                made += self.written_out(item)
        elif self._is_small(value) or isinstance(value, (range, Namespace)):
            made = 32 + (value.bit_length() // 3 if isinstance(value, int) else 64)
            self.spend(1, made)
        else:
            raise SecurityError(f"a {type(value).__name__} is no text and no data")
        return made


def _inside(namespace: Namespace) -> dict[str, Any]:
    inside: dict[str, Any] = namespace._Namespace__attrs
    return inside


# What filters return that say elements one after the other, once: it is true and has no length.
ONCE: type[Iterator[Any]] = type(iter([]))

BUDGET: ContextVar[Budget] = ContextVar("budget")
