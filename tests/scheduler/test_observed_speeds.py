"""Speeds from what stages report: medians that settle, and what they say of others."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.membership import NodeFacts
from parallax.scheduler.observed_speeds import LEAST_SAMPLES, SAMPLES, ObservedSpeeds
from parallax.scheduler.planner import StagePlan, make_plan, rate
from parallax.scheduler.reconciler import Place, Ring
from parallax.scheduler.stage_costs import DEFAULT_LINK, LinkFacts, decode_s
from tests.scheduler.test_planner import GB, model, node

MODEL = model(8, flops=1e9)
RING = Ring(wire.ModelSource(), (Place("a", 0, 4), Place("b", 4, 8)))


def nodes() -> list[NodeFacts]:
    return [node(name, 9 * GB, 100e9, 1e12) for name in "abc"]


@dataclass
class Stage:
    """A stage's running totals, second by second."""

    observed: ObservedSpeeds
    index: int
    health: wire.StageHealth = field(default_factory=lambda: wire.StageHealth(epoch=1))

    def second(self, slowness: float, rows: int = 1, frames: int = 20) -> None:
        place = RING.places[self.index]
        facts = nodes()[self.index]
        self.health.stage = self.index
        self.health.decode_frames += frames
        self.health.decode_tokens += rows * frames
        took = decode_s(MODEL, facts, place.first, place.end, rows)
        self.health.decode_compute_s += slowness * took * frames
        sent = wire.StageHealth()
        sent.CopyFrom(self.health)
        self.observed.observe(sent, RING)


def speeds(observed: ObservedSpeeds) -> dict[str, float]:
    return {n.node_id: n.bandwidth_bytes_s / 100e9 for n in observed.corrected(MODEL, nodes())}


def test_a_node_is_as_fast_as_its_stages_turn_out_to_be() -> None:
    observed = ObservedSpeeds()
    a, b = Stage(observed, 0), Stage(observed, 1)
    for _ in range(LEAST_SAMPLES):
        a.second(2.0)
        b.second(4.0, rows=5)
    assert speeds(observed) == pytest.approx({"a": 1 / 2, "b": 1 / 4, "c": 1 / 3})
    observed.forget_node("b")
    assert speeds(observed) == pytest.approx({"a": 1 / 2, "b": 1 / 2, "c": 1 / 2})
    observed.forget_model()
    assert speeds(observed) == {"a": 1, "b": 1, "c": 1}


def test_little_work_says_nothing() -> None:
    observed = ObservedSpeeds()
    a = Stage(observed, 0)
    for _ in range(LEAST_SAMPLES - 1):
        a.second(3.0)
    for _ in range(50):
        a.second(3.0, frames=1)
    assert speeds(observed)["a"] == 1


def test_seconds_in_which_a_machine_is_busy_change_nothing() -> None:
    observed = ObservedSpeeds()
    a, b = Stage(observed, 0), Stage(observed, 1)
    chance = random.Random(3)
    for _ in range(SAMPLES):
        a.second(chance.uniform(0.97, 1.03))
        b.second(chance.uniform(0.97, 1.03))
    before = speeds(observed)
    for second in range(200):
        busy = second % 60 < 20
        a.second(chance.uniform(2, 9) if busy else chance.uniform(0.97, 1.03))
        b.second(chance.uniform(0.97, 1.03))
        assert speeds(observed) == before


def test_a_machine_that_is_slower_for_good_gets_fewer_layers_and_the_gain_is_told() -> None:
    observed = ObservedSpeeds()
    a, b = Stage(observed, 0), Stage(observed, 1)
    for _ in range(SAMPLES):
        a.second(3.0)
        b.second(1.0)
    facts = [f for f in observed.corrected(MODEL, nodes()) if f.node_id != "c"]
    plan = make_plan(MODEL, facts, min_nodes=2)
    stages = [StagePlan(p.node_id, p.first, p.end) for p in RING.places]
    present = rate(MODEL, facts, {}, [stages])
    shares = {s.node_id: s.end - s.first for s in plan.rings[0].stages}
    assert shares == {"a": 2, "b": 6}
    assert plan.throughput_tokens_s > 1.5 * present.throughput_tokens_s


def test_prefill_tells_how_fast_a_node_computes() -> None:
    observed = ObservedSpeeds()
    health = wire.StageHealth(epoch=1, stage=0)
    for _ in range(LEAST_SAMPLES):
        health.prefill_frames += 10
        health.prefill_tokens += 320
        health.prefill_compute_s += 320 * 4e9 / 0.25e12
        sent = wire.StageHealth()
        sent.CopyFrom(health)
        observed.observe(sent, RING)
    flops = {n.node_id: n.flops for n in observed.corrected(MODEL, nodes())}
    assert flops == pytest.approx({"a": 0.25e12, "b": 0.25e12, "c": 0.25e12})


def test_hops_cost_at_least_what_they_were_seen_to_cost() -> None:
    observed = ObservedSpeeds()
    way = LinkFacts(1e-4, 1e9)
    paths = {("a", "b"): way, ("b", "c"): way, ("b", "a"): LinkFacts(1.0, 1e9)}
    assert observed.links(paths) == (paths, DEFAULT_LINK)
    health = wire.StageHealth(epoch=1, stage=0)
    for _ in range(LEAST_SAMPLES):
        health.hops += 10
        health.hop_s += 10 * 3e-3
        sent = wire.StageHealth()
        sent.CopyFrom(health)
        observed.observe(sent, RING)
    links, unknown = observed.links(paths)
    trips = {pair: link.round_trip_s for pair, link in links.items()}
    assert trips == pytest.approx({("a", "b"): 6e-3, ("b", "c"): 6e-3, ("b", "a"): 1.0})
    assert unknown.round_trip_s == pytest.approx(6e-3)


def test_caches_of_all_rings_on_a_node_count_and_of_past_ones_do_not() -> None:
    observed = ObservedSpeeds()
    for epoch, size in ((1, 100), (2, 30)):
        observed.observe(wire.StageHealth(epoch=epoch, stage=1, cache_bytes=size), RING)
    assert observed.cache_bytes("b") == 130
    observed.forget_epoch(1)
    assert observed.cache_bytes("b") == 30
    assert observed.cache_bytes("c") == 0
