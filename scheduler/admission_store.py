"""Tokens, and what was decided about nodes, on disk."""

from __future__ import annotations

from parallax.scheduler.admission_values import (
    Change,
    DropNode,
    DropToken,
    Known,
    Remembered,
    SaveNode,
    SaveToken,
    Standing,
)
from parallax.scheduler.store import Store
from parallax.scheduler.tokens import Token


async def remembered(store: Store) -> Remembered:
    """Everything that was written down.

    Raises:
        BadSetting: the state file cannot be used.
    """
    tokens = await store.run(
        "SELECT id, digest, note, created_s, expires_s, uses_limit, uses, revoked_s"
        " FROM token ORDER BY created_s, rowid"
    )
    nodes = await store.run(
        "SELECT node_id, name, standing, since_s, how,"
        " node_id NOT IN (SELECT node_id FROM unattended) FROM node ORDER BY since_s, rowid"
    )
    return Remembered(
        tokens=tuple(Token(*row) for row in tokens),
        nodes=tuple(
            Known(node_id, name, Standing(standing), since_s, how, bool(attended))
            for node_id, name, standing, since_s, how, attended in nodes
        ),
    )


async def write(store: Store, change: Change) -> None:
    """Writes one change down; writing it twice is writing it once.

    Raises:
        BadSetting: the state file cannot be used.
    """
    match change:
        case SaveToken(token):
            await store.run(
                "INSERT OR REPLACE INTO token"
                " (id, digest, note, created_s, expires_s, uses_limit, uses, revoked_s)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    token.id,
                    token.digest,
                    token.note,
                    token.created_s,
                    token.expires_s,
                    token.uses_limit,
                    token.uses,
                    token.revoked_s,
                ),
            )
        case DropToken(token_id):
            await store.run("DELETE FROM token WHERE id = ?", (token_id,))
        case SaveNode(known):
            if not known.attended:  # first: one that is named here and not there is nobody
                await store.run(
                    "INSERT OR IGNORE INTO unattended (node_id) VALUES (?)", (known.node_id,)
                )
            await store.run(
                "INSERT OR REPLACE INTO node (node_id, name, standing, since_s, how)"
                " VALUES (?, ?, ?, ?, ?)",
                (known.node_id, known.name, known.standing.value, known.since_s, known.how),
            )
            if known.attended:
                await store.run("DELETE FROM unattended WHERE node_id = ?", (known.node_id,))
        case DropNode(node_id):
            await store.run("DELETE FROM node WHERE node_id = ?", (node_id,))
            await store.run("DELETE FROM unattended WHERE node_id = ?", (node_id,))
