"""Frames in pieces, as they travel through gRPC, whose messages are small."""

from __future__ import annotations

from collections.abc import AsyncIterator

from parallax.fabric.errors import FrameRefused
from parallax.proto import wire_pb2 as wire

MOST_PIECES = 65_536  # of one frame: each takes some fifty bytes of memory beside its own


def split(frame: wire.Frame, piece_bytes: int) -> list[wire.FramePiece]:
    """The pieces in which a frame travels; one for all but large carries."""
    if len(frame.carry) <= piece_bytes:
        return [wire.FramePiece(frame=frame)]
    carry = memoryview(frame.carry)
    head = wire.Frame()
    head.CopyFrom(frame)
    head.carry = bytes(carry[:piece_bytes])
    pieces = [wire.FramePiece(frame=head, more=True)]
    for start in range(piece_bytes, len(carry), piece_bytes):
        end = start + piece_bytes
        pieces.append(wire.FramePiece(rest=bytes(carry[start:end]), more=end < len(carry)))
    return pieces


async def assemble(
    pieces: AsyncIterator[wire.FramePiece], limit_bytes: int
) -> AsyncIterator[wire.Frame]:
    """Whole frames out of pieces.

    Raises:
        FrameRefused: a piece without its beginning, a carry over ``limit_bytes``, or one in
            absurdly many pieces.
    """
    frame: wire.Frame | None = None
    parts: list[bytes] = []
    size = 0
    async for piece in pieces:
        if piece.HasField("frame"):
            if frame is not None:
                raise FrameRefused("A frame began before the last one ended")
            frame = piece.frame
            size = len(frame.carry)
        elif frame is None:
            raise FrameRefused("A piece of no frame arrived")
        else:
            if not piece.rest and piece.more:
                raise FrameRefused("An empty piece arrived")
            parts.append(piece.rest)
            size += len(piece.rest)
        if size > limit_bytes:
            raise FrameRefused(f"A frame of over {limit_bytes} bytes arrived")
        if len(parts) >= MOST_PIECES:
            raise FrameRefused(f"A frame in {MOST_PIECES} pieces arrived")
        if not piece.more:
            if parts:
                frame.carry = b"".join((frame.carry, *parts))
                parts = []
            yield frame
            frame = None
