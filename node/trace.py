"""Which arrays a computation depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx


def reached(
    compute: Callable[[list[mx.array]], list[mx.array]], inputs: Mapping[str, mx.array]
) -> set[str]:
    """Names of the ``inputs`` from which ``compute`` makes its results.

    ``compute`` is called with stand-ins for the inputs, in their order, and must evaluate nothing;
    nothing is evaluated here either. The graph comes from ``mlx.core.export_function``, which
    describes it to a callback, every operation after those that it needs.
    """
    parts: list[dict[str, Any]] = []
    mx.export_function(parts.append, lambda *values: compute(list(values)), *inputs.values())
    of_kind: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        of_kind.setdefault(part["type"], []).append(part)
    live = {array[0] for array in of_kind["outputs"][0]["outputs"]}
    for operation in reversed(of_kind.get("primitive", [])):
        if any(array[0] in live for array in operation["outputs"]):
            live.update(array[0] for array in operation["inputs"])
    labels = (array[0] for array in of_kind["inputs"][0]["inputs"])
    return {name for name, label in zip(inputs, labels, strict=True) if label in live}
