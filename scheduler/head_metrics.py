"""What heads say of themselves, as gauges and as the differences that counters take."""

from __future__ import annotations

from collections.abc import Mapping

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.metrics import Metrics


class HeadMetrics:
    """Remembers what each head said last; a new epoch begins at zero."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last: dict[int, wire.PrefixLoad] = {}

    def observe(self, loads: Mapping[int, wire.HeadLoad]) -> None:
        """The heads of all rings that serve, by epoch."""
        self._metrics.set_lanes(
            sum(load.decoding for load in loads.values()),
            sum(load.lanes for load in loads.values()),
            sum(load.free_rows for load in loads.values()),
        )
        self._metrics.set_prefixes(
            sum(load.prefixes.kept for load in loads.values()),
            sum(load.prefixes.kept_bytes for load in loads.values()),
        )
        for epoch, load in loads.items():
            now, last = load.prefixes, self._last.get(epoch) or wire.PrefixLoad()
            self._metrics.observe_prefixes(
                prompts=max(0, now.prompts - last.prompts),
                hits=max(0, now.hits - last.hits),
                saved_tokens=max(0, now.saved_tokens - last.saved_tokens),
                evictions=max(0, now.evictions - last.evictions),
            )
        self._last = {epoch: load.prefixes for epoch, load in loads.items()}
