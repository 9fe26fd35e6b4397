"""The journal on disk: what became of every request, for whoever wants to prove it.

Off by default. Notes cost the event loop an append to a queue; a thread of its own makes bytes of
them and writes. Files are bounded in size and number.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from parallax.fabric.errors import BadSetting
from parallax.scheduler.journal_entries import Encoder, Entry, Missed, Opened, TokenRun

log = logging.getLogger(__name__)

FILE_BYTES = 64 << 20
FILES = 8  # the present one and those before it
WRITE_EVERY_S = 0.2
MOST_NOTES = 200_000  # not yet written: some seconds' worth, should the disk hang


class Journal:
    """Open it with the file or folder of the settings, note, close.

    Args:
        place: a file, or a folder in which ``journal.msgpack`` is made.
        tokens: whether the tokens of answers are written too, and not only their checksum.

    Raises:
        BadSetting: it cannot be written there.
    """

    def __init__(self, place: Path, *, tokens: bool = False) -> None:
        path = place / "journal.msgpack" if place.is_dir() else place
        self._encoder = Encoder(tokens=tokens, wall_s=time.time() - time.monotonic())
        self._run = secrets.token_hex(8)
        self._notes: deque[tuple[float, Entry | TokenRun]] = deque()  # MOST_NOTES at most
        self._missed = 0  # for want of room in there
        self._unwritten = 0
        self._closing = threading.Event()
        try:
            self._files = BoundedFiles(path, self._opening)
        except OSError as error:
            raise BadSetting(
                f"The journal {path} cannot be written",
                str(error),
                "Name another file with --journal, or leave it out",
                setting="journal",
            ) from None
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def note(self, entry: Entry) -> None:
        """Something happened now."""
        self._append(entry)

    def token(self, request: int, attempt: int, index: int, token: int) -> None:
        """The next token of an answer was taken in."""
        self._append(TokenRun(request, attempt, index, [token], time.monotonic()))

    def close(self) -> None:
        """Writes what is left. The event loop may wait for it: it is little."""
        self._closing.set()
        self._thread.join()
        self._files.close()

    def _append(self, note: Entry | TokenRun) -> None:
        if len(self._notes) < MOST_NOTES:
            self._notes.append((time.monotonic(), note))
        else:
            self._missed += 1

    def _opening(self) -> bytes:
        return self._encoder.encode([(time.monotonic(), Opened(self._run))])

    def _work(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(WRITE_EVERY_S)
            notes = [self._notes.popleft() for _ in range(len(self._notes))]
            missed, self._missed = self._missed + self._unwritten, 0
            self._unwritten = 0
            if missed:
                notes.append((time.monotonic(), Missed(missed)))
            if notes:
                self._write(notes)

    def _write(self, notes: Sequence[tuple[float, Entry | TokenRun]]) -> None:
        try:
            self._files.write(self._encoder.encode(notes))
        except OSError as error:  # a full disk must not end answers
            log.warning("the journal cannot be written: %s", error)
            self._unwritten = len(notes)
        except Exception:  # what comes later is still worth writing
            log.exception("entries cannot be written to the journal")
            self._unwritten = len(notes)


class BoundedFiles:
    """A file that moves on to the next when it is full: ``j``, before it ``j.1``, ``j.2`` …

    A file that is there already is not written on: it is what came before.

    Args:
        path: the present file's.
        opening: what every file begins with.
        file_bytes: how long a file may become; one write longer than that stays whole.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(
        self, path: Path, opening: Callable[[], bytes], file_bytes: int = FILE_BYTES
    ) -> None:
        self._path = path
        self._opening = opening
        self._file_bytes = file_bytes
        self._size = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = self._begin()

    def write(self, data: bytes) -> None:
        """Writes at once, all of it or nothing.

        Raises:
            OSError: the disk is full, or the folder is gone.
        """
        if self._file is not None and self._size and self._size + len(data) > self._file_bytes:
            self.close()
        if self._file is None:
            self._file = self._begin()
        end = self._file.tell()
        try:
            _write_all(self._file, data)
        except OSError:
            # Half a record would spoil all that come behind it.
            try:
                self._file.truncate(end)
                self._file.seek(end)
            except OSError:
                self.close()
            raise
        self._size += len(data)

    def close(self) -> None:
        """Ends the present file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _begin(self) -> BinaryIO:
        if self._path.exists() and self._path.stat().st_size:
            for number in range(FILES - 1, 0, -1):
                older = numbered(self._path, number - 1)
                if older.exists():
                    older.replace(numbered(self._path, number))
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        file = os.fdopen(descriptor, "wb", buffering=0)
        self._size = 0
        try:
            _write_all(file, self._opening())
        except OSError:
            file.close()
            self._path.unlink(missing_ok=True)  # else the next try moves the older ones on again
            raise
        return file


def _write_all(file: BinaryIO, data: bytes) -> None:
    """A file without a buffer takes less than it is given, when the disk is nearly full."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def numbered(path: Path, number: int) -> Path:
    """The journal's file before the present one, the one before that, and so on."""
    return path if number == 0 else path.with_name(f"{path.name}.{number}")
