"""Giving out the bytes of models: by a model's digest and ranges of its files, never by a path.

Whoever asks names a digest. What the asked one has of that model is a :class:`Holding`; of anything
else it knows nothing, and nothing else can be read.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

from parallax.fabric.blocks import BLOCK_BYTES, FileBlocks, Marks
from parallax.fabric.credentials import peer_of
from parallax.fabric.models import DESCRIBING_FILES
from parallax.fabric.shares import Shares
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc

MOST_RANGES = 64  # of one Read
MOST_READERS = 32  # at once: each takes a block or two of memory
EACH_READERS = 6  # of one member: a node asks IN_FLIGHT, and its last ones may still be ending
MOST_READ_S = 150.0  # a place is held no longer; nodes ask for less, and gRPC ends what is late

_WEIGHT_FILE = re.compile(r"model[\w.-]{0,160}\.safetensors", re.ASCII)
_C = grpc.StatusCode


class Holding(Protocol):
    """What there is here of one model."""

    def file(self, name: str) -> Path:
        """Where one of its weight files is."""
        ...

    @property
    def blocks(self) -> Mapping[str, FileBlocks]:
        """Its weight files' blocks, by the file's name."""
        ...

    @property
    def marks(self) -> Mapping[str, Marks] | None:
        """The blocks that are here; None for all."""
        ...


Find = Callable[[str], Holding | None]


class WeightsService(rpc.WeightsServicer):
    """Service Weights as every member offers it: what is here, and its bytes.

    Args:
        find: what there is of the model with this digest.
        sent: is told of bytes as they are given out.
    """

    def __init__(self, find: Find, sent: Callable[[int], None] = lambda _: None) -> None:
        self._find = find
        self._sent = sent
        self._readers = Shares(MOST_READERS, EACH_READERS)

    async def Holds(
        self,
        request: wire.ModelAsked,
        context: grpc.aio.ServicerContext[wire.ModelAsked, wire.HoldsTold],
    ) -> wire.HoldsTold:
        """What of a model can be read here now."""
        holding = await self.asked(request.digest, context)
        if holding.marks is None:
            return wire.HoldsTold(whole=True)
        files = [
            wire.HeldFile(file=file, blocks=bytes(marks)) for file, marks in holding.marks.items()
        ]
        return wire.HoldsTold(files=files)

    async def Read(
        self,
        request: wire.ReadAsked,
        context: grpc.aio.ServicerContext[wire.ReadAsked, wire.BytesRead],
    ) -> AsyncIterator[wire.BytesRead]:
        """Bytes of one weight file, one message for each range."""
        holding = await self.asked(request.digest, context)
        blocks = holding.blocks.get(request.file)
        if blocks is None or not 0 < len(request.ranges) <= MOST_RANGES:
            await context.abort(_C.INVALID_ARGUMENT, "no such file, or no number of ranges")
            return
        for place in request.ranges:
            found = blocks.between(place.begin, place.end)
            if found is None or place.end - place.begin > BLOCK_BYTES:
                await context.abort(_C.INVALID_ARGUMENT, "a range is not made of blocks")
                return
            marks = holding.marks
            if marks is not None and not all(block in marks[request.file] for block in found):
                await context.abort(_C.OUT_OF_RANGE, "a block is not here")
                return
        async with self.reading(context):
            for place in request.ranges:
                data = await asyncio.to_thread(
                    read_bytes, holding.file(request.file), place.begin, place.end
                )
                self._sent(len(data))  # before: who has all it asked for ends the call
                yield wire.BytesRead(data=data)

    async def Describe(
        self,
        request: wire.ModelAsked,
        context: grpc.aio.ServicerContext[wire.ModelAsked, wire.Described],
    ) -> AsyncIterator[wire.Described]:
        """What a model is made of: only a scheduler is believed."""
        await context.abort(_C.UNIMPLEMENTED, "the scheduler says that")
        yield wire.Described()

    async def Sums(
        self,
        request: wire.SumsAsked,
        context: grpc.aio.ServicerContext[wire.SumsAsked, wire.SumsTold],
    ) -> wire.SumsTold:
        """What is right: only a scheduler is believed."""
        await context.abort(_C.UNIMPLEMENTED, "the scheduler says that")
        raise AssertionError  # abort has raised

    @asynccontextmanager
    async def reading(self, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
        """A place among those that are read to; the call ends if its caller gets none.

        Who takes nothing holds a place until the call's deadline, so a call must have one.
        """
        left_s = context.time_remaining()
        if left_s is None or left_s > MOST_READ_S:
            await context.abort(_C.INVALID_ARGUMENT, f"a deadline of {MOST_READ_S:g} s is needed")
        with self._readers.place(peer_of(context)) as free:
            if not free:
                await context.abort(_C.RESOURCE_EXHAUSTED, "too many read at once")
            try:
                yield
            except OSError as error:
                await context.abort(_C.DATA_LOSS, f"it cannot be read: {error.strerror}")

    async def asked(self, digest: str, context: grpc.aio.ServicerContext[Any, Any]) -> Holding:
        """What is here of the model that was asked for; the call ends if it is not known."""
        holding = self._find(digest)
        if holding is None:
            await context.abort(_C.NOT_FOUND, "this model is not known here")
            raise AssertionError  # abort has raised
        return holding


def known_name(file: str) -> bool:
    """Whether this is the name of a file that a model has: a plain name, no path."""
    return file in DESCRIBING_FILES or _WEIGHT_FILE.fullmatch(file) is not None


def read_bytes(file: Path, begin: int, end: int) -> bytes:
    """Bytes ``[begin, end)`` of a file.

    Raises:
        OSError: it cannot be read, or is shorter than that.
    """
    handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts: list[bytes] = []
        while begin < end:
            part = os.pread(handle, end - begin, begin)
            if not part:
                raise OSError(0, "it is shorter than its header says")
            parts.append(part)
            begin += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(handle)
