"""Running only some layers of an mlx-lm model, whatever its architecture.

The model's own forward pass does the work (embeddings, masks, loops); only what its layers do when
called is changed: those before the range hand on what came in, and the last one of the range ends
the pass. A layer gets a subclass of its own class, so its attributes, by which models choose masks
and caches, stay as they are.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from parallax.fabric.errors import InternalError
from parallax.node.arrays import ArrayTree
from parallax.node.mlx_lm_seam import Caches, Model

# A frame waits for the one before it to come around, so building a stage's graph cannot overlap
# with the last frame's computing, as it does when mlx-lm runs a model whole; it overlaps with its
# own instead. Measured on the CPU backend with two halves of 8 layers, 256 wide, and one row: a
# tenth faster. Not measured on a GPU, where each beginning has a cost of its own.
STARTS_EARLY = mx.default_device() == mx.Device(mx.cpu)


class _StageDone(Exception):  # no error: how the last layer ends the pass
    """The last layer of the range has run."""

    def __init__(self, output: Any) -> None:
        self.output = output


class Splice:
    """Layers ``[first, end)`` of ``model``, until :meth:`undo`."""

    def __init__(self, model: Model, first: int, end: int) -> None:
        self._model = model
        self._carry: Any = None
        self._stops = True
        self._begins = False
        self._layers = list(model.layers)
        self._classes = [type(layer) for layer in self._layers]
        for layer in self._layers[:first]:
            layer.__class__ = self._passing(type(layer))
        if STARTS_EARLY:
            for layer in self._layers[first : end - 1]:
                layer.__class__ = self._starting(type(layer))
        layer = self._layers[end - 1]
        layer.__class__ = self._ending(type(layer))

    def run(
        self, tokens: mx.array, carry: ArrayTree, caches: Caches, *, stop: bool, begin: bool = False
    ) -> Any:
        """One pass over ``tokens``, shape [rows, length].

        Args:
            carry: what layer ``first - 1`` returned; unused when ``first`` is 0.
            caches: one for every slot of the model.
            stop: end after the last layer of the range, and return what it returned;
                otherwise go on to the logits, which only the model's last range can.
            begin: let each layer's evaluation begin while the next one's graph is built.
        """
        self._carry = carry
        self._stops = stop
        self._begins = begin
        try:
            output = self._model(tokens, cache=caches)
        except _StageDone as done:
            return done.output
        finally:
            self._carry = None
        if stop:
            raise InternalError("A stage ran past its last layer")
        return output

    def undo(self) -> None:
        """Gives the layers their own classes back."""
        for layer, own in zip(self._layers, self._classes, strict=True):
            layer.__class__ = own

    def _passing(self, own: type[Any]) -> type[Any]:
        def call(layer: Model, *args: Any, **kwargs: Any) -> Any:
            return self._carry

        return _subclass(own, call)

    def _starting(self, own: type[Any]) -> type[Any]:
        def call(layer: Model, *args: Any, **kwargs: Any) -> Any:
            output = own.__call__(layer, *args, **kwargs)
            if self._begins:
                mx.async_eval(output)  # type: ignore[no-untyped-call]
            return output

        return _subclass(own, call)

    def _ending(self, own: type[Any]) -> type[Any]:
        def call(layer: Model, *args: Any, **kwargs: Any) -> Any:
            output = own.__call__(layer, *args, **kwargs)
            if self._stops:
                raise _StageDone(output)
            return output

        return _subclass(own, call)


def _subclass(own: type[Any], call: Any) -> type[Any]:
    return type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})
