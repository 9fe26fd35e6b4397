"""Headers of weight files, whole and broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from parallax.fabric.errors import ModelBroken
from parallax.fabric.safetensors import TensorInfo, folder_headers, read_header


def write(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_that_mlx_wrote_is_described_with_offsets_that_hold_its_data(
    tmp_path: Path,
) -> None:
    file = tmp_path / "model.safetensors"
    array = mx.arange(6, dtype=mx.float32).reshape(2, 3)
    mx.save_safetensors(str(file), {"a": array, "b": mx.ones((4,), mx.bfloat16)}, {"format": "mlx"})
    header = read_header(file)
    assert set(header) == {"a", "b"}
    assert header["a"].dtype == "F32"
    assert header["a"].shape == (2, 3)
    assert header["b"].nbytes == 8
    data = file.read_bytes()[header["a"].begin : header["a"].end]
    assert data == struct.pack("<6f", *range(6))


def test_a_folder_gives_the_headers_of_its_model_files_and_no_others(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "adapters.safetensors"):
        write(tmp_path / name, {"w": entry([1], 0, 4)}, bytes(4))
    assert list(folder_headers(tmp_path)) == ["model-1.safetensors", "model-2.safetensors"]


def test_types_smaller_than_a_byte_are_counted_in_bits(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", {"w": entry([4], 0, 2, "F4")}, bytes(2))
    assert read_header(file)["w"] == TensorInfo(
        "F4", (4,), file.stat().st_size - 2, file.stat().st_size
    )


@pytest.mark.parametrize(
    ("header", "data", "length", "why"),
    [
        ({"w": entry([2], 0, 8)}, bytes(7), None, "cut short"),
        ({"w": entry([2], 0, 8)}, b"", None, "cut short"),
        (b'{"w":{}, "w":{}}', b"", None, "occurs twice"),
        ({"w" * 5000: entry([2], 0, 8)}, bytes(8), None, "a name of 5000 characters"),
        ({"w": entry([1 << 31, 0], 0, 0)}, b"", None, "impossible shape"),
        (b"{}", b"", 100, "cut short in its header"),
        (b"{}", b"", 1 << 62, "claims"),
        (b"{]", b"", None, "not valid JSON"),
        (b"[" * 100_000, b"", None, "not valid JSON"),
        (b"\xff\xfe", b"", None, "not valid JSON"),
        ([], b"", None, "not a JSON object"),
        ({"w": 3}, b"", None, "does not describe w"),
        ({"w": entry([2], 0, 8, "F33")}, bytes(8), None, "unknown type"),
        ({"w": entry([3], 0, 8)}, bytes(8), None, "size of its shape"),
        ({"w": entry([-2], 0, 8)}, bytes(8), None, "impossible shape"),
        ({"w": entry([2], 8, 0)}, bytes(8), None, "size of its shape"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, bytes(8), None, "nowhere"),
        ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"", None, "shape"),
        ({"w": entry([1] * 17, 0, 4)}, bytes(4), None, "impossible shape"),
    ],
)
def test_every_defect_of_a_header_is_named(
    tmp_path: Path, header: Any, data: bytes, length: int | None, why: str
) -> None:
    file = write(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(ModelBroken, match=why) as caught:
        read_header(file)
    assert caught.value.fields["path"] == str(file)


def test_a_missing_and_an_empty_file_are_broken_models(tmp_path: Path) -> None:
    with pytest.raises(ModelBroken, match="No such file"):
        read_header(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelBroken, match="first eight bytes"):
        folder_headers(tmp_path)
