"""gRPC: the chosen model's files for nodes that lack them, and what is right about them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import grpc
import grpc.aio

from parallax.fabric.blocks import FileBlocks, Marks, blocks_of, data_begin
from parallax.fabric.credentials import peer_of
from parallax.fabric.errors import ModelError
from parallax.fabric.models import DESCRIBING_FILES, PARTS, ModelFolder
from parallax.fabric.safetensors import folder_headers
from parallax.fabric.shares import Shares
from parallax.fabric.tasks import in_thread
from parallax.fabric.weights_service import WeightsService, read_bytes
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.outline import cached_file, fetch_file
from parallax.scheduler.sums import Sums

log = logging.getLogger(__name__)

MOST_SUMS = 64  # blocks of one answer: 64 MiB are read for it at most
MOST_ASKING = 1024  # for sums at once; most wait their turn and hold nothing
EACH_ASKING = 32  # of one member: a node asks for each parcel that is on its way, from 9 sources
PIECE_BYTES = 1 << 20

_C = grpc.StatusCode


class Offered:
    """A model that nodes may fetch from here.

    Of an outline (``scheduler/outline.py``) a weight file is here once it has been brought.
    """

    def __init__(self, folder: ModelFolder, blocks: Mapping[str, FileBlocks], kept: Path) -> None:
        self.folder = folder
        self.blocks = blocks
        self.sums = Sums(self.file, blocks, kept)
        self.marks: dict[str, Marks] | None = None  # None: all of it is on this disk
        self._brought: dict[str, Path] = {}
        self._bringing: dict[str, asyncio.Task[None]] = {}
        if (folder.path / PARTS).exists():
            self.marks = {file: Marks(len(found)) for file, found in blocks.items()}
            for file in blocks:
                path = cached_file(folder, file)
                if path is not None:
                    self._here(file, path)

    def file(self, name: str) -> Path:
        """Where a weight file is, or its header."""
        return self._brought.get(name, self.folder.path / name)

    def bring(self, file: str) -> bool:
        """Whether a file is here; if not, it is on its way from the hub from now on.

        Raises:
            ModelError: it did not come; the next call tries again.
        """
        if self.marks is None or file in self._brought:
            return True
        task = self._bringing.get(file)
        if task is None:
            log.info("%s of %s is fetched from the hub", file, self.folder.name)
            self._bringing[file] = asyncio.create_task(self._bring(file))
        elif task.done():
            del self._bringing[file]
            task.result()
        return file in self._brought

    def close(self) -> None:
        """Nothing more is wanted of it."""
        for task in self._bringing.values():
            task.cancel()

    async def _bring(self, file: str) -> None:
        self._here(file, await in_thread(lambda: fetch_file(self.folder, file)))

    def _here(self, file: str, path: Path) -> None:
        self._brought[file] = path
        if self.marks is not None:
            count = self.marks[file].count
            self.marks[file] = Marks(count, b"\xff" * (count // 8 + 1))


class ModelWeights(WeightsService):
    """Service Weights of the scheduler: the model that is chosen now.

    Args:
        state_dir: where sums are kept.
        sent: is told of bytes as they are given out.
    """

    def __init__(self, state_dir: Path, sent: Callable[[int], None]) -> None:
        super().__init__(self._offer_of, sent)
        self._kept = state_dir / "sums"
        self._asking = Shares(MOST_ASKING, EACH_ASKING)
        self._offers: dict[str, Offered] = {}  # by digest: the chosen one

    async def offer(self, folder: ModelFolder) -> None:
        """This model is given out from now on, in place of the one before.

        Raises:
            ModelBroken: its files cannot be described.
        """
        blocks = await in_thread(lambda: blocks_of(folder_headers(folder.path)))
        kept = self._kept / folder.digest
        offered = await in_thread(lambda: Offered(folder, blocks, kept))
        self.close()
        self._offers = {folder.digest: offered}

    def close(self) -> None:
        """Nothing more is given out."""
        offers, self._offers = self._offers, {}
        for offered in offers.values():
            offered.close()

    async def Describe(
        self,
        request: wire.ModelAsked,
        context: grpc.aio.ServicerContext[wire.ModelAsked, wire.Described],
    ) -> AsyncIterator[wire.Described]:
        """The model's configuration and the headers of its weight files."""
        await self.asked(request.digest, context)
        offered = self._offers[request.digest]
        folder = offered.folder.path
        names = [name for name in DESCRIBING_FILES if (folder / name).is_file()]
        async with self.reading(context):
            for name in (*names, *offered.blocks):
                path = folder / name
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
        with self._asking.place(peer_of(context)) as free:
            if not free:
                await context.abort(_C.RESOURCE_EXHAUSTED, "too many sums asked for at once")
            try:
                if not offered.bring(request.file):
                    await context.abort(_C.ABORTED, f"{request.file} is on its way from the hub")
                return wire.SumsTold(sums=await offered.sums.of(request.file, run))
            except ModelError as error:
                log.warning("%s", error.sentence)
                await context.abort(_C.DATA_LOSS, error.sentence)
                raise AssertionError from None

    def _offer_of(self, digest: str) -> Offered | None:
        return self._offers.get(digest)
