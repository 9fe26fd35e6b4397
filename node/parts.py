"""Fetched weights on disk: a model's folder of which only some blocks are there.

The folder has the model's own files at their full size, with their headers and, as they come, the
blocks that stages here need; the rest of each file is a hole, which takes no room. Which blocks are
there stands in one small file, written after they are safe on the disk: what it names is whole,
whatever ended the process or the machine.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from parallax.fabric.blocks import Marks, blocks_of
from parallax.fabric.errors import DiskFull, ModelBroken, ModelError
from parallax.fabric.models import PARTS, ModelFolder, open_folder
from parallax.fabric.safetensors import HEADER_BYTES, folder_headers
from parallax.fabric.weights_service import known_name
from parallax.proto import wire_pb2 as wire

MOST_FILES = 4096
MOST_FILE_BYTES = 1 << 46
MOST_DESCRIBED_BYTES = 2 * HEADER_BYTES

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Parts:
    """One model of which parts are here.

    Attributes:
        folder: the model's folder, as loading takes it.
        blocks: of its weight files.
        marks: the blocks that are here.
    """

    def __init__(self, folder: ModelFolder) -> None:
        """Takes up what the folder's list of blocks names.

        Raises:
            ModelBroken: its headers make no sense.
        """
        self.folder = folder
        self.blocks = blocks_of(folder_headers(folder.path))
        known = _read_marks(folder.path / PARTS)
        self.marks = {f: Marks(len(b), known.get(f, b"")) for f, b in self.blocks.items()}
        self._handles: dict[str, int] = {}
        self._unsettled: dict[str, list[int]] = {}
        self._turn = threading.Lock()

    @property
    def path(self) -> Path:
        """The folder."""
        return self.folder.path

    def file(self, name: str) -> Path:
        """Where one of its weight files is."""
        return self.path / name

    def missing(self, tensors: Iterable[str]) -> dict[str, list[int]]:
        """Blocks of these tensors that are not here, by file, rising."""
        names = list(tensors)
        found: dict[str, list[int]] = {}
        for file, blocks in self.blocks.items():
            marks = self.marks[file]
            wanted = sorted(b for name in names for b in blocks.of(name) if b not in marks)
            if wanted:
                found[file] = wanted
        return found

    def size(self, tensors: Iterable[str]) -> int:
        """Bytes of these tensors, here or not."""
        names = list(tensors)
        return sum(
            blocks.place(run[-1])[1] - blocks.place(run[0])[0]
            for blocks in self.blocks.values()
            for run in map(blocks.of, names)
            if run
        )

    def write(self, file: str, block: int, data: memoryview) -> None:
        """Puts a block, known to be right, in its place. On any thread.

        Raises:
            DiskFull: there is no room.
            ModelBroken: the disk fails.
        """
        begin, _ = self.blocks[file].place(block)
        path = self.path / file
        try:
            with self._turn:
                handle = self._handles.get(file)
                if handle is None:
                    handle = self._handles[file] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            while data:
                written = os.pwrite(handle, data, begin)
                data, begin = data[written:], begin + written
        except OSError as error:
            raise disk_error(error, path) from error
        with self._turn:
            self._unsettled.setdefault(file, []).append(block)

    def settle(self) -> None:
        """Sees that what was written is on the disk, then marks it as there. On one thread.

        Raises:
            DiskFull, ModelBroken: see :meth:`write`.
        """
        with self._turn:
            written, self._unsettled = self._unsettled, {}
            handles = dict(self._handles)
        if not written:
            return
        try:
            for file, blocks in written.items():
                os.fsync(handles[file])
                for block in blocks:
                    self.marks[file].add(block)
            _write_marks(self.path / PARTS, self.marks)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def close(self) -> None:
        """Closes the files after the last :meth:`write`."""
        with self._turn:
            handles, self._handles = self._handles, {}
        for handle in handles.values():
            os.close(handle)


class Shelved:
    """The folder of all fetched models of one node, by digest.

    Args:
        place: the folder, made when it is needed.
        limit_bytes: the most that fetched models may take on the disk; None: no limit.
    """

    def __init__(self, place: Path, limit_bytes: int | None = None) -> None:
        self._place = place
        self._limit_bytes = limit_bytes

    def open(self, digest: str, *, name: str, location: str) -> Parts | None:
        """What there is of a model; None if nothing, or nothing that is usable.

        Raises:
            ModelBroken: the disk fails.
        """
        path = self._place / digest
        if not _DIGEST.fullmatch(digest) or not (path / PARTS).is_file():
            return None
        try:
            folder = open_folder(path, name=name, location=location, parts=True)
            parts = Parts(folder)
        except ModelError:  # cut short or changed by hand
            shutil.rmtree(path, ignore_errors=True)
            return None
        if folder.digest != digest:
            shutil.rmtree(path, ignore_errors=True)
            return None
        os.utime(path / PARTS)  # the model used last is the last to be let go
        return parts

    def begin(self, digest: str) -> Outline:
        """A new model's folder, to be filled with what describes it.

        Raises:
            ModelBroken: the digest is none.
            DiskFull: no room for it.
        """
        if not _DIGEST.fullmatch(digest):
            raise ModelBroken("A model was named by something that is no digest")
        return Outline(self._place / digest)

    def make_room(self, needed_bytes: int, keep: Iterable[str]) -> None:
        """Lets models go, the one used longest ago first, until so much more may be fetched.

        Raises:
            DiskFull: what is left is too little.
        """
        kept = set(keep)
        old = sorted(
            (entry for entry in self._models() if entry.name not in kept),
            key=lambda entry: (entry / PARTS).stat().st_mtime,
        )
        while (short := self._short_of(needed_bytes)) > 0 and old:
            shutil.rmtree(old.pop(0), ignore_errors=True)
        if short > 0:
            raise DiskFull(
                "There is no room on the disk for the weights of this stage",
                f"{needed_bytes} bytes are to be fetched into {self._place}, {short} too many",
                "Make room there, raise --cache-bytes, or choose another --state-dir",
                path=self._place,
                missing_bytes=short,
            )

    def used_bytes(self) -> int:
        """What fetched models take on the disk."""
        return sum(_disk_bytes(entry) for entry in self._models())

    def _models(self) -> list[Path]:
        try:
            return [e for e in self._place.iterdir() if (e / PARTS).is_file()]
        except OSError:
            return []

    def _short_of(self, needed_bytes: int) -> int:
        place = self._place
        while not place.exists():
            place = place.parent
        short = needed_bytes - shutil.disk_usage(place).free
        if self._limit_bytes is not None:
            short = max(short, self.used_bytes() + needed_bytes - self._limit_bytes)
        return short


class Outline:
    """A model's description as it comes in; nothing of it counts before :meth:`finish`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = path.with_name(path.name + ".new")
        self._sizes: dict[str, int] = {}
        self._file = ""
        self._bytes = 0
        shutil.rmtree(self._new, ignore_errors=True)
        try:
            self._new.mkdir(parents=True)
        except OSError as error:
            raise disk_error(error, self._new) from error

    def take(self, piece: wire.Described) -> None:
        """One message of the description.

        Raises:
            ModelBroken: it names what no model has, or is too large.
            DiskFull: there is no room.
        """
        if piece.file:
            if not known_name(piece.file) or piece.file in self._sizes:
                raise _refused(f"it names the file {piece.file[:80]!r}")
            if len(self._sizes) >= MOST_FILES or not 0 < piece.size_bytes <= MOST_FILE_BYTES:
                raise _refused(f"it has too many files, or {piece.file} is too large")
            self._file = piece.file
            self._sizes[piece.file] = piece.size_bytes
        self._bytes += len(piece.data)
        if not self._file or self._bytes > MOST_DESCRIBED_BYTES:
            raise _refused("it is too large")
        try:
            with (self._new / self._file).open("ab") as file:
                file.write(piece.data)
        except OSError as error:
            raise disk_error(error, self._new) from error

    def finish(self, digest: str, *, name: str, location: str) -> Parts:
        """The model, of which no block is here yet.

        Raises:
            ModelBroken: it is not the model of this digest, or makes no sense.
            DiskFull: there is no room.
        """
        try:
            for file, size in self._sizes.items():
                with (self._new / file).open("r+b") as stream:
                    if stream.seek(0, os.SEEK_END) > size:
                        raise _refused(f"{file} is longer than it says")
                    stream.truncate(size)
                    os.fsync(stream.fileno())
            if open_folder(self._new, name=name, location=location).digest != digest:
                raise _refused("it is another model's")
            Parts(open_folder(self._new, name=name, location=location))
            _write_marks(self._new / PARTS, {})
            shutil.rmtree(self._path, ignore_errors=True)
            self._new.rename(self._path)
        except OSError as error:
            raise disk_error(error, self._new) from error
        except ModelError:
            shutil.rmtree(self._new, ignore_errors=True)
            raise
        return Parts(open_folder(self._path, name=name, location=location, parts=True))


def disk_error(error: OSError, path: Path) -> ModelError:
    """What a failure of the disk means for people."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            "The disk is full",
            f"{path} could not be written",
            "Make room there, or choose another --state-dir",
            path=path,
        )
    return ModelBroken(
        "The disk failed",
        f"{path}: {error.strerror or error}",
        "Check the disk, or choose another --state-dir",
        path=path,
    )


def _refused(why: str) -> ModelBroken:
    return ModelBroken("A member described a model that cannot be", why, "See its log")


def _read_marks(path: Path) -> Mapping[str, bytes]:
    try:
        kept = json.loads(path.read_bytes())
        return {str(file): bytes.fromhex(bits) for file, bits in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_marks(path: Path, marks: Mapping[str, Marks]) -> None:
    text = json.dumps({file: bytes(bits).hex() for file, bits in marks.items()})
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="ascii") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)


def _disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    try:
        yield from [entry for entry in folder.iterdir() if entry.is_file()]
    except OSError:
        return
