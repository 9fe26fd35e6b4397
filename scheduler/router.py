"""The only queue of the cluster, and which ring a request goes to.

A pure state machine: bounded, first come first served within a client, in turn
between clients. Every request fits every ring, so whoever is first takes the
best ring that has a free row.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from parallax.fabric.errors import NoRing, QueueFull, QueueTimeout
from parallax.fabric.limits import DEFAULT_LIMITS, Limits

WORK_STEP_TOKENS = 512  # outstanding work counts in such steps, so that a known prefix can decide
REFUSED_PAUSE_S = 1.0  # a head that had no room is asked again after an end, or after this


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Request ``id`` goes to the ring of this epoch."""

    id: int
    epoch: int


@dataclass(slots=True, eq=False)
class _Request:
    id: int
    client: str
    cost_tokens: int
    arrival: int
    left_s: float  # of its wait, while no clock runs
    deadline_s: float | None  # None: on a ring, or its clock starts at the next event
    epoch: int | None = None  # its ring, once dispatched


@dataclass(slots=True, eq=False)
class _Ring:
    slots: int
    tokens_s: float
    running: dict[int, int] = field(default_factory=dict)  # request -> its tokens
    free_rows: int | None = None  # as the head said, less what was sent since
    leaving: int = 0  # sequences that the head still has and we have ended
    refused: bool = False  # its head had no room; the pause starts at the next event
    paused_until_s: float | None = None

    @property
    def free(self) -> int:
        own = self.slots - len(self.running)
        if not self.running or self.free_rows is None:
            return own  # with nothing to do it is always tried: what its head said last is old
        return min(own - self.leaving, self.free_rows)

    @property
    def work_s(self) -> float:
        return sum(self.running.values()) / self.tokens_s


