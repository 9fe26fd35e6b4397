"""What :class:`~parallax.scheduler.admission.Admission` is asked, answers and wants remembered."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from parallax.fabric.errors import JoinRefused
from parallax.scheduler.tokens import Token


class Standing(Enum):
    """What was decided about a node."""

    ADMITTED = "admitted"
    DENIED = "denied"  # it waited, and somebody said no
    REMOVED = "removed"  # it was a member, and somebody sent it away


@dataclass(frozen=True, slots=True)
class Known:
    """A node about which something was decided, and how it came in: token ID, approval, local, …"""

    node_id: str
    name: str
    standing: Standing
    since_s: float
    how: str
    attended: bool = False  # at least once

    @property
    def idle(self) -> bool:
        """Whether it was let in and has never come."""
        return self.standing is Standing.ADMITTED and not self.attended


@dataclass(frozen=True, slots=True)
class Pending:
    """A node that waits to be let in."""

    node_id: str
    name: str
    address: str
    fingerprint: str
    since_s: float
    asked_s: float


@dataclass(frozen=True, slots=True)
class Admitted:
    """It may be a member."""

    new: bool = False  # it was not one before


@dataclass(frozen=True, slots=True)
class Waiting:
    """It has to wait for somebody's approval, and asks again meanwhile."""

    fingerprint: str  # empty where it is not listed: the node knows its own
    new: bool = False  # it did not wait before
    listed: bool = True  # whether those who may approve see it; there is room for so many


@dataclass(frozen=True, slots=True)
class Refused:
    """It may not, and asking again does not help."""

    error: JoinRefused


Verdict = Admitted | Waiting | Refused


@dataclass(frozen=True, slots=True)
class SaveToken:
    """Remember a token in its present state."""

    token: Token


@dataclass(frozen=True, slots=True)
class DropToken:
    """Forget a token."""

    id: str


@dataclass(frozen=True, slots=True)
class SaveNode:
    """Remember what was decided about a node, in place of what was before."""

    known: Known


@dataclass(frozen=True, slots=True)
class DropNode:
    """Forget a node."""

    node_id: str


Change = SaveToken | DropToken | SaveNode | DropNode


@dataclass(frozen=True, slots=True)
class Remembered:
    """What an earlier process wrote down."""

    tokens: tuple[Token, ...] = ()
    nodes: tuple[Known, ...] = ()
