"""Which arrays a lazy computation depends on."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import mlx.core as mx

# Lines of MLX's export: `"A" -> 123` feeds array A into operation 123, `123 -> "B"` makes array B.
_EDGE = re.compile(r'^(?:"(\w+)" -> (\d+)|(\d+) -> "(\w+)")$', re.MULTILINE)


def reached(outputs: Iterable[mx.array], inputs: Mapping[str, mx.array]) -> set[str]:
    """Names of the unevaluated ``inputs`` that the unevaluated ``outputs`` are computed from.

    Nothing is evaluated: the graph comes from ``mlx.core.export_to_dot``.
    """
    names = {f"input{i}": name for i, name in enumerate(inputs)}
    labels = dict(zip(names, inputs.values(), strict=True))
    end = mx.depends(mx.array(0), list(outputs))
    text = io.StringIO()
    mx.export_to_dot(text, end=end, **labels)
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
