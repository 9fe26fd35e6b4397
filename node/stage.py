"""A contiguous range of a model's layers, run as one piece of it.

Shapes: tokens are [rows, length] uint32; a carry is what the layer before the range returned, for
most models [rows, length, hidden]; logits are [rows, length, vocabulary].
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from parallax.fabric.errors import CutRefused
from parallax.node import mlx_lm_seam as seam
from parallax.node import spare_memory
from parallax.node.arrays import ArrayTree
from parallax.node.mlx_lm_seam import Cache, Caches, Model, Weights
from parallax.node.splice import Splice
from parallax.node.trace import reached
from parallax.proto import wire_pb2 as wire

# Caches grow by this many tokens (mlx-lm's KVCache.step), so costs are measured at its multiples.
_GROWTH_TOKENS = 256


@dataclass(frozen=True, slots=True)
class _Slots:
    """Where each cache slot of the model comes from."""

    owned: tuple[int, ...]  # slots that this stage fills
    source: tuple[int | None, ...]  # per slot: index into the owned ones; None: a ghost


class Stage:
    """Layers ``[first, end)`` of ``model``, whose weights may be lazy.

    Raises:
        CutRefused: the range is not one of the model's.
    """

    def __init__(self, model: Model, first: int, end: int) -> None:
        check_range(model, first, end)
        self.first = first
        self.end = end
        self.total = len(model.layers)
        self.is_first = first == 0
        self.is_last = end == self.total
        self.vocabulary = seam.vocabulary(model)
        self.weight_bytes = 0
        self.weights: Weights = {}  # by name, once they are evaluated; stages may share them
        self._model = model
        self._sample_carry = _zeros(self._carry_before(first, 2))
        self._splice = Splice(model, first, end)
        fresh = seam.new_caches(model)
        self._probe(2, fresh)
        self._slots = _assign([seam.is_filled(cache) for cache in fresh], fresh)
        self._ghosts: dict[int, Cache] = {
            slot: cache
            for slot, cache in enumerate(seam.new_caches(model))
            if self._slots.source[slot] is None
        }
        owned = [fresh[slot] for slot in self._slots.owned]
        self.can_batch = all(seam.can_merge(cache) for cache in owned)
        parts = [part for cache in owned for part in seam.parts(cache)]
        self.can_trim = all(part.is_trimmable() for part in parts)
        self.can_fork = self.takes_blocks = True
        # Sums over a window that has wrapped run in the order of its ring, not in a prefill's.
        self.keeps_answers = self.can_trim and not any(map(seam.window_tokens, parts))

    @property
    def slots(self) -> tuple[int, ...]:
        """The model's cache slots that this stage fills."""
        return self._slots.owned

    def new_cache(self) -> Caches:
        """Empty caches of one sequence: the slots that this stage fills, and no others."""
        caches = seam.new_caches(self._model)
        return [caches[slot] for slot in self._slots.owned]

    def forward(self, tokens: mx.array, carry: ArrayTree, cache: Caches, *, head: bool) -> Any:
        """Runs the layers, lazily; ``cache`` goes forward with them.

        Args:
            tokens: [rows, length], uint32.
            carry: the stage before's result; ignored by the first stage.
            cache: from :meth:`new_cache`, or a batch of such.
            head: on the last stage, go on through norm and head to logits.

        Returns:
            Logits if ``head`` on the last stage, else the carry for the next stage.
        """
        source = self._slots.source
        if self._ghosts:
            here = seam.position(cache)
            for ghost in self._ghosts.values():
                seam.set_position(ghost, here)
        full = [
            self._ghosts[slot] if owned is None else cache[owned]
            for slot, owned in enumerate(source)
        ]
        stop = not (head and self.is_last)
        return self._splice.run(tokens, carry, full, stop=stop, begin=True)

    def takes(self, carry: ArrayTree, rows: int, length: int) -> bool:
        """Whether this has the form of what the layer before returns for [rows, length] tokens."""
        return _fits(carry, self._sample_carry, rows, length)

    def parameters(self) -> Weights:
        """The weights this stage needs: its layers', and of the rest those its results use."""
        caches = seam.new_caches(self._model)
        results = [*seam.named([self._probe(2, caches)]).values()]
        parts = (part for slot in self.slots for part in seam.parts(caches[slot]))
        results += [array for part in parts for array in seam.arrays(part)]
        weights = seam.named(self._model.parameters())
        used = reached(results, weights)
        layers = self._model.layers[self.first : self.end]
        own = {id(a) for layer in layers for a in seam.named(layer.parameters()).values()}
        return {n: value for n, value in weights.items() if n in used or id(value) in own}

    def warm_up(self) -> None:
        """One small pass, evaluated: compiles kernels and settles lazy constants."""
        cache = self.new_cache()
        mx.eval(self.forward(mx.zeros((1, 2), mx.uint32), self._sample_carry, cache, head=True))
        mx.eval([c.state for c in cache])

    def cache_cost(self) -> wire.CacheCost:
        """What the caches of one sequence take here, from shapes alone."""
        short, long = self._cache_bytes(_GROWTH_TOKENS), self._cache_bytes(2 * _GROWTH_TOKENS)
        cost = wire.CacheCost()
        for (window, at_short), (_, at_long) in zip(short, long, strict=True):
            per_token = -(-(at_long - at_short) // _GROWTH_TOKENS)
            if window:
                cost.window_bytes_per_token += per_token
                cost.window_tokens = max(cost.window_tokens, window)
            else:
                cost.bytes_per_token += per_token
                cost.fixed_bytes += max(0, at_short - _GROWTH_TOKENS * per_token)
        windows = [window for window, _ in short if window]
        cost.forks, cost.answers = self.can_fork, self.keeps_answers
        cost.trim_tokens = min(windows, default=(1 << 32) - 1) if self.can_trim else 0
        return cost

    def close(self) -> None:
        """Lets the weights go; the stage cannot run afterwards."""
        self._splice.undo()
        self.weights = {}
        del self._model, self._splice
        self._ghosts = {}
        gc.collect()  # layers and the classes they had refer to each other
        spare_memory.give_back()

    def _probe(self, length: int, caches: Caches, carry: ArrayTree = None) -> Any:
        tokens = mx.zeros((1, length), mx.uint32)
        carry = self._sample_carry if carry is None else carry
        return self._splice.run(tokens, carry, caches, stop=not self.is_last)

    def _carry_before(self, layer: int, length: int) -> Any:
        """What the layers before would hand over, lazily: only its shapes matter."""
        if layer == 0:
            return None
        before = Splice(self._model, 0, layer)
        try:
            tokens = mx.zeros((1, length), mx.uint32)
            return before.run(tokens, None, seam.new_caches(self._model), stop=True)
        finally:
            before.undo()

    def _cache_bytes(self, length: int) -> list[tuple[int, int]]:
        """Per simple cache: its window, and its bytes once ``length`` tokens went in at once."""
        self._splice.undo()
        carry = _zeros(self._carry_before(self.first, length))
        self._splice = Splice(self._model, self.first, self.end)
        caches = seam.new_caches(self._model)
        self._probe(length, caches, carry)
        owned = [part for slot in self._slots.owned for part in seam.parts(caches[slot])]
        return [(seam.window_tokens(p), sum(a.nbytes for a in seam.arrays(p))) for p in owned]


def check_range(model: Model, first: int, end: int) -> None:
    """Whether the model has layers ``[first, end)``.

    Raises:
        CutRefused: it has not.
    """
    total = len(model.layers)
    if not 0 <= first < end <= total:
        raise CutRefused(
            f"There are no layers {first} to {end - 1}",
            f"the model has layers 0 to {total - 1}",
            cut=f"{first}:{end}",
        )


def _assign(filled: list[bool], caches: Caches) -> _Slots:
    """Slots of others alias an owned one of the same kind: its masks and offsets are theirs too."""
    owned = tuple(slot for slot, is_filled in enumerate(filled) if is_filled)
    kinds = [seam.kind(caches[slot]) for slot in owned]
    source: list[int | None] = []
    for slot, cache in enumerate(caches):
        if slot in owned:
            source.append(owned.index(slot))
        else:
            kind = seam.kind(cache)
            source.append(kinds.index(kind) if kind in kinds else None)
    return _Slots(owned, tuple(source))


def _fits(found: Any, sample: Any, rows: int, length: int) -> bool:
    """``sample`` is the carry of one row of two tokens."""
    if type(found) is not type(sample):
        return False
    if isinstance(sample, mx.array):
        if sample.shape[:2] == (1, 2):
            expected = (rows, length, *sample.shape[2:])
            return bool(found.dtype == sample.dtype and found.shape == expected)
        return bool(found.dtype == sample.dtype and found.ndim == sample.ndim)
    if isinstance(sample, (list, tuple)):
        pairs = zip(found, sample, strict=False)
        return len(found) == len(sample) and all(_fits(f, s, rows, length) for f, s in pairs)
    if isinstance(sample, dict):
        return found.keys() == sample.keys() and all(
            _fits(found[key], sample[key], rows, length) for key in sample
        )
    return True


def _zeros(tree: Any) -> Any:
    return tree_map(lambda a: mx.zeros(a.shape, a.dtype) if isinstance(a, mx.array) else a, tree)
