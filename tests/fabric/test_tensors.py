"""Trees of tensors as bytes, whole, broken and hostile."""

from __future__ import annotations

import struct

import msgpack
import pytest

from parallax.fabric.errors import FrameRefused
from parallax.fabric.tensors import ITEM_BYTES, MAX_DEPTH, MAX_ELEMENTS, Tensor, pack, unpack


def tensor(dtype: str = "float32", shape: tuple[int, ...] = (2, 3)) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return Tensor(dtype, shape, bytes(i % 251 for i in range(count * ITEM_BYTES[dtype])))


def test_a_lone_tensor_comes_back_and_shares_memory_with_its_bytes() -> None:
    packed = pack(tensor())
    back = unpack(packed)
    assert back == tensor()
    assert isinstance(back, Tensor)
    assert isinstance(back.data, memoryview)
    assert back.data.obj is packed


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 1, 1, 4)])
def test_every_type_and_shape_comes_back(dtype: str, shape: tuple[int, ...]) -> None:
    for tree in (tensor(dtype, shape), [tensor(dtype, shape)]):
        assert unpack(pack(tree)) == tree


def test_trees_keep_lists_tuples_dicts_and_scalars_apart() -> None:
    tree = {
        "a": [tensor(), None, True, False, 1, -5, 2.5, "text"],
        "b": (tensor("bfloat16", (1,)), [], (), {}),
        "c": {"d": {"e": (1,)}},
    }
    back = unpack(pack(tree))
    assert back == tree
    assert isinstance(back, dict)
    assert isinstance(back["b"], tuple)
    assert unpack(memoryview(pack(tree))) == tree


def test_what_does_not_travel_is_a_type_error() -> None:
    for odd in (object(), b"bytes", {1, 2}, [object()]):
        with pytest.raises(TypeError):
            pack(odd)  # type: ignore[arg-type]


def test_what_is_too_large_or_too_deep_is_not_packed() -> None:
    with pytest.raises(ValueError, match="elements"):
        pack([[0] * 900] * 5)
    deep: object = 0
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ValueError, match="deeper"):
        pack(deep)  # type: ignore[arg-type]


def head(dtype: int, *shape: int) -> bytes:
    return bytes((dtype, len(shape))) + b"".join(struct.pack("<Q", n) for n in shape)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x0a",
        b"\xff\x00",
        b"\x0a\x09" + bytes(72),
        b"\x0a\x02" + bytes(8),
        head(10, 2, 3) + bytes(23),
        head(10, 2, 3) + bytes(25),
        head(10, 1 << 63, 1 << 63),
        head(10, 1 << 62) + bytes(4),
    ],
)
def test_a_tensor_that_is_not_what_it_says_is_refused(payload: bytes) -> None:
    alone = struct.pack(">BIb", 0xC9, len(payload), 1) + payload
    inside = msgpack.packb([False, msgpack.ExtType(1, payload)])
    for data in (alone, inside):
        with pytest.raises(FrameRefused):
            unpack(data)


def nested(depth: int) -> bytes:
    return b"\x92\xc2" * depth + b"\xc0"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        pack(tensor())[:-1],
        pack(tensor()) + b"\x00",
        pack([tensor()])[:-1],
        pack([tensor()]) + b"\x00",
        msgpack.packb([1, 2]),
        msgpack.packb([]),
        msgpack.packb([None, 2]),
        msgpack.packb({1: 2}),
        msgpack.packb(b"bytes"),
        msgpack.packb("x" * 5000),
        msgpack.packb(msgpack.ExtType(5, b"1234")),
        struct.pack(">BIb", 0xC9, 4, 5) + b"1234",
        struct.pack(">BIb", 0xC9, 0xFFFFFFFF, 1) + b"1234",
        b"\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\xdf\xff\xff\xff\xff",
        nested(MAX_DEPTH + 1),
        nested(500),
        nested(100_000),
        msgpack.packb([[False, *([0] * 1000)]] * (MAX_ELEMENTS // 1000 + 1)),
        b"\xc7\x08\xff" + bytes(8),  # msgpack's own time stamps are no tensors
    ],
)
def test_bytes_that_are_no_tree_of_ours_are_refused(data: bytes) -> None:
    with pytest.raises(FrameRefused, match="carry"):
        unpack(data)


def test_more_bytes_than_the_limit_are_refused_unread() -> None:
    packed = pack(tensor("uint8", (1000,)))
    assert unpack(packed, limit_bytes=len(packed)) == tensor("uint8", (1000,))
    with pytest.raises(FrameRefused, match="more than"):
        unpack(packed, limit_bytes=len(packed) - 1)


def test_a_name_that_occurs_twice_is_refused() -> None:
    with pytest.raises(FrameRefused, match="twice"):
        unpack(b"\x82\xa1a\x01\xa1a\x02")


def test_an_empty_tensor_of_an_impossible_shape_is_refused() -> None:
    head = bytes((0, 2)) + struct.pack("<2Q", 0, 1 << 62)
    with pytest.raises(FrameRefused, match="impossible shape"):
        unpack(struct.pack(">BIb", 0xC9, len(head), 1) + head)
