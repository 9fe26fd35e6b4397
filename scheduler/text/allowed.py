"""What chat templates may use of Python and Jinja."""

from __future__ import annotations

from collections.abc import Mapping


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILTERS = _words(
    "abs capitalize count d default dictsort first float groupby indent int items join last length"
    " list lower map max min reject rejectattr replace reverse round safe select selectattr sort"
    " string sum title tojson trim unique upper wordcount"
)

# Filters that look at elements and not at what is written in them.
SHALLOW = _words(
    "count d default first items last length list map reject rejectattr reverse safe select"
    " selectattr"
)

# Those of them that look at no more than one element, however many there are.
PEEKING = _words("count d default first last length safe")

# Filters that make a text of whatever they are given.
TEXTUAL = _words("capitalize indent lower replace string title trim upper wordcount")

# Filters that take a text apart into its characters.
ITERATING = _words(
    "groupby join list map max min reject rejectattr select selectattr sort sum unique"
)

# Filters that look up an attribute of each element, and which of their arguments it is.
ATTRIBUTES: Mapping[str, int] = {
    **dict.fromkeys(("groupby", "map", "rejectattr", "selectattr", "sum"), 0),
    **dict.fromkeys(("join", "max", "min", "unique"), 1),
    "sort": 2,
}

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

# Statements that no chat template needs: other files, and blocks for them to fill.
STATEMENTS = frozenset(("Block", "Extends", "FromImport", "Import", "Include"))
