"""Headers of safetensors files: which tensors there are, and where. The data is never read.

Format: https://huggingface.co/docs/safetensors (eight bytes of little-endian header length, a JSON
header, then the data). Files come from strangers, so every number in the header is checked.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from parallax.fabric.errors import ModelBroken

HEADER_BYTES = 64 << 20  # of all files of a folder; experts in four bits, of 1,000 B, take 29 MiB
MOST_MARKS = 6_000_000  # brackets and commas of one header; those of that model have 1.7 million
NAME_CHARACTERS = 512
MOST_SIDE = (1 << 31) - 1  # of a dimension, as MLX counts
_DIMENSIONS = 16
_LENGTH = struct.Struct("<Q")

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. ``begin`` and ``end`` are byte offsets from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return self.end - self.begin


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelBroken: the file is missing, unreadable, cut short, or its header makes no sense.
    """
    text = header_bytes(file)
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MOST_MARKS:
        raise _broken(file, "its header has too many values")
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    start = _LENGTH.size + len(text)
    size = file.stat().st_size
    tensors = {name: _tensor(file, name, entry, start) for name, entry in header.items()}
    needed = max((tensor.end for tensor in tensors.values()), default=start)
    if needed > size:
        raise _broken(file, f"it has {size} bytes and should have {needed}: it is cut short")
    return tensors


def folder_headers(folder: Path) -> dict[str, dict[str, TensorInfo]]:
    """Headers of all ``model*.safetensors`` of a folder, by file name, in order of names.

    Raises:
        ModelBroken: see :func:`read_header`; or the headers are absurdly large together.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    left = HEADER_BYTES
    for file in sorted(folder.glob("model*.safetensors")):
        left -= len(header_bytes(file))
        if left < 0:
            raise _broken(file, f"the headers of its folder have over {HEADER_BYTES} bytes")
        found[file.name] = read_header(file)
    return found


def header_bytes(file: Path) -> bytes:
    """A file's header as it is there, not yet understood.

    Raises:
        ModelBroken: the file is missing, no plain file, cut short, or its header absurdly large.
    """
    try:
        if file.exists() and not file.is_file():
            raise _broken(file, "it is no plain file")
        with file.open("rb") as stream:
            head = stream.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                raise _broken(file, "it is cut short in its first eight bytes")
            (length,) = _LENGTH.unpack(head)
            if length > HEADER_BYTES:
                raise _broken(file, f"its header claims {length} bytes")
            text = stream.read(length)
    except OSError as error:
        raise _broken(file, error.strerror or str(error)) from error
    if len(text) < length:
        raise _broken(file, "it is cut short in its header")
    return text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers differ in which of two equal names they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if len(name) > NAME_CHARACTERS:
        raise _broken(file, f"{name[:40]}… has a name of {len(name)} characters")
    if not isinstance(entry, dict):
        raise _broken(file, f"its header does not describe {name}")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _broken(file, f"{name} has the unknown type {dtype!r}")
    if not _counts(shape) or len(shape) > _DIMENSIONS or max(shape, default=0) > MOST_SIDE:
        raise _broken(file, f"{name} has an impossible shape")
    if not _counts(offsets) or len(offsets) != 2:
        raise _broken(file, f"{name} lies nowhere in the file")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _broken(file, f"{name} does not have the size of its shape")
    return TensorInfo(dtype, tuple(shape), start + begin, start + end)


def _counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _broken(file: Path, why: str) -> ModelBroken:
    return ModelBroken(
        f"The weight file {file.name} cannot be used", why, "Fetch the model again", path=file
    )
