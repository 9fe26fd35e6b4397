"""Prometheus metrics of the scheduler, in a registry of their own."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from parallax.scheduler.shown_nodes import MOST_SHOWN, ShownNodes
from parallax.scheduler.totals import Totals

# Why somebody is turned away (fabric/tally.py); a node could say anything.
_OF_CALLS = ("handshake", "tls", "resumed", "certificate", "not_admitted", "identity", "proof")
REASONS = frozenset((*_OF_CALLS, "stage", "scheduler", "ticket", "silent"))

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Metrics:
    """What the scheduler counts. Names begin with ``parallax_``; durations are seconds.

    Stage figures are counters of increments: whoever holds running totals of an
    epoch hands over the differences.
    """

    def __init__(self, most_nodes: int = MOST_SHOWN) -> None:
        self.registry = registry = CollectorRegistry()
        self.totals = Totals()
        self._requests = Counter(
            "parallax_requests",
            "Chat requests that have ended, by outcome: stop, length, cancelled or an error's code",
            ["outcome"],
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "parallax_prompt_tokens", "Tokens of accepted prompts", registry=registry
        )
        self._completion_tokens = Counter(
            "parallax_completion_tokens", "Tokens delivered", registry=registry
        )
        self._first = Histogram(
            "parallax_time_to_first_token_seconds",
            "From the request's arrival to its first token",
            buckets=_FIRST_S,
            registry=registry,
        )
        self._between = Histogram(
            "parallax_inter_token_latency_seconds",
            "Between a token of an answer and the next",
            buckets=_BETWEEN_S,
            registry=registry,
        )
        self._whole = Histogram(
            "parallax_request_duration_seconds",
            "From a chat request's arrival to its end",
            buckets=_WHOLE_S,
            registry=registry,
        )
        self._waiting = Gauge("parallax_queue_waiting", "Requests waiting", registry=registry)
        self._running = Gauge("parallax_requests_running", "Requests running", registry=registry)
        self._rows = Gauge("parallax_lane_rows", "Sequences decoding in lanes", registry=registry)
        self._lanes = Gauge("parallax_lanes", "Lanes that hold a sequence", registry=registry)
        self._free_rows = Gauge(
            "parallax_lane_rows_free", "Sequences that lanes could still take", registry=registry
        )
        self._prefixes = Gauge(
            "parallax_prefixes_kept", "Prefixes in the caches of all rings", registry=registry
        )
        self._prefix_bytes = Gauge(
            "parallax_prefix_bytes",
            "Bytes of kept prefixes, of each ring on the stage where they take most",
            registry=registry,
        )
        self._prefix_prompts = Counter(
            "parallax_prefix_prompts",
            "Prompts that were looked up among the kept prefixes",
            registry=registry,
        )
        self._prefix_hits = Counter(
            "parallax_prefix_hits", "Prompts that began with a kept prefix", registry=registry
        )
        self._prefix_tokens = Counter(
            "parallax_prefix_saved_tokens",
            "Tokens that were not prefilled, because they were kept",
            registry=registry,
        )
        self._prefix_evictions = Counter(
            "parallax_prefix_evictions",
            "Kept prefixes let go for want of room",
            registry=registry,
        )
        self._weights = Counter(
            "parallax_weights_sent_bytes",
            "Bytes of the model's weights given out to nodes that lack them",
            registry=registry,
        )
        self._round_trip = Gauge(
            "parallax_ring_round_trip_seconds",
            "How long the last beat took around its ring",
            ["ring"],
            registry=registry,
        )
        stage = ["stage", "node", "kind"]
        self._frames = Counter(
            "parallax_stage_frames", "Frames that a stage computed", stage, registry=registry
        )
        self._tokens = Counter(
            "parallax_stage_tokens", "Tokens that passed a stage", stage, registry=registry
        )
        self._compute = Counter(
            "parallax_stage_compute_seconds",
            "Time in a stage's layers, and at the last one in drawing tokens",
            stage,
            registry=registry,
        )
        self._draw = Counter(
            "parallax_stage_draw_seconds",
            "Time in drawing tokens, from one decode frame in 16",
            ["stage", "node"],
            registry=registry,
        )
        self._hops = Counter(
            "parallax_stage_hops",
            "Frames that a stage sent on",
            ["stage", "node"],
            registry=registry,
        )
        self._hop = Counter(
            "parallax_stage_hop_seconds",
            "Time from the end of compute to the write on the wire",
            ["stage", "node"],
            registry=registry,
        )
        self._drafted = Counter(
            "parallax_drafted_tokens",
            "Tokens sent ahead of lone answers before they were drawn",
            registry=registry,
        )
        self._accepted = Counter(
            "parallax_accepted_draft_tokens",
            "Drafted tokens that were drawn then",
            registry=registry,
        )
        self._joins_refused = Counter(
            "parallax_joins_refused",
            "Nodes that were not let in, by reason: unknown, expired, revoked or used_up (tokens), "
            "too_many (of such), denied, removed, full",
            ["reason"],
            registry=registry,
        )
        self._refused = Counter(
            "parallax_http_refused",
            "HTTP requests and connections refused for how they came, by reason",
            ["reason"],
            registry=registry,
        )
        self._messages_refused = Counter(
            "parallax_messages_refused",
            "Messages that made no sense, by kind: hello, report (of nodes), frame (between them)",
            ["kind"],
            registry=registry,
        )
        self._stale = Counter(
            "parallax_stale_frames",
            "What came of epochs that are over, and was refused: frames and streams at a node, "
            "tokens and ends at the scheduler",
            ["where"],
            registry=registry,
        )
        self._aside = Counter(
            "parallax_nodes_put_aside",
            "Times that a node was put aside: rings with it broke, or it was lost, again and again",
            ["node"],
            registry=registry,
        )
        self._turned_away = Counter(
            "parallax_refused",
            "Connections and calls that were refused, by reason and by the node where it happened "
            "(empty: the scheduler)",
            ["reason", "node"],
            registry=registry,
        )
        self._turned_away_before: dict[str, dict[str, int]] = {}
        self._stale_before: dict[str, int] = {}
        self._nodes = ShownNodes(most_nodes)
        # What HTTP calls for each token, looked up once.
        self.observe_between = self._between.observe
        self.observe_first = self._first.observe

    def accepted(self, prompt_tokens: int) -> None:
        """A chat request has been accepted."""
        self._prompt_tokens.inc(prompt_tokens)
        self.totals.requests += 1
        self.totals.prompt_tokens += prompt_tokens

    def ended(self, outcome: str, completion_tokens: int, duration_s: float) -> None:
        """A chat request has ended; ``outcome`` is a finish reason, "cancelled" or a code."""
        self._requests.labels(outcome).inc()
        self._completion_tokens.inc(completion_tokens)
        self.totals.completion_tokens += completion_tokens
        self._whole.observe(duration_s)

    def refused(self, reason: str) -> None:
        """A request or a connection was refused before anybody looked at what it asks."""
        self._refused.labels(reason).inc()

    def set_queue(self, waiting: int, running: int) -> None:
        """How many requests wait for a ring, and how many are on one."""
        self._waiting.set(waiting)
        self._running.set(running)

    def set_lanes(self, rows: int, lanes: int, free_rows: int = 0) -> None:
        """How full the lanes of all rings are."""
        self._rows.set(rows)
        self._lanes.set(lanes)
        self._free_rows.set(free_rows)

    def set_prefixes(self, kept: int, kept_bytes: int) -> None:
        """What the prefix caches of all rings hold."""
        self._prefixes.set(kept)
        self._prefix_bytes.set(kept_bytes)

    def observe_prefixes(
        self, *, prompts: int, hits: int, saved_tokens: int, evictions: int
    ) -> None:
        """What the prefix cache of a ring did since the last call."""
        self._prefix_prompts.inc(prompts)
        self._prefix_hits.inc(hits)
        self._prefix_tokens.inc(saved_tokens)
        self._prefix_evictions.inc(evictions)

    def observe_stage(
        self,
        stage: int,
        node: str,
        kind: str,
        *,
        frames: int,
        tokens: int,
        compute_s: float,
        draw_s: float = 0.0,
    ) -> None:
        """What a stage did since the last call; ``kind`` is "decode" or "prefill"."""
        self._heard(node)
        labels = (str(stage), node, kind)
        self._frames.labels(*labels).inc(frames)
        self._tokens.labels(*labels).inc(tokens)
        self._compute.labels(*labels).inc(compute_s)
        if draw_s:
            self._draw.labels(str(stage), node).inc(draw_s)

    def observe_hops(self, stage: int, node: str, *, hops: int, hop_s: float) -> None:
        """What a stage sent on since the last call."""
        self._heard(node)
        self._hops.labels(str(stage), node).inc(hops)
        self._hop.labels(str(stage), node).inc(hop_s)

    def observe_drafts(self, *, drafted: int, accepted: int) -> None:
        """What a ring's head drafted, and what of it stood, since the last call."""
        self._drafted.inc(drafted)
        self._accepted.inc(accepted)

    def observe_weights(self, sent_bytes: int) -> None:
        """Weights were given out to a node."""
        self._weights.inc(sent_bytes)

    def observe_stale(self, where: str, total: int) -> None:
        """What came of epochs that are over since ``where`` was started; it may have been again."""
        self._heard(where)
        more = _more(total, self._stale_before.get(where, 0))
        self._stale_before[where] = total
        if more:
            self._stale.labels(where).inc(more)

    def observe_round_trip(self, ring: str, seconds: float) -> None:
        """How long the last beat took around this ring."""
        self._round_trip.labels(ring).set(seconds)

    def forget_ring(self, ring: str) -> None:
        """This ring is no more: its round trip is not shown any longer."""
        self._round_trip.remove_by_labels({"ring": ring})

    def join_refused(self, reason: str) -> None:
        """A node was not let in."""
        self._joins_refused.labels(reason).inc()

    def message_refused(self, kind: str) -> None:
        """Something came that made no sense."""
        self._messages_refused.labels(kind).inc()

    def put_aside(self, node: str) -> None:
        """Rings do without this node for a while."""
        self._aside.labels(node).inc()

    def turned_away(self, node: str, totals: Mapping[str, int]) -> None:
        """Who was turned away at a node since it started, by reason; it may have been restarted."""
        self._heard(node)
        before = self._turned_away_before.setdefault(node, {})
        for reason, total in totals.items():
            known = reason if reason in REASONS else "other"
            more = _more(total, before.get(known, 0))
            before[known] = total
            if more:
                self._turned_away.labels(known, node).inc(more)

    def _heard(self, node: str) -> None:
        """A node has figures; those of whoever makes room for it are shown no longer."""
        gone = self._nodes.heard(node)
        if gone is None:
            return
        stages = self._frames, self._tokens, self._compute, self._draw, self._hops, self._hop
        for counter in stages:
            counter.remove_by_labels({"node": gone})
        self._turned_away.remove_by_labels({"node": gone})
        self._stale.remove_by_labels({"where": gone})
        self._turned_away_before.pop(gone, None)
        self._stale_before.pop(gone, None)

    def page(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


def _more(total: int, before: int) -> int:
    """What a total has grown by; one that is smaller began anew."""
    return total - before if total >= before else total
