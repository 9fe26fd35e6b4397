"""Frames in pieces: whole again at the other end, and bounded on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from parallax.fabric.errors import FrameRefused
from parallax.node.ring import assemble, split
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
