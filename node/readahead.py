"""Reading files ahead of whoever maps or reads them next: several threads fill the page cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

THREADS = 4  # a solid-state disk needs several requests in flight to be fast
BLOCK_BYTES = 4 << 20
WINDOW_BYTES = 256 << 20  # the most that is read before it is needed: memory is for weights


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes ``[begin, end)`` of a file."""

    path: Path
    begin: int
    end: int


class ReadAhead:
    """Reads extents in order, some way ahead; a context, whose end stops the reading.

    What cannot be read is left to whoever needs it: errors are theirs to tell.
    """

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._blocks = _blocks(extents)
        self._ahead = 0  # bytes read, or being read, and not yet needed
        self._stopped = False
        self._moved = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name="readahead", daemon=True)
            for _ in range(THREADS)
        ]

    def read(self, size: int) -> None:
        """So many bytes are read by now: the window moves on."""
        with self._moved:
            self._ahead -= size
            self._moved.notify_all()

    def __enter__(self) -> ReadAhead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self) -> Extent | None:
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or self._ahead < WINDOW_BYTES)
            block = None if self._stopped else next(self._blocks, None)
            if block is not None:
                self._ahead += block.end - block.begin
            return block

    def _work(self) -> None:
        path: Path | None = None
        file = -1
        try:
            while (block := self._next()) is not None:
                if block.path != path:
                    if file >= 0:
                        os.close(file)
                        file = -1
                    file = os.open(block.path, os.O_RDONLY)
                    path = block.path
                _fill(file, block)
        except OSError:
            return
        finally:
            if file >= 0:
                os.close(file)


def _blocks(extents: Iterable[Extent]) -> Iterator[Extent]:
    for extent in extents:
        for begin in range(extent.begin, extent.end, BLOCK_BYTES):
            yield Extent(extent.path, begin, min(extent.end, begin + BLOCK_BYTES))


def _fill(file: int, block: Extent) -> None:
    """Reads a block, unless its ends show that the system has it already."""
    if _cached(file, block.begin) and _cached(file, block.end - 1):
        return
    os.pread(file, block.end - block.begin, block.begin)


def _cached(file: int, place: int) -> bool:
    """Whether a byte can be had without the disk; False where the system cannot tell."""
    no_wait = getattr(os, "RWF_NOWAIT", 0)  # Linux
    if not no_wait:
        return False
    try:
        return os.preadv(file, [bytearray(1)], place, no_wait) == 1
    except OSError:  # it would have to wait, or the file system does not know
        return False
