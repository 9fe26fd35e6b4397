"""Measured speeds, as stages show them at work, with the noise taken out. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TypeVar

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.absences import Absences
from parallax.scheduler.membership import NodeFacts
from parallax.scheduler.model_facts import ModelFacts
from parallax.scheduler.reconciler import Place, Ring
from parallax.scheduler.stage_costs import (
    DEFAULT_LINK,
    UNKNOWN_BANDWIDTH_BYTES_S,
    LinkFacts,
    Links,
    decode_s,
    known,
)

K = TypeVar("K")
V = TypeVar("V")

SAMPLES = 60  # seconds of work that a median looks back on
LEAST_SAMPLES = 10  # fewer say nothing
FEW_SAMPLES = 5  # say enough of a node that was known before
LEAST_FRAMES = 4  # in one sample; fewer are mostly waiting and starting
CHUNK_TOKENS = 16  # prefill frames of fewer are bound by reading, not by arithmetic
DEAD_BAND = 0.1  # a median within this of the figure in use changes nothing
MOST_TIMES = 50.0  # as far as a measured figure may be from the one measured at start
FAR = 1.25  # times: a node that is slower by this than it was taken for is slow again


@dataclass(frozen=True, slots=True)
class _Sample:
    """What one frame took on average, over about a second."""

    first: int
    end: int
    seconds: float
    tokens: float  # in one frame


@dataclass(frozen=True, slots=True)
class _Ratios:
    """How far a node is from its own first measurement."""

    flops: float
    slowness: float

    def is_far_below(self, other: _Ratios) -> bool:
        by_bytes = self.slowness / other.slowness
        return max(by_bytes, by_bytes * other.flops / self.flops) > FAR


@dataclass(slots=True)
class _Totals:
    """A stage's last report, and those at which its last samples were taken."""

    latest: wire.StageHealth
    decode: wire.StageHealth = field(default_factory=wire.StageHealth)
    prefill: wire.StageHealth = field(default_factory=wire.StageHealth)
    hops: wire.StageHealth = field(default_factory=wire.StageHealth)


