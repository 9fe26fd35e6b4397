"""Why a node is not let in: what, why, and how to fix it. Never with the token itself."""

from __future__ import annotations

from math import ceil

from parallax.fabric.errors import JoinRefused
from parallax.scheduler.tokens import Token, TokenState

AGAIN = (
    "Copy the join command anew from the page or from 'parallax run', or make a token on the "
    "scheduler: parallax tokens create"
)


def wrong_token(token: Token | None, state: TokenState | None) -> JoinRefused:
    """A token that does not open the door."""
    if token is None:
        what = "The token that this node brought is not one of this scheduler's"
        why = "It was misprinted, belongs to another cluster, or has been forgotten long ago"
        return JoinRefused(what, why, AGAIN, reason="unknown")
    what = f"The token {token.id} does not let nodes in any more"
    if state is TokenState.REVOKED:
        return JoinRefused(what, "It was revoked", AGAIN, reason="revoked")
    if state is TokenState.USED_UP:
        times = "node" if token.uses_limit == 1 else "nodes"
        why = f"It was good for {token.uses_limit} {times}, and as many have come with it"
        return JoinRefused(what, why, AGAIN, reason="used_up")
    return JoinRefused(what, "It has expired", AGAIN, reason="expired")


def too_many(pause_s: float) -> JoinRefused:
    """Wrong tokens over and over."""
    return JoinRefused(
        "Too many wrong tokens came from this address",
        f"No more of them are looked into for {ceil(pause_s)} s",
        AGAIN,
        reason="too_many",
    )


def removed() -> JoinRefused:
    """A node that was a member and was sent away."""
    return JoinRefused(
        "This node was removed from the cluster",
        "Somebody sent it away, and it brought no token that was made after that",
        "On the scheduler: 'parallax nodes approve' with its id, or a fresh token from "
        "'parallax tokens create'",
        reason="removed",
    )


def denied() -> JoinRefused:
    """A node that waited and was refused."""
    return JoinRefused(
        "This node was refused",
        "Somebody who may decide that said no to it",
        "On the scheduler: 'parallax nodes approve' with its id; or join with a token from "
        "'parallax tokens create'",
        reason="denied",
    )


def crowded(token: Token, nodes: int) -> JoinRefused:
    """Too many came in with one token, and have not been seen since."""
    return JoinRefused(
        f"The token {token.id} lets nobody in for now",
        f"{nodes} nodes came in with it that have never attended",
        "Wait until they do; or, on the scheduler, see 'parallax nodes', remove those that are "
        "none of yours, and make another token: parallax tokens create",
        reason="crowded",
    )


def full(nodes: int) -> JoinRefused:
    """Too many nodes to remember one more."""
    return JoinRefused(
        "This cluster takes no more nodes",
        f"It remembers {nodes} of them, and all of them have attended or were sent away lately",
        "Revoke the tokens that too many come with, and remove nodes that are none of yours: they "
        "make room once their certificates have ended",
        reason="full",
    )
