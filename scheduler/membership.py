"""Who is a member, and how sure we are of it: joining, ready, suspect, gone.

A pure state machine. The shell gives each node's stream a number that is never
used twice; events name it, so a late word of an old stream cannot hurt the new one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from parallax.fabric.errors import VersionMismatch
from parallax.fabric.limits import DEFAULT_LIMITS, Limits

STARVED_PATIENCE = 5.0  # a node that gets no processor time may be silent this much longer
GONE_AFTER = 2.0  # multiples of the silence limit: suspect after one, gone after two
FORGET_S = 60.0  # how long a node that is gone stays in the list


class NodeState(Enum):
    """How a node stands."""

    JOINING = "joining"  # said hello
    READY = "ready"  # heartbeats arrive
    SUSPECT = "suspect"  # silent for too long
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node says of itself."""

    node_id: str
    name: str
    chip: str
    platform: str
    memory_bytes: int
    budget_bytes: int  # weights and caches together
    bandwidth_bytes_s: float  # measured memory bandwidth
    flops: float  # measured FLOP/s
    accelerators: int = 0
    backend: str = "cpu"


@dataclass(frozen=True, slots=True)
class Versions:
    """What must be equal throughout a ring."""

    protocol: int
    mlx: str
    mlx_lm: str


@dataclass(frozen=True, slots=True)
class Member:
    """A node in the list."""

    facts: NodeFacts
    stream: int
    incarnation: int
    state: NodeState
    heard_s: float  # monotonic time of its last word, or of its end once it is gone
    starved: bool = False


@dataclass(frozen=True, slots=True)
class NodeArrived:
    """A node said hello and may be planned with."""

    node_id: str
    stream: int


@dataclass(frozen=True, slots=True)
class NodeReady:
    """The first heartbeat of a new node."""

    node_id: str
    stream: int


@dataclass(frozen=True, slots=True)
class NodeSuspected:
    """A node has been silent for too long; its stream is still open."""

    node_id: str
    stream: int
    silent_s: float


@dataclass(frozen=True, slots=True)
class NodeRecovered:
    """A suspect spoke again."""

    node_id: str
    stream: int


@dataclass(frozen=True, slots=True)
class NodeGone:
    """A node left; its stream, if still open, is to be ended."""

    node_id: str
    stream: int
    reason: str
    incarnation: int  # the process that is gone
    farewell: bool = False  # it left by its own will, and well


@dataclass(frozen=True, slots=True)
class Refused:
    """A node cannot be a member: tell it why and end its stream."""

    node_id: str
    stream: int
    error: VersionMismatch


Change = NodeArrived | NodeReady | NodeSuspected | NodeRecovered | NodeGone | Refused


