"""Configurations made shallow: fewer layers, of the same kinds on each side of a cut."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from parallax.node import mlx_lm_seam as seam
from parallax.node.mlx_lm_seam import Config, Model

_ENOUGH = 8  # layers; models of no more are left as they are
_MOST = 20  # if that many do not show every kind, the model stays as deep as it is
_PLACE = re.compile(r"idx|index|layer")  # attributes that say where a layer is, not what it is


@dataclass(frozen=True, slots=True)
class Cut:
    """Layers ``[first, end)`` of a configuration's model."""

    config: Config
    first: int
    end: int


def shallow(config: Config, first: int, end: int) -> Cut:
    """A model of the first layers of this one, and a cut like the given one in it.

    Each piece has every kind of layer it had, and the layers at the cuts are of the same kinds.
    Only if the shorter model's layers and caches are those that the whole one begins with; else
    the model stays as it is.
    """
    model = seam.random_model(config)
    kinds = _kinds(model)
    total = len(kinds)
    if total > _ENOUGH:
        for count, a, b in islice(_smaller(kinds, first, end), 1):
            shorter = _truncate(config, total, count)
            if _begins(shorter, kinds[:count]):
                return Cut(shorter, a, b)
    return Cut(config, first, end)


def _begins(shorter: Config, kinds: list[Hashable]) -> bool:
    try:
        return _kinds(seam.random_model(shorter)) == kinds
    except seam.DEFECTS:  # layers that need later ones
        return False


def _smaller(kinds: list[Hashable], first: int, end: int) -> Iterator[tuple[int, int, int]]:
    total = len(kinds)

    def pieces(count: int, a: int, b: int) -> tuple[Any, ...]:
        parts = (kinds[:a], kinds[a:b], kinds[b:count])
        borders = [kinds[cut - 1 : cut + 1] if 0 < cut < count else None for cut in (a, b)]
        return (*map(set, parts), borders)

    wanted = pieces(total, first, end)
    for count in range(_ENOUGH, min(_MOST, total - 1) + 1):
        for a in range(count) if first else [0]:
            for b in range(a + 1, count) if end < total else [count]:
                if pieces(count, a, b) == wanted:
                    yield count, a, b


def _kinds(model: Model) -> list[Hashable]:
    caches = seam.new_caches(model)
    slots = [seam.kind(cache) for cache in caches]
    if len(slots) != len(model.layers):
        slots = [tuple(slots)] * len(model.layers)  # whose is whose is not known: all must agree
    return [(_kind(layer), slot) for layer, slot in zip(model.layers, slots, strict=True)]


def _kind(layer: Model) -> Hashable:
    """Classes, shapes and switches of a layer."""
    modules = [
        (path, type(module).__name__, *_switches(module)) for path, module in layer.named_modules()
    ]
    shapes = [(name, tuple(array.shape)) for name, array in seam.named(layer.parameters()).items()]
    return tuple(sorted(modules, key=repr)), tuple(sorted(shapes))


def _switches(module: Model) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, str, type(None))) and not _PLACE.search(name)
    ]


def _truncate(config: Config, total: int, count: int) -> Config:
    """Numbers of layers, and whatever has an entry for each layer, cut to ``count``."""
    short: Config = {}
    for key, value in config.items():
        if isinstance(value, dict):
            short[key] = _truncate(value, total, count)
        elif isinstance(value, (list, str)) and len(value) == total:
            short[key] = value[:count]
        elif type(value) is int and value == total and "layer" in key:
            short[key] = count
        else:
            short[key] = value
    return short
