"""What a method, a filter, an operator or a format costs, paid before it does anything.

Python does each of these in one step of C that nothing can interrupt: repetition, padding, joins,
escapes, searches that go over a text once for each of its characters.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any

from jinja2.exceptions import SecurityError

from parallax.scheduler.text.allowed import ATTRIBUTES, ITERATING, PEEKING, SHALLOW, TEXTUAL
from parallax.scheduler.text.budget import MOST_INTEGER_BITS, Budget, TooMuch

MOST_WIDTH = 64  # of an indentation
MOST_DIGITS = 20  # that a number is rounded to, before or after its point
MOST_NUMERAL = 4300  # characters of a text that is read as a number: Python's own bound
MOST_ATTRIBUTE = 128  # characters of a name, or of names with points between them
MOST_PARTS = 8
MOST_SEPARATOR = 16
PADDING = 700  # characters of the longest float with a precision of two digits, and a width
_ESCAPING = frozenset("arboxX")  # conversions that make more than ``str`` does

_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_WORD = re.compile(r"\S+")
# One field of either format: no width or precision of more than two digits, none from an argument.
_PERCENT = re.compile(r"%(?:\([^()]*\))?[-+ #0]*\d{0,2}(?:\.\d{0,2})?[hlL]?([a-zA-Z%])")
_SPECIFICATION = re.compile(
    r"(?:.?[<>=^])?[-+ ]?z?#?0?\d{0,2}[_,]?(?:\.\d{0,2})?[a-zA-Z%]?", re.DOTALL
)


def pay_for_product(budget: Budget, left: Any, right: Any) -> None:
    """``left * right``."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MOST_INTEGER_BITS:
            raise TooMuch("it makes huge numbers")
        return
    for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and hasattr(other, "__len__"):
            made = max(0, one) * len(other)
            budget.spend(1 if isinstance(other, str) else 1 + made, made)


def pay_for_power(left: Any, right: Any) -> None:
    """``left ** right``."""
    whole = isinstance(left, int) and isinstance(right, int)
    if whole and left.bit_length() * abs(right) > MOST_INTEGER_BITS:
        raise TooMuch("it makes huge numbers")


def pay_for_sum(budget: Budget, left: Any, right: Any) -> None:
    """``left + right``."""
    if isinstance(left, str) and isinstance(right, str):
        budget.spend(1, len(left) + len(right))
    elif hasattr(left, "__len__") and hasattr(right, "__len__"):
        budget.spend(1 + len(left) + len(right))


def pay_for_percent(budget: Budget, form: str, given: Any) -> None:
    """``form % given``.

    Raises:
        SecurityError: a width or precision pads, or comes from an argument.
    """
    budget.spend(1 + form.count("%"), len(form))
    fields, escaped, place = 0, False, form.find("%")
    while place >= 0:
        field = _PERCENT.match(form, place)
        if field is None:
            raise SecurityError("a format that pads, or is none")
        fields += 1
        escaped = escaped or field[1] in _ESCAPING
        place = form.find("%", field.end())
    parts: Sequence[Any] = given if isinstance(given, tuple) else (given,)
    if isinstance(given, Mapping):
        parts = (given, *given.values())
    _pay_for_fields(budget, fields, parts, escaped=escaped)


def pay_for_format(budget: Budget, form: str, parts: Sequence[Any]) -> None:
    """``form.format(…)``, where each field is one of these parts.

    Raises:
        SecurityError: a width or precision pads, or a field reaches into its argument.
    """
    budget.spend(1 + form.count("{"), 2 * len(form))
    fields, escaped = 0, False
    for _, name, specification, conversion in Formatter().parse(form):
        if name is None:
            continue
        if "." in name or "[" in name:
            raise SecurityError("a format that reaches into its arguments")
        if not _SPECIFICATION.fullmatch(specification or ""):
            raise SecurityError("a format that pads, or is none")
        fields += 1
        escaped = escaped or (specification or "")[-1:] in _ESCAPING or conversion in _ESCAPING
    _pay_for_fields(budget, fields, parts, escaped=escaped)


def _pay_for_fields(budget: Budget, fields: int, parts: Sequence[Any], *, escaped: bool) -> None:
    longest = max((budget.shown(part) for part in parts), default=0)
    budget.spend(1, fields * (longest * (10 if escaped else 1) + PADDING))