class ObservedSpeeds:
    """What stages really take, from the totals they report; speeds that planning goes by.

    Reports make a sample once they tell of enough frames, a figure is the median of a minute of
    samples, and a figure in use stays until the median has left a band around it. Figures of
    nodes that are in no ring fade (:mod:`parallax.scheduler.absences`).
    """

    def __init__(self) -> None:
        self._totals: dict[tuple[str, int], _Totals] = {}  # by node and epoch
        self._decode: dict[str, deque[_Sample]] = {}
        self._prefill: dict[str, deque[_Sample]] = {}
        self._draws: dict[str, deque[float]] = {}  # seconds a token, of those at the end of a ring
        self._hops: dict[tuple[str, str], deque[float]] = {}
        self._in_use: dict[tuple[str, ...], float] = {}
        self._absences = Absences()
        self._given: dict[str, _Ratios] = {}  # as last planned with
        self._promised: dict[str, _Ratios] = {}  # as planned with when they came back

    def observe(self, health: wire.StageHealth, ring: Ring, now: float) -> None:
        """Takes a stage's running totals."""
        if health.stage >= len(ring.places):
            return
        place = ring.places[health.stage]
        if self._absences.seen(place.node_id, now):
            self._begin_anew(place.node_id)
        key = place.node_id, health.epoch
        totals = self._totals.setdefault(key, _Totals(health))
        totals.latest = health
        self._decoded(health, totals, place, is_last=health.stage == len(ring.places) - 1)
        self._prefilled(health, totals, place)
        last = totals.hops
        hops = health.hops - last.hops
        if not 0 <= hops < LEAST_FRAMES:
            totals.hops = health
            if hops > 0 and len(ring.places) > 1:
                after = ring.places[(health.stage + 1) % len(ring.places)].node_id
                _add(self._hops, (place.node_id, after), (health.hop_s - last.hop_s) / hops)

    def _decoded(
        self, health: wire.StageHealth, totals: _Totals, place: Place, *, is_last: bool
    ) -> None:
        if not is_last:
            self._draws.pop(place.node_id, None)
        last = totals.decode
        frames = health.decode_frames - last.decode_frames
        if 0 <= frames < LEAST_FRAMES:
            return  # they add up
        totals.decode = health  # or it says less than before, which is nonsense
        tokens = health.decode_tokens - last.decode_tokens
        if frames <= 0 or tokens <= 0:
            return
        seconds = health.decode_compute_s - last.decode_compute_s
        drawing = min(seconds, max(0.0, health.draw_s - last.draw_s)) if is_last else 0.0
        sample = _Sample(place.first, place.end, (seconds - drawing) / frames, tokens / frames)
        _add(self._decode, place.node_id, sample)
        if is_last:
            _add(self._draws, place.node_id, drawing / tokens)

    def _prefilled(self, health: wire.StageHealth, totals: _Totals, place: Place) -> None:
        last = totals.prefill
        frames = health.prefill_frames - last.prefill_frames
        if 0 <= frames < LEAST_FRAMES:
            return
        totals.prefill = health
        tokens = health.prefill_tokens - last.prefill_tokens
        if frames > 0 and tokens >= CHUNK_TOKENS * frames:
            seconds = health.prefill_compute_s - last.prefill_compute_s
            sample = _Sample(place.first, place.end, seconds / frames, tokens / frames)
            _add(self._prefill, place.node_id, sample)

    def _begin_anew(self, node_id: str) -> None:
        """A node is back after a while: it counts as what it was taken for, until it shows more."""
        taken = self._given.get(node_id)
        known_of = [kind for kind in ("flops", "decode") if (kind, node_id) in self._in_use]
        self._forget_samples(node_id)
        if taken is not None and known_of:
            self._promised[node_id] = taken
            ratios = {"flops": taken.flops, "decode": taken.slowness}
            self._in_use.update({(kind, node_id): ratios[kind] for kind in known_of})

    def cache_bytes(self, node_id: str) -> int:
        """What the caches on a node took when it last said so."""
        held = (totals for (node, _), totals in self._totals.items() if node == node_id)
        return sum(totals.latest.cache_bytes for totals in held)

    def forget_epoch(self, epoch: int) -> None:
        """A ring is no more; how fast it was stays known."""
        for key in [key for key in self._totals if key[1] == epoch]:
            del self._totals[key]

    def forget_model(self) -> None:
        """Another model is served from now on: its layers take other times."""
        for samples in (self._totals, self._decode, self._prefill, self._draws, self._hops):
            samples.clear()
        for figures in (self._in_use, self._given, self._promised):
            figures.clear()
        self._absences = Absences()

    def forget_node(self, node_id: str) -> None:
        """A node is gone; when it comes back it may be another machine."""
        self._forget_samples(node_id)
        self._absences.forget(node_id)
        self._given.pop(node_id, None)
        self._promised.pop(node_id, None)
        for place in [place for place in self._totals if node_id in place]:
            del self._totals[place]

    def _forget_samples(self, node_id: str) -> None:
        for samples in (self._decode, self._prefill):
            samples.pop(node_id, None)
        self._draws.pop(node_id, None)
        for pair in [pair for pair in self._hops if node_id in pair]:
            del self._hops[pair]
        for key in [key for key in self._in_use if node_id in key]:
            del self._in_use[key]

    def is_slow_again(self, node_id: str) -> bool:
        """Whether a node that was tried again is slower by far than what it was taken for."""
        return self._absences.has_failed(node_id)

    def corrected(
        self, model: ModelFacts, nodes: Iterable[NodeFacts], now: float
    ) -> list[NodeFacts]:
        """The nodes with the speeds at which they would take the times that were observed.

        Prefill tells how fast a node computes, decode then how fast it is as a whole. A node that
        has not worked yet is taken to be as far from its own measurement as others of its kind
        are, or, if there are none, as all are. One that has not worked for a while comes nearer
        to that with time.
        """
        given = list(nodes)
        weights = {n.node_id: self._absences.weight(n.node_id, now) for n in given}
        flops = _spread(given, {n.node_id: self._flops_ratio(model, n) for n in given}, weights)
        computing = [replace(n, flops=n.flops * flops[n.node_id]) for n in given]
        found = {n.node_id: self._slowness(model, n) for n in computing}
        slower = _spread(given, found, weights)
        for node_id in slower:
            self._given[node_id] = ratios = _Ratios(flops[node_id], slower[node_id])
            promised = self._promised.get(node_id)
            if promised is None or weights[node_id] < 1:
                continue
            if ratios.is_far_below(promised):
                self._absences.failed(node_id)
            elif len(self._decode.get(node_id, ())) == SAMPLES:
                del self._promised[node_id]  # kept
        return [
            replace(
                node,
                flops=node.flops / slower[node.node_id],
                bandwidth_bytes_s=node.bandwidth_bytes_s / slower[node.node_id],
            )
            for node in computing
        ]

    def drawing(self, model: ModelFacts, corrected: Iterable[NodeFacts], now: float) -> ModelFacts:
        """The model with what drawing its tokens was seen to cost, on nodes with these speeds.

        It depends on what requests ask for, so those count that draw now, and not what a node
        that was at the end of a ring once showed then.
        """
        costs = [
            seconds * known(node.bandwidth_bytes_s, UNKNOWN_BANDWIDTH_BYTES_S)
            for node in corrected
            if self._absences.weight(node.node_id, now) == 1
            and (seconds := _median(self._draws.get(node.node_id, ()), LEAST_SAMPLES)) is not None
        ]
        used = self._settled(("draw",), median(costs) if costs else None)
        return model if used is None else replace(model, draw_bytes=used)

    def links(self, paths: Links, now: float) -> tuple[dict[tuple[str, str], LinkFacts], LinkFacts]:
        """The ways between nodes, and what an unknown one is taken for.

        A hop costs at least what it was seen to cost: a round trip of an empty call knows nothing
        of threads that must be woken. Ways not yet travelled are judged by those that were, and
        so are, with time, those of nodes that are in no ring.
        """
        seen: dict[tuple[str, str], float] = {}
        weights: dict[tuple[str, str], float] = {}
        for pair in self._hops:
            hop = self._figure(("hop", *pair), self._hops[pair])
            if hop is not None:
                seen[pair] = hop
                weights[pair] = min(self._absences.weight(node_id, now) for node_id in pair)
        present = [hop for pair, hop in seen.items() if weights[pair] == 1]
        usual = median(present) if present else 0.0
        seen = {pair: usual + (hop - usual) * weights[pair] for pair, hop in seen.items()}
        links = {
            pair: replace(way, round_trip_s=max(way.round_trip_s, 2 * seen.get(pair, usual)))
            for pair, way in paths.items()
        }
        unknown = replace(DEFAULT_LINK, round_trip_s=max(DEFAULT_LINK.round_trip_s, 2 * usual))
        return links, unknown

    def _flops_ratio(self, model: ModelFacts, node: NodeFacts) -> float | None:
        """FLOP/s of prefill as a multiple of what the node measured at its start."""
        ratios = [
            s.tokens * sum(model.layer_flops[s.first : s.end]) / (s.seconds * node.flops)
            for s in self._prefill.get(node.node_id, ())
            if s.seconds > 0 and node.flops > 0
        ]
        return self._figure(("flops", node.node_id), ratios)

    def _slowness(self, model: ModelFacts, node: NodeFacts) -> float | None:
        """How many times the expected time a decode step takes."""
        ratios = [
            s.seconds / expected
            for s in self._decode.get(node.node_id, ())
            if (expected := decode_s(model, node, s.first, s.end, s.tokens)) > 0
        ]
        return self._figure(("decode", node.node_id), ratios)

    def _figure(self, key: tuple[str, ...], samples: Collection[float]) -> float | None:
        least = FEW_SAMPLES if key in self._in_use else LEAST_SAMPLES
        return self._settled(key, _median(samples, least))

    def _settled(self, key: tuple[str, ...], found: float | None) -> float | None:
        """The figure in use for this, replaced only by one that differs enough."""
        used = self._in_use.get(key)
        if found is None or not 0 < found < math.inf:
            return used
        if used is None or abs(math.log(found) - math.log(used)) > DEAD_BAND:
            self._in_use[key] = used = found
        return used


