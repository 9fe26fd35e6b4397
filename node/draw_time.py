"""How much of a last stage's decode time goes into drawing tokens. Pure.

MLX computes logits and draws in one go, so where drawing begins is only seen if the logits are
waited for. That costs a step some percent; so one frame in :data:`TIMED_EVERY` of each lane is
timed, and those between are taken to cost as much for each token.
"""

from __future__ import annotations

from dataclasses import dataclass

TIMED_EVERY = 16  # frames of a lane
MOST_LANES = 4096  # remembered; more are forgotten all together


@dataclass(slots=True)
class _Lane:
    token_s: float
    frames: int = 0  # until the next one is timed: not the first, which builds what others have


class DrawTime:
    """A running total for one stage; lanes differ, for their requests do."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._lanes: dict[int, _Lane] = {}
        self._token_s = 0.0  # of whichever lane was timed last

    def is_due(self, lane: int) -> bool:
        """Whether the next frame of a lane is to be timed."""
        found = self._lanes.get(lane)
        return found is not None and found.frames <= 0

    def timed(self, lane: int, tokens: int, seconds: float) -> None:
        """A frame of a lane was timed; it drew so many tokens."""
        self._token_s = seconds / tokens
        self._lanes[lane] = _Lane(self._token_s, TIMED_EVERY - 1)
        self.total_s += seconds

    def untimed(self, lane: int, tokens: int, most_s: float) -> None:
        """A frame of a lane was not timed, and took ``most_s`` with its layers."""
        found = self._lanes.get(lane)
        if found is None:
            if len(self._lanes) >= MOST_LANES:
                self._lanes.clear()
            found = self._lanes[lane] = _Lane(self._token_s)
        else:
            found.frames -= 1
        self.total_s += min(most_s, tokens * found.token_s)
