"""What each stage would cost on each node: seconds per step and whether it fits. Pure.

A step is one decode frame of :data:`REFERENCE_ROWS` rows. Decode is bound by
memory bandwidth or by arithmetic, whichever is slower (the roofline model,
Williams et al. 2009), and a stage is occupied by its hop to the next one too.
The last one also draws the tokens: its cost is that of reading so many bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallax.scheduler.membership import NodeFacts
from parallax.scheduler.model_facts import ModelFacts

REFERENCE_ROWS = 8
RESERVE_TOKENS = 4096  # context for which every stage keeps room beside its weights
UNKNOWN_BANDWIDTH_BYTES_S = 10e9  # of a node that has not measured itself
UNKNOWN_FLOPS = 50e9
SLOWEST = 1.0  # bytes or operations a second: what is said to be slower is nonsense

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """One direction between two nodes."""

    round_trip_s: float
    bandwidth_bytes_s: float


DEFAULT_LINK = LinkFacts(round_trip_s=2e-3, bandwidth_bytes_s=100e6)
Links = Mapping[tuple[str, str], LinkFacts]  # (from, to); absent pairs are default links


class StageCosts:
    """Costs of stages of one model on some nodes; nodes are numbered by their place in ``nodes``.

    ``positions`` are the layers at which a stage may begin or end, 0 and the
    number of layers included; matrices are indexed by positions.
    """

    def __init__(
        self,
        model: ModelFacts,
        nodes: Sequence[NodeFacts],
        links: Links,
        cuts: Iterable[int] | None,
        default_link: LinkFacts = DEFAULT_LINK,
    ) -> None:
        layers = model.layers
        inner = range(1, layers) if cuts is None else (c for c in set(cuts) if 0 < c < layers)
        self.model = model
        self.nodes = nodes
        self.positions = np.array([0, *sorted(inner), layers])
        self.reserve_tokens = min(RESERVE_TOKENS, model.context_tokens)
        cache = model.kv_bytes_per_token_per_layer * self.reserve_tokens
        self.layer_held = np.array(model.layer_bytes, float) + cache
        self._links = {pair: link for pair, link in links.items() if _plausible(link)}
        self._default_link = default_link
        self._matrices: dict[int, Matrix] = {}

        first, last = self.positions[:, None], self.positions[None, :]
        begins, ends = first == 0, last == layers
        self.held = self._spans(self.layer_held) + model.first_bytes * begins
        self.held += model.last_bytes * ends - model.tied_bytes * (begins & ends)
        self.read = self._spans(np.array(model.layer_read_bytes, float)) + model.last_bytes * ends
        self.work = REFERENCE_ROWS * (
            self._spans(np.array(model.layer_flops, float)) + model.head_flops * ends
        )
        self._drawn = REFERENCE_ROWS * model.draw_bytes * ends
        self._forbidden = first >= last
        self.bandwidth = [
            known(node.bandwidth_bytes_s, UNKNOWN_BANDWIDTH_BYTES_S) for node in nodes
        ]
        self.flops = [known(node.flops, UNKNOWN_FLOPS) for node in nodes]

    @property
    def most_stages(self) -> int:
        """No ring can have more stages than this."""
        return len(self.positions) - 1

    def compute(self, node: int) -> Matrix:
        """Seconds of the stage from position row to position column; infinite if impossible."""
        found = self._matrices.get(node)
        if found is None:
            found = np.maximum(self.read / self.bandwidth[node], self.work / self.flops[node])
            found += self._drawn / self.bandwidth[node]
            too_big = self.held > self.nodes[node].budget_bytes
            found[self._forbidden | too_big] = np.inf
            self._matrices[node] = found
        return found

    def hop_s(self, sender: int, receiver: int) -> float:
        """Seconds that a carry of a whole micro-batch takes to the next stage."""
        link = self._link(sender, receiver)
        carry = REFERENCE_ROWS * self.model.carry_bytes_per_token
        return link.round_trip_s / 2 + carry / link.bandwidth_bytes_s

    def return_s(self, last: int, head: int) -> float:
        """Seconds that sampled tokens take back to the head; nothing in a ring of one."""
        return 0.0 if last == head else self._link(last, head).round_trip_s / 2

    def near_pairs(self, factor: float) -> list[tuple[int, int]]:
        """Known links whose round trip is below ``factor`` of a default link's."""
        number = {node.node_id: at for at, node in enumerate(self.nodes)}
        limit_s = factor * self._default_link.round_trip_s
        return [
            (number[sender], number[receiver])
            for (sender, receiver), link in sorted(self._links.items())
            if link.round_trip_s < limit_s and sender in number and receiver in number
        ]

    def layers_that_fit(self, node: int) -> float:
        """About how many layers of mean size a node can hold."""
        return max(0.0, self.nodes[node].budget_bytes / float(self.layer_held.mean()))

    def layer_s(self, node: int) -> float:
        """Seconds of a mean layer."""
        model = self.model
        read = sum(model.layer_read_bytes) / model.layers
        work = REFERENCE_ROWS * sum(model.layer_flops) / model.layers
        return max(read / self.bandwidth[node], work / self.flops[node], 1e-12)

    def needed_bytes(self, stages: int) -> int:
        """Memory of the whole model with its reserve, cut into so many stages."""
        model = self.model
        tied = model.tied_bytes if stages > 1 else 0
        return (
            round(float(self.layer_held.sum()))
            + model.first_bytes
            + model.last_bytes
            - (model.tied_bytes - tied)
        )

    def most_rates(self) -> NDArray[np.float64]:
        """For each node the most tokens per second that it can add to any ring.

        A node's stage with a share f of the bytes that a step reads occupies it for at least
        f x (its time for the whole model) plus its hop, so a ring of step time T has
        f / T <= f / (f x whole + hop). That grows with f, which the node's memory limits. The
        shares of a ring add up to one; so the sum over its nodes is at least 1 / T.
        """
        read = np.maximum(self.read, 0.0) / max(float(self.read[0, -1]), 1.0)
        trips = [self._default_link.round_trip_s, *(k.round_trip_s for k in self._links.values())]
        widths = [self._default_link, *self._links.values()]
        carry = REFERENCE_ROWS * self.model.carry_bytes_per_token
        back = min(trips) / 2
        onward = back + carry / max(link.bandwidth_bytes_s for link in widths)
        budgets = np.array([node.budget_bytes for node in self.nodes], float)
        whole_s = self._least_whole_s()
        begins = np.arange(len(self.positions))[:, None] == 0
        ends = np.arange(len(self.positions))[None, :] == len(self.positions) - 1
        most = np.zeros(len(self.nodes))
        for kind, hop in ((begins & ends, 0.0), (ends & ~begins, back), (~ends, onward)):
            share = self._largest_share(read, kind & ~self._forbidden, budgets)
            most = np.maximum(most, share / np.maximum(share * whole_s + hop, 1e-12))
        return REFERENCE_ROWS * most

    def bound_tokens_s(self) -> float:
        """No plan can be faster than this: every node adds the most that it can."""
        return float(self.most_rates().sum())

    def _least_whole_s(self) -> NDArray[np.float64]:
        """For each node, seconds below which it cannot pass the whole model, by any cut."""
        sides = [
            (read, work)
            for read, work in zip(
                (*self.model.layer_read_bytes, self.model.last_bytes),
                (*self.model.layer_flops, self.model.head_flops),
                strict=True,
            )
            if read > 0
        ]
        read = float(self.read[0, -1])
        least = min((REFERENCE_ROWS * work / read for read, work in sides), default=0.0)
        return np.maximum(read / np.array(self.bandwidth), least * read / np.array(self.flops))

    def _largest_share(
        self, share: Matrix, kind: NDArray[np.bool_], budgets: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The largest share of a stage of this kind that fits into each budget; 0 if none does."""
        held, shares = self.held[kind], share[kind]
        order = np.argsort(held, kind="stable")
        best = np.concatenate([[0.0], np.maximum.accumulate(shares[order])])
        return np.asarray(best[np.searchsorted(held[order], budgets, side="right")])

    def _spans(self, values: NDArray[np.float64]) -> Matrix:
        """Sums over layers from position row to position column."""
        sums = np.concatenate([[0.0], np.cumsum(values)])[self.positions]
        return np.asarray(sums[None, :] - sums[:, None])

    def _link(self, sender: int, receiver: int) -> LinkFacts:
        pair = (self.nodes[sender].node_id, self.nodes[receiver].node_id)
        return self._links.get(pair, self._default_link)


def decode_s(model: ModelFacts, node: NodeFacts, first: int, end: int, rows: float) -> float:
    """Seconds that a decode step of so many rows is expected to compute; 0 if it cannot be told.

    Drawing the tokens is left out.
    """
    if node.bandwidth_bytes_s <= 0 or node.flops <= 0:
        return 0.0
    read = float(sum(model.layer_read_bytes[first:end]))
    work = sum(model.layer_flops[first:end])
    if end == model.layers:
        read += model.last_bytes
        work += model.head_flops
    return max(read / node.bandwidth_bytes_s, rows * work / node.flops)


def draw_s(model: ModelFacts, node: NodeFacts, end: int, rows: float) -> float:
    """Seconds that a stage that ends there is expected to draw tokens for so many rows."""
    if end < model.layers or not model.draw_bytes:
        return 0.0
    return rows * model.draw_bytes / known(node.bandwidth_bytes_s, UNKNOWN_BANDWIDTH_BYTES_S)


def _plausible(link: LinkFacts) -> bool:
    """Nodes report links; one that measured nonsense is taken for a default link."""
    return 0 <= link.round_trip_s < math.inf and SLOWEST <= link.bandwidth_bytes_s < math.inf


def known(measured: float, otherwise: float) -> float:
    """A measured speed, or the other one where it makes no sense."""
    return measured if SLOWEST <= measured < math.inf else otherwise
