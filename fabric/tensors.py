"""Trees of tensors as bytes: msgpack with one ext type per array. No MLX in here.

A tree is a tensor, a list, tuple or dict (string keys) of trees, None, bool, int, float or str.
Lists and tuples travel as arrays whose first element tells them apart. An array's payload is its
type code, its number of dimensions, the dimensions (64 bits, little-endian), then the raw
little-endian data. What comes in is untrusted: sizes, counts and depth are bounded.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TypeAlias

import msgpack

from parallax.fabric.errors import FrameRefused
from parallax.fabric.limits import DEFAULT_LIMITS

MAX_ELEMENTS = 4096  # of all lists, tuples and dicts of a tree together
MAX_DEPTH = 16
MAX_DIMENSIONS = 8
MOST_SIDE = (1 << 31) - 1  # of a dimension, as MLX counts
_MAX_CONTAINER = 1024
_MAX_STRING = 4096

_ARRAY = 1  # the ext type
_DIMENSION = struct.Struct("<Q")
_EXT_32 = struct.Struct(">BIb")  # msgpack's ext 32: 0xc9, length, type

# Wire code by name; sizes in bytes.
_CODES = {
    "bool": 0,
    "uint8": 1,
    "uint16": 2,
    "uint32": 3,
    "uint64": 4,
    "int8": 5,
    "int16": 6,
    "int32": 7,
    "int64": 8,
    "float16": 9,
    "float32": 10,
    "bfloat16": 11,
}
_NAMES = {code: name for name, code in _CODES.items()}
ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "float32": 4,
    "bfloat16": 2,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A dense array: type name as in :data:`ITEM_BYTES`, shape, little-endian C-ordered data."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


Tree: TypeAlias = (
    "Tensor | list[Tree] | tuple[Tree, ...] | dict[str, Tree] | bool | int | float | str | None"
)


def pack(tree: Tree) -> bytes:
    """A tree as bytes. Tensor data is copied once.

    Raises:
        TypeError: the tree holds something else.
        ValueError: the tree is larger or deeper than :func:`unpack` takes.
    """
    parts: list[bytes | memoryview] = []
    if _write(tree, parts, msgpack.Packer(), 0) > MAX_ELEMENTS:
        raise ValueError(f"a tree of more than {MAX_ELEMENTS} elements")
    return b"".join(parts)


def unpack(data: bytes | memoryview, *, limit_bytes: int = DEFAULT_LIMITS.frame_bytes) -> Tree:
    """The tree that :func:`pack` wrote. A lone tensor shares memory with ``data``.

    Raises:
        FrameRefused: the bytes are no such tree, or exceed a bound.
    """
    view = memoryview(data)
    if len(view) > limit_bytes:
        raise _refused(f"{len(view)} bytes, more than the {limit_bytes} taken in")
    if len(view) > _EXT_32.size and view[0] == 0xC9:
        _, length, code = _EXT_32.unpack_from(view)
        if length != len(view) - _EXT_32.size:
            raise _refused("a tensor's length is not that of its bytes")
        return _read_tensor(code, view[_EXT_32.size :])
    reader = _Reader()
    try:
        tree: Tree = msgpack.unpackb(
            view,
            ext_hook=_read_tensor,
            list_hook=reader.sequence,
            object_pairs_hook=reader.mapping,
            max_array_len=_MAX_CONTAINER,
            max_map_len=_MAX_CONTAINER,
            max_str_len=_MAX_STRING,
            max_bin_len=0,
            max_ext_len=limit_bytes,
        )
    except FrameRefused:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise _refused(f"not a tensor tree ({type(error).__name__}: {error})") from error
    _check(tree, 0)
    return tree


class _Reader:
    """Containers of one tree, counted as they end."""

    def __init__(self) -> None:
        self._left = MAX_ELEMENTS

    def _count(self, elements: int) -> None:
        self._left -= elements
        if self._left < 0:
            raise _refused(f"more than {MAX_ELEMENTS} elements")

    def sequence(self, items: list[Tree]) -> Tree:
        self._count(len(items))
        if not items or not isinstance(items[0], bool):
            raise _refused("a sequence of no kind")
        return tuple(items[1:]) if items[0] else items[1:]

    def mapping(self, pairs: list[tuple[object, Tree]]) -> Tree:
        self._count(len(pairs))
        result: dict[str, Tree] = {}
        for key, value in pairs:
            if not isinstance(key, str) or key in result:
                raise _refused("a key that is not a string, or twice")
            result[key] = value
        return result


def _write(tree: Tree, parts: list[bytes | memoryview], packer: msgpack.Packer, depth: int) -> int:
    if depth > MAX_DEPTH:
        raise ValueError(f"a tree deeper than {MAX_DEPTH}")
    if isinstance(tree, Tensor):
        head = bytes((_CODES[tree.dtype], len(tree.shape)))
        head += b"".join(map(_DIMENSION.pack, tree.shape))
        data = memoryview(tree.data).cast("B")
        parts += (_EXT_32.pack(0xC9, len(head) + len(data), _ARRAY), head, data)
        return 1
    if isinstance(tree, (list, tuple)):
        parts.append(packer.pack_array_header(len(tree) + 1))
        parts.append(packer.pack(isinstance(tree, tuple)))
        return 1 + sum(_write(item, parts, packer, depth + 1) for item in tree)
    if isinstance(tree, dict):
        parts.append(packer.pack_map_header(len(tree)))
        count = 1
        for key, value in tree.items():
            parts.append(packer.pack(key))
            count += _write(value, parts, packer, depth + 1)
        return count
    if tree is None or isinstance(tree, (bool, int, float, str)):
        parts.append(packer.pack(tree))
        return 1
    raise TypeError(f"{type(tree).__name__} does not travel")


def _read_tensor(code: int, data: bytes | memoryview) -> Tensor:
    if code != _ARRAY:
        raise _refused(f"the unknown ext type {code}")
    if len(data) < 2 or data[0] not in _NAMES or data[1] > MAX_DIMENSIONS:
        raise _refused("a tensor of no known type")
    dtype, dimensions = _NAMES[data[0]], data[1]
    start = 2 + dimensions * _DIMENSION.size
    if len(data) < start:
        raise _refused("a tensor cut short in its shape")
    shape = struct.unpack_from(f"<{dimensions}Q", data, 2)
    if max(shape, default=0) > MOST_SIDE:
        raise _refused("a tensor of an impossible shape")
    if math.prod(shape) * ITEM_BYTES[dtype] != len(data) - start:
        raise _refused("a tensor whose data does not fit its shape")
    return Tensor(dtype, shape, memoryview(data)[start:])


def _check(tree: Tree, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _refused(f"nested deeper than {MAX_DEPTH}")
    if isinstance(tree, (list, tuple)):
        for item in tree:
            _check(item, depth + 1)
    elif isinstance(tree, dict):
        for item in tree.values():
            _check(item, depth + 1)
    elif not (tree is None or isinstance(tree, (Tensor, int, float, str))):
        raise _refused(f"a {type(tree).__name__}")  # msgpack's time stamps


def _refused(why: str) -> FrameRefused:
    return FrameRefused("A frame's carry cannot be read", why)
