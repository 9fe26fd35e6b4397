"""Who was turned away, and why: counted, and said in the log."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, deque

log = logging.getLogger(__name__)

SAY_EVERY_S = 1.0  # for each reason; a flood of strangers must not become a flood of lines
REMEMBERED = 4096  # connections that came through lately
HANDSHAKE = "handshake"


class Tally:
    """Counts refusals by reason. Any thread may call it.

    gRPC says nothing of connections that fail in TLS, so these are told from those that came
    through: what began ``settle_s`` ago and has called nothing since did not. A client that went
    away by itself in the middle is counted with them.
    """

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._said: dict[str, float] = {}
        self._begun = 0
        self._met = 0
        self._known: OrderedDict[str, None] = OrderedDict()
        self._marks: deque[tuple[float, int]] = deque([(0.0, 0)])

    def refuse(self, reason: str, detail: str, count: int = 1) -> None:
        """Somebody was turned away."""
        now = time.monotonic()
        with self._lock:
            self._counts[reason] += count
            quiet = now - self._said.get(reason, -SAY_EVERY_S) < SAY_EVERY_S
            if not quiet:
                self._said[reason] = now
            total = self._counts[reason]
        if not quiet:
            log.warning("refused (%s, %d in all): %s", reason, total, detail)

    def begun(self) -> None:
        """A connection was taken, and TLS begins."""
        with self._lock:
            self._begun += 1

    def met(self, connection: str) -> None:
        """A call came over a connection, named as gRPC names its peer."""
        with self._lock:
            if connection in self._known:
                self._known.move_to_end(connection)
                return
            self._known[connection] = None
            self._met += 1
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def totals(self, now: float) -> dict[str, int]:
        """Refusals by reason since the start; to be asked for now and then."""
        with self._lock:
            self._marks.append((now, self._begun))
            while len(self._marks) > 1 and self._marks[1][0] <= now - self._settle_s:
                self._marks.popleft()
            lost = self._marks[0][1] - self._met - self._counts[HANDSHAKE]
        if lost > 0:
            self.refuse(
                HANDSHAKE,
                "a connection showed no certificate of this cluster that is valid now, "
                "or did not speak TLS",
                lost,
            )
        with self._lock:
            return dict(+self._counts)
