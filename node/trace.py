"""Which arrays a lazy computation depends on."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import islice

import mlx.core as mx

# Lines of MLX's export: `"A" -> 123` feeds array A into operation 123, `123 -> "B"` makes array B.
_EDGE = re.compile(r'^(?:"(\w+)" -> (\d+)|(\d+) -> "(\w+)")$', re.MULTILINE)
_MOST_NAMES = 1000  # in one export; MLX's bindings take no more than 1024


def reached(outputs: Iterable[mx.array], inputs: Mapping[str, mx.array]) -> set[str]:
    """Names of the ``inputs`` that the lazy ``outputs`` are computed from.

    Nothing is evaluated: the graph comes from ``mlx.core.export_to_dot``.
    """
    end = mx.depends(mx.array(0), list(outputs))
    left = iter(inputs.items())
    found: set[str] = set()
    while some := dict(islice(left, _MOST_NAMES)):
        found |= _reached(end, some)
    return found


def _reached(end: mx.array, inputs: Mapping[str, mx.array]) -> set[str]:
    names = {f"input{i}": name for i, name in enumerate(inputs)}
    text = io.StringIO()
    mx.export_to_dot(text, end=end, **dict(zip(names, inputs.values(), strict=True)))
    sources: defaultdict[str, list[str]] = defaultdict(list)
    for array, taker, maker, result in _EDGE.findall(text.getvalue()):
        sources[taker or result].append(array or maker)
    seen = {"end"}
    todo = ["end"]
    while todo:
        for source in sources[todo.pop()]:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return {name for label, name in names.items() if label in seen}