def pay_for_method(
    budget: Budget, owner: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """``owner.name(*args, **kwargs)`` of a text, a list, a tuple or a dictionary."""
    if not isinstance(owner, str):
        if name in ("count", "index"):
            budget.look(owner, deep=True)
            budget.written_out(args[0] if args else None)  # "… is not in list"
        elif name == "copy":
            budget.glance(owner)
        return
    budget.spend(1, len(owner))
    if name in _GROWING and not owner.isascii():
        budget.spend(1, 2 * len(owner))
        return
    first = args[0] if args else kwargs.get("sep")
    if name == "join":
        _pay_for_join(budget, args[0] if args else (), owner)
    elif name in _SEARCHED:
        _pay_for_search(budget, owner, first, backwards=name != "replace" and name[0] == "r")
    elif name in ("strip", "lstrip", "rstrip"):
        _pay_for_strip(budget, owner, first)
    if name in ("split", "rsplit"):
        most = args[1] if len(args) > 1 else kwargs.get("maxsplit", -1)
        if not isinstance(most, int) or not 0 <= most < 64:
            budget.spend(
                owner.count(first) if isinstance(first, str) else _words_of(owner, budget.steps)
            )
    elif name == "splitlines":
        budget.spend(_lines_of(owner))
    elif name == "replace" and len(args) >= 2:
        _pay_for_replaced(budget, owner, args[0], args[1])


_GROWING = frozenset(("capitalize", "casefold", "lower", "upper", "swapcase", "title"))
_SEARCHED = frozenset(("count", "find", "index", "partition", "replace", "split"))
_SEARCHED |= {"rfind", "rindex", "rpartition", "rsplit"}


def _pay_for_search(budget: Budget, text: str, sought: Any, *, backwards: bool) -> None:
    """Forwards Python's search is linear, at worst; backwards it compares all with all."""
    if isinstance(sought, str):
        budget.spend(1, len(text) * len(sought) // 8 if backwards else 3 * len(text))


def _pay_for_strip(budget: Budget, text: str, marks: Any) -> None:
    """Each character is looked for among all the marks."""
    if isinstance(marks, str):
        budget.spend(1, len(text) * len(marks) // 64)


def _pay_for_replaced(budget: Budget, text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        budget.spend(1, text.count(old) * len(new))


def _pay_for_join(budget: Budget, items: Any, separator: str) -> None:
    if not hasattr(items, "__len__"):
        return
    budget.spend(len(items), len(items) * len(separator))
    if not isinstance(items, str):
        for item in items:
            budget.shown(item)


def _words_of(text: str, most: int) -> int:
    """How many words it has; more than ``most`` are not counted."""
    if len(text) < 2000:
        return len(text) // 2 + 1
    return sum(1 for _ in itertools.islice(_WORD.finditer(text), most + 1))


def _lines_of(text: str) -> int:
    return 1 + sum(text.count(mark) for mark in _BREAKS)


def pay_for_filter(
    budget: Budget, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """``value | name(*args, **kwargs)``.

    Raises:
        ValueError: a width, a precision or a name beyond what people write.
    """
    if name in PEEKING:
        budget.spend()
        return
    deep = name not in SHALLOW
    for given in args:
        budget.look(given, deep=deep)
    for given in kwargs.values():
        budget.look(given, deep=deep)
    if name in TEXTUAL:
        size = budget.shown(value)
    else:
        size = len(value) if isinstance(value, str) else 0
        if deep:
            budget.look(value, deep=True)
        else:
            budget.glance(value)
    if size and name in ITERATING:
        budget.spend(size)
    place = ATTRIBUTES.get(name)
    if place is not None:
        _check_attribute(args[place] if len(args) > place else kwargs.get("attribute"))
    pay = _PRICES.get(name)
    if pay is not None:
        pay(budget, value, size, args, kwargs)


def _check_attribute(attribute: Any) -> None:
    if isinstance(attribute, str) and (
        len(attribute) > MOST_ATTRIBUTE or len(re.findall(r"[.,]", attribute)) >= MOST_PARTS
    ):
        raise ValueError("an attribute of very many names")


def _reversed(budget: Budget, value: Any, size: int, args: Any, kwargs: Any) -> None:
    budget.spend(1, size)


def _cased(budget: Budget, value: Any, size: int, args: Any, kwargs: Any) -> None:
    if not (isinstance(value, str) and value.isascii()):
        budget.spend(1, 2 * size)


def _in_words(budget: Budget, value: Any, size: int, args: Any, kwargs: Any) -> None:
    budget.spend(size, 2 * size)  # a title, or a count, is made of a list of the words


def _trimmed(budget: Budget, value: Any, size: int, args: Any, kwargs: Any) -> None:
    marks = args[0] if args else kwargs.get("chars")
    if isinstance(marks, str):
        budget.spend(1, size * len(marks) // 64)


def _replaced(budget: Budget, value: Any, size: int, args: Any, kwargs: Any) -> None:
    old = args[0] if args else kwargs.get("old", kwargs.get("s", ""))
    new = args[1] if len(args) > 1 else kwargs.get("new", "")
    budget.shown(old)
    budget.shown(new)
    text = str(value)
    _pay_for_search(budget, text, str(old), backwards=False)
    _pay_for_replaced(budget, text, str(old), str(new))


def _joined(budget: Budget, value: Any, size: int, args: Any, kwargs: Any) -> None:
    separator = args[0] if args else kwargs.get("d", "")
    budget.shown(separator)
    _pay_for_join(budget, value, str(separator))
    if len(args) > 1 or "attribute" in kwargs:
        budget.written_out(value)


def _indented(budget: Budget, value: Any, size: int, args: Any, kwargs: Any) -> None:
    width = args[0] if args else kwargs.get("width", 4)
    width = len(width) if isinstance(width, str) else int(width)
    _check_width(width)
    lines = _lines_of(str(value))
    budget.spend(lines, (1 + width) * lines)


def _as_json(budget: Budget, value: Any, size: int, args: Any, kwargs: Any) -> None:
    # Beside what repr makes: \u0000 for what has four characters there, and with ``ensure_ascii``
    # as many as twelve for one that repr leaves alone.
    escaping = bool(args[0] if args else kwargs.get("ensure_ascii"))
    budget.spend(1, budget.written_out(value) * (5 if escaping else 1))
    indent = (args[1] if len(args) > 1 else kwargs.get("indent")) or 0
    separators = (args[2] if len(args) > 2 else kwargs.get("separators")) or ()
    if sum(len(mark) for mark in separators) > MOST_SEPARATOR:
        raise ValueError("separators of very many characters")
    width = len(indent) if isinstance(indent, str) else int(indent)
    _check_width(width)
    budget.spend(1, (1 + width + MOST_SEPARATOR) * _rows_of(value, 1))


def _summed(budget: Budget, value: Any, size: int, args: Any, kwargs: Any) -> None:
    start = args[1] if len(args) > 1 else kwargs.get("start", 0)
    fit = all(isinstance(item, (int, float, Mapping)) for item in value or ())
    if not fit or not isinstance(start, (int, float)):
        raise ValueError("sum is for numbers")


def _rounded(budget: Budget, value: Any, size: int, args: Any, kwargs: Any) -> None:
    precision = args[0] if args else kwargs.get("precision", 0)
    if not isinstance(precision, (int, float)) or not abs(precision) <= MOST_DIGITS:
        raise ValueError(f"numbers are rounded to {MOST_DIGITS} digits at most")


def _numeral(budget: Budget, value: Any, size: int, args: Any, kwargs: Any) -> None:
    if size > MOST_NUMERAL:
        raise ValueError("a number of very many digits")


_PRICES: Mapping[str, Callable[[Budget, Any, int, Sequence[Any], Mapping[str, Any]], None]] = {
    "reverse": _reversed,
    "capitalize": _cased,
    "lower": _cased,
    "upper": _cased,
    "title": _in_words,
    "wordcount": _in_words,
    "trim": _trimmed,
    "replace": _replaced,
    "join": _joined,
    "indent": _indented,
    "tojson": _as_json,
    "sum": _summed,
    "round": _rounded,
    "int": _numeral,
    "float": _numeral,
}


def _check_width(width: int) -> None:
    if not 0 <= width <= MOST_WIDTH:
        raise ValueError(f"an indentation of {width}")


def _rows_of(value: Any, depth: int) -> int:
    """Lines of a value as indented JSON, each counted as often as it is indented."""
    if isinstance(value, Mapping):
        return depth + sum(_rows_of(item, depth + 1) for item in value.values())
    if isinstance(value, (list, tuple)):
        return depth + sum(_rows_of(item, depth + 1) for item in value)
    return depth
