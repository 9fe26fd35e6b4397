"""SHA-256 of a model's blocks: each is computed when it is first asked for, and kept on disk.

A file of sums begins with a key made of the weight file's path, size and time of change; when that
is another, the sums are computed anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from parallax.fabric.blocks import SUM_BYTES, FileBlocks
from parallax.fabric.errors import ModelBroken
from parallax.fabric.weights_service import read_bytes

_UNKNOWN = bytes(SUM_BYTES)


class Sums:
    """The sums of one model's blocks.

    Args:
        place: where a file is.
        blocks: of its files.
        kept: folder where sums are kept; where it cannot be written, they are computed again.
    """

    def __init__(
        self, place: Callable[[str], Path], blocks: Mapping[str, FileBlocks], kept: Path
    ) -> None:
        self._place = place
        self._blocks = blocks
        self._kept = kept
        self._known: dict[str, bytearray] = {}
        self._turns = {file: asyncio.Lock() for file in blocks}

    async def of(self, file: str, run: range) -> bytes:
        """The sums of neighbouring blocks, one after the other.

        Raises:
            ModelBroken: the file cannot be read.
        """
        async with self._turns[file]:  # two that ask for the same wait for one reading
            return await asyncio.to_thread(self._of, file, run)

    def _of(self, file: str, run: range) -> bytes:
        known = self._known.get(file)
        if known is None:
            known = self._known[file] = self._load(file)
        fresh = False
        for block in run:
            place = slice(block * SUM_BYTES, (block + 1) * SUM_BYTES)
            if known[place] == _UNKNOWN:
                fresh = True
                known[place] = self._sum(file, block)
        part = slice(run.start * SUM_BYTES, run.stop * SUM_BYTES)
        if fresh:
            self._save(file, run.start * SUM_BYTES, bytes(known[part]))
        return bytes(known[part])

    def _sum(self, file: str, block: int) -> bytes:
        path = self._place(file)
        try:
            return hashlib.sha256(read_bytes(path, *self._blocks[file].place(block))).digest()
        except OSError as error:
            raise ModelBroken(
                f"The weight file {file} cannot be read",
                error.strerror or str(error),
                "Fetch the model again",
                path=path,
            ) from error

    def _key(self, file: str) -> bytes:
        path = self._place(file)
        facts = path.stat()
        text = f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\0{len(self._blocks[file])}"
        return hashlib.sha256(text.encode()).digest()

    def _load(self, file: str) -> bytearray:
        size = len(self._blocks[file]) * SUM_BYTES
        try:
            kept = (self._kept / f"{file}.sums").read_bytes()
            if kept[:SUM_BYTES] == self._key(file) and len(kept) <= SUM_BYTES + size:
                return bytearray(kept[SUM_BYTES:].ljust(size, b"\0"))
        except OSError:
            pass
        try:
            self._kept.mkdir(parents=True, exist_ok=True)
            (self._kept / f"{file}.sums").write_bytes(self._key(file))
        except OSError:
            pass
        return bytearray(size)

    def _save(self, file: str, offset: int, sums: bytes) -> None:
        try:
            handle = os.open(self._kept / f"{file}.sums", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            os.pwrite(handle, sums, SUM_BYTES + offset)
        except OSError:  # a full disk: they are computed again another time
            return
        finally:
            os.close(handle)
