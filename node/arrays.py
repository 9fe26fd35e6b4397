"""MLX arrays as the tensors that travel, and back.

Only evaluated arrays cross threads, and only bytes cross machines. float16 and bfloat16, which
Python's buffers do not know, go through views of 16-bit integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import mlx.core as mx

from parallax.fabric import tensors
from parallax.fabric.tensors import Tensor

ArrayTree: TypeAlias = (
    "mx.array | list[ArrayTree] | tuple[ArrayTree, ...] | dict[str, ArrayTree]"
    " | bool | int | float | str | None"
)

_NAMES: dict[mx.Dtype, str] = {
    mx.bool_: "bool",
    mx.uint8: "uint8",
    mx.uint16: "uint16",
    mx.uint32: "uint32",
    mx.uint64: "uint64",
    mx.int8: "int8",
    mx.int16: "int16",
    mx.int32: "int32",
    mx.int64: "int64",
    mx.float16: "float16",
    mx.float32: "float32",
    mx.bfloat16: "bfloat16",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}

# struct's format of each name; the halves travel as 16-bit integers.
_FORMATS = {
    "bool": "?",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
    "float16": "H",
    "float32": "f",
    "bfloat16": "H",
}


def to_tensor(array: mx.array) -> Tensor:
    """The array's data, evaluated; shared with the array where it lies in C order."""
    dtype = array.dtype
    if dtype in (mx.float16, mx.bfloat16):
        array = array.view(mx.uint16)
    view = memoryview(cast(Any, array))  # which its stubs do not tell
    data = view.cast("B") if view.c_contiguous and array.size and array.ndim else view.tobytes()
    return Tensor(_NAMES[dtype], tuple(array.shape), data)


def from_tensor(tensor: Tensor) -> mx.array:
    """The tensor as an array of its own memory."""
    dtype = _TYPES[tensor.dtype]
    if 0 in tensor.shape:
        return mx.zeros(tensor.shape, dtype)
    data: Any = memoryview(tensor.data).cast("B")
    array = mx.array(data.cast(_FORMATS[tensor.dtype]))
    if array.dtype != dtype:
        array = array.view(dtype)
    return array.reshape(tensor.shape)


def pack(tree: ArrayTree) -> bytes:
    """A tree of arrays as bytes; evaluates what is lazy.

    Raises:
        TypeError: the tree holds something that does not travel.
        ValueError: it is too large or too deep.
    """
    if isinstance(tree, mx.array):
        return tensors.pack(to_tensor(tree))
    return tensors.pack(_map(tree, mx.array, to_tensor))


def unpack(data: bytes | memoryview) -> ArrayTree:
    """The tree of arrays that :func:`pack` wrote.

    Raises:
        FrameRefused: the bytes are no such tree, or exceed a bound.
    """
    tree = tensors.unpack(data)
    if isinstance(tree, Tensor):
        return from_tensor(tree)
    arrays: ArrayTree = _map(tree, Tensor, from_tensor)
    return arrays


def _map(tree: Any, leaf: type, change: Callable[..., Any]) -> Any:
    if isinstance(tree, leaf):
        return change(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map(item, leaf, change) for item in tree)
    if isinstance(tree, dict):
        return {key: _map(value, leaf, change) for key, value in tree.items()}
    return tree
