"""The nodes that attend, and how to reach them: members, their streams, the ways between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from parallax.fabric.credentials import Credentials
from parallax.fabric.limits import Limits
from parallax.fabric.version import PROTOCOL, mlx_lm_version, mlx_version
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.control import NodeLink
from parallax.scheduler.membership import (
    Change,
    Membership,
    NodeFacts,
    NodeGone,
    NodeState,
    Refused,
    Versions,
)
from parallax.scheduler.planner import LinkFacts


class Roster:
    """Who is a member, over which stream, and what each said of itself at its hello."""

    def __init__(self, credentials: Credentials, limits: Limits) -> None:
        self.credentials = credentials
        self._limits = limits
        self.members = Membership(Versions(PROTOCOL, mlx_version(), mlx_lm_version()), limits)
        self.paths: dict[tuple[str, str], LinkFacts] = {}  # measured, from one node to another
        self._links: dict[int, NodeLink] = {}  # by stream
        self._hellos: dict[str, wire.Hello] = {}
        self._streams = itertools.count(1)

    def hello(self, hello: wire.Hello, link: NodeLink, now: float) -> list[Change]:
        """A node attends: it is welcomed, and the ways to it are measured.

        Raises:
            VersionMismatch: it cannot be part of a ring here.
        """
        stream = next(self._streams)
        theirs = Versions(hello.protocol, hello.mlx_version, hello.mlx_lm_version)
        changes = self.members.hello(
            _facts(hello.facts), theirs, hello.incarnation, stream=stream, now=now
        )
        for change in changes:
            if isinstance(change, Refused):
                raise change.error
        self._links[stream] = link
        self._hellos[hello.facts.node_id] = hello
        link.order(
            wire.NodeOrder(
                welcome=wire.Welcome(
                    scheduler_id=self.credentials.peer_id,
                    heartbeat_s=self._limits.heartbeat_s,
                    silence_s=self._limits.silence_s,
                )
            )
        )
        self._probe(hello)
        return changes

    def gone(self, change: NodeGone) -> None:
        """A member left: its stream is ended, and what was known of it is forgotten."""
        link = self._links.pop(change.stream, None)
        if link is not None:
            link.close()
        member = self.members.get(change.node_id)
        if member is None or member.state is NodeState.GONE:  # and not back already
            self._hellos.pop(change.node_id, None)
            self.paths = {way: f for way, f in self.paths.items() if change.node_id not in way}

    def lost(self, link: NodeLink, now: float) -> list[Change]:
        """A stream ended."""
        for stream, known in self._links.items():
            if known is link:
                return self.members.broken(stream, now=now)
        return []

    def current(self, node_id: str, link: NodeLink) -> bool:
        """Whether a node attends over this stream, and not over a newer one."""
        member = self.members.get(node_id)
        return member is not None and self._links.get(member.stream) is link

    def order(self, node_id: str, order: wire.NodeOrder) -> None:
        """Sends an order; nothing happens when the node is gone."""
        member = self.members.get(node_id)
        link = self._links.get(member.stream) if member else None
        if link is not None:
            link.order(order)

    def locate(self, places: Iterable[wire.StagePlace]) -> None:
        """Fills in how these nodes are reached."""
        for place in places:
            if place.node_id in self._hellos:
                place.endpoints.extend(self._hellos[place.node_id].endpoints)

    def order_all(self, order: wire.NodeOrder) -> None:
        """Sends an order to everybody who attends."""
        for link in self._links.values():
            link.order(order)

    def hello_of(self, node_id: str) -> wire.Hello:
        """What a member said of itself."""
        return self._hellos[node_id]

    def name_of(self, node_id: str) -> str:
        """A node's name for people."""
        member = self.members.get(node_id)
        return member.facts.name if member else node_id

    def close(self) -> None:
        """Ends every stream after the orders already queued."""
        for link in self._links.values():
            link.close()

    def _probe(self, hello: wire.Hello) -> None:
        """The new node and the others measure the ways between them."""
        new = hello.facts.node_id
        others = [m.facts.node_id for m in self.members.usable() if m.facts.node_id != new]
        for other in others:
            self.order(other, wire.NodeOrder(probe=wire.ProbeLinks(peers=[_place(hello)])))
        if others:
            peers = [_place(self._hellos[other]) for other in others]
            self.order(new, wire.NodeOrder(probe=wire.ProbeLinks(peers=peers)))


def _place(hello: wire.Hello) -> wire.StagePlace:
    return wire.StagePlace(node_id=hello.facts.node_id, endpoints=hello.endpoints)


def _facts(facts: wire.NodeFacts) -> NodeFacts:
    return NodeFacts(
        node_id=facts.node_id,
        name=facts.name,
        chip=facts.chip,
        platform=facts.platform,
        memory_bytes=facts.memory_bytes,
        budget_bytes=facts.budget_bytes,
        bandwidth_bytes_s=facts.bandwidth_bytes_s,
        flops=facts.flops,
        accelerators=facts.accelerators,
        backend=facts.backend,
    )