class Router:
    """Requests and rings in, dispatches out; ``now`` is monotonic.

    ``prefix_tokens(epoch, id)`` tells how much of a request's prompt a ring has
    in its prefix cache, as far as is known.
    """

    def __init__(
        self,
        limits: Limits = DEFAULT_LIMITS,
        prefix_tokens: Callable[[int, int], int] = lambda _epoch, _id: 0,
    ) -> None:
        self._limits = limits
        self._prefix_tokens = prefix_tokens
        self._requests: dict[int, _Request] = {}
        self._returned: list[_Request] = []  # by arrival; they go before everyone else
        self._clients: OrderedDict[str, deque[_Request]] = OrderedDict()
        self._rings: dict[int, _Ring] = {}
        self._arrivals = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._returned) + sum(map(len, self._clients.values()))

    @property
    def running(self) -> int:
        """Requests on rings."""
        return sum(len(ring.running) for ring in self._rings.values())

    def enqueue(
        self, id: int, client: str, cost_tokens: int, now: float, *, ring_coming: bool = False
    ) -> None:
        """A new request waits for its turn; ``id`` is new, ``cost_tokens`` its expected work.

        Raises:
            NoRing: no ring serves at the moment, and none is coming.
            QueueFull: no place is left.
        """
        if not self._rings and not ring_coming:
            raise NoRing(
                "No ring of nodes serves the model at the moment",
                "Nodes are missing, or they are still loading.",
                "Try again soon; GET /cluster/status_json shows what is missing.",
                retry_after_s=self._limits.retry_after_s,
            )
        if self.waiting >= self._limits.queue_requests:
            raise QueueFull(
                "The queue is full",
                f"{self.waiting} requests wait already.",
                f"Try again in {self._limits.retry_after_s} s.",
                retry_after_s=self._limits.retry_after_s,
            )
        if id in self._requests:
            raise ValueError(f"request {id} is here already")
        self._arrivals += 1
        wait_s = self._limits.queue_wait_s
        request = _Request(id, client, cost_tokens, self._arrivals, wait_s, now + wait_s)
        self._requests[id] = request
        self._clients.setdefault(client, deque()).append(request)

    def ring_up(self, epoch: int, slots: int, tokens_s: float = 1.0) -> None:
        """A ring serves with so many rows; ``tokens_s`` weighs rings of different speed."""
        if slots < 1 or not tokens_s > 0:
            raise ValueError("a ring has at least one row and a speed above zero")
        self._rings[epoch] = _Ring(slots, tokens_s)

    def ring_down(self, epoch: int) -> list[int]:
        """A ring is no more; returns its requests by arrival, to be put back or ended."""
        ring = self._rings.pop(epoch, None)
        lost = [self._requests[id] for id in ring.running] if ring else []
        for request in lost:
            request.epoch = None
        return [request.id for request in sorted(lost, key=lambda r: r.arrival)]

    def load(self, epoch: int, free_rows: int, outstanding: int) -> None:
        """What a head says of itself: rows that are free, and sequences it still works on."""
        if (ring := self._rings.get(epoch)) is None:
            return
        ring.free_rows = free_rows
        ring.leaving = max(0, outstanding - len(ring.running))

    def finished(self, epoch: int, id: int) -> None:
        """A request ended on its ring, well or not: its row is free and it is forgotten."""
        request = self._requests.get(id)
        if request is None or request.epoch != epoch:
            return
        self._leave_ring(request)
        del self._requests[id]

    def cancel(self, id: int) -> bool:
        """Forget a request that is on no ring; False if it is on one, or unknown."""
        request = self._requests.get(id)
        if request is None or request.epoch is not None:
            return False
        if self._is_queued(request):
            self._unqueue(request)
        del self._requests[id]
        return True

    def requeue_front(self, id: int, *, refused: bool = False) -> None:
        """Put a request back before all others, in order of arrival.

        Either its ring broke (its wait begins anew), or its head ``refused`` it
        for want of room (its wait goes on). The ring it comes from is left in
        peace until one of its requests ends, or for a second.
        """
        request = self._requests.get(id)
        if request is None or self._is_queued(request):
            return
        if request.epoch is not None and (ring := self._rings.get(request.epoch)) is not None:
            self._leave_ring(request)
            ring.refused = True
        if not refused:
            request.left_s = self._limits.queue_wait_s
        request.deadline_s = None
        self._returned.append(request)
        self._returned.sort(key=lambda r: r.arrival)

    def dispatch(self, now: float) -> list[Dispatch]:
        """Send as many waiting requests to rings as have room; call after any event."""
        self._start_clocks(now)
        sent: list[Dispatch] = []
        while (request := self._next()) is not None:
            epoch = self._best_ring(request)
            if epoch is None:
                break
            self._unqueue(request)
            ring = self._rings[epoch]
            ring.running[request.id] = request.cost_tokens
            if request.deadline_s is not None:
                request.left_s = max(0.0, request.deadline_s - now)
            request.deadline_s = None
            if ring.free_rows is not None:
                ring.free_rows -= 1
            request.epoch = epoch
            sent.append(Dispatch(request.id, epoch))
        return sent

    def expired(self, now: float) -> list[int]:
        """Requests that waited too long, by arrival; they are out of the queue."""
        self._start_clocks(now)
        late = [r for r in self._queued() if r.deadline_s is not None and r.deadline_s <= now]
        for request in late:
            self._unqueue(request)
            del self._requests[request.id]
        return [request.id for request in sorted(late, key=lambda r: r.arrival)]

    def next_event_s(self) -> float | None:
        """When to call :meth:`expired` and :meth:`dispatch` even if nothing happens."""
        queued = self._queued()
        if not queued:
            return None
        times = [r.deadline_s for r in queued if r.deadline_s is not None]
        times += [r.paused_until_s for r in self._rings.values() if r.paused_until_s is not None]
        return min(times, default=None)

    def timeout(self) -> QueueTimeout:
        """The error for a request that :meth:`expired` names."""
        return QueueTimeout(
            "All rings stayed full",
            f"The request waited {self._limits.queue_wait_s:g} s for a free place.",
            f"Try again in {self._limits.retry_after_s} s.",
            retry_after_s=self._limits.retry_after_s,
        )

    def _queued(self) -> list[_Request]:
        return [*self._returned, *(r for queue in self._clients.values() for r in queue)]

    def _is_queued(self, request: _Request) -> bool:
        return request in self._returned or request in self._clients.get(request.client, ())

    def _start_clocks(self, now: float) -> None:
        """Events that carry no time take effect at the next one that does."""
        for request in self._returned:
            if request.deadline_s is None:
                request.deadline_s = now + request.left_s
        for ring in self._rings.values():
            if ring.refused:
                ring.refused, ring.paused_until_s = False, now + REFUSED_PAUSE_S
            elif ring.paused_until_s is not None and ring.paused_until_s <= now:
                ring.paused_until_s = None

    def _next(self) -> _Request | None:
        if self._returned:
            return self._returned[0]
        return next(iter(self._clients.values()))[0] if self._clients else None

    def _best_ring(self, request: _Request) -> int | None:
        best: tuple[tuple[float, int, float, int], int] | None = None
        fastest = max((ring.tokens_s for ring in self._rings.values()), default=1.0)
        for epoch, ring in self._rings.items():
            if ring.free < 1 or ring.paused_until_s is not None:
                continue
            steps = ring.work_s * fastest // WORK_STEP_TOKENS
            rank = (steps, -self._prefix_tokens(epoch, request.id), ring.work_s, epoch)
            if best is None or rank < best[0]:
                best = (rank, epoch)
        return best[1] if best else None

    def _unqueue(self, request: _Request) -> None:
        """Take a request out of the queue; the client it came from goes to the end of the turn."""
        if request in self._returned:
            self._returned.remove(request)
            return
        queue = self._clients[request.client]
        first = queue[0] is request
        queue.remove(request)
        if not queue:
            del self._clients[request.client]
        elif first:
            self._clients.move_to_end(request.client)

    def _leave_ring(self, request: _Request) -> None:
        ring = self._rings.get(request.epoch) if request.epoch is not None else None
        request.epoch = None
        if ring is None:
            return
        ring.running.pop(request.id, None)
        if ring.free_rows is not None:
            ring.free_rows += 1
        ring.refused = False
        ring.paused_until_s = None
