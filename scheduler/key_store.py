"""API keys on disk, in the scheduler's ``state.db``: digests, limits, usage."""

from __future__ import annotations

from collections.abc import Mapping

from parallax.scheduler.api_keys import KeyRecord, Usage
from parallax.scheduler.store import Store

_TABLE = """
CREATE TABLE IF NOT EXISTS api_key (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL UNIQUE,
    admin INTEGER NOT NULL, rate INTEGER, concurrent INTEGER, created INTEGER NOT NULL,
    requests INTEGER NOT NULL DEFAULT 0, prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0, last_used INTEGER
) STRICT
"""
_USED = """
UPDATE api_key SET requests = requests + ?, prompt_tokens = prompt_tokens + ?,
    completion_tokens = completion_tokens + ?,
    last_used = coalesce(max(coalesce(last_used, 0), ?), last_used)
WHERE id = ?
"""


class KeyStore:
    """Keys in a :class:`Store`; open with :meth:`open`. Its methods raise as the store's do."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    async def open(cls, store: Store) -> KeyStore:
        """The keys in this store; their table is made where it is missing."""
        await store.run(_TABLE)
        return cls(store)

    async def all(self) -> list[KeyRecord]:
        """Every key that was made and not revoked, oldest first."""
        rows = await self._store.run(
            "SELECT id, name, digest, admin, rate, concurrent, created, requests, prompt_tokens,"
            " completion_tokens, last_used FROM api_key ORDER BY created, rowid"
        )
        return [
            KeyRecord(
                id=row[0],
                name=row[1],
                digest=row[2],
                admin=bool(row[3]),
                rate=row[4],
                concurrent=row[5],
                created=row[6],
                usage=Usage(*row[7:11]),
            )
            for row in rows
        ]

    async def add(self, record: KeyRecord) -> None:
        """Keep a new key."""
        await self._store.run(
            "INSERT INTO api_key (id, name, digest, admin, rate, concurrent, created)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                record.id,
                record.name,
                record.digest,
                int(record.admin),
                record.rate,
                record.concurrent,
                record.created,
            ),
        )

    async def remove(self, key_id: str) -> None:
        """Forget a key, its usage too."""
        await self._store.run("DELETE FROM api_key WHERE id = ?", (key_id,))

    async def write(self, used: Mapping[str, Usage]) -> None:
        """Add what was used since the last call."""
        for key_id, usage in used.items():
            await self._store.run(
                _USED,
                (
                    usage.requests,
                    usage.prompt_tokens,
                    usage.completion_tokens,
                    usage.last_used,
                    key_id,
                ),
            )
