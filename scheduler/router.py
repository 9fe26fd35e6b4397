"""The only queue of the cluster, and which ring a request goes to.

A pure state machine. Whoever is first takes the best of the rings that can hold it and have a
free row, room in their caches and work for its prompt soon. While none of them has room, nobody
behind it gets one of them, so that large requests come to their turn too; on rings that cannot hold
it others pass. A client that has its share of a ring's rows lets others pass as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

from parallax.fabric.errors import NoRing, PromptTooLong, QueueFull, QueueTimeout
from parallax.fabric.limits import DEFAULT_LIMITS, Limits
from parallax.scheduler.fair_queue import FairQueue
from parallax.scheduler.ring_load import RingLoad, rank
from parallax.scheduler.routed_request import Line, RoutedRequest

REFUSED_PAUSE_S = 1.0  # a head that had no room is asked again after an end, or after this


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Request ``id`` goes to the ring of this epoch."""

    id: int
    epoch: int


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
        self._requests: dict[int, RoutedRequest] = {}
        self._returned: list[RoutedRequest] = []  # by arrival; they go before everyone else
        self._queue = FairQueue(limits.queue_requests)
        self._rings: dict[int, RingLoad] = {}
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
            cost_tokens: its expected work, prompt and answer.
            now: monotonic.
            tokens: of its prompt.
            most_tokens: of its prompt and the longest answer that it may get.
            ring_coming: whether a ring is planned that does not serve yet, for which it may wait.

        Raises:
            NoRing: no ring serves at the moment, and none is coming.
            PromptTooLong: no ring could ever take it, and none is coming.
            QueueFull: no place is left, or none for this client.
        """
        if not self._rings and not ring_coming:
            raise NoRing(
                "No ring of nodes serves the model at the moment",
                "Nodes are missing, or they are still loading.",
                "Try again soon; GET /cluster/status_json shows what is missing.",
                retry_after_s=self._limits.retry_after_s,
            )
        if self._rings and not ring_coming and not self.fits_any(tokens):
            raise self.too_long(tokens)
        self.check_place(client)
        if id in self._requests:
            raise ValueError(f"request {id} is here already")
        self._arrivals += 1
        wait_s = self._limits.queue_wait_s
        request = RoutedRequest(
            id,
            client,
            cost_tokens,
            answer_tokens=max(0, cost_tokens - tokens),
            tokens=tokens,
            most_tokens=most_tokens,
            arrival=self._arrivals,
            left_s=wait_s,
            deadline_s=now + wait_s,
            line=Line.NEW,
        )
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
        chunk_tokens: int = 0,
        stages: int = 1,
    ) -> None:
        """A ring serves.

        ``epoch`` is its generation; the rest is as :class:`RingLoad` says.
        """
        if slots < 1 or not tokens_s > 0:
            raise ValueError("a ring has at least one row and a speed above zero")
        self._rings[epoch] = RingLoad(
            slots, tokens_s, context_tokens, row_bytes, chunk_tokens, stages
        )

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
        if (ring := self._rings.get(epoch)) is not None:
            ring.heard(free_rows, outstanding, room_bytes)

    def begun(self, id: int) -> bool:
        """An answer's first token of this attempt is here; True if more prompts may go now."""
        request = self._requests.get(id)
        ring = self._rings.get(request.epoch) if request and request.epoch is not None else None
        return ring is not None and ring.begun(id)

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
        if request.line is not None:
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

        Either its ring broke (its wait begins anew), or it outgrew it, or its head ``refused`` it
        for want of room: then its wait goes on, and that ring is left in peace until one of its
        requests ends, or for a second. An answer that has ``begun`` has waited for its
        turn: it is for whoever knows its deadline to end it. ``tokens`` is how long
        it has grown. Of those that are ``suspect`` of breaking rings, each ring has one at a
        time, until :meth:`cleared`.
        """
        request = self._requests.get(id)
        if request is None or request.line is not None:
            return
        if request.epoch is not None and (ring := self._rings.get(request.epoch)) is not None:
            self._leave_ring(request)
            ring.refused = refused
        if begun:
            request.left_s = math.inf
        elif not refused:
            request.left_s = self._limits.queue_wait_s
        if tokens is not None:
            request.tokens = tokens
        request.suspect |= suspect
        request.deadline_s = None
        request.line = Line.RETURNED
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
        while (found := self._next()) is not None:
            request, epoch = found
            self._leave_line(request, turn=True)
            if request.deadline_s is not None:
                request.left_s = max(0.0, request.deadline_s - now)
            request.deadline_s = None
            request.epoch = epoch
            self._rings[epoch].add(request, self._uncached(epoch, request))
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

    def fits_another(self, epoch: int, tokens: int) -> bool:
        """Whether a request so long is too long for this ring, but not for every other one."""
        ring = self._rings.get(epoch)
        return ring is not None and not ring.takes(tokens) and self.fits_any(tokens)

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

    def _give_up(self, requests: Iterable[RoutedRequest]) -> list[int]:
        given_up = sorted(requests, key=lambda r: r.arrival)
        for request in given_up:
            self._leave_line(request)
            del self._requests[request.id]
        return [request.id for request in given_up]

    def _queued(self) -> list[RoutedRequest]:
        return [*self._returned, *(self._requests[id] for id in self._queue)]

    def _start_clocks(self, now: float) -> None:
        """Events that carry no time take effect at the next one that does."""
        for request in self._returned:
            if request.deadline_s is None:
                request.deadline_s = now + request.left_s
        for ring in self._rings.values():
            ring.start_pause(now, REFUSED_PAUSE_S)

    def _next(self) -> tuple[RoutedRequest, int] | None:
        """Who goes first, and where.

        Whoever waits for a ring's caches keeps it from all behind. Whoever waits for its turn to be
        prefilled, or for one of its client's rows to end, keeps it from its own client only.
        """
        rings = {epoch: ring for epoch, ring in self._rings.items() if ring.open}
        busy = {epoch for epoch, ring in rings.items() if ring.prefills_enough}
        returned = ((request.client, (request.id,)) for request in self._returned)
        for client, ids in chain(returned, self._queue.turns()):
            mine = {epoch: ring for epoch, ring in rings.items() if ring.admits(client)}
            for id in ids:
                if not mine:
                    break
                request = self._requests[id]
                able = {epoch: ring for epoch, ring in mine.items() if ring.takes(request.tokens)}
                with_room = {e: ring for e, ring in able.items() if ring.has_room(request)}
                soon = [e for e in with_room if e not in busy or self._begins_soon(e, request)]
                if soon:
                    return request, self._best(soon, request)
                for epoch in able:
                    del mine[epoch]
                    if epoch not in with_room:
                        del rings[epoch]
            if not rings:
                break
        return None

    def _best(self, epochs: Iterable[int], request: RoutedRequest) -> int:
        def badness(epoch: int) -> tuple[bool, float, float, int]:
            known = self._prefix_tokens(epoch, request.id)
            return *rank(self._rings[epoch], request, known), epoch

        return min(epochs, key=badness)

    def _begins_soon(self, epoch: int, request: RoutedRequest) -> bool:
        """Whether so little of it is to be prefilled that it passes most of the prompts there."""
        ring = self._rings[epoch]
        if ring.begins_soon(request.tokens):
            return True
        if epoch not in request.known:  # asked once: many may wait, and this is asked often
            request.known[epoch] = self._prefix_tokens(epoch, request.id)
        return ring.begins_soon(request.tokens - request.known[epoch])

    def _uncached(self, epoch: int, request: RoutedRequest) -> int:
        return max(0, request.tokens - self._prefix_tokens(epoch, request.id))

    def _leave_line(self, request: RoutedRequest, *, turn: bool = False) -> None:
        """Take a request out of where it waits; a new one's ``turn`` counts for its client."""
        if request.line is Line.RETURNED:
            self._returned.remove(request)
        elif turn:
            self._queue.take(request.id, request.client)
        else:
            self._queue.remove(request.id, request.client)
        request.line = None

    def _leave_ring(self, request: RoutedRequest) -> None:
        ring = self._rings.get(request.epoch) if request.epoch is not None else None
        request.epoch = None
        if ring is not None:
            ring.remove(request)
