"""gRPC: the chosen model's files for nodes that lack them, and what is right about them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from parallax.fabric.blocks import FileBlocks, Marks, blocks_of, data_begin
from parallax.fabric.errors import ModelError
from parallax.fabric.models import DESCRIBING_FILES, ModelFolder
from parallax.fabric.safetensors import folder_headers
from parallax.fabric.tasks import in_thread
from parallax.fabric.weights_service import WeightsService, read_bytes
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.sums import Sums

log = logging.getLogger(__name__)

MOST_SUMS = 64  # blocks of one answer: 64 MiB are read for it at most
PIECE_BYTES = 1 << 20

_C = grpc.StatusCode


@dataclass(frozen=True, slots=True)
class Offered:
    """A model that nodes may fetch from here: all of it is on this disk."""

    path: Path
    blocks: Mapping[str, FileBlocks]
    sums: Sums
    marks: Mapping[str, Marks] | None = None


class ModelWeights(WeightsService):
    """Service Weights of the scheduler: the model that is chosen now.

    Args:
        state_dir: where sums are kept.
        sent: is told of bytes as they are given out.
    """

    def __init__(self, state_dir: Path, sent: Callable[[int], None]) -> None:
        super().__init__(self._offer_of, sent)
        self._kept = state_dir / "sums"
        self._offers: dict[str, Offered] = {}  # by digest: the chosen one

    async def offer(self, folder: ModelFolder) -> None:
        """This model is given out from now on, in place of the one before.

        Raises:
            ModelBroken: its files cannot be described.
        """
        blocks = await in_thread(lambda: blocks_of(folder_headers(folder.path)))
        sums = Sums(folder.path, blocks, self._kept / folder.digest)
        self._offers = {folder.digest: Offered(folder.path, blocks, sums)}

    async def Describe(
        self,
        request: wire.ModelAsked,
        context: grpc.aio.ServicerContext[wire.ModelAsked, wire.Described],
    ) -> AsyncIterator[wire.Described]:
        """The model's configuration and the headers of its weight files."""
        offered = await self.asked(request.digest, context)
        names = [name for name in DESCRIBING_FILES if (offered.path / name).is_file()]
        try:
            for name in (*names, *offered.blocks):
                path = offered.path / name
                size = path.stat().st_size
                end = await asyncio.to_thread(data_begin, path) if name in offered.blocks else size
                begin = 0
                while begin < end:
                    stop = min(end, begin + PIECE_BYTES)
                    data = await asyncio.to_thread(read_bytes, path, begin, stop)
                    first = begin == 0
                    yield wire.Described(
                        file=name if first else "", size_bytes=size if first else 0, data=data
                    )
                    begin = stop
        except OSError as error:
            await context.abort(_C.DATA_LOSS, f"it cannot be read: {error.strerror}")

    async def Sums(
        self,
        request: wire.SumsAsked,
        context: grpc.aio.ServicerContext[wire.SumsAsked, wire.SumsTold],
    ) -> wire.SumsTold:
        """SHA-256 of some blocks."""
        await self.asked(request.digest, context)
        offered = self._offers[request.digest]
        blocks = offered.blocks.get(request.file)
        run = range(request.first, request.first + request.count)
        if blocks is None or not 0 < len(run) <= MOST_SUMS or run.stop > len(blocks):
            await context.abort(_C.INVALID_ARGUMENT, "no such file, or no such blocks")
            raise AssertionError  # abort has raised
        try:
            return wire.SumsTold(sums=await offered.sums.of(request.file, run))
        except ModelError as error:
            log.warning("%s", error.sentence)
            await context.abort(_C.DATA_LOSS, error.sentence)
            raise AssertionError from None

    def _offer_of(self, digest: str) -> Offered | None:
        return self._offers.get(digest)
