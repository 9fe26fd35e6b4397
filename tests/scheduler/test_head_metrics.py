"""Heads' running totals as counters."""

from __future__ import annotations

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.head_metrics import HeadMetrics
from parallax.scheduler.metrics import Metrics


def load(prompts: int, hits: int, saved: int, evictions: int = 0, kept: int = 1) -> wire.HeadLoad:
    prefixes = wire.PrefixLoad(
        kept=kept,
        kept_bytes=kept * 100,
        prompts=prompts,
        hits=hits,
        saved_tokens=saved,
        evictions=evictions,
    )
    return wire.HeadLoad(decoding=3, lanes=2, free_rows=5, prefixes=prefixes)


def test_totals_of_rings_are_counted_once_and_a_new_epoch_begins_at_zero() -> None:
    metrics = Metrics()
    heads = HeadMetrics(metrics)

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(name)

    heads.observe({1: load(4, 2, 640), 2: load(1, 0, 0)})
    heads.observe({1: load(5, 3, 960, evictions=2), 2: load(1, 0, 0)})
    assert value("parallax_prefix_prompts_total") == 6
    assert value("parallax_prefix_hits_total") == 3
    assert value("parallax_prefix_saved_tokens_total") == 960
    assert value("parallax_prefix_evictions_total") == 2
    assert value("parallax_prefixes_kept") == 2
    assert value("parallax_prefix_bytes") == 200
    assert value("parallax_lane_rows") == 6
    heads.observe({3: load(1, 1, 32)})
    assert value("parallax_prefix_hits_total") == 4
    assert value("parallax_prefix_saved_tokens_total") == 992
    assert value("parallax_prefix_bytes") == 100
    heads.observe({})
    assert value("parallax_prefixes_kept") == 0
