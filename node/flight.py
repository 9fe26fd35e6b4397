"""A frame on its way around the ring, as its conductor sees it."""

from __future__ import annotations

from dataclasses import dataclass

from parallax.node.sequences import Lane, Sequence
from parallax.node.speculation import Block
from parallax.proto import wire_pb2 as wire


@dataclass(slots=True)
class Flight:
    """A frame in the ring: what its return will mean."""

    kind: wire.FrameKind.ValueType
    tokens: int
    lane: Lane | None = None
    rows: tuple[Sequence, ...] = ()
    block: Block | None = None  # of the only sequence in the ring
    sent_at: float | None = None  # of a beat whose round trip is measured
    entered_at: float | None = None  # of a step that follows the one before at once
