"""A request as the router sees it: where it waits, and how long it is. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from parallax.scheduler.row_cost import GROWTH_TOKENS


class Line(Enum):
    """Where a request waits."""

    NEW = "new"  # for its client's turn
    RETURNED = "returned"  # it had its turn, and goes before everyone else


@dataclass(slots=True, eq=False)
class RoutedRequest:
    """A request in the queue or on a ring."""

    id: int
    client: str
    cost_tokens: int  # what its turn costs
    answer_tokens: int  # of that, its answer
    tokens: int  # prompt and answer so far
    most_tokens: int  # with the longest answer that it may get
    arrival: int
    left_s: float  # of its wait, while no clock runs; infinite once its answer has begun
    deadline_s: float | None  # None: on a ring, or its clock starts at the next event
    epoch: int | None = None  # its ring, once dispatched
    line: Line | None = None  # None: on a ring, or on none and not put back yet
    suspect: bool = False  # rings broke while it ran there, and perhaps because of it
    known: dict[int, int] = field(default_factory=dict)  # of it, when a ring was first looked at

    @property
    def soon_tokens(self) -> int:
        """How long it will soon be: heads take nobody in who has no room to grow."""
        return min(self.tokens + GROWTH_TOKENS, self.most_tokens)

    @property
    def expected_tokens(self) -> int:
        """How long it will be in the end."""
        return min(self.tokens + self.answer_tokens, self.most_tokens)
