"""Which nodes are lost again and again, and how long they then have no layers. Pure.

A loss is a node with layers, or loading some, that is gone without a farewell: its process died, or
it was cut off. Answers survive each, and everybody pauses each time. So whoever is lost often comes
after others when rings are planned, and then has no layers for a while, doubled each time.

A killed process that starts again and one that dies of its work look the same, and a way that is
cut heals by itself. So a few losses cost nothing, what was only cut off waits for a minute at most,
and all is forgotten after some time of service.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from parallax.fabric.limits import DEFAULT_LIMITS, Limits

WINDOW_S = 600.0  # losses within this time count together
OFTEN = 2  # so many: others are preferred where they can do the same
ENOUGH = 3  # so many: no layers for a while; of one that was put aside before, the next is enough
FIRST_SHARE = 0.5  # of ``aside_s``, the first time
LONGEST_S = 600.0  # without layers, of a process that was started again
LONGEST_CUT_OFF_S = 60.0  # the same of a process that lives and was only cut off
FORGIVEN_S = 600.0  # of service without a loss
MEMORY_S = 3600.0  # since the last loss, or the end of the last time without layers
MOST_NODES = 1024  # that are remembered
MOST_TIMES = 64  # of being put aside that are counted
MOST_TEXT = 256  # characters of a name or a reason that are read back


@dataclass(slots=True)
class _Record:
    """What is held against one node."""

    losses: list[float] = field(default_factory=list)  # of the last while, the latest last
    incarnation: int = 0  # the process that was lost
    reason: str = ""
    times: int = 0  # put aside so far
    owed: bool = False  # lost once too often: put aside when it is back
    until: float | None = None  # aside
    latest: float = 0.0  # loss or end of a time aside
    serves_since: float | None = None


class Losses:
    """Losses and returns in, times without layers out; ``now`` is monotonic, never goes back."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._first_s = limits.aside_s * FIRST_SHARE
        self._records: dict[str, _Record] = {}

    # ------------------------------------------------------------------ events

    def lost(self, node_id: str, incarnation: int, reason: str, now: float) -> None:
        """A node with layers is gone without a farewell, or silent."""
        record = self._records.pop(node_id, _Record())
        self._records[node_id] = record  # the latest last
        recent = [at for at in record.losses if now - at <= WINDOW_S]
        record.losses = [*recent, now][-ENOUGH:]
        record.incarnation, record.reason = incarnation, reason[:MOST_TEXT]
        record.latest, record.serves_since = now, None
        record.owed = record.times > 0 or len(record.losses) >= ENOUGH
        while len(self._records) > MOST_NODES:
            del self._records[next(iter(self._records))]

    def back(self, node_id: str, incarnation: int, now: float) -> float | None:
        """A node attends, or speaks again. Returns for how many seconds it is put aside now."""
        record = self._records.get(node_id)
        if record is None or not record.owed:
            return None
        record.owed = False
        longest_s = LONGEST_S if incarnation != record.incarnation else LONGEST_CUT_OFF_S
        seconds = float(min(longest_s, self._first_s * 2.0 ** min(record.times, 16)))
        record.times = min(record.times + 1, MOST_TIMES)
        record.until = now + seconds
        return seconds

    def serving(self, nodes: Collection[str], now: float) -> None:
        """These nodes, and no others, are in rings that serve; to be called again and again."""
        for node_id, record in list(self._records.items()):
            if node_id not in nodes:
                record.serves_since = None
            elif record.serves_since is None:
                record.serves_since = now
            elif now - record.serves_since >= FORGIVEN_S:
                del self._records[node_id]

    def needed(self) -> list[str]:
        """Nothing serves without those who are aside: takes those back who were so least often."""
        aside = self.aside
        least = min((self._records[node_id].times for node_id in aside), default=0)
        back = sorted(node_id for node_id in aside if self._records[node_id].times == least)
        for node_id in back:
            self._records[node_id].until = None
        return back

    def forgive(self, node_id: str) -> bool:
        """Nothing is held against this node any more. Returns whether it was aside."""
        record = self._records.pop(node_id, None)
        return record is not None and record.until is not None

    def over(self, now: float) -> list[str]:
        """Nodes whose time is over by now; each is told once. What is old is forgotten."""
        back = []
        for node_id, record in list(self._records.items()):
            record.losses = [at for at in record.losses if now - at <= WINDOW_S]
            if record.until is not None and now >= record.until:
                record.latest, record.until = record.until, None
                back.append(node_id)
            old = now - record.latest > (MEMORY_S if record.times else WINDOW_S)
            if old and record.until is None:
                del self._records[node_id]
        return sorted(back)

    # ------------------------------------------------------------------- state

    @property
    def aside(self) -> frozenset[str]:
        """Nodes that are not planned with."""
        return frozenset(n for n, record in self._records.items() if record.until is not None)

    @property
    def often(self) -> frozenset[str]:
        """Nodes that come after others: they were lost more than once lately."""
        return frozenset(n for n, r in self._records.items() if len(r.losses) >= OFTEN)

    def why(self, node_id: str) -> str | None:
        """Why a node is aside; None when it is not."""
        record = self._records.get(node_id)
        if record is None or record.until is None:
            return None
        often = f"{ENOUGH} times within {WINDOW_S / 60:.0f} minutes"
        if record.times > 1:
            often = f"again (it has been put aside {record.times} times now)"
        return f"It was lost {often} while it had layers; the last time {record.reason}"

    def left_s(self, node_id: str, now: float) -> float:
        """How long a node is still aside."""
        record = self._records.get(node_id)
        if record is None or record.until is None:
            return 0.0
        return max(0.0, record.until - now)

    # ------------------------------------------------------------------ memory

    def told(self) -> list[object]:
        """Everything as JSON values, for :meth:`recall`; the same as before if nothing happened."""
        return [
            [
                node_id,
                list(record.losses),
                record.incarnation,
                record.reason,
                record.times,
                record.owed,
                record.until,
                record.latest,
            ]
            for node_id, record in self._records.items()
        ]

    def recall(self, told: object, shift_s: float, now: float) -> None:
        """Takes up what an earlier process told; what makes no sense is left out.

        Args:
            shift_s: what turns that process's times into this one's.
        """
        for entry in told[-MOST_NODES:] if isinstance(told, list) else []:
            try:
                node_id, losses, incarnation, reason, times, owed, until, latest = entry
                record = _Record(
                    [min(finite(at) + shift_s, now) for at in list(losses)[-ENOUGH:]],
                    int(incarnation),
                    str(reason)[:MOST_TEXT],
                    min(max(int(times), 0), MOST_TIMES),
                    owed is True,
                    None if until is None else min(finite(until) + shift_s, now + LONGEST_S),
                    min(finite(latest) + shift_s, now),
                )
            except (TypeError, ValueError, OverflowError):
                continue
            if isinstance(node_id, str) and len(node_id) <= MOST_TEXT:
                self._records[node_id] = record


def finite(number: object) -> float:
    """A number that was read back.

    Raises:
        TypeError: it is none.
        ValueError: it is infinite, or not a number.
        OverflowError: it is larger than any float.
    """
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(number)
    if not math.isfinite(number):
        raise ValueError(number)
    return float(number)
