"""Blocks: every byte of every tensor in exactly one, and both sides see the same ones."""

from __future__ import annotations

import random

import pytest

from parallax.fabric.blocks import BLOCK_BYTES, FileBlocks, Marks
from parallax.fabric.errors import ModelBroken
from parallax.fabric.safetensors import TensorInfo

MIB = BLOCK_BYTES


def header(*places: tuple[int, int]) -> dict[str, TensorInfo]:
    return {f"t{n}": TensorInfo("U8", (e - b,), b, e) for n, (b, e) in enumerate(places)}


def test_a_tensor_is_cut_into_blocks_and_no_block_has_bytes_of_two() -> None:
    blocks = FileBlocks("f", header((100, 100 + 2 * MIB + 5), (100 + 2 * MIB + 5, 3 * MIB)))
    assert len(blocks) == 4
    assert list(blocks.of("t0")) == [0, 1, 2]
    assert list(blocks.of("t1")) == [3]
    assert [blocks.place(b) for b in range(4)] == [
        (100, 100 + MIB),
        (100 + MIB, 100 + 2 * MIB),
        (100 + 2 * MIB, 100 + 2 * MIB + 5),
        (100 + 2 * MIB + 5, 3 * MIB),
    ]
    with pytest.raises(IndexError):
        blocks.place(4)


def test_the_order_of_names_and_empty_tensors_make_no_difference() -> None:
    places = header((0, 10), (10, 10), (10, 20), (30, 40))
    one = FileBlocks("f", places)
    other = FileBlocks("f", dict(reversed(places.items())))
    assert len(one) == len(other) == 3
    assert all(one.of(name) == other.of(name) for name in places)
    assert list(one.of("t1")) == list(one.of("nobody")) == []


def test_tensors_that_overlap_are_refused() -> None:
    with pytest.raises(ModelBroken, match="overlaps"):
        FileBlocks("f", header((0, 10), (9, 20)))


def test_only_ranges_made_of_whole_blocks_are_found() -> None:
    blocks = FileBlocks(
        "f", header((8, 8 + MIB + 1), (8 + MIB + 1, 8 + MIB + 3), (MIB + 20, MIB + 30))
    )
    assert blocks.between(8, 8 + MIB) == range(1)
    assert blocks.between(8 + MIB, 8 + MIB + 3) == range(1, 3)
    assert blocks.between(MIB + 20, MIB + 30) == range(3, 4)
    for begin, end in (
        (0, 8),
        (8, 9),
        (9, 8 + MIB),
        (8 + MIB, MIB + 30),
        (8, 8),
        (5 * MIB, 6 * MIB),
    ):
        assert blocks.between(begin, end) is None, (begin, end)


def test_runs_hold_neighbours_without_a_gap_up_to_a_size() -> None:
    rng = random.Random(7)
    places, at = [], 0
    for _ in range(200):
        at += rng.choice((0, 0, 0, 16))
        size = rng.choice((4, 4000, MIB // 3, 2 * MIB))
        places.append((at, at + size))
        at += size
    blocks = FileBlocks("f", header(*places))
    wanted = sorted(rng.sample(range(len(blocks)), len(blocks) // 2))
    runs = list(blocks.runs(wanted, MIB))
    assert [block for run in runs for block in run] == wanted
    for run in runs:
        begin, end = blocks.place(run[0])[0], blocks.place(run[-1])[1]
        assert end - begin <= MIB
        assert blocks.between(begin, end) == run
    assert any(len(run) > 1 for run in runs)


def test_marks_survive_as_bytes_and_ignore_what_is_too_much() -> None:
    marks = Marks(11)
    for block in (0, 3, 10):
        marks.add(block)
    again = Marks(11, bytes(marks) + b"\xff\xff")
    assert [b for b in range(-2, 40) if b in again] == [0, 3, 10]
    assert len(again) == 3
    assert len(Marks(11, b"\xff" * 9)) == 11
    with pytest.raises(IndexError):
        marks.add(11)
