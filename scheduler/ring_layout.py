"""The best cut of one ring whose nodes and their order are given. Pure, exact.

Dynamic programming over (stage, position): first the least possible step time,
then, among all cuts that reach it, the least latency.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallax.scheduler.stage_costs import Matrix, StageCosts

SLACK = 1e-9  # two times closer than this, relatively, are equal

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Layout:
    """A ring: nodes in order, head first, and where each stage ends."""

    order: tuple[int, ...]
    ends: tuple[int, ...]  # layers
    step_s: float  # of the slowest stage, its hop included
    latency_s: float  # of one token once around


def start(costs: StageCosts) -> Vector:
    """Before any stage: at position 0, nothing spent."""
    vector = np.full(len(costs.positions), np.inf)
    vector[0] = 0.0
    return vector


def slower(reached: Vector, stage: Matrix) -> Vector:
    """Least slowest-stage time at each position after one more stage, which is not the last."""
    after: Vector = np.maximum(reached[:, None], stage).min(axis=0)
    after[-1] = np.inf  # nothing can follow there
    return after


def close(reached: Vector, stage: Matrix) -> float:
    """Least slowest-stage time when one more stage, the last one, ends the model."""
    return float(np.maximum(reached, stage[:, -1]).min())


def lay_out(costs: StageCosts, order: tuple[int, ...]) -> Layout | None:
    """Cut the model over nodes in this order, each holding at least one layer.

    Returns None when it does not fit.
    """
    stages = stage_matrices(costs, order)
    reached = start(costs)
    for stage in stages[:-1]:
        reached = slower(reached, stage)
        if not np.isfinite(reached).any():
            return None
    step_s = close(reached, stages[-1])
    if not np.isfinite(step_s):
        return None
    spent = start(costs)
    choices: list[NDArray[np.intp]] = []
    for stage in stages[:-1]:
        sums = spent[:, None] + np.where(stage <= step_s * (1 + SLACK), stage, np.inf)
        choices.append(sums.argmin(axis=0))
        spent = sums.min(axis=0)
    last = stages[-1][:, -1]
    sums = spent + np.where(last <= step_s * (1 + SLACK), last, np.inf)
    position = int(sums.argmin())
    latency_s = float(sums[position])
    ends = [int(costs.positions[-1])]
    for choice in reversed(choices):
        ends.append(int(costs.positions[position]))
        position = int(choice[position])
    return Layout(order, tuple(reversed(ends)), step_s, latency_s)


def stage_matrices(costs: StageCosts, order: tuple[int, ...]) -> list[Matrix]:
    """Each stage's seconds with its hop to the next one, for a ring in this order."""
    following = order[1:]
    stages = [
        costs.compute(node) + costs.hop_s(node, after)
        for node, after in zip(order, following, strict=False)
    ]
    return [*stages, costs.compute(order[-1]) + costs.return_s(order[-1], order[0])]
