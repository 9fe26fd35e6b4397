"""What chat templates may use of Python and Jinja, and what it makes at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILTERS = _words(
    "abs capitalize count d default dictsort first float groupby indent int items join last length"
    " list lower map max min reject rejectattr replace reverse round safe select selectattr sort"
    " string sum title tojson trim unique upper wordcount"
)

# Filters that look at elements and not at what is written in them.
SHALLOW = _words(
    "count d default first last length list map reject rejectattr reverse select selectattr"
)

COMPARING = _words("!= < <= == > >= eq equalto ge greaterthan gt in le lessthan lower lt ne upper")

_TEXT = _words(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit"
    " isidentifier islower isnumeric isprintable isspace istitle isupper join lower lstrip"
    " partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split"
    " splitlines startswith strip swapcase title upper format format_map"
)
_ROW = frozenset(("count", "index", "copy"))

METHODS: Mapping[type, frozenset[str]] = {
    str: _TEXT,
    list: _ROW,
    tuple: _ROW,
    dict: frozenset(("get", "items", "keys", "values", "copy")),
}

MOST_WIDTH = 64  # of an indentation


def price_of_method(owner: Any, name: str, args: Sequence[Any]) -> int:
    """Characters that a method makes at most, beyond those that it was given."""
    if name == "replace" and isinstance(owner, str):
        return _replaced(owner, args)
    if name == "join" and isinstance(owner, str) and args:
        return _joined(args[0], owner)
    return 0


def price_of_filter(name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Characters that a filter makes at most, beyond those that it was given.

    Raises:
        ValueError: an indentation that is wider than people write.
    """
    if name == "replace":
        old = args[0] if args else kwargs.get("old", kwargs.get("s", ""))
        new = args[1] if len(args) > 1 else kwargs.get("new", "")
        return _replaced(str(value), (str(old), str(new)))
    if name == "join":
        return _joined(value, str(args[0] if args else kwargs.get("d", "")))
    if name == "indent":
        width = args[0] if args else kwargs.get("width", 4)
        width = len(width) if isinstance(width, str) else int(width)
        _check_width(width)
        return width * (str(value).count("\n") + 1)
    if name == "tojson":
        indent = kwargs.get("indent") or (args[1] if len(args) > 1 else 0) or 0
        width = len(indent) if isinstance(indent, str) else int(indent)
        _check_width(width)
        return (1 + width) * _lines(value, 1)
    if name == "sum" and not all(isinstance(item, (int, float, Mapping)) for item in value or ()):
        raise ValueError("sum is for numbers")
    return 0


def _check_width(width: int) -> None:
    if not 0 <= width <= MOST_WIDTH:
        raise ValueError(f"an indentation of {width}")


def _replaced(text: str, args: Sequence[Any]) -> int:
    if len(args) < 2 or not all(isinstance(part, str) for part in args[:2]):
        return 0
    return text.count(args[0]) * len(args[1])


def _joined(items: Any, separator: str) -> int:
    return len(items) * len(separator) if hasattr(items, "__len__") else 0


def _lines(value: Any, depth: int) -> int:
    """Lines of a value as indented JSON, each counted as often as it is indented."""
    if isinstance(value, Mapping):
        return depth + sum(_lines(item, depth + 1) for item in value.values())
    if isinstance(value, (list, tuple)):
        return depth + sum(_lines(item, depth + 1) for item in value)
    return depth
