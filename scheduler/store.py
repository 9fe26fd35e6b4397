"""What the scheduler remembers over a restart: one SQLite file in the state directory.

Here: the file, its form, issued epochs, the chosen model, and notes: small JSON values
by name. Other nouns have a file each that speaks through :meth:`Store.run`
(``admission_store.py``). SQLite's own locks keep numbers unique when two processes open
it, and a number is on disk before anyone sees it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import aiosqlite

from parallax.fabric.errors import BadSetting

log = logging.getLogger(__name__)

FILE_NAME = "state.db"

Value = str | int | float | bytes | None

_BUSY_S = 5.0

# Epochs of a new file begin at the seconds since 2026: a file that was lost or moved away is behind
# that (it issued fewer than one a second), and nodes that outlive it take no epoch twice.
# Each brings the file from the form before to its own; the first makes it. A migration may run
# twice, when two processes open the file at once, and must then change nothing.
_MIGRATIONS = (
    """
    CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
    INSERT OR IGNORE INTO counter (name, value)
        VALUES ('epoch', max(0, CAST(strftime('%s', 'now') AS INTEGER) - 1767225600));
    CREATE TABLE IF NOT EXISTS choice (
        one INTEGER PRIMARY KEY CHECK (one = 1), model TEXT NOT NULL, nodes INTEGER NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE IF NOT EXISTS token (
        id TEXT PRIMARY KEY, digest BLOB NOT NULL UNIQUE, note TEXT NOT NULL,
        created_s REAL NOT NULL, expires_s REAL NOT NULL,
        uses_limit INTEGER, uses INTEGER NOT NULL, revoked_s REAL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS node (
        node_id TEXT PRIMARY KEY, name TEXT NOT NULL, standing TEXT NOT NULL,
        since_s REAL NOT NULL, how TEXT NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE IF NOT EXISTS note (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    """,
    # Nodes that never attended since they were let in; of those let in before, that is not known.
    """
    CREATE TABLE IF NOT EXISTS unattended (node_id TEXT PRIMARY KEY) STRICT;
    """,
)
SCHEMA_VERSION = len(_MIGRATIONS)


@dataclass(frozen=True, slots=True)
class Choice:
    """The model that the cluster serves, and on how many nodes a ring should lie."""

    model: str
    nodes: int


class Store:
    """Open with :meth:`open`; close it, or use it as an async context."""

    def __init__(self, path: Path, db: aiosqlite.Connection) -> None:
        self._path = path
        self._db = db

    @classmethod
    async def open(cls, state_dir: Path) -> Store:
        """Open or create ``state.db``, which its owner alone may read.

        Raises:
            BadSetting: the file is broken, of a newer version, locked, or cannot be written.
        """
        path = state_dir / FILE_NAME
        try:
            await asyncio.to_thread(_own, path)
            db = await aiosqlite.connect(path, timeout=_BUSY_S, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(path, error) from error
        store = cls(path, db)
        try:
            await store._prepare()
        except BaseException:
            await db.close()
            raise
        return store

    async def next_epoch(self) -> int:
        """A number that no ring ever had, larger than all before; on disk when this returns."""
        rows = await self.run(
            "UPDATE counter SET value = value + 1 WHERE name = 'epoch' RETURNING value"
        )
        return int(rows[0][0])

    async def choice(self) -> Choice | None:
        """The model chosen last, or None."""
        rows = await self.run("SELECT model, nodes FROM choice")
        return Choice(str(rows[0][0]), int(rows[0][1])) if rows else None

    async def choose(self, choice: Choice) -> None:
        """Remember a choice in place of the one before."""
        await self.run(
            "INSERT INTO choice (one, model, nodes) VALUES (1, ?, ?)"
            " ON CONFLICT (one) DO UPDATE SET model = excluded.model, nodes = excluded.nodes",
            (choice.model, choice.nodes),
        )

    async def note(self, name: str) -> object:
        """What was written under a name, or None; what cannot be read counts as never written."""
        rows = await self.run("SELECT value FROM note WHERE name = ?", (name,))
        try:
            value: object = json.loads(str(rows[0][0])) if rows else None
        except (ValueError, RecursionError):
            log.warning("the note %r in %s cannot be read, and is forgotten", name, self._path)
            return None
        return value

    async def keep(self, name: str, value: object) -> None:
        """Write a JSON value under a name, in place of the one before."""
        await self.run(
            "INSERT INTO note (name, value) VALUES (?, ?)"
            " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (name, json.dumps(value)),
        )

    async def close(self) -> None:
        """Let go of the file; may be called twice."""
        await self._db.close()

    async def __aenter__(self) -> Store:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _prepare(self) -> None:
        version = int((await self.run("PRAGMA user_version"))[0][0])
        if version > SCHEMA_VERSION:
            raise BadSetting(
                f"The state file {self._path} was written by a newer Parallax",
                f"Its form is number {version}; this version knows up to {SCHEMA_VERSION}.",
                "Update Parallax on this machine, or use another state directory (--state-dir).",
                setting="state_dir",
            )
        if version > 0:
            health = str((await self.run("PRAGMA quick_check(1)"))[0][0])
            if health != "ok":
                raise _unusable(self._path, sqlite3.DatabaseError(health))
        for number, script in enumerate(_MIGRATIONS[version:], version + 1):
            try:
                await self._db.executescript(
                    f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;"
                )
            except sqlite3.Error as error:
                raise _unusable(self._path, error) from error

    async def run(self, sql: str, values: Iterable[Value] = ()) -> list[sqlite3.Row]:
        """One statement, written down when this returns.

        It is one call of the database's thread: no other statement can come between.

        Raises:
            BadSetting: the file cannot be used.
        """
        try:
            return list(await self._db.execute_fetchall(sql, tuple(values)))
        except sqlite3.Error as error:
            raise _unusable(self._path, error) from error


def _own(path: Path) -> None:
    """Makes the file if it is not there; it and those that SQLite puts beside it are its owner's
    alone. SQLite gives those the rights of the file.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    # Not by opening it: SQLite loses its locks when another handle of the process is closed.
    for suffix in ("", "-journal", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.with_name(path.name + suffix).chmod(0o600)


def _unusable(path: Path, error: Exception) -> BadSetting:
    locked = "locked" in str(error)
    broken = isinstance(error, sqlite3.DatabaseError) and not isinstance(
        error, sqlite3.OperationalError
    )
    if locked:
        fix = "Stop the other program that uses it, or use another state directory (--state-dir)."
    elif broken:
        fix = f"Move {path} away and start again: a model is then chosen, and nodes let in, anew."
    else:
        fix = "Check the rights and the free space there, or use another --state-dir."
    return BadSetting(f"The state file {path} cannot be used", str(error), fix, setting="state_dir")
