"""What a ring has to do, and whether it takes one more request. Pure.

Two things are kept for those who come later. Of its rows a client gets no more than ``SHARE``
times those that are still free (a dynamic threshold, Choudhury and Hahne 1998), so that whoever
comes next finds one, however long the answers before take. And prompts are begun in the order in
which a head gets them, so it gets them only just before it needs them: those that wait here
can still take turns between clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from parallax.scheduler.routed_request import RoutedRequest

SHARE = 7  # rows a client may hold for each free one: when alone 32 of 36, and all but one of 8
SHORT_CHUNKS = 2  # prompts that heads let pass others: so many chunks to prefill at most
LONGER_TIMES = 2  # prompts that are longer by so much share a ring with others, as heads do it
AHEAD_TOKENS = 1024  # of prompts behind the one that is being prefilled, at the least
PREFIX_WORTH_TOKENS = 4096  # eight answers


@dataclass(slots=True, eq=False)
class RingLoad:
    """One ring: what it holds at most, and what it works on.

    Args:
        slots: its rows.
        tokens_s: its speed.
        context_tokens: what its caches, or the model, take of one request; 0: no limit.
        row_bytes: what a request with so many tokens costs the dearest stage's caches.
        chunk_tokens: of its prefill; 0: unknown, then its head gets prompts as they come.
        stages: nodes that prefill different chunks at the same time.
    """

    slots: int
    tokens_s: float
    context_tokens: int
    row_bytes: Callable[[int], int]
    chunk_tokens: int = 0
    stages: int = 1
    running: dict[int, RoutedRequest] = field(default_factory=dict)  # in the order they were sent
    rows: Counter[str] = field(default_factory=Counter)  # of each client
    prompts: dict[int, int] = field(default_factory=dict)  # tokens to prefill of those not begun
    free_rows: int | None = None  # as the head said, less what was sent since
    leaving: int = 0  # sequences that the head still has and we have ended
    refused: bool = False  # its head had no room; the pause starts at the next event
    paused_until_s: float | None = None
    room_bytes: int | None = None  # of its caches, as the head said, less what was sent since

    @property
    def free(self) -> int:
        """Rows that are free."""
        own = self.slots - len(self.running)
        if not self.running or self.free_rows is None:
            return own  # with nothing to do it is always tried: what its head said last is old
        return min(own - self.leaving, self.free_rows)

    @property
    def open(self) -> bool:
        """Whether anybody can come here now."""
        return self.free > 0 and self.paused_until_s is None

    @property
    def work_tokens(self) -> int:
        """Tokens that are expected of it: prompts to prefill, and answers."""
        answers = sum(request.answer_tokens for request in self.running.values())
        return answers + sum(self.prompts.values())

    def admits(self, client: str) -> bool:
        """Whether this client may have one more row."""
        free = self.free
        return free > 0 and self.rows.get(client, 0) < SHARE * free

    def takes(self, tokens: int) -> bool:
        """Whether a request so long fits this ring when nothing else is there."""
        return not self.context_tokens or tokens < self.context_tokens

    def takes_whole(self, request: RoutedRequest) -> bool:
        """Whether its answer likely fits too; a shorter ring would have to hand it on."""
        return not self.context_tokens or request.expected_tokens <= self.context_tokens

    def charge(self, request: RoutedRequest) -> int:
        """Bytes that a head will charge for this request."""
        soon = request.soon_tokens
        return self.row_bytes(min(soon, self.context_tokens or soon))

    def has_room(self, request: RoutedRequest) -> bool:
        """Whether the caches may take this request in now; a lone one they take always."""
        if request.suspect and any(other.suspect for other in self.running.values()):
            return False  # the next break must tell which of them it was
        if not self.running or self.room_bytes is None:
            return True
        return self.charge(request) <= self.room_bytes

    @property
    def prefills_enough(self) -> bool:
        """Whether one more long prompt would have to wait at the head.

        The first of those there is being prefilled; those behind it are enough for every stage
        to have its next chunk while the first one's answer begins and its successor is sent.
        """
        return self._is_enough(self.prompts.values())

    def begins_soon(self, tokens: int) -> bool:
        """Whether a prompt with so many tokens to prefill need not wait: much longer ones let it
        pass."""
        return self.is_short(tokens) or not self._is_enough(
            others for others in self.prompts.values() if others < LONGER_TIMES * tokens
        )

    def _is_enough(self, prompts: Iterable[int]) -> bool:
        long = (tokens for tokens in prompts if not self.is_short(tokens))
        ahead = max(AHEAD_TOKENS, 2 * (self.stages + 1) * self.chunk_tokens)
        return bool(self.chunk_tokens) and sum(islice(long, 1, None)) >= ahead

    def is_short(self, tokens: int) -> bool:
        """Whether a prompt with so many tokens to prefill waits for no long one."""
        return tokens <= SHORT_CHUNKS * self.chunk_tokens

    def heard(self, free_rows: int, outstanding: int, room_bytes: int | None) -> None:
        """What the head says of itself; see :meth:`Router.load`."""
        self.free_rows = free_rows
        self.leaving = max(0, outstanding - len(self.running))
        if room_bytes is not None:  # those it had not heard of when it said so are the last ones
            unheard = max(0, len(self.running) - outstanding)
            sent = islice(reversed(self.running.values()), unheard)
            room_bytes -= sum(map(self.charge, sent))
        self.room_bytes = room_bytes

    def add(self, request: RoutedRequest, uncached_tokens: int) -> None:
        """A request is sent here, and so much of it is to be prefilled."""
        self.running[request.id] = request
        self.rows[request.client] += 1
        self.prompts[request.id] = uncached_tokens
        if self.free_rows is not None:
            self.free_rows -= 1
        if self.room_bytes is not None:
            self.room_bytes -= self.charge(request)

    def begun(self, id: int) -> bool:
        """An answer's first token is here; True if it is news."""
        return self.prompts.pop(id, None) is not None

    def remove(self, request: RoutedRequest) -> None:
        """A request is here no more."""
        if self.running.pop(request.id, None) is None:
            return
        self.prompts.pop(request.id, None)
        self.rows[request.client] -= 1
        if not self.rows[request.client]:
            del self.rows[request.client]
        if self.room_bytes is not None:
            self.room_bytes += self.charge(request)
        if self.free_rows is not None:
            self.free_rows += 1
        self.refused = False
        self.paused_until_s = None

    def start_pause(self, now: float, pause_s: float) -> None:
        """A refusal that carried no time begins its pause; one that is over ends."""
        if self.refused:
            self.refused, self.paused_until_s = False, now + pause_s
        elif self.paused_until_s is not None and self.paused_until_s <= now:
            self.paused_until_s = None


def rank(ring: RingLoad, request: RoutedRequest, known_tokens: int) -> tuple[bool, float, float]:
    """How good a ring that knows so many of its tokens is for a request; less is better.

    When it would be through with all that it has and this, too. A known prefix is worth the
    tokens that need not be prefilled, but never more than ``PREFIX_WORTH_TOKENS``: what all have
    in common must not gather all of them on one ring.
    """
    worth = min(known_tokens, PREFIX_WORTH_TOKENS)
    own = request.answer_tokens + max(0, request.tokens - worth)
    done_s = (ring.work_tokens + own) / ring.tokens_s
    return not ring.takes_whole(request), done_s, -known_tokens
