"""Running totals that stages report, as the differences that counters take."""

from __future__ import annotations

from typing import TypeVar

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.metrics import Metrics

N = TypeVar("N", int, float)


class StageMetrics:
    """Remembers each stage's last report; a new epoch begins at zero."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last: dict[tuple[int, int], wire.StageHealth] = {}

    def observe(self, health: wire.StageHealth, node: str) -> None:
        """Counts what a stage did since its last report."""
        key = health.epoch, health.stage
        last = self._last.get(key) or wire.StageHealth()
        self._last[key] = health
        self._metrics.observe_stage(
            health.stage,
            node,
            "decode",
            frames=_more(health.decode_frames, last.decode_frames),
            tokens=_more(health.decode_tokens, last.decode_tokens),
            compute_s=_more(health.decode_compute_s, last.decode_compute_s),
            draw_s=_more(health.draw_s, last.draw_s),
        )
        self._metrics.observe_stage(
            health.stage,
            node,
            "prefill",
            frames=_more(health.prefill_frames, last.prefill_frames),
            tokens=_more(health.prefill_tokens, last.prefill_tokens),
            compute_s=_more(health.prefill_compute_s, last.prefill_compute_s),
        )
        self._metrics.observe_hops(
            health.stage,
            node,
            hops=_more(health.hops, last.hops),
            hop_s=_more(health.hop_s, last.hop_s),
        )
        if health.stage == 0:
            self._metrics.observe_round_trip(str(health.epoch), health.ring_round_trip_s)
            self._metrics.observe_drafts(
                drafted=_more(health.drafted_tokens, last.drafted_tokens),
                accepted=_more(health.accepted_tokens, last.accepted_tokens),
            )

    def forget(self, epoch: int) -> None:
        """An epoch is over."""
        self._metrics.forget_ring(str(epoch))
        for key in [key for key in self._last if key[0] == epoch]:
            del self._last[key]


def _more(now: N, before: N) -> N:
    """Counters only grow, whatever a stage says of itself."""
    return max(now - before, 0)
