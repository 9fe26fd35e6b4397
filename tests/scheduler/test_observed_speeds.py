"""Speeds from what stages report: medians that settle, and what they say of others."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.membership import NodeFacts
from parallax.scheduler.observed_speeds import LEAST_FRAMES, LEAST_SAMPLES, SAMPLES, ObservedSpeeds
from parallax.scheduler.planner import StagePlan, make_plan, rate
from parallax.scheduler.reconciler import Place, Ring
from parallax.scheduler.stage_costs import (
    DEFAULT_LINK,
    REFERENCE_ROWS,
    LinkFacts,
    StageCosts,
    decode_s,
    draw_s,
)
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
    now: float = 0.0

    def second(self, slowness: float, rows: int = 1, frames: int = 20, draw_s: float = 0.0) -> None:
        self.now += 1
        place = RING.places[self.index]
        facts = nodes()[self.index]
        self.health.stage = self.index
        self.health.decode_frames += frames
        self.health.decode_tokens += rows * frames
        took = decode_s(MODEL, facts, place.first, place.end, rows)
        self.health.decode_compute_s += (slowness * took + draw_s) * frames
        self.health.draw_s += draw_s * frames
        sent = wire.StageHealth()
        sent.CopyFrom(self.health)
        self.observed.observe(sent, RING, self.now)


def speeds(observed: ObservedSpeeds, now: float = 0.0) -> dict[str, float]:
    facts = observed.corrected(MODEL, nodes(), now)
    return {n.node_id: n.bandwidth_bytes_s / 100e9 for n in facts}


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


def test_little_work_says_nothing_until_it_adds_up() -> None:
    observed = ObservedSpeeds()
    a = Stage(observed, 0)
    for _ in range(LEAST_SAMPLES * LEAST_FRAMES - 1):
        a.second(3.0, frames=1)
    assert speeds(observed)["a"] == 1
    a.second(3.0, frames=1)
    assert speeds(observed)["a"] == pytest.approx(1 / 3)


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
    facts = [f for f in observed.corrected(MODEL, nodes(), 0.0) if f.node_id != "c"]
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
        observed.observe(sent, RING, 0.0)
    flops = {n.node_id: n.flops for n in observed.corrected(MODEL, nodes(), 0.0)}
    assert flops == pytest.approx({"a": 0.25e12, "b": 0.25e12, "c": 0.25e12})


def test_hops_cost_at_least_what_they_were_seen_to_cost() -> None:
    observed = ObservedSpeeds()
    way = LinkFacts(1e-4, 1e9)
    paths = {("a", "b"): way, ("b", "c"): way, ("b", "a"): LinkFacts(1.0, 1e9)}
    assert observed.links(paths, 0.0) == (paths, DEFAULT_LINK)
    health = wire.StageHealth(epoch=1, stage=0)
    for _ in range(LEAST_SAMPLES):
        health.hops += 10
        health.hop_s += 10 * 3e-3
        sent = wire.StageHealth()
        sent.CopyFrom(health)
        observed.observe(sent, RING, 0.0)
    links, unknown = observed.links(paths, 0.0)
    trips = {pair: link.round_trip_s for pair, link in links.items()}
    assert trips == pytest.approx({("a", "b"): 6e-3, ("b", "c"): 6e-3, ("b", "a"): 1.0})
    assert unknown.round_trip_s == pytest.approx(6e-3)


def test_caches_of_all_rings_on_a_node_count_and_of_past_ones_do_not() -> None:
    observed = ObservedSpeeds()
    for epoch, size in ((1, 100), (2, 30)):
        observed.observe(wire.StageHealth(epoch=epoch, stage=1, cache_bytes=size), RING, 0.0)
    assert observed.cache_bytes("b") == 130
    observed.forget_epoch(1)
    assert observed.cache_bytes("b") == 30
    assert observed.cache_bytes("c") == 0


def test_chunks_and_hops_that_come_three_a_second_add_up() -> None:
    observed = ObservedSpeeds()
    health = wire.StageHealth(epoch=1, stage=0)
    for _ in range(2 * LEAST_SAMPLES):
        health.prefill_frames += 3
        health.prefill_tokens += 3 * 512
        health.prefill_compute_s += 3 * 512 * 4e9 / 0.25e12
        health.hops += 3
        health.hop_s += 3 * 3e-3
        sent = wire.StageHealth()
        sent.CopyFrom(health)
        observed.observe(sent, RING, 0.0)
    assert observed.corrected(MODEL, nodes(), 0.0)[0].flops == pytest.approx(0.25e12)
    assert observed.links({}, 0.0)[1].round_trip_s == pytest.approx(6e-3)


def test_totals_that_shrink_are_a_new_beginning() -> None:
    observed = ObservedSpeeds()
    a = Stage(observed, 0)
    a.second(1.0, frames=10**6)
    a.health.Clear()
    a.health.epoch = 1
    for _ in range(LEAST_SAMPLES + 1):
        a.second(3.0)
    assert speeds(observed)["a"] == pytest.approx(1 / 3)


def test_figures_of_a_node_that_is_left_out_fade_and_speak_for_no_other() -> None:
    observed = ObservedSpeeds()
    a, b = Stage(observed, 0), Stage(observed, 1)
    for _ in range(SAMPLES):
        a.second(2.0)
        b.second(40.0)
    assert speeds(observed, 60.0) == pytest.approx({"a": 1 / 2, "b": 1 / 40, "c": 1 / 21})
    while a.now < 3600:
        a.second(2.0)
    after = [speeds(observed, 60.0 + minutes * 60) for minutes in (0, 2, 5, 10, 50)]
    assert [known["b"] for known in after] == sorted(known["b"] for known in after)
    assert after[2]["b"] == pytest.approx((1 / 2 * 1 / 40) ** 0.5)
    assert after[-1]["b"] == pytest.approx(1 / 2), "as good as any other of its kind"
    assert [known["c"] for known in after[1:]] == pytest.approx([1 / 2] * 4)
    for _ in range(LEAST_SAMPLES):
        a.second(1.0)
    b.now = a.now
    promised = speeds(observed, b.now)["b"]
    b.second(40.0)
    assert speeds(observed, b.now)["b"] == promised, "one sample says nothing"
    for _ in range(LEAST_SAMPLES):
        assert not observed.is_slow_again("a")
        b.second(40.0)
    assert speeds(observed, b.now)["b"] == pytest.approx(1 / 40)
    assert observed.is_slow_again("b")


def test_hops_of_a_node_that_is_left_out_fade() -> None:
    observed = ObservedSpeeds()
    for stage, hop_s in ((0, 3e-3), (1, 0.5)):
        health = wire.StageHealth(epoch=1, stage=stage)
        for now in range(60):
            health.hops += 10
            health.hop_s += 10 * hop_s
            sent = wire.StageHealth()
            sent.CopyFrom(health)
            observed.observe(sent, RING, float(now))
    way = LinkFacts(1e-4, 1e9)
    paths = {("a", "b"): way, ("b", "a"): way}
    before, _ = observed.links(paths, 60.0)
    assert before["b", "a"].round_trip_s == pytest.approx(1.0)
    after, _ = observed.links(paths, 7200.0)
    assert after["b", "a"].round_trip_s == pytest.approx(1e-4)


def test_what_drawing_costs_is_told_apart_from_layers_and_counts_where_it_is_done_now() -> None:
    observed = ObservedSpeeds()
    a, b = Stage(observed, 0), Stage(observed, 1)
    for _ in range(SAMPLES):
        a.second(1.0, rows=2)
        b.second(2.0, rows=2, draw_s=0.3)
    facts = observed.corrected(MODEL, nodes(), 60.0)
    drawing = observed.drawing(MODEL, facts, 60.0)
    assert speeds(observed) == pytest.approx({"a": 1, "b": 1 / 2, "c": 1 / 1.5})
    seconds = [draw_s(drawing, n, MODEL.layers, 2) for n in facts]
    assert seconds == pytest.approx([0.15, 0.3, 0.225]), "a faster node draws faster"
    assert draw_s(drawing, facts[1], MODEL.layers - 1, 2) == 0
    with_draws, without = (StageCosts(m, facts, {}, None).compute(1) for m in (drawing, MODEL))
    assert with_draws[4, 8] - without[4, 8] == pytest.approx(REFERENCE_ROWS / 2 * 0.3)
    assert with_draws[4, 7] == without[4, 7]


def test_who_kept_what_it_was_tried_for_is_judged_like_any_other_again() -> None:
    observed = ObservedSpeeds()
    a = Stage(observed, 0)
    for _ in range(SAMPLES):
        a.second(4.0)
    speeds(observed, a.now)
    a.now = 3600.0
    assert speeds(observed, a.now)["a"] == pytest.approx(1)
    for slowness in (1.0, 4.0):
        for _ in range(SAMPLES):
            a.second(slowness)
            assert speeds(observed, a.now)
    assert speeds(observed, a.now)["a"] == pytest.approx(1 / 4)
    assert not observed.is_slow_again("a")
