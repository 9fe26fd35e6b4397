"""Requests between the queue and the rings: the shell around router and lifecycle."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress

from parallax.fabric.credentials import Credentials
from parallax.fabric.errors import NoRing, ParallaxError, RingLost
from parallax.fabric.limits import Limits
from parallax.fabric.tasks import Tasks
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.generation import Finish, Generation, Token
from parallax.scheduler.heads import HeadLink
from parallax.scheduler.journal import Journal
from parallax.scheduler.journal_entries import Accepted, Ended, Entry, Moved, Started
from parallax.scheduler.known_prefixes import KnownPrefixes
from parallax.scheduler.lifecycle import Phase, Request
from parallax.scheduler.router import Router
from parallax.scheduler.row_cost import row_bytes

log = logging.getLogger(__name__)

TICK_S = 0.5
EXPECTED_TOKENS = 512  # of an answer, where it may be longer; what it really took is settled later
LOSSES_IN_A_ROW = 8  # rings that broke on an answer, with not one token in between
SUSPECT_LOSSES = 3  # after so many a ring runs one such answer at a time: others may be innocent


class _Answer:
    """What has arrived for one request and its client has not taken yet."""

    __slots__ = ("events", "news")

    def __init__(self) -> None:
        self.events: deque[Token | Finish | ParallaxError] = deque()  # max_tokens at most
        self.news = asyncio.Event()

    def put(self, event: Token | Finish | ParallaxError) -> None:
        self.events.append(event)
        self.news.set()


class Dispatcher:
    """Queues requests, sends them to rings, and sends them again when a ring breaks.

    Args:
        limits: queue and time-outs.
        credentials: what heads are shown.
        lost: told when a head's stream broke; the epoch is then over.
        rings_planned: how many there are to be; requests may wait for those that do not serve yet.
        journal: told what becomes of every request.
        missing_bytes: how much memory the model lacks, where it does not fit.
    """

    def __init__(
        self,
        limits: Limits,
        credentials: Credentials,
        lost: Callable[[int, ParallaxError], None],
        rings_planned: Callable[[], int] = lambda: 0,
        journal: Journal | None = None,
        missing_bytes: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._limits = limits
        self._credentials = credentials
        self._lost = lost
        self._rings_planned = rings_planned
        self._journal = journal
        self._missing_bytes = missing_bytes
        self._router = Router(limits, self._known_tokens)
        self._prefixes = KnownPrefixes()
        self._requests: dict[int, Request] = {}
        self._answers: dict[int, _Answer] = {}
        self._links: dict[int, HeadLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)
        self._tasks = Tasks()
        self.loads: dict[int, wire.HeadLoad] = {}
        self.refused = 0  # tokens and ends of attempts that are over
        self._paused = False
        self._refuses = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    def start(self) -> None:
        """Begins to watch deadlines."""
        self._tasks.start(self._tick())

    async def stop(self) -> None:
        """Ends every request with a retryable error, and every stream."""
        await self._tasks.stop()
        for request in list(self._requests.values()):
            self._fail(request, _stopping())
        for epoch in list(self._links):
            self.ring_down(epoch)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def refuse(self) -> None:
        """Takes no new request from now on: the scheduler is stopping."""
        self._refuses = True

    async def drained(self, timeout_s: float) -> None:
        """Returns when no request runs on a ring or is about to, or after ``timeout_s``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.running or (self.waiting and self._links and not self._paused):
                    self._quiet.clear()
                    await self._quiet.wait()

    # ------------------------------------------------------------------- rings

    def ring_up(
        self,
        epoch: int,
        node_id: str,
        endpoints: list[wire.Endpoint],
        slots: int,
        tokens_s: float,
        *,
        context_tokens: int = 0,
        costs: Sequence[wire.CacheCost] = (),
        chunk_tokens: int = 0,
    ) -> None:
        """A ring serves, at about this speed: requests may go there.

        ``context_tokens`` is the longest that it takes (0: any), ``costs`` what caches cost
        its stages, ``chunk_tokens`` how it prefills (0: unknown).
        """
        self._links[epoch] = HeadLink(
            epoch, node_id, endpoints, self, self._limits, self._credentials
        )
        self._router.ring_up(
            epoch,
            slots,
            tokens_s,
            context_tokens=context_tokens,
            row_bytes=row_bytes(costs),
            chunk_tokens=chunk_tokens,
            stages=max(1, len(costs)),
        )
        self._dispatch()

    def ring_down(self, epoch: int, *, moved: bool = False) -> None:
        """An epoch is over: its requests go back to the front of the queue.

        ``moved``: it did not break, another ring takes its place.
        """
        link = self._links.pop(epoch, None)
        self.loads.pop(epoch, None)
        self._prefixes.forget(epoch)
        if link is None:
            return
        task = asyncio.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        for number in self._router.ring_down(epoch):
            request = self._requests[number]
            if not request.ring_lost(epoch, moved=moved):
                continue
            self._note(Moved(number, request.attempt, epoch, "moved" if moved else "broke"))
            if request.losses >= LOSSES_IN_A_ROW:
                self._fail(request, _hopeless(request.losses))
            else:
                self._router.requeue_front(
                    number,
                    tokens=request.length,
                    begun=bool(request.tokens),
                    suspect=request.losses >= SUSPECT_LOSSES,
                )
        self._quiet.set()
        self._dispatch()

    def check_place(self, client: str) -> None:
        """Raises QueueFull when one more request of this client could not wait."""
        self._router.check_place(client)

    @property
    def _ring_coming(self) -> bool:
        return self._rings_planned() > len(self._links)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._router.waiting

    @property
    def running(self) -> int:
        """Requests on rings."""
        return self._router.running

    def pause(self) -> None:
        """Sends nothing to rings until :meth:`resume`: the model is being changed."""
        self._paused = True

    def resume(self) -> None:
        """Sends requests to rings again."""
        self._paused = False
        self._dispatch()

    def fail_all(self, error: ParallaxError) -> None:
        """Ends every request with an error."""
        for request in list(self._requests.values()):
            self._fail(request, error)

    # ---------------------------------------------------------------- requests

    async def generate(self, generation: Generation) -> AsyncGenerator[Token | Finish, None]:
        """One request, from the queue to its one end; closing it cancels the request.

        Raises:
            NoRing, PromptTooLong, QueueFull: at once.
            QueueTimeout, RingLost: after the wait.
        """
        if self._refuses:
            raise _stopping()
        now = time.monotonic()
        number = next(self._ids)
        request = Request(number, generation, deadline=now + self._limits.request_s)
        prompt = len(generation.prompt)
        self._router.enqueue(
            number,
            generation.client,
            prompt + min(generation.max_tokens, EXPECTED_TOKENS),
            now,
            tokens=prompt,
            most_tokens=prompt + generation.max_tokens,
            ring_coming=self._ring_coming,
        )
        self._note(
            Accepted(number, generation.answer, generation.choice, prompt, generation.max_tokens)
        )
        self._requests[number] = request
        answer = self._answers[number] = _Answer()
        try:
            self._dispatch()
            while True:
                await answer.news.wait()
                answer.news.clear()
                while answer.events:
                    event = answer.events.popleft()
                    if isinstance(event, ParallaxError):
                        raise event
                    yield event
                    if isinstance(event, Finish):
                        return
        finally:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        link = self._links.get(request.epoch)
        running = request.phase is Phase.RUNNING
        ended = request.phase is Phase.ENDED
        if not ended:
            self._note(Ended(request.id, "closed", len(request.tokens)))
        cancel = request.cancel()
        if cancel is not None and link is not None:
            link.cancel(cancel)
        if running:
            self._router.finished(request.epoch, request.id, request.length)
        elif not ended:
            self._router.cancel(request.id)
        self._served(request)
        self._requests.pop(request.id, None)
        self._answers.pop(request.id, None)
        self._quiet.set()
        self._dispatch()

    def _dispatch(self) -> None:
        if self._paused or not self._router.waiting:
            return
        now = time.monotonic()
        for send in self._router.dispatch(now):
            request = self._requests[send.id]
            self._links[send.epoch].submit(request.start(send.epoch))
            self._note(Started(request.id, request.attempt, send.epoch, len(request.tokens)))
            self._served(request)

    def _known_tokens(self, epoch: int, number: int) -> int:
        return self._prefixes.length(epoch, self._requests[number].history)

    def _served(self, request: Request) -> None:
        """What a ring now has, or soon will have."""
        if request.epoch in self._links:
            self._prefixes.served(request.epoch, request.history)

    def _fail(self, request: Request, error: ParallaxError) -> None:
        if request.phase is Phase.ENDED:
            return
        if request.phase is Phase.RUNNING:
            cancel = request.cancel()
            link = self._links.get(request.epoch)
            if cancel is not None and link is not None:
                link.cancel(cancel)
            self._router.finished(request.epoch, request.id, request.length)
        else:
            self._router.cancel(request.id)
        request.fail(error)
        self._note(Ended(request.id, "error", len(request.tokens), type(error).__name__))
        self._quiet.set()
        self._answers[request.id].put(error)

    # ------------------------------------------------------------ what heads say

    def head_report(self, report: wire.HeadReport) -> None:
        """Tokens and ends of one ring step."""
        news = False
        deadline = time.monotonic() + self._limits.request_s
        for event in report.tokens:
            request = self._requests.get(event.request)
            if request is None or request.epoch != report.epoch:
                self.refused += 1
                continue
            lost = request.losses
            token = request.take(event)
            if token is None:
                self.refused += 1
            else:
                request.deadline = deadline
                if lost:
                    self._router.cleared(request.id)
                news |= self._router.begun(request.id)
                if self._journal is not None:
                    self._journal.token(request.id, event.attempt, token.index, token.id)
                self._answers[request.id].put(token)
        for end in report.ends:
            self._ended(report.epoch, end)
        if report.HasField("load") and report.epoch in self._links:
            self.loads[report.epoch] = report.load
            outstanding = report.load.decoding + report.load.prefilling
            room = report.load.budget_bytes - report.load.charged_bytes
            self._router.load(
                report.epoch,
                report.load.free_rows,
                outstanding,
                room if report.load.budget_bytes else None,
            )
            news = True
        if news:
            self._dispatch()

    def head_lost(self, epoch: int, error: ParallaxError) -> None:
        """The stream to a head broke."""
        if epoch in self._links:
            self._lost(epoch, error)

    def _ended(self, epoch: int, end: wire.EndEvent) -> None:
        request = self._requests.get(end.request)
        if request is None or request.epoch != epoch or request.phase is not Phase.RUNNING:
            return
        if end.attempt != request.attempt:
            return  # of an attempt that went before, on the same ring
        short = len(request.tokens) < request.generation.max_tokens
        outgrown = end.reason == wire.END_LENGTH and short
        outgrown = outgrown and self._router.fits_another(epoch, request.length)
        if outgrown:  # this ring's caches, but not those of another one, which goes on with it
            end = wire.EndEvent(request=end.request, attempt=end.attempt, reason=wire.END_REFUSED)
        finish = request.end(end)
        if finish is not None:
            self._note(Ended(request.id, finish.reason.value, len(request.tokens)))
            self._router.finished(epoch, request.id, request.length)
            self._quiet.set()  # its reader may be slow
            self._answers[request.id].put(finish)
        else:
            self._note(Moved(request.id, request.attempt, epoch, "refused"))
            self._router.requeue_front(
                request.id,
                tokens=request.length,
                refused=not outgrown,
                begun=bool(request.tokens),
            )

    def _note(self, entry: Entry) -> None:
        if self._journal is not None:
            self._journal.note(entry)

    # ------------------------------------------------------------------- clock

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._look(time.monotonic())
            except Exception:  # deadlines must be kept all the same
                log.exception("watching the deadlines failed")

    def _look(self, now: float) -> None:
        for number in self._router.expired(now):
            request = self._requests.get(number)
            if request is not None:
                self._fail(request, self._expired(request))
        for number in () if self._ring_coming else self._router.misfits():
            request = self._requests.get(number)
            if request is not None:
                self._fail(request, self._router.too_long(request.length))
        for request in list(self._requests.values()):
            if now > request.deadline:
                running = request.phase is Phase.RUNNING
                self._fail(request, self._late() if running else self._expired(request))
        self._dispatch()

    def _expired(self, request: Request) -> ParallaxError:
        again = {"retry_after_s": self._limits.retry_after_s}
        if request.tokens or request.losses:
            return RingLost(
                "The nodes that worked on this answer are gone",
                self._why_lost(request),
                "Send the request again",
                **again,
            )
        if not self._links:
            return NoRing(
                "No ring serves this model",
                "nodes are missing or still loading",
                "See 'parallax status', and join more nodes",
                missing_bytes=self._missing_bytes(),
                **again,
            )
        if not self._router.fits_any(request.length):
            return self._router.too_long(request.length)
        return self._router.timeout()

    def _late(self) -> ParallaxError:
        """Of an answer on a ring that serves, but gives it nothing."""
        return RingLost(
            "The answer took too long",
            f"no token of it came for {self._limits.request_s:g} s",
            "Ask with a shorter prompt, or raise `limits.request_s`",
        )

    def _why_lost(self, request: Request) -> str:
        """Why nobody could go on with a request that had news."""
        missing = self._missing_bytes()
        if missing and not self._links:
            return f"without them {missing:,} bytes of memory are missing for the model"
        if self._links and not self._router.fits_any(request.length):
            return (
                f"with its {request.length} tokens it does not fit the caches of what is left, "
                f"which take {self._router.most_tokens}"
            )
        return "no other ring could go on with it in time"


def _hopeless(losses: int) -> ParallaxError:
    return RingLost(
        "The rings break on this answer",
        f"{losses} in a row did, before its next token",
        "Send the request again; the scheduler's log says why they broke",
    )


def _stopping() -> ParallaxError:
    return RingLost("The scheduler is stopping", fix="Send the request again")
