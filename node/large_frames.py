"""Frames by what they take of memory: large ones are looked at before they are read as frames."""

from __future__ import annotations

from parallax.fabric.bounds import MOST_CHUNK
from parallax.fabric.errors import FrameRefused
from parallax.proto import wire_pb2 as wire

FIELD_COST_BYTES = 64  # of memory, for the smallest of fields
# A smaller message is read as it is: what takes two bytes there takes 40 here, 5 MiB in all.
LOOKED_AT_BYTES = 256 << 10
MOST_COMMANDS = 65_536  # of one frame: every kept prefix may go at once
MOST_TOKENS = MOST_CHUNK  # of one frame: a chunk, or one for each row of a lane
_VARINT, _BYTES = 0, 2  # wire types (protobuf.dev, "Encoding")
_FIXED = {1: 8, 5: 4}
_CARRY_TAG = wire.Frame.CARRY_FIELD_NUMBER << 3 | _BYTES


def check_counts(frame: wire.Frame) -> None:
    """See that a frame has no more in it than there can be.

    Raises:
        FrameRefused: it has too many commands, or tokens.
    """
    commands, tokens = len(frame.commands), len(frame.tokens)
    if commands > MOST_COMMANDS or tokens > MOST_TOKENS:
        raise FrameRefused(
            f"A frame with {commands} commands and {tokens} tokens came",
            f"there are at most {MOST_COMMANDS} and {MOST_TOKENS}",
            epoch=frame.epoch,
            number=frame.number,
        )


def weight_of(frame: wire.Frame, size_bytes: int) -> int:
    """What a frame that came in so many bytes takes of memory while it waits."""
    return size_bytes + FIELD_COST_BYTES * len(frame.commands)


def check_large(message: bytes, most_bytes: int) -> None:
    """See that a large message is a frame whose carry makes it large, before it is read as one.

    Many small things take far more memory once they are read; a carry takes what it takes.

    Raises:
        FrameRefused: it has over ``most_bytes`` beside its carry, or is no message at all.
    """
    at = beside = 0
    while at < len(message):
        begin = at
        tag, at = _varint(message, at)
        kind, size = tag & 7, 0
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        elif kind == _BYTES:
            size, at = _varint(message, at)
        else:
            raise FrameRefused("What came is no frame")
        at += size
        beside += 0 if tag == _CARRY_TAG else max(at - begin, FIELD_COST_BYTES)
        if at > len(message) or beside > most_bytes:
            raise FrameRefused(f"What came has over {most_bytes} bytes beside its carry")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise FrameRefused("What came is no frame")
