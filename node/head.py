"""The head of a ring: the shell that carries out what the conductor decides.

Frames go to this node's own stage, answers to the scheduler's stream. Answers
that wait for the stream are merged into one report, so a slow scheduler costs
memory only for the tokens themselves; one of very many leaves in parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator

from parallax.fabric.bounds import MOST_EVENTS, check_submit
from parallax.fabric.errors import FrameRefused, InternalError, ParallaxError, StageStuck
from parallax.fabric.limits import Limits
from parallax.node.conductor import Conductor, Output
from parallax.node.ring import RingMember
from parallax.proto import wire_pb2 as wire

log = logging.getLogger(__name__)

FIRST_PATIENCE = 10  # times as long before an epoch's first step: shaders compile then


# Answers leave a moment after the frames that their return made room for: the MLX thread is then
# building that frame's graph, and writing at the same time would fight it for the interpreter
# (measured with one stream on two cores: every step a fifteenth longer).
REPORT_AFTER_S = 0.002


class Head:
    """Conductor, clock and streams of one ring's first stage.

    Frames return on a data connection's thread, everything else happens on the event loop:
    whoever touches the conductor or the report holds the lock.
    """

    def __init__(self, form: wire.FormRing, limits: Limits) -> None:
        self._epoch = form.epoch
        self._stages = len(form.stages)
        self._orphan_s = form.shape.orphan_s or limits.orphan_s
        self._limits = limits
        self._conductor = Conductor(form.epoch, form.shape, len(form.stages), list(form.costs))
        self._member: RingMember | None = None
        self._report = wire.HeadReport(epoch=form.epoch)
        self._lock = threading.RLock()
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._report_is_due = False
        self._streams = 0
        self._orphan_since = time.monotonic()
        self._clock: asyncio.Task[None] | None = None

    def start(self, member: RingMember) -> None:
        """Begins to beat; frames go to ``member``'s stage."""
        self._member = member
        self._clock = asyncio.create_task(self._beat())

    async def stop(self) -> None:
        """Ends the clock."""
        if self._clock is not None:
            self._clock.cancel()
            await asyncio.gather(self._clock, return_exceptions=True)
        self._news.set()

    def returned(self, frame: wire.Frame) -> float | None:
        """Takes a frame that came back from the last stage. Any thread may call it.

        Returns:
            After how many seconds :meth:`report` is to follow; None if it need not.
        """
        with self._lock:
            if self._member is not None and self._member.carry_bytes_per_token:
                self._conductor.carry_bytes_per_token = self._member.carry_bytes_per_token
            try:
                out = self._conductor.returned(frame, time.monotonic())
            except (KeyError, ValueError):
                what = f"Frame {frame.number} came back unasked"
                self._end(FrameRefused(what, epoch=self._epoch))
                return None
            except Exception as error:
                self._defect(error)
                return None
            if not self._carry_out(out) or self._report_is_due:
                return None
            self._report_is_due = True
            return REPORT_AFTER_S

    def report(self) -> None:
        """Lets what :meth:`returned` brought leave for the scheduler. Any thread may call it."""
        with self._lock:
            self._report_is_due = False
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._news.set)

    async def serve(self, orders: AsyncIterator[wire.HeadOrder]) -> AsyncGenerator[wire.HeadReport]:
        """One stream of the scheduler: its orders in, this ring's answers out."""
        self._streams += 1
        intake = asyncio.create_task(self._take(orders))
        intake.add_done_callback(lambda _: self._news.set())
        try:
            self._news.set()
            while not intake.done() and self._member is not None and not self._member.ended:
                await self._news.wait()
                self._news.clear()
                with self._lock:
                    report, self._report = self._report, wire.HeadReport(epoch=self._epoch)
                    report.load.CopyFrom(self._conductor.load())
                for part in parts_of(report):
                    yield part
        finally:
            self._streams -= 1
            self._orphan_since = time.monotonic()
            intake.cancel()
            await asyncio.gather(intake, return_exceptions=True)

    def add_health(self, health: wire.StageHealth) -> None:
        """What only the head knows of its ring."""
        health.ring_round_trip_s = self._conductor.round_trip_s
        health.drafted_tokens = self._conductor.drafted_tokens
        health.accepted_tokens = self._conductor.accepted_tokens

    async def _take(self, orders: AsyncIterator[wire.HeadOrder]) -> None:
        try:
            async for order in orders:
                if order.epoch != self._epoch:
                    continue
                if order.HasField("submit"):
                    check_submit(order.submit)
                with self._lock:
                    if order.HasField("submit"):
                        waits = self._carry_out(self._conductor.submit(order.submit))
                    elif order.HasField("cancel"):
                        waits = self._carry_out(self._conductor.cancel(order.cancel))
                    else:
                        waits = False
                if waits:
                    self._news.set()
        except ParallaxError as error:
            self._end(error)
        except Exception as error:
            self._defect(error)

    async def _beat(self) -> None:
        due = time.monotonic()
        try:
            while True:
                due += self._limits.beat_s
                await asyncio.sleep(self._limits.beat_s)
                now = time.monotonic()
                # Late by more than a beat: this process was not given time to run, and what came
                # back meanwhile is still unread. Nobody else is to blame.
                starved = now - due > self._limits.beat_s
                due = now
                with self._lock:
                    self._tick(now, starved=starved)
        except Exception as error:
            self._defect(error)

    def _tick(self, now: float, *, starved: bool = False) -> None:
        orphaned = not self._streams and now - self._orphan_since > self._orphan_s
        if orphaned and not self._conductor.idle:
            self._carry_out(self._conductor.abandon())
        # No stage is slower than this in one frame, and a beat waits behind a frame of each.
        # A broken link shows much sooner; this is for what no stream tells.
        patience_s = self._limits.stuck_s * self._stages
        if not self._conductor.stepped:
            patience_s *= FIRST_PATIENCE
        quiet_s = self._conductor.quiet_s(now)
        if quiet_s > patience_s and not starved:
            self._end(
                StageStuck(
                    f"Nothing has come back through ring {self._epoch} for {quiet_s:.0f} s",
                    "a stage hangs, or frames get lost on the way",
                )
            )
        self._carry_out(self._conductor.beat(now))
        self._news.set()

    def _carry_out(self, out: Output) -> bool:
        """Sends frames, and keeps answers for the report; True when the report can wait for them.

        It waits a moment when frames left as well: building their graphs needs the interpreter.
        """
        if self._member is None or self._member.ended:
            return False
        try:
            for frame in out.frames:
                self._member.process(frame)
        except ParallaxError as error:
            self._end(error)
        if not out.tokens and not out.ends:
            return False
        self._report.tokens.extend(out.tokens)
        self._report.ends.extend(out.ends)
        if out.frames:
            return True
        self.report()
        return False

    def _defect(self, error: Exception) -> None:
        """Nobody awaits what fails here: it is logged, and the epoch is over."""
        log.error("the head of ring %d failed", self._epoch, exc_info=error)
        self._end(InternalError(f"The head failed: {type(error).__name__}: {error}"))

    def _end(self, error: ParallaxError) -> None:
        if self._member is not None:
            self._member.end(error)
        self.report()


def parts_of(report: wire.HeadReport) -> list[wire.HeadReport]:
    """The reports of at most :data:`MOST_EVENTS` tokens, and ends, that say the same.

    Tokens go before ends, and what the ring looks like after all of them goes last.
    """
    tokens, ends = report.tokens, report.ends
    if len(tokens) <= MOST_EVENTS and len(ends) <= MOST_EVENTS:
        return [report]
    most, epoch = MOST_EVENTS, report.epoch
    steps = [range(0, len(events), most) for events in (tokens, ends)]
    parts = [wire.HeadReport(epoch=epoch, tokens=tokens[at : at + most]) for at in steps[0]]
    parts += [wire.HeadReport(epoch=epoch, ends=ends[at : at + most]) for at in steps[1]]
    parts[-1].load.CopyFrom(report.load)
    return parts
