"""What a ring's head may report: of the requests that were sent to it, each token once, one end.

Pure. A head that says more, or what cannot be, is not believed from then on: its ring ends. What
an honest one says always passes, however late it comes: the end of each request that was sent is
told once, nothing is told of it afterwards, and whoever reads late gets several reports.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallax.fabric.bounds import MOST_CHUNK, MOST_EVENTS, check
from parallax.fabric.errors import MessageRefused
from parallax.proto import wire_pb2 as wire

REPORT_BYTES = 256 << 10  # of one report: MOST_EVENTS of each kind, with the longest of numbers
MOST_OPEN = 65_536  # requests that were sent and of which no end was told
EVICTIONS_EACH = 8  # prefixes that one request may have kept, and more


@dataclass(slots=True)
class _Sent:
    """One attempt that the head works on."""

    next: int  # the place in the answer of the token that is due
    most: int
    history: int  # tokens that it came with


class HeadAccount:
    """What one head has been told and has said, in one epoch."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, int], _Sent] = {}
        self._submits = 0
        self._history = 0
        self._tokens = 0

    def sent(self, submit: wire.Submit) -> None:
        """A request goes to the head.

        Raises:
            MessageRefused: it has not told the end of far too many.
        """
        if len(self._open) >= MOST_OPEN:
            raise MessageRefused(f"It has not told the ends of {MOST_OPEN} requests")
        given = len(submit.generated)
        history = len(submit.prompt) + given
        self._open[submit.request, submit.attempt] = _Sent(given, submit.max_tokens, history)
        self._submits += 1
        self._history += history

    def take(self, report: wire.HeadReport) -> None:
        """Checks a report before anybody acts on it.

        Raises:
            MessageRefused: it cannot be true.
        """
        for name, events in (("tokens", len(report.tokens)), ("ends", len(report.ends))):
            if events > MOST_EVENTS:
                raise _refused(name, f"{events} of them in one report, more than {MOST_EVENTS}")
        for event in report.tokens:
            sent = self._open.get((event.request, event.attempt))
            if sent is None:
                raise _refused("tokens", _unknown(event))
            if event.index != sent.next or event.index >= sent.most:
                raise _refused("index", f"token {event.index} of an answer, not {sent.next}")
            if event.cached_tokens > sent.history:
                kept = f"{event.cached_tokens} of {sent.history} tokens"
                raise _refused("cached_tokens", f"{kept} were in its caches")
            sent.next += 1
        self._tokens += len(report.tokens)
        for end in report.ends:
            if self._open.pop((end.request, end.attempt), None) is None:
                raise _refused("ends", _unknown(end))
        if report.HasField("load"):
            self._check_load(report.load)

    def _check_load(self, load: wire.HeadLoad) -> None:
        check(load)
        prefixes, rows = load.prefixes, load.decoding + load.prefilling
        bounds = (
            ("decoding", rows, len(self._open)),
            ("lanes", load.lanes, len(self._open)),
            ("accepted_tokens", load.accepted_tokens, load.drafted_tokens),
            ("drafted_tokens", load.drafted_tokens, self._most_drafted),
            ("prompts", prefixes.prompts, self._submits),
            ("hits", prefixes.hits, prefixes.prompts),
            ("saved_tokens", prefixes.saved_tokens, self._history),
            ("evictions", prefixes.evictions, EVICTIONS_EACH * self._submits),
        )
        for name, value, most in bounds:
            if value > most:
                raise _refused(name, f"it is {value}, and cannot be over {most}")

    @property
    def _most_drafted(self) -> int:
        """Each draw may void what was assumed after it; some draws end answers, untold."""
        return MOST_CHUNK * (self._tokens + 2 * self._submits)


def _unknown(event: wire.TokenEvent | wire.EndEvent) -> str:
    return f"request {event.request}, attempt {event.attempt}, is none that it works on"


def _refused(field: str, why: str) -> MessageRefused:
    return MessageRefused("A report makes no sense", f"{field}: {why}", field=field)
