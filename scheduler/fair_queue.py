"""Who is next: a bounded queue that is fair between clients. Pure.

Start-time fair queueing (Goyal, Vin, Cheng 1996), with tokens for bytes. Each client
has a tag, the virtual time at which its next request may start; the lowest goes
first and moves on by that request's cost. Virtual time is the start of whatever went
last, so a client that was away neither saves up turns nor pays for having been alone.

Places are shared by a dynamic threshold (Choudhury, Hahne 1998): nobody may hold more
than so many times the places that are still free, so however many a flooder asks for,
someone new finds one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

SHARE = 3  # places a client may hold for each free one: three quarters of the queue when alone
CLIENTS_REMEMBERED = 1024  # with nothing in the queue; beyond, the longest away is forgotten


@dataclass(slots=True)
class _Client:
    tag: float  # virtual time, in tokens
    waiting: dict[int, int] = field(default_factory=dict)  # request -> its cost, by arrival


class FairQueue:
    """Requests by number, each its client's, and what it is expected to cost in tokens."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._now = 0.0
        self._length = 0
        self._clients: OrderedDict[str, _Client] = OrderedDict()  # the longest away first

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        """Every request, client by client."""
        for client in self._clients.values():
            yield from client.waiting

    def waiting_of(self, client: str) -> int:
        """How many requests of this client wait."""
        known = self._clients.get(client)
        return len(known.waiting) if known else 0

    def has_place(self, client: str, taken: int = 0) -> bool:
        """Whether one more of this client may wait; ``taken`` places are used otherwise."""
        free = self._places - self._length - taken
        return free > 0 and self.waiting_of(client) < SHARE * free

    def push(self, id: int, client: str, cost_tokens: int) -> None:
        """A request waits, behind those of its client."""
        known = self._clients.setdefault(client, _Client(self._now))
        if not known.waiting:
            known.tag = max(known.tag, self._now)
        known.waiting[id] = cost_tokens
        self._length += 1
        self._clients.move_to_end(client)

    def turns(self) -> list[tuple[str, Collection[int]]]:
        """Clients in the order of their turns, each with its requests in order of arrival."""
        waiting = [(name, client) for name, client in self._clients.items() if client.waiting]
        waiting.sort(key=lambda each: (each[1].tag, next(iter(each[1].waiting))))
        return [(name, client.waiting.keys()) for name, client in waiting]

    def take(self, id: int, client: str) -> None:
        """A request's turn has come: it leaves, and its client pays."""
        known = self._clients[client]
        self._now = max(self._now, known.tag)
        known.tag += known.waiting[id]
        self.remove(id, client)

    def remove(self, id: int, client: str) -> None:
        """A request leaves without having had its turn."""
        del self._clients[client].waiting[id]
        self._length -= 1
        while len(self._clients) > CLIENTS_REMEMBERED:
            away = next((name for name, c in self._clients.items() if not c.waiting), None)
            if away is None:
                return
            del self._clients[away]

    def settle(self, client: str, tokens: int) -> None:
        """A request took so many tokens more (or fewer, below 0) than it was expected to."""
        known = self._clients.get(client)
        if known is not None:
            known.tag += tokens

    def rest(self) -> None:
        """Nobody waits and nothing runs: who went before whom does not matter any more."""
        if not self._length:
            self._clients.clear()
            self._now = 0.0
