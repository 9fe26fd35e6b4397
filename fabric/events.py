"""What a running scheduler or node tells whoever started it, mostly the command line."""

from __future__ import annotations

from dataclasses import dataclass

from parallax.fabric.errors import ParallaxError


@dataclass(frozen=True, slots=True)
class Started:
    """A scheduler listens."""

    peer_id: str
    http_port: int
    enrol_port: int
    cluster_port: int
    page: str  # address of the page, "http://127.0.0.1:3001"
    join_command: str
    notice: str


@dataclass(frozen=True, slots=True)
class NodeStarted:
    """A node listens; it may not have met its scheduler yet."""

    node_id: str
    name: str
    port: int
    notice: str


@dataclass(frozen=True, slots=True)
class AwaitsApproval:
    """A node waits until somebody at the scheduler lets it in."""

    scheduler_id: str
    fingerprint: str  # of this node


@dataclass(frozen=True, slots=True)
class Joined:
    """A node is a member of a scheduler's cluster."""

    scheduler_id: str
    address: str


@dataclass(frozen=True, slots=True)
class NodeAsks:
    """A stranger wants to be a node of this scheduler, and waits for an answer."""

    name: str  # what it calls itself
    address: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A scheduler has a new member."""

    name: str


@dataclass(frozen=True, slots=True)
class NodeLeft:
    """A scheduler lost a member."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Loading:
    """A stage's weights come in. ``fraction`` runs from 0 to 1."""

    stage: str  # for people: "builtin layers 0-3 on studio: reading"
    fraction: float


@dataclass(frozen=True, slots=True)
class Ready:
    """A model answers."""

    model: str
    rings: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Something is wrong, and the process goes on: it waits, or tries again."""

    error: ParallaxError


@dataclass(frozen=True, slots=True)
class Stopped:
    """Everything is put away."""


Event = (
    Started
    | NodeStarted
    | AwaitsApproval
    | Joined
    | NodeAsks
    | NodeJoined
    | NodeLeft
    | Loading
    | Ready
    | Problem
    | Stopped
)
