"""The only queue of the cluster, and which ring a request goes to.

A pure state machine. Whoever is first, of those that fit a ring at all, takes the best
ring that has a free row and room in its caches; while there is none, nobody else
overtakes, so that large requests come to their turn too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice

from parallax.fabric.errors import NoRing, PromptTooLong, QueueFull, QueueTimeout
from parallax.fabric.limits import DEFAULT_LIMITS, Limits
from parallax.scheduler.fair_queue import FairQueue
from parallax.scheduler.row_cost import GROWTH_TOKENS

WORK_STEP_TOKENS = 512  # outstanding work counts in such steps, so that a known prefix can decide
REFUSED_PAUSE_S = 1.0  # a head that had no room is asked again after an end, or after this


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Request ``id`` goes to the ring of this epoch."""

    id: int
    epoch: int


class _Line(Enum):
    """Where a request waits."""

    NEW = "new"  # for its client's turn
    RETURNED = "returned"  # it had its turn, and goes before everyone else


@dataclass(slots=True, eq=False)
class _Request:
    id: int
    client: str
    cost_tokens: int  # what its turn costs
    tokens: int  # prompt and answer so far
    most_tokens: int  # with the longest answer that it may get
    arrival: int
    left_s: float  # of its wait, while no clock runs; infinite once its answer has begun
    deadline_s: float | None  # None: on a ring, or its clock starts at the next event
    epoch: int | None = None  # its ring, once dispatched
    waits: _Line | None = None  # None: on a ring, or on none and not put back yet
    suspect: bool = False  # rings broke while it ran there, and perhaps because of it

    @property
    def soon_tokens(self) -> int:
        """How long it will soon be: heads take nobody in who has no room to grow."""
        return min(self.tokens + GROWTH_TOKENS, self.most_tokens)


