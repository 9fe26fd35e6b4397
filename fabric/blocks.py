"""A weight file's blocks: the unit in which weights are summed, asked for and kept.

The blocks of a file are its tensors in the order of their places, each cut into pieces of at most
:data:`BLOCK_BYTES`. Whoever has the file's header knows them, and no block holds bytes of two
tensors, so that a stage needs no byte of another one's layers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from parallax.fabric.errors import ModelBroken
from parallax.fabric.safetensors import TensorInfo

BLOCK_BYTES = 1 << 20
SUM_BYTES = 32  # SHA-256


class FileBlocks:
    """The blocks of one weight file.

    Raises:
        ModelBroken: two of the header's tensors overlap; their blocks would be without number.
    """

    def __init__(self, file: str, header: Mapping[str, TensorInfo]) -> None:
        self.file = file
        placed = sorted(
            (info.begin, info.end, name) for name, info in header.items() if info.nbytes
        )
        self._begins = [begin for begin, _, _ in placed]
        self._ends = [end for _, end, _ in placed]
        self._numbers = {name: number for number, (_, _, name) in enumerate(placed)}
        self._firsts = [0]  # block of each tensor, and the end
        before = 0
        for begin, end, name in placed:
            if begin < before:
                raise ModelBroken(
                    f"The weight file {file} cannot be used",
                    f"{name} overlaps the tensor before it",
                    "Fetch the model again",
                    path=file,
                )
            before = end
            self._firsts.append(self._firsts[-1] + -(-(end - begin) // BLOCK_BYTES))

    def __len__(self) -> int:
        return self._firsts[-1]

    def of(self, tensor: str) -> range:
        """A tensor's blocks; none for one of another file, or without data."""
        number = self._numbers.get(tensor)
        return range(0) if number is None else range(self._firsts[number], self._firsts[number + 1])

    def place(self, block: int) -> tuple[int, int]:
        """Where in the file a block begins and ends.

        Raises:
            IndexError: there is no such block.
        """
        if not 0 <= block < len(self):
            raise IndexError(block)
        number = bisect_right(self._firsts, block) - 1
        begin = self._begins[number] + (block - self._firsts[number]) * BLOCK_BYTES
        return begin, min(begin + BLOCK_BYTES, self._ends[number])

    def between(self, begin: int, end: int) -> range | None:
        """The blocks that exactly these bytes are made of; None if they are not made of blocks."""
        number = bisect_right(self._begins, begin) - 1
        if number < 0 or (begin - self._begins[number]) % BLOCK_BYTES or begin >= end:
            return None
        first = block = self._firsts[number] + (begin - self._begins[number]) // BLOCK_BYTES
        while begin < end:
            if block >= len(self) or self.place(block)[0] != begin:
                return None
            begin = self.place(block)[1]
            block += 1
        return range(first, block) if begin == end else None

    def runs(self, blocks: Iterable[int], most_bytes: int) -> Iterator[range]:
        """Rising blocks as ranges of neighbours without a gap, of at most so many bytes each."""
        run: range | None = None
        begin = end = 0
        for block in blocks:
            at, stop = self.place(block)
            if run is not None and block == run.stop and at == end and stop - begin <= most_bytes:
                run, end = range(run.start, block + 1), stop
                continue
            if run is not None:
                yield run
            run, begin, end = range(block, block + 1), at, stop
        if run is not None:
            yield run


class Marks:
    """Which of so many blocks are here: one bit for each, the lowest of the first byte first."""

    def __init__(self, count: int, bits: bytes = b"") -> None:
        """Marks from ``bits``; what does not fit the count is left out."""
        self.count = count
        self._bits = bytearray(bits[: -(-count // 8)].ljust(-(-count // 8), b"\0"))
        if count % 8:
            self._bits[-1] &= (1 << count % 8) - 1

    def __contains__(self, block: int) -> bool:
        return 0 <= block < self.count and bool(self._bits[block >> 3] >> (block & 7) & 1)

    def __bytes__(self) -> bytes:
        return bytes(self._bits)

    def __len__(self) -> int:
        return int.from_bytes(self._bits, "little").bit_count()

    def add(self, block: int) -> None:
        """This block is here now."""
        if not 0 <= block < self.count:
            raise IndexError(block)
        self._bits[block >> 3] |= 1 << (block & 7)


def blocks_of(headers: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, FileBlocks]:
    """The blocks of every file of a folder, by the file's name.

    Raises:
        ModelBroken: see :class:`FileBlocks`.
    """
    return {file: FileBlocks(file, header) for file, header in headers.items()}


def data_begin(file: Path) -> int:
    """Where the header of a weight file ends, in a file whose header has been checked."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")
