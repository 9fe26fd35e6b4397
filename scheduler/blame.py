"""Who is to blame for rings that break again and again, and is put aside for a while. Pure.

Each break names suspects: the node that failed, or, of a link, both its ends, since nobody can tell
from outside which of them it is. Whoever is suspected twice, without steady service in between, may
be put aside. Nobody is judged before every node of the ring has spoken again after the break: what
was killed, stopped or starved never does, and then the break is nobody's fault who is left.

Frames and links are told apart. Work that fails on one node after another is the fault of what is
asked, say of one request, and of no node: else a single request could have all of them put aside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from parallax.fabric.errors import (
    ClusterError,
    FrameRefused,
    MessageRefused,
    ParallaxError,
    StageStuck,
)
from parallax.fabric.limits import DEFAULT_LIMITS, Limits
from parallax.scheduler.losses import MOST_TEXT, finite

ENOUGH = 2  # breaks in a row of the same nodes
LONGEST_S = 480.0  # aside; doubled each time up to this
MEMORY_S = 600.0  # of a break, and of how often a node was put aside
ALIKE_S = 60.0  # work that fails on several nodes within this time is no node's fault
MOST_BREAKS = 256  # that are remembered
MOST_ABSENCES = 1024  # that are read back
MOST_TIMES = 64  # aside

Nodes = tuple[str, ...]
Heard = Callable[[str], float | None]  # when a node last spoke; None: it is not well


@dataclass(slots=True)
class _Break:
    epoch: int
    nodes: Nodes
    suspects: Nodes  # the likeliest first
    work: bool  # frames failed, not links
    at_s: float
    why: str
    hearsay: bool  # the head knows more: its stream to the scheduler ends with its ring
    cleared: set[str] = field(default_factory=set)  # suspects that it was not


@dataclass(slots=True)
class _Absence:
    """A node's time aside."""

    incarnation: int
    times: int
    until: float
    why: str
    work: bool
    over: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whom to put aside, if it can be done without one of them; the first that can, no more."""

    nodes: Nodes  # of the ring that breaks
    suspects: Nodes
    breaks: int
    why: str
    work: bool


class Blame:
    """Breaks in, judgements out; ``now`` is monotonic and never goes back."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._breaks: deque[_Break] = deque(maxlen=MOST_BREAKS)
        self._open: dict[Nodes, float] = {}  # rings to be judged, and since when
        self._absences: dict[str, _Absence] = {}

    # ------------------------------------------------------------------ events

    def broke(
        self,
        nodes: Nodes,
        epoch: int,
        error: ParallaxError,
        now: float,
        *,
        reporter: str | None = None,
        silent: Collection[str] = (),
    ) -> None:
        """A ring broke, or did not form.

        Args:
            nodes: those of the ring, in its order.
            reporter: which of them said so; None: the scheduler noticed.
            silent: those that did not say that they joined, where that is what went wrong.
        """
        suspects = tuple(silent) or suspects_of(nodes, reporter, error)
        work = reporter is not None and is_work(error)
        # What the scheduler itself read of the head, the head cannot explain away.
        hearsay = reporter is None and not silent and not isinstance(error, MessageRefused)
        broken = _Break(epoch, nodes, suspects, work, now, _said(error), hearsay)
        self._breaks.append(broken)
        if self._in_a_row(nodes) >= ENOUGH:
            self._open.setdefault(nodes, now)

    def corrected(self, reporter: str, epoch: int, error: ParallaxError) -> None:
        """A head says why its ring broke, after its stream to the scheduler had ended for that."""
        for broken in self._breaks:
            if broken.epoch == epoch and broken.hearsay and reporter == broken.nodes[0]:
                broken.suspects = suspects_of(broken.nodes, reporter, error)
                broken.work, broken.why, broken.hearsay = is_work(error), _said(error), False

    def excuse(self, node_id: str, since: float | None = None) -> None:
        """What became of a node's rings (since then) has another cause, and is held against none.

        To be called for a node that is gone, silent, hangs, or was given no time to run.
        """
        kept = (
            broken
            for broken in self._breaks
            if node_id not in broken.nodes or (since is not None and broken.at_s < since)
        )
        self._breaks = deque(kept, maxlen=MOST_BREAKS)
        self._close()

    def served(self, nodes: Nodes) -> None:
        """A ring of these nodes has served steadily: none of them was to blame before."""
        kept = (broken for broken in self._breaks if broken.nodes != nodes)
        self._breaks = deque(kept, maxlen=MOST_BREAKS)
        for broken in self._breaks:
            broken.cleared.update(nodes)
        for node_id in nodes:
            if node_id in self._absences and self._absences[node_id].over:
                del self._absences[node_id]
        self._close()

    def arrived(self, node_id: str, incarnation: int) -> None:
        """A node attends; a new process of it begins with a clean slate."""
        known = self._absences.get(node_id)
        if known is not None and known.incarnation != incarnation:
            del self._absences[node_id]

    # --------------------------------------------------------------- judgement

    def due(self, heard: Heard) -> list[Judgement]:
        """Rings to be judged now; each is told once, until it breaks again."""
        judged = []
        for nodes, since in list(self._open.items()):
            if any((heard(node) or since) <= since for node in nodes):
                continue
            del self._open[nodes]
            last = next(b for b in reversed(self._breaks) if b.nodes == nodes)
            suspects = self._suspects(last)
            if suspects:
                breaks = self._in_a_row(nodes)
                judged.append(Judgement(nodes, suspects, breaks, last.why, last.work))
        return judged

    def instead(self, node_id: str) -> frozenset[str]:
        """Who would be aside after this node was put aside: those whom it excuses are not."""
        return (self.aside - self._excused_by(node_id)) | {node_id}

    def put_aside(
        self, node_id: str, incarnation: int, why: str, now: float, *, work: bool = False
    ) -> float:
        """A node is not planned with from now on. Returns for how many seconds."""
        for other in self._excused_by(node_id):
            self.take_back(other)
        strikes = self._strikes(node_id)
        if len({frozenset(broken.suspects) for broken in strikes}) > 1:  # with several others
            for broken in strikes:
                broken.cleared.update(set(broken.suspects) - {node_id})
        before = self._absences.get(node_id)
        times = 1 + (before.times if before else 0)
        seconds = float(min(LONGEST_S, self._limits.aside_s * 2.0 ** min(times - 1, 16)))
        self._absences[node_id] = _Absence(incarnation, times, now + seconds, why, work)
        return seconds

    def take_back(self, node_id: str) -> bool:
        """A node may be planned with again; how often it was put aside stays known."""
        if node_id not in self.aside:
            return False
        self._absences[node_id].over = True
        return True

    def over(self, now: float) -> list[str]:
        """Nodes whose time is over by now; each is told once. Old breaks are forgotten."""
        while self._breaks and now - self._breaks[0].at_s > MEMORY_S:
            self._breaks.popleft()
        self._close()
        for node_id, absence in list(self._absences.items()):
            if absence.over and now - absence.until > MEMORY_S:
                del self._absences[node_id]
        back = [n for n in sorted(self.aside) if now >= self._absences[n].until]
        for node_id in back:
            self.take_back(node_id)
        return back

    # ------------------------------------------------------------------- state

    @property
    def aside(self) -> frozenset[str]:
        """Nodes that are not planned with."""
        return frozenset(n for n, absence in self._absences.items() if not absence.over)

    def why(self, node_id: str) -> str | None:
        """Why a node is aside; None when it is not."""
        return self._absences[node_id].why if node_id in self.aside else None

    def left_s(self, node_id: str, now: float) -> float:
        """How long a node is still aside."""
        return max(0.0, self._absences[node_id].until - now) if node_id in self.aside else 0.0

    # ------------------------------------------------------------------ memory

    def told(self) -> list[object]:
        """Who is or was aside, as JSON values for :meth:`recall`."""
        return [
            [node_id, a.incarnation, a.times, a.until, a.why[:MOST_TEXT], a.work, a.over]
            for node_id, a in self._absences.items()
        ]

    def recall(self, told: object, shift_s: float, now: float) -> None:
        """Takes up what an earlier process told; what makes no sense is left out.

        Args:
            shift_s: what turns that process's times into this one's.
        """
        for entry in told[-MOST_ABSENCES:] if isinstance(told, list) else []:
            try:
                node_id, incarnation, times, until, why, work, over = entry
                absence = _Absence(
                    int(incarnation),
                    min(max(int(times), 1), MOST_TIMES),
                    min(finite(until) + shift_s, now + LONGEST_S),
                    str(why)[:MOST_TEXT],
                    work is True,
                    over is not False,
                )
            except (TypeError, ValueError, OverflowError):
                continue
            if isinstance(node_id, str) and len(node_id) <= MOST_TEXT:
                self._absences[node_id] = absence

    # ----------------------------------------------------------------- figures

    def _close(self) -> None:
        """Rings of which too few breaks are left are not judged."""
        self._open = {n: since for n, since in self._open.items() if self._in_a_row(n) >= ENOUGH}

    def _in_a_row(self, nodes: Nodes) -> int:
        return sum(broken.nodes == nodes for broken in self._breaks)

    def _strikes(self, node_id: str) -> list[_Break]:
        return [b for b in self._breaks if node_id in b.suspects and node_id not in b.cleared]

    def _suspects(self, last: _Break) -> Nodes:
        """Who may be put aside for this break, those suspected most, and by most, first."""
        strikes = {n: self._strikes(n) for n in last.suspects if n not in last.cleared}
        enough = [n for n, found in strikes.items() if len(found) >= ENOUGH]
        if last.work:
            alike = [b for b in self._breaks if b.work and last.at_s - b.at_s <= ALIKE_S]
            if not set(last.suspects).intersection(*(b.suspects for b in alike)):
                for node_id in [n for n in self.aside if self._absences[n].work]:
                    self.take_back(node_id)
                return ()
            enough = [n for n in enough if all(n in b.suspects for b in alike)]

        def order(node_id: str) -> tuple[int, int]:
            found = strikes[node_id]
            return -len(found), -len({frozenset(b.suspects) for b in found})

        return tuple(sorted(enough, key=order))

    def _excused_by(self, node_id: str) -> frozenset[str]:
        """Nodes aside that were only ever suspected together with this one."""
        return frozenset(
            other
            for other in self.aside - {node_id}
            if (found := self._strikes(other)) and all(node_id in b.suspects for b in found)
        )


def suspects_of(nodes: Nodes, reporter: str | None, error: ParallaxError) -> Nodes:
    """Who may be at fault when a ring of these nodes breaks, the likeliest first."""
    if reporter is None or reporter not in nodes:
        return nodes[:1]  # the head, whose stream to the scheduler broke
    at = nodes.index(reporter)
    before, behind = nodes[at - 1], nodes[(at + 1) % len(nodes)]
    match error:
        case FrameRefused() | MessageRefused():
            named = [before, reporter]
        case StageStuck():  # nothing comes back: anybody's fault
            named = [*nodes]
        case ClusterError():
            peer = error.fields.get("peer")
            named = [peer, reporter] if peer in nodes else [before, behind, reporter]
        case _:
            named = [reporter]
    return tuple(dict.fromkeys(named))


def is_work(error: ParallaxError) -> bool:
    """Whether frames failed, and not a link."""
    return isinstance(error, FrameRefused | MessageRefused) or not isinstance(error, ClusterError)


def _said(error: ParallaxError) -> str:
    return f"{error.what}. {error.why}" if error.why else error.what
