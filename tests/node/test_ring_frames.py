"""Frames in pieces: whole again at the other end, and bounded on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from parallax.fabric.errors import FrameRefused
from parallax.node.large_frames import check_large
from parallax.node.pieces import assemble, split
from parallax.proto import wire_pb2 as wire


async def stream(*pieces: wire.FramePiece) -> AsyncIterator[wire.FramePiece]:
    for piece in pieces:
        yield wire.FramePiece.FromString(piece.SerializeToString())


def frame(size: int) -> wire.Frame:
    carry = bytes(range(256)) * (size // 256) + bytes(size % 256)
    return wire.Frame(epoch=3, number=4, kind=wire.PREFILL, tokens=[1, 2, 3], carry=carry)


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 2001, 5432])
async def test_a_frame_in_pieces_is_the_same_frame(size: int) -> None:
    sent = [frame(size), frame(10)]
    pieces = [piece for one in sent for piece in split(one, 1000)]
    assert all(piece.ByteSize() < 1100 for piece in pieces)
    assert [one async for one in assemble(stream(*pieces), 10_000)] == sent


async def test_an_endless_frame_is_refused_before_it_fills_the_memory() -> None:
    pieces = split(frame(5000), 1000)
    with pytest.raises(FrameRefused, match="3000 bytes"):
        _ = [one async for one in assemble(stream(*pieces), 3000)]


async def test_a_piece_without_its_beginning_is_refused() -> None:
    with pytest.raises(FrameRefused, match="no frame"):
        _ = [one async for one in assemble(stream(wire.FramePiece(rest=b"x")), 3000)]


async def test_a_frame_inside_another_is_refused() -> None:
    first = split(frame(5000), 1000)[0]
    with pytest.raises(FrameRefused, match="before the last one ended"):
        _ = [one async for one in assemble(stream(first, first), 10_000)]


async def test_pieces_of_nothing_are_refused() -> None:
    first = split(frame(5000), 1000)[0]
    with pytest.raises(FrameRefused, match="empty piece"):
        _ = [one async for one in assemble(stream(first, wire.FramePiece(more=True)), 10_000)]


async def test_pieces_of_next_to_nothing_are_refused_when_they_are_very_many() -> None:
    pieces = split(frame(100_000), 1)
    with pytest.raises(FrameRefused, match="pieces arrived"):
        _ = [one async for one in assemble(stream(*pieces), 200_000)]


def test_a_frame_is_large_by_its_carry_or_is_not_read_at_all() -> None:
    honest = frame(5000)
    honest.tokens.extend(range(300))
    honest.commands.add().drop.sequence = 1
    check_large(honest.SerializeToString(), 2000)
    many = wire.Frame(commands=[wire.Command()] * 1000)  # each takes two bytes here, and many there
    split_carry = frame(500).SerializeToString() * 3  # the last of several counts
    check_large(split_carry, 2000)
    for data in (
        many.SerializeToString(),
        wire.Frame(tokens=[1 << 31] * 1000).SerializeToString(),
        honest.SerializeToString() + b"\xff" * 20,
        honest.SerializeToString()[:-1] + b"\x4a\xff\xff\xff\x7f",
        b"\x0b" * 10,
    ):
        with pytest.raises(FrameRefused):
            check_large(data, 2000)
