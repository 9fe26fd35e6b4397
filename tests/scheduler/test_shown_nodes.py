"""Nodes that come under ever new names do not fill the metrics."""

from __future__ import annotations

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.stage_metrics import StageMetrics

SHOWN = 4


def report(metrics: Metrics, stages: StageMetrics, number: int) -> None:
    """All that one node says of itself, in a ring of its own."""
    name = f"node{number}"
    health = wire.StageHealth(epoch=number, decode_frames=7, draw_s=0.2, hops=7, hop_s=0.1)
    stages.observe(health, name)
    metrics.observe_stale(name, 3)
    metrics.turned_away(name, {"ticket": 2})
    stages.forget(number)


def series(metrics: Metrics) -> list[str]:
    """Every line of the page that names a node."""
    return [line for line in metrics.page().decode().splitlines() if '="node' in line]


def test_nodes_that_come_under_new_names_leave_no_more_behind_than_so_many() -> None:
    metrics = Metrics(most_nodes=SHOWN)
    stages = StageMetrics(metrics)
    for number in range(SHOWN):
        report(metrics, stages, number)
    full = len(series(metrics))
    for number in range(SHOWN, 50):
        report(metrics, stages, number)
    assert len(series(metrics)) == full
    held = (stages._last, metrics._stale_before, metrics._turned_away_before)
    assert max(map(len, held)) <= SHOWN


def test_those_heard_of_last_stay_and_count_on() -> None:
    metrics = Metrics(most_nodes=SHOWN)
    stages = StageMetrics(metrics)
    for number in range(1, 50):
        report(metrics, stages, 0)
        report(metrics, stages, number)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    assert value("parallax_stage_hops_total", stage="0", node="node0") == 7 * 49
    assert value("parallax_stale_frames_total", where="node0") == 3
    assert value("parallax_refused_total", reason="ticket", node="node0") == 2
    assert value("parallax_stage_hops_total", stage="0", node="node1") is None


def test_a_node_that_was_started_again_counts_from_zero() -> None:
    metrics = Metrics()
    for total in (3, 5, 1):
        metrics.observe_stale("a", total)
    assert metrics.registry.get_sample_value("parallax_stale_frames_total", {"where": "a"}) == 6