class Membership:
    """Events in, changes out; ``now`` is monotonic and never goes back."""

    def __init__(self, versions: Versions, limits: Limits = DEFAULT_LIMITS) -> None:
        self._versions = versions
        self._limits = limits
        self._members: dict[str, Member] = {}
        self._streams: dict[int, str] = {}
        self._ticked_s: float | None = None

    def hello(
        self, facts: NodeFacts, versions: Versions, incarnation: int, *, stream: int, now: float
    ) -> list[Change]:
        """A node opened a stream. The newest process or stream of a node replaces the one before.

        A node of other versions is refused; that leaves a present member of the same id alone.
        """
        node_id = facts.node_id
        if (mismatch := self._mismatch(facts.name, versions)) is not None:
            return [Refused(node_id, stream, mismatch)]
        changes: list[Change] = []
        old = self._members.get(node_id)
        if old is not None and old.state is not NodeState.GONE:
            restarted = old.incarnation != incarnation
            changes += self._end(old, "it was started again" if restarted else "reconnected", now)
        self._members[node_id] = Member(facts, stream, incarnation, NodeState.JOINING, now)
        self._streams[stream] = node_id
        changes.append(NodeArrived(node_id, stream))
        return changes

    def heartbeat(self, stream: int, *, starved: bool, now: float) -> list[Change]:
        """A sign of life; ``starved``: the node was lately given no time to run."""
        member = self._present(stream)
        if member is None:
            return []
        node_id = member.facts.node_id
        self._members[node_id] = replace(
            member, state=NodeState.READY, heard_s=now, starved=starved
        )
        if member.state is NodeState.JOINING:
            return [NodeReady(node_id, stream)]
        if member.state is NodeState.SUSPECT:
            return [NodeRecovered(node_id, stream)]
        return []

    def broken(self, stream: int, *, now: float) -> list[Change]:
        """The stream ended without a goodbye: its node is gone at once."""
        member = self._present(stream)
        return self._end(member, "its connection broke", now) if member else []

    def goodbye(
        self, stream: int, reason: str, *, now: float, failed: bool = False
    ) -> list[Change]:
        """The node leaves by its own will; ``failed``: because something broke in it."""
        member = self._present(stream)
        if member is None:
            return []
        return self._end(member, reason or "it left", now, farewell=not failed)

    def tick(self, now: float) -> list[Change]:
        """Time passed; call about once a heartbeat. Silence makes suspects, then takes them out."""
        self._forgive_own_absence(now)
        changes: list[Change] = []
        for node_id, member in list(self._members.items()):
            silent_s = now - member.heard_s
            if member.state is NodeState.GONE:
                if silent_s >= FORGET_S:
                    del self._members[node_id]
                continue
            limit_s = self._limits.silence_s * (STARVED_PATIENCE if member.starved else 1.0)
            if silent_s >= GONE_AFTER * limit_s:
                changes += self._end(member, f"it was silent for {silent_s:.0f} s", now)
            elif silent_s >= limit_s and member.state is not NodeState.SUSPECT:
                self._members[node_id] = replace(member, state=NodeState.SUSPECT)
                changes.append(NodeSuspected(node_id, member.stream, silent_s))
        return changes

    def members(self) -> list[Member]:
        """Every node in the list by id, those that left lately included."""
        return [self._members[key] for key in sorted(self._members)]

    def usable(self) -> list[Member]:
        """Nodes to plan with, by id: joining, ready and suspect ones."""
        return [m for m in self.members() if m.state is not NodeState.GONE]

    def get(self, node_id: str) -> Member | None:
        """The node of this id, also if it left lately."""
        return self._members.get(node_id)

    def _present(self, stream: int) -> Member | None:
        node_id = self._streams.get(stream)
        return self._members[node_id] if node_id is not None else None

    def _end(
        self, member: Member, reason: str, now: float, *, farewell: bool = False
    ) -> list[Change]:
        node_id = member.facts.node_id
        del self._streams[member.stream]
        self._members[node_id] = replace(member, state=NodeState.GONE, heard_s=now)
        return [NodeGone(node_id, member.stream, reason, member.incarnation, farewell)]

    def _forgive_own_absence(self, now: float) -> None:
        """While this process slept or starved, heartbeats waited unread: nobody's silence."""
        before, self._ticked_s = self._ticked_s, now
        if before is None or now - before <= 2 * self._limits.heartbeat_s:
            return
        absent_s = now - before
        for node_id, member in self._members.items():
            if member.state is not NodeState.GONE and member.heard_s <= before:
                self._members[node_id] = replace(member, heard_s=member.heard_s + absent_s)

    def _mismatch(self, name: str, theirs: Versions) -> VersionMismatch | None:
        pairs = (
            ("Parallax protocol", self._versions.protocol, theirs.protocol),
            ("mlx", self._versions.mlx, theirs.mlx),
            ("mlx-lm", self._versions.mlx_lm, theirs.mlx_lm),
        )
        for what, our, their in pairs:
            if our != their:
                return VersionMismatch(
                    f"The node {name} and its scheduler run different versions of {what}",
                    f"The scheduler has {our}, the node has {their}, and a ring needs equal ones.",
                    "Install the same version of parallax-cluster on both.",
                    ours=f"{what} {our}",
                    theirs=f"{what} {their}",
                )
        return None