def _add(samples: dict[K, deque[V]], key: K, sample: V) -> None:
    samples.setdefault(key, deque(maxlen=SAMPLES)).append(sample)


def _median(values: Collection[float], least: int) -> float | None:
    return median(values) if len(values) >= least else None


def _spread(
    nodes: Iterable[NodeFacts], found: Mapping[str, float | None], weights: Mapping[str, float]
) -> dict[str, float]:
    """A ratio for every node: its own, that of its kind, that of all, or 1; kept within bounds.

    Others are judged by those at full weight; of less weight, a node is partly one of the others.
    """
    kinds: dict[tuple[str, str, int], list[float]] = {}
    for node in nodes:
        ratio = found[node.node_id]
        if ratio is not None and weights[node.node_id] == 1:
            kinds.setdefault((node.chip, node.backend, node.accelerators), []).append(ratio)
    everyone = [ratio for ratios in kinds.values() for ratio in ratios]
    out: dict[str, float] = {}
    for node in nodes:
        alike = kinds.get((node.chip, node.backend, node.accelerators)) or everyone
        usual = min(MOST_TIMES, max(1 / MOST_TIMES, median(alike) if alike else 1.0))
        ratio = min(MOST_TIMES, max(1 / MOST_TIMES, found[node.node_id] or usual))
        out[node.node_id] = usual * (ratio / usual) ** weights[node.node_id]
    return out
