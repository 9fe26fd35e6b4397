"""MLX arrays to bytes and back."""

from __future__ import annotations

import mlx.core as mx
import pytest

from parallax.fabric.errors import FrameRefused
from parallax.node import arrays
from parallax.node.arrays import from_tensor, pack, to_tensor, unpack

TYPES = [
    mx.bool_,
    mx.uint8,
    mx.uint16,
    mx.uint32,
    mx.uint64,
    mx.int8,
    mx.int16,
    mx.int32,
    mx.int64,
    mx.float16,
    mx.bfloat16,
    mx.float32,
]


def numbers(dtype: mx.Dtype) -> mx.array:
    values = mx.arange(12) - (0 if dtype in (mx.uint8, mx.uint16, mx.uint32, mx.uint64) else 6)
    return (values % 2 == 0 if dtype == mx.bool_ else values.astype(dtype)).reshape(3, 4)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_and_layout_comes_back_bit_for_bit(dtype: mx.Dtype) -> None:
    a = numbers(dtype)
    for array in (a, a.T, a[:, 1:3], a[::2], a[0, 0], a[None, :, None], mx.zeros((0, 3), dtype)):
        back = unpack(pack(array))
        assert isinstance(back, mx.array)
        assert back.dtype == dtype
        assert back.shape == array.shape
        assert mx.array_equal(back, array).item()


def test_not_a_number_and_infinities_travel() -> None:
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        array = mx.array([mx.nan, mx.inf, -mx.inf, -0.0], dtype)
        back = from_tensor(to_tensor(array))
        assert bytes(to_tensor(back).data) == bytes(to_tensor(array).data)


def test_a_dense_array_is_shared_and_not_copied() -> None:
    for dtype in (mx.float32, mx.bfloat16):
        array = mx.ones((8, 8), dtype)
        mx.eval(array)
        assert isinstance(to_tensor(array).data, memoryview)


def test_trees_keep_their_form() -> None:
    tree = {"h": (mx.ones((2, 2)), [mx.zeros((1,), mx.int32), None, 3]), "s": "x"}
    back = unpack(pack(tree))
    assert isinstance(back, dict)
    assert isinstance(back["h"], tuple)
    assert isinstance(back["h"][1], list)
    assert mx.array_equal(back["h"][0], mx.ones((2, 2))).item()
    assert back["h"][1][1:] == [None, 3]


def test_unpacked_arrays_do_not_depend_on_the_bytes_they_came_from() -> None:
    data = bytearray(pack(mx.ones((4,))))
    back = arrays.unpack(memoryview(data))
    assert isinstance(back, mx.array)
    mx.eval(back)
    data[-16:] = bytes(16)
    assert mx.array_equal(back, mx.ones((4,))).item()


def test_bytes_that_are_no_arrays_are_refused() -> None:
    with pytest.raises(FrameRefused):
        unpack(b"nonsense")