@dataclass(slots=True, eq=False)
class _Ring:
    slots: int
    tokens_s: float
    context_tokens: int
    row_bytes: Callable[[int], int]
    running: dict[int, _Request] = field(default_factory=dict)  # in the order they were sent
    free_rows: int | None = None  # as the head said, less what was sent since
    leaving: int = 0  # sequences that the head still has and we have ended
    refused: bool = False  # its head had no room; the pause starts at the next event
    paused_until_s: float | None = None
    room_bytes: int | None = None  # of its caches, as the head said, less what was sent since

    @property
    def free(self) -> int:
        own = self.slots - len(self.running)
        if not self.running or self.free_rows is None:
            return own  # with nothing to do it is always tried: what its head said last is old
        return min(own - self.leaving, self.free_rows)

    @property
    def work_s(self) -> float:
        return sum(request.cost_tokens for request in self.running.values()) / self.tokens_s

    def takes(self, tokens: int) -> bool:
        """Whether a request so long fits this ring when nothing else is there."""
        return not self.context_tokens or tokens < self.context_tokens

    def takes_whole(self, request: _Request) -> bool:
        """Whether the longest answer that it may get fits too; a shorter ring would cut it off."""
        return not self.context_tokens or request.most_tokens <= self.context_tokens

    def charge(self, request: _Request) -> int:
        """Bytes that a head will charge for this request."""
        soon = request.soon_tokens
        return self.row_bytes(min(soon, self.context_tokens or soon))

    def has_room(self, request: _Request) -> bool:
        """Whether the head may take this request in now; a lone one it takes always."""
        if not self.takes(request.tokens) or self.free < 1 or self.paused_until_s is not None:
            return False
        if request.suspect and any(other.suspect for other in self.running.values()):
            return False  # the next break must tell which of them it was
        if not self.running or self.room_bytes is None:
            return True
        return self.charge(request) <= self.room_bytes


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
        self._queue = FairQueue(limits.queue_requests)
        self._rings: dict[int, _Ring] = {}
        self._arrivals = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._returned) + len(self._queue)

    @property
    def running(self) -> int:
        """Requests on rings."""
        return sum(len(ring.running) for ring in self._rings.values())

    def enqueue(
        self,
        id: int,
        client: str,
        cost_tokens: int,
        now: float,
        *,
        tokens: int = 0,
        most_tokens: int = 0,
        ring_coming: bool = False,
    ) -> None:
        """A new request waits for its turn.

        Args:
            id: larger than any before.
            client: turns are fair between clients.
            cost_tokens: its expected work.
            now: monotonic.
            tokens: of its prompt.
            most_tokens: of its prompt and the longest answer that it may get.
            ring_coming: whether a ring is planned, for which it may wait.

        Raises:
            NoRing: no ring serves at the moment, and none is coming.
            PromptTooLong: no ring could ever take it.
            QueueFull: no place is left, or none for this client.
        """
        if not self._rings and not ring_coming:
            raise NoRing(
                "No ring of nodes serves the model at the moment",
                "Nodes are missing, or they are still loading.",
                "Try again soon; GET /cluster/status_json shows what is missing.",
                retry_after_s=self._limits.retry_after_s,
            )
        if self._rings and not self.fits_any(tokens):
            raise self.too_long(tokens)
        self.check_place(client)
        if id in self._requests:
            raise ValueError(f"request {id} is here already")
        self._arrivals += 1
        wait_s = self._limits.queue_wait_s
        request = _Request(
            id, client, cost_tokens, tokens, most_tokens, self._arrivals, wait_s, now + wait_s
        )
        request.waits = _Line.NEW
        self._requests[id] = request
        self._queue.push(id, client, cost_tokens)

    def check_place(self, client: str) -> None:
        """Whether one more request of this client may wait.

        Raises:
            QueueFull: no place is left, or none for this client.
        """
        if not self._queue.has_place(client, len(self._returned)):
            raise self._full(client)

    def ring_up(
        self,
        epoch: int,
        slots: int,
        tokens_s: float = 1.0,
        *,
        context_tokens: int = 0,
        row_bytes: Callable[[int], int] = lambda _tokens: 0,
    ) -> None:
        """A ring serves.

        Args:
            epoch: its generation.
            slots: its rows.
            tokens_s: its speed; rings are weighed by it.
            context_tokens: what its caches, or the model, take of one request; 0: no limit.
            row_bytes: what a request with so many tokens costs the dearest stage's caches.
        """
        if slots < 1 or not tokens_s > 0:
            raise ValueError("a ring has at least one row and a speed above zero")
        self._rings[epoch] = _Ring(slots, tokens_s, context_tokens, row_bytes)

    def ring_down(self, epoch: int) -> list[int]:
        """A ring is no more; returns its requests by arrival, to be put back or ended."""
        ring = self._rings.pop(epoch, None)
        lost = list(ring.running.values()) if ring else []
        for request in lost:
            request.epoch = None
        return [request.id for request in sorted(lost, key=lambda r: r.arrival)]

    def load(
        self, epoch: int, free_rows: int, outstanding: int, room_bytes: int | None = None
    ) -> None:
        """What a head says of itself.

        Args:
            epoch: its ring.
            free_rows: rows that are free.
            outstanding: sequences it works on.
            room_bytes: what its caches still take; None: it has no budget.
        """
        if (ring := self._rings.get(epoch)) is None:
            return
        ring.free_rows = free_rows
        ring.leaving = max(0, outstanding - len(ring.running))
        if room_bytes is not None:  # those it had not heard of when it said so are the last ones
            unheard = max(0, len(ring.running) - outstanding)
            sent = islice(reversed(ring.running.values()), unheard)
            room_bytes -= sum(map(ring.charge, sent))
        ring.room_bytes = room_bytes

    def finished(self, epoch: int, id: int, tokens: int | None = None) -> None:
        """A request ended on its ring, well or not: its row is free and it is forgotten.

        ``tokens`` is what it took in all; its client pays, or gets back, the difference
        from what was expected.
        """
        request = self._requests.get(id)
        if request is None or request.epoch != epoch:
            return
        self._leave_ring(request)
        del self._requests[id]
        if tokens is not None:
            self._queue.settle(request.client, tokens - request.cost_tokens)
        if not self._requests:
            self._queue.rest()

    def cancel(self, id: int) -> bool:
        """Forget a request that is on no ring; False if it is on one, or unknown."""
        request = self._requests.get(id)
        if request is None or request.epoch is not None:
            return False
        if request.waits is not None:
            self._leave_line(request)
        del self._requests[id]
        return True

    def requeue_front(
        self,
        id: int,
        *,
        tokens: int | None = None,
        refused: bool = False,
        begun: bool = False,
        suspect: bool = False,
    ) -> None:
        """Put a request back before all others, in order of arrival.

        Either its ring broke (its wait begins anew), or its head ``refused`` it
        for want of room (its wait goes on). An answer that has ``begun`` has waited for its
        turn: it is for whoever knows its deadline to end it. The ring it comes from is left in
        peace until one of its requests ends, or for a second. ``tokens`` is how long
        it has grown. Of those that are ``suspect`` of breaking rings, each ring has one at a
        time, until :meth:`cleared`.
        """
        request = self._requests.get(id)
        if request is None or request.waits is not None:
            return
        if request.epoch is not None and (ring := self._rings.get(request.epoch)) is not None:
            self._leave_ring(request)
            ring.refused = True
        if begun:
            request.left_s = math.inf
        elif not refused:
            request.left_s = self._limits.queue_wait_s
        if tokens is not None:
            request.tokens = tokens
        request.suspect |= suspect
        request.deadline_s = None
        request.waits = _Line.RETURNED
        self._returned.append(request)
        self._returned.sort(key=lambda r: r.arrival)

    def cleared(self, id: int) -> None:
        """A request got on: it breaks no rings."""
        request = self._requests.get(id)
        if request is not None:
            request.suspect = False

    def dispatch(self, now: float) -> list[Dispatch]:
        """Send as many waiting requests to rings as have room; call after any event."""
        self._start_clocks(now)
        sent: list[Dispatch] = []
        while (request := self._next()) is not None:
            epoch = self._best_ring(request)
            if epoch is None:
                break
            self._leave_line(request, turn=True)
            ring = self._rings[epoch]
            ring.running[request.id] = request
            if request.deadline_s is not None:
                request.left_s = max(0.0, request.deadline_s - now)
            request.deadline_s = None
            if ring.free_rows is not None:
                ring.free_rows -= 1
            if ring.room_bytes is not None:
                ring.room_bytes -= ring.charge(request)
            request.epoch = epoch
            sent.append(Dispatch(request.id, epoch))
        return sent

    def expired(self, now: float) -> list[int]:
        """Requests that waited too long, by arrival; they are out of the queue."""
        self._start_clocks(now)
        late = [r for r in self._queued() if r.deadline_s is not None and r.deadline_s <= now]
        return self._give_up(late)

    def misfits(self) -> list[int]:
        """New requests that no ring of now can take, by arrival; they are out of the queue."""
        if not self._rings:
            return []
        waiting = [self._requests[id] for id in self._queue]
        return self._give_up(r for r in waiting if not self.fits_any(r.tokens))

    def fits_any(self, tokens: int) -> bool:
        """Whether some ring can take a request so long, when nothing else is there."""
        return any(ring.takes(tokens) for ring in self._rings.values())

    @property
    def most_tokens(self) -> int:
        """The longest request that a ring takes; 0: no limit is known."""
        return max((ring.context_tokens for ring in self._rings.values()), default=0)

    def next_event_s(self) -> float | None:
        """When to call :meth:`expired` and :meth:`dispatch` even if nothing happens."""
        queued = self._queued()
        if not queued:
            return None
        times = [r.deadline_s for r in queued if r.deadline_s is not None]
        times += [r.paused_until_s for r in self._rings.values() if r.paused_until_s is not None]
        return min((time for time in times if time < math.inf), default=None)

    def timeout(self) -> QueueTimeout:
        """The error for a request that :meth:`expired` names."""
        return QueueTimeout(
            "All rings stayed full",
            f"The request waited {self._limits.queue_wait_s:g} s for a free place.",
            f"Try again in {self._limits.retry_after_s} s.",
            retry_after_s=self._limits.retry_after_s,
        )

    def too_long(self, tokens: int) -> PromptTooLong:
        """The error for a request of so many tokens that :meth:`misfits` names."""
        most = self.most_tokens
        return PromptTooLong(
            f"The prompt has {tokens} tokens, and the caches of this cluster hold {most}",
            f"With its answer's first token it would need {tokens + 1}.",
            f"Send at most {most - 1} tokens, or let more memory join the cluster.",
            prompt_tokens=tokens,
            context_tokens=most,
        )

    def _full(self, client: str) -> QueueFull:
        what, why = "The queue is full", f"{self.waiting} requests wait already."
        if self.waiting < self._limits.queue_requests:
            own = self._queue.waiting_of(client)
            what += " for this client"
            why = f"{own} of its requests wait already; the places left are for others."
        return QueueFull(
            what,
            why,
            f"Try again in {self._limits.retry_after_s} s.",
            retry_after_s=self._limits.retry_after_s,
        )

    def _give_up(self, requests: Iterable[_Request]) -> list[int]:
        given_up = sorted(requests, key=lambda r: r.arrival)
        for request in given_up:
            self._leave_line(request)
            del self._requests[request.id]
        return [request.id for request in given_up]

    def _queued(self) -> list[_Request]:
        return [*self._returned, *(self._requests[id] for id in self._queue)]

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
        """Who goes first of those that fit a ring: those that do not hold up nobody."""
        if not any(ring.free > 0 for ring in self._rings.values()):
            return None
        for request in self._returned:
            if self.fits_any(request.tokens):
                return request
        id = self._queue.first(lambda id: self.fits_any(self._requests[id].tokens))
        return None if id is None else self._requests[id]

    def _best_ring(self, request: _Request) -> int | None:
        best: tuple[tuple[bool, float, int, float, int], int] | None = None
        fastest = max((ring.tokens_s for ring in self._rings.values()), default=1.0)
        for epoch, ring in self._rings.items():
            if not ring.has_room(request):
                continue
            steps = ring.work_s * fastest // WORK_STEP_TOKENS
            known = self._prefix_tokens(epoch, request.id)
            rank = (not ring.takes_whole(request), steps, -known, ring.work_s, epoch)
            if best is None or rank < best[0]:
                best = (rank, epoch)
        return best[1] if best else None

    def _leave_line(self, request: _Request, *, turn: bool = False) -> None:
        """Take a request out of where it waits; a new one's ``turn`` counts for its client."""
        if request.waits is _Line.RETURNED:
            self._returned.remove(request)
        elif turn:
            self._queue.take(request.id, request.client)
        else:
            self._queue.remove(request.id, request.client)
        request.waits = None

    def _leave_ring(self, request: _Request) -> None:
        ring = self._rings.get(request.epoch) if request.epoch is not None else None
        request.epoch = None
        if ring is None:
            return
        if ring.running.pop(request.id, None) is not None and ring.room_bytes is not None:
            ring.room_bytes += ring.charge(request)
        if ring.free_rows is not None:
            ring.free_rows += 1
        ring.refused = False
        ring.paused_until_s = None
