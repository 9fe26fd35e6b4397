"""What is measured: rows with goals, and the samples that rounds put into them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.disturbance import MOST_CORES, Disturbance

if TYPE_CHECKING:
    from benchmarks.bench import Bench


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a row's median."""

    bound: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether a value is within the bound."""
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {plain(self.bound)}"


def at_least(bound: float) -> Goal:
    """More is better."""
    return Goal(bound)


def at_most(bound: float) -> Goal:
    """Less is better."""
    return Goal(bound, at_most=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        name: what is measured.
        unit: of the sides, or of the value where nothing is compared.
        against: what the cluster is compared with; the judged value is then the ratio
            cluster to other. Empty: the value stands alone.
        goal: what the median has to meet; None: for information.
        timed: whether what other processes do changes it.
    """

    name: str
    unit: str
    against: str = ""
    goal: Goal | None = None
    timed: bool = True


@dataclass(frozen=True, slots=True)
class Round:
    """One value, the sides it came from, and the cores that other processes had meanwhile."""

    value: float
    cluster: float
    other: float
    disturbed_cores: float


@dataclass
class Samples:
    """One row's values, one for each round."""

    row: Row
    rounds: list[Round] = field(default_factory=list)
    missing: str = ""  # why there are none
    notes: list[str] = field(default_factory=list)

    @property
    def counted(self) -> list[Round]:
        """The rounds that others left alone; all, where those would be fewer than two."""
        calm = [one for one in self.rounds if one.disturbed_cores <= MOST_CORES]
        return calm if len(calm) >= min(2, len(self.rounds)) else self.rounds

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or without values."""
        if self.row.goal is None or not self.rounds:
            return None
        return self.row.goal.met(statistics.median(one.value for one in self.counted))

    def as_json(self) -> dict[str, Any]:
        """What the JSON file holds of it."""
        row, counted = self.row, self.counted
        found: dict[str, Any] = {"name": row.name, "unit": row.unit, "met": self.met}
        if row.goal is not None:
            found["goal"] = str(row.goal)
        if self.missing:
            found["missing"] = self.missing
        if self.notes:
            found["notes"] = self.notes
        if counted:
            disturbed = max(one.disturbed_cores for one in counted)
            if disturbed > MOST_CORES:
                self.notes.append(f"other processes used up to {disturbed:.2f} cores meanwhile")
                found["notes"] = self.notes
            found["ratio" if row.against else "value"] = spread([one.value for one in counted])
            found["rounds"] = len(counted)
            found["disturbed"] = len(self.rounds) - len(counted)
        if row.against and counted:
            found["against"] = row.against
            found["cluster"] = spread([one.cluster for one in counted])
            found["other"] = spread([one.other for one in counted])
        return found


class Sheet:
    """One part's rows and curves as they fill."""

    def __init__(self, rows: Sequence[Row], say: Callable[[str], None]) -> None:
        self.samples = {row.name: Samples(row) for row in rows}
        self.curves: dict[str, dict[str, list[list[float]]]] = {}
        self.bars: dict[str, float] = {}
        self._say = say
        self._others = Disturbance()
        self._round_cores: float | None = None

    def compare(self, name: str, cluster: float, other: float) -> None:
        """One round of a row that is compared with something."""
        cores = self._cores()
        self.samples[name].rounds.append(Round(cluster / other, cluster, other, cores))
        self._say(
            f"{name}: {plain(cluster)} against {plain(other)} {self.samples[name].row.unit},"
            f" ratio {plain(cluster / other)}{_disturbed(cores)}"
        )

    def value(self, name: str, value: float) -> None:
        """One round of a row that stands alone."""
        cores = self._cores() if self.samples[name].row.timed else 0.0
        self.samples[name].rounds.append(Round(value, value, value, cores))
        self._say(f"{name}: {plain(value)} {self.samples[name].row.unit}{_disturbed(cores)}")

    def note(self, name: str, text: str) -> None:
        """A remark that is shown with a row, once."""
        notes = self.samples[name].notes
        if text not in notes:
            notes.append(text)
            self._say(f"{name}: {text}")

    def missing(self, name: str, why: str) -> None:
        """This row cannot be measured here."""
        self.samples[name].missing = why
        self._say(f"{name}: not measured: {why}")

    def point(self, curve: str, line: str, x: float, values: Sequence[float]) -> None:
        """One point of a curve: x, and the median, smallest and largest of its values."""
        found = spread(values)
        points = self.curves.setdefault(curve, {}).setdefault(line, [])
        points.append([x, found["median"], found["min"], found["max"]])
        self._say(f"{curve}, {line}, {plain(x)}: {plain(found['median'])}")

    def bar(self, name: str, seconds: float) -> None:
        """A part of a step, in order."""
        self.bars[name] = seconds
        self._say(f"{name}: {seconds * 1e3:.3f} ms")

    def rounds(self, count: int, *, warm_up: int = 0) -> Iterator[int]:
        """Numbers of rounds, those that warm up below 0.

        A round that others have disturbed is done again, as long as half of all are not.
        """
        calm = tried = 0
        for number in range(-warm_up, 2 * count):
            self._others.cores()
            self._round_cores = None
            yield number
            if number >= 0:
                tried += 1
                calm += self._cores() <= MOST_CORES
            if calm == count or tried == 2 * count:
                break
        self._round_cores = None

    def _cores(self) -> float:
        if self._round_cores is None:
            self._round_cores = self._others.cores()
        return self._round_cores

    def close(self, why: str) -> None:
        """Rows that have no values yet are missing, because of this."""
        for name, samples in self.samples.items():
            if not samples.rounds and not samples.missing:
                self.missing(name, why)

    def as_json(self) -> dict[str, Any]:
        """What the JSON file holds of it."""
        found: dict[str, Any] = {"rows": [samples.as_json() for samples in self.samples.values()]}
        if self.curves:
            found["curves"] = self.curves
        if self.bars:
            found["bars"] = self.bars
        return found


def _disturbed(cores: float) -> str:
    return f" (others used {cores:.2f} cores)" if cores > MOST_CORES else ""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that are measured together, under one name on the command line."""

    name: str
    rows: tuple[Row, ...]
    measure: Callable[[Bench, Sheet], None]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def plain(value: float) -> str:
    """A number as people write it: three digits, thousands apart."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
