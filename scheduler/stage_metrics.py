"""Running totals that stages report, as the differences that counters take."""

from __future__ import annotations

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.metrics import Metrics


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
            frames=health.decode_frames - last.decode_frames,
            tokens=health.decode_tokens - last.decode_tokens,
            compute_s=health.decode_compute_s - last.decode_compute_s,
        )
        self._metrics.observe_stage(
            health.stage,
            node,
            "prefill",
            frames=health.prefill_frames - last.prefill_frames,
            tokens=health.prefill_tokens - last.prefill_tokens,
            compute_s=health.prefill_compute_s - last.prefill_compute_s,
        )
        self._metrics.observe_hops(
            health.stage, node, hops=health.hops - last.hops, hop_s=health.hop_s - last.hop_s
        )
        if health.stage == 0:
            self._metrics.observe_round_trip(str(health.epoch), health.ring_round_trip_s)
            self._metrics.observe_drafts(
                drafted=health.drafted_tokens - last.drafted_tokens,
                accepted=health.accepted_tokens - last.accepted_tokens,
            )

    def forget(self, epoch: int) -> None:
        """An epoch is over."""
        self._metrics.forget_ring(str(epoch))
        for key in [key for key in self._last if key[0] == epoch]:
            del self._last[key]
