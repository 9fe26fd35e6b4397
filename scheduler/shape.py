"""How a ring is run: lanes, rows, the prefill grid, windows and the cache budget. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.reconciler import Ring

ACCELERATED_CHUNK_TOKENS = 512  # a GPU needs larger chunks to be busy
SLACK_FRAMES = 4  # beats and commands beside lanes and chunks
TOKEN_BYTES = 4  # of a message: 3 at most for ids below 2^21, and what goes with them


def shape_of(
    reports: Sequence[wire.StageReady],
    budgets_bytes: Sequence[int],
    context_tokens: int,
    *,
    accelerated: bool,
    limits: Limits,
    speculation: bool = True,
) -> wire.RingShape:
    """The shape of a ring whose stages sent ``reports`` and may hold ``budgets_bytes``.

    Lanes: one decode batch for each stage, so that none idles, and as many spare ones for
    rows much longer or shorter than the others; where caches cannot be batched, lanes of
    one, as many as the window allows. Drafts: where
    every stage's caches can be cut again; several in a frame where that is as
    exact as one by one.
    """
    stages = len(reports)
    batches = all(report.batches for report in reports)
    lanes = stages if batches else max(stages, limits.window_frames)
    spare_lanes = stages if batches else 0
    spare = [b - r.weight_bytes for b, r in zip(budgets_bytes, reports, strict=True)]
    cache_bytes = max(1, min(spare))
    drafts = speculation and all(report.trims for report in reports)
    blocks = all(report.blocks for report in reports)
    chunk_tokens = ACCELERATED_CHUNK_TOKENS if accelerated else limits.chunk_tokens
    sendable = limits.message_bytes // TOKEN_BYTES  # to a head, and with its lane's first frame
    return wire.RingShape(
        lanes=lanes,
        lane_rows=limits.lane_rows if batches else 1,
        chunk_tokens=chunk_tokens,
        window_frames=max(limits.window_frames, lanes + spare_lanes + stages + SLACK_FRAMES),
        window_bytes=limits.window_bytes,
        cache_bytes=cache_bytes,
        context_tokens=min(
            context_tokens, sendable, tokens_that_fit(reports, cache_bytes, chunk_tokens)
        ),
        orphan_s=limits.orphan_s,
        draft_tokens=limits.draft_tokens if drafts else 0,
        block_tokens=limits.block_tokens if blocks else 1,
        spare_lanes=spare_lanes,
    )


def forms_of(
    ring: Ring,
    reports: Sequence[wire.StageReady],
    hellos: Sequence[wire.Hello],
    shape: wire.RingShape,
) -> list[wire.FormRing]:
    """The orders that form a ring, one per stage; ``hellos`` say where its nodes listen."""
    stages = [
        wire.StagePlace(
            node_id=place.node_id, endpoints=hello.endpoints, first=place.first, end=place.end
        )
        for place, hello in zip(ring.places, hellos, strict=True)
    ]
    return [
        wire.FormRing(
            epoch=ring.epoch,
            index=index,
            model=ring.model,
            stages=stages,
            shape=shape,
            costs=[report.cache for report in reports],
            batches=all(report.batches for report in reports),
        )
        for index in range(len(stages))
    ]


def tokens_that_fit(reports: Sequence[wire.StageReady], cache_bytes: int, chunk_tokens: int) -> int:
    """The longest lone sequence that stays within ``cache_bytes``.

    It is decoded beside a copy of its caches; before that, windows hold a chunk more.
    """
    most = 1 << 31
    for report in reports:
        cost = report.cache
        fixed = cost.fixed_bytes + cost.window_bytes_per_token * cost.window_tokens
        chunk = cost.window_bytes_per_token * chunk_tokens
        room = min(cache_bytes // 2, cache_bytes - chunk) - fixed
        if cost.bytes_per_token:
            most = min(most, max(1, room // cost.bytes_per_token))
    return most
