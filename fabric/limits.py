"""Time-outs and sizes: one typed group that checks them against each other."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt
from pydantic import BaseModel, ConfigDict, model_validator

Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Gt(0)]


class Limits(BaseModel):
    """Every duration (seconds), size (bytes) and count that bounds something."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Members: a heartbeat and a ring beat each second; silence makes a suspect.
    heartbeat_s: Positive = 1.0
    beat_s: Positive = 1.0
    silence_s: Positive = 3.0
    stuck_s: Positive = 30.0  # a stage's MLX thread in one job, loading and compiling left out
    connect_s: Positive = 5.0
    call_s: Positive = 10.0
    form_s: Positive = 60.0  # a ring that has not formed by then is formed anew
    reload_s: Positive = 60.0  # before a node that could not load tries again: files get mended
    aside_s: Positive = 60.0  # without layers, of a node whose rings break; half of a lost one
    join_token_s: Positive = 86_400.0  # how long the join command that `run` shows is good
    drain_s: Positive = 10.0  # what a stopping process gives to answers in flight
    orphan_s: Positive = 30.0  # how long a head keeps sequences without its scheduler
    certificate_s: Positive = 7 * 86400.0  # a node's is renewed when half of that is over
    unattended_nodes: Count = 64  # that came in with one token and have never attended

    # Better plans: by how much, for how long, and how soon after the last move.
    replan_margin: Positive = 0.15
    replan_hold_s: Positive = 10.0
    replan_pause_s: Positive = 60.0

    # Requests.
    queue_requests: Count = 256
    queue_wait_s: Positive = 100.0  # 20 tries of 5 s in the reference
    retry_after_s: Count = 5
    request_s: Positive = 600.0  # to an answer's first token, and from each to the next
    body_bytes: Count = 4 << 20
    bodies_bytes: Count = 256 << 20  # of all bodies that are coming in
    disconnect_s: Positive = 2.0

    # HTTP connections.
    header_line_bytes: Count = 8190  # the request line, and each header
    header_lines: Count = 100
    header_s: Positive = 10.0  # from a connection, or its next first byte, to a whole head
    body_s: Positive = 60.0  # from there to a whole body
    linger_s: Positive = 2.0  # for the rest of a body that nobody wants, before closing
    keepalive_s: Positive = 75.0  # a connection without a request
    reader_s: Positive = 60.0  # what was written for a client and it does not take
    connections: Count = 2048
    connections_per_address: Count = 512  # loopback, where proxies are, is not held to it
    stream_buffer_events: Count = 1024  # ready for one client; beyond that nothing is read for it

    # The ring.
    piece_bytes: Count = 1 << 20  # larger frames travel in pieces
    message_bytes: Count = 4 << 20  # gRPC's own limit for one message
    frame_bytes: Count = 256 << 20  # the largest carry that is taken in
    window_frames: Count = 16
    window_bytes: Count = 512 << 20
    lane_rows: Count = 18  # two of them for clients that come when another one has all the rest
    draft_tokens: Count = 64  # most tokens sent ahead of a lone answer before they are drawn
    block_tokens: Count = 16  # most of them in one frame
    chunk_tokens: Count = 32  # prefill grid on the CPU backend, where larger chunks gain nothing

    @model_validator(mode="after")
    def _agree(self) -> Limits:
        if self.silence_s < 2 * self.heartbeat_s:
            raise ValueError("silence_s must be at least twice heartbeat_s")
        if self.piece_bytes >= self.message_bytes:
            raise ValueError("piece_bytes must be below message_bytes")
        if self.frame_bytes < self.piece_bytes:
            raise ValueError("frame_bytes must be at least piece_bytes")
        if self.bodies_bytes < self.body_bytes:
            raise ValueError("bodies_bytes must be at least body_bytes")
        if self.queue_wait_s > self.request_s:
            raise ValueError("queue_wait_s must not exceed request_s")
        return self


DEFAULT_LIMITS = Limits()
