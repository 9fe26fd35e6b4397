"""Measured speeds, as stages show them at work, with the noise taken out. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TypeVar

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.membership import NodeFacts
from parallax.scheduler.model_facts import ModelFacts
from parallax.scheduler.reconciler import Ring
from parallax.scheduler.stage_costs import DEFAULT_LINK, LinkFacts, Links, decode_s

K = TypeVar("K")
V = TypeVar("V")

SAMPLES = 60  # seconds of work that a median looks back on
LEAST_SAMPLES = 10  # fewer say nothing
LEAST_FRAMES = 4  # in one report; fewer are mostly waiting and starting
CHUNK_TOKENS = 16  # prefill frames of fewer are bound by reading, not by arithmetic
DEAD_BAND = 0.1  # a median within this of the figure in use changes nothing
MOST_TIMES = 50.0  # as far as a measured figure may be from the one measured at start


@dataclass(frozen=True, slots=True)
class _Sample:
    """What one frame took on average, over about a second."""

    first: int
    end: int
    seconds: float
    tokens: float  # in one frame


class ObservedSpeeds:
    """What stages really take, from the totals they report; speeds that planning goes by.

    A report counts as one sample, a figure is the median of a minute of them, and a figure in use
    stays until the median has left a band around it.
    """

    def __init__(self) -> None:
        self._totals: dict[tuple[str, int], wire.StageHealth] = {}  # by node and epoch
        self._decode: dict[str, deque[_Sample]] = {}
        self._prefill: dict[str, deque[_Sample]] = {}
        self._hops: dict[tuple[str, str], deque[float]] = {}
        self._in_use: dict[tuple[str, ...], float] = {}

    def observe(self, health: wire.StageHealth, ring: Ring) -> None:
        """Takes a stage's running totals."""
        if health.stage >= len(ring.places):
            return
        place = ring.places[health.stage]
        last = self._totals.get((place.node_id, health.epoch)) or wire.StageHealth()
        self._totals[place.node_id, health.epoch] = health

        def sample(frames: int, tokens: int, seconds: float) -> _Sample:
            return _Sample(place.first, place.end, seconds / frames, tokens / frames)

        frames = health.decode_frames - last.decode_frames
        if frames >= LEAST_FRAMES:
            tokens = health.decode_tokens - last.decode_tokens
            seconds = health.decode_compute_s - last.decode_compute_s
            _add(self._decode, place.node_id, sample(frames, tokens, seconds))
        frames = health.prefill_frames - last.prefill_frames
        tokens = health.prefill_tokens - last.prefill_tokens
        if frames >= LEAST_FRAMES and tokens >= CHUNK_TOKENS * frames:
            seconds = health.prefill_compute_s - last.prefill_compute_s
            _add(self._prefill, place.node_id, sample(frames, tokens, seconds))
        hops = health.hops - last.hops
        if hops >= LEAST_FRAMES and len(ring.places) > 1:
            after = ring.places[(health.stage + 1) % len(ring.places)].node_id
            _add(self._hops, (place.node_id, after), (health.hop_s - last.hop_s) / hops)

    def cache_bytes(self, node_id: str) -> int:
        """What the caches on a node took when it last said so."""
        return sum(h.cache_bytes for (node, _), h in self._totals.items() if node == node_id)

    def forget_epoch(self, epoch: int) -> None:
        """A ring is no more; how fast it was stays known."""
        for key in [key for key in self._totals if key[1] == epoch]:
            del self._totals[key]

    def forget_model(self) -> None:
        """Another model is served from now on: its layers take other times."""
        for known in (self._totals, self._decode, self._prefill, self._hops, self._in_use):
            known.clear()

    def forget_node(self, node_id: str) -> None:
        """A node is gone; when it comes back it may be another machine."""
        for known in (self._decode, self._prefill):
            known.pop(node_id, None)
        for place in [place for place in self._totals if node_id in place]:
            del self._totals[place]
        for pair in [pair for pair in self._hops if node_id in pair]:
            del self._hops[pair]
        for key in [key for key in self._in_use if node_id in key]:
            del self._in_use[key]

    def corrected(self, model: ModelFacts, nodes: Iterable[NodeFacts]) -> list[NodeFacts]:
        """The nodes with the speeds at which they would take the times that were observed.

        Prefill tells how fast a node computes, decode then how fast it is as a whole. A node that
        has not worked yet is taken to be as far from its own measurement as others of its kind
        are, or, if there are none, as all are.
        """
        given = list(nodes)
        flops = _spread(given, {n.node_id: self._flops_ratio(model, n) for n in given})
        computing = [replace(n, flops=n.flops * flops[n.node_id]) for n in given]
        slower = _spread(given, {n.node_id: self._slowness(model, n) for n in computing})
        return [
            replace(
                node,
                flops=node.flops / slower[node.node_id],
                bandwidth_bytes_s=node.bandwidth_bytes_s / slower[node.node_id],
            )
            for node in computing
        ]

    def links(self, paths: Links) -> tuple[dict[tuple[str, str], LinkFacts], LinkFacts]:
        """The ways between nodes, and what an unknown one is taken for.

        A hop costs at least what it was seen to cost: a round trip of an empty call knows nothing
        of threads that must be woken. Ways not yet travelled are judged by those that were.
        """
        hops = {pair: self._settled(("hop", *pair), _median(s)) for pair, s in self._hops.items()}
        seen = {pair: hop for pair, hop in hops.items() if hop is not None}
        usual = median(seen.values()) if seen else 0.0
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
        return self._settled(("flops", node.node_id), _median(ratios))

    def _slowness(self, model: ModelFacts, node: NodeFacts) -> float | None:
        """How many times the expected time a decode step takes."""
        ratios = [
            s.seconds / expected
            for s in self._decode.get(node.node_id, ())
            if (expected := decode_s(model, node, s.first, s.end, s.tokens)) > 0
        ]
        return self._settled(("decode", node.node_id), _median(ratios))

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


def _median(values: Sequence[float] | deque[float]) -> float | None:
    return median(values) if len(values) >= LEAST_SAMPLES else None


def _spread(nodes: Iterable[NodeFacts], found: Mapping[str, float | None]) -> dict[str, float]:
    """A ratio for every node: its own, that of its kind, that of all, or 1; kept within bounds."""
    kinds: dict[tuple[str, str, int], list[float]] = {}
    for node in nodes:
        ratio = found[node.node_id]
        if ratio is not None:
            kinds.setdefault((node.chip, node.backend, node.accelerators), []).append(ratio)
    everyone = [ratio for ratios in kinds.values() for ratio in ratios]
    out: dict[str, float] = {}
    for node in nodes:
        alike = kinds.get((node.chip, node.backend, node.accelerators)) or everyone
        ratio = found[node.node_id]
        if ratio is None:
            ratio = median(alike) if alike else 1.0
        out[node.node_id] = min(MOST_TIMES, max(1 / MOST_TIMES, ratio))
    return out
