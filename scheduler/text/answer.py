"""One answer's tokens in, its text out."""

from __future__ import annotations

from collections.abc import Sequence

from parallax.scheduler.generation import Reason
from parallax.scheduler.text.detokenizer import Detokenizer
from parallax.scheduler.text.stops import StopMatcher


class AnswerText:
    """Detokeniser and stop strings of one answer.

    ``tokens`` counts what was delivered: every token up to the one that completed a
    stop string, that one included. Once ``finish_reason`` is set nothing more is taken.
    """

    __slots__ = ("_detokenizer", "_stops", "finish_reason", "tokens")

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops)
        self.tokens = 0
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """The text that can be shown after this token; may be empty."""
        if self.finish_reason is not None:
            return ""
        self.tokens += 1
        return self._show(self._detokenizer.add(token))

    def finish(self, reason: Reason) -> str:
        """The cluster ended the answer: the text that was held back until now."""
        if self.finish_reason is not None:
            return ""
        text = self._show(self._detokenizer.end())
        if self.finish_reason is None:
            text += self._stops.flush()
            self.finish_reason = reason.value
        return text

    def _show(self, text: str) -> str:
        text, met = self._stops.push(text)
        if met:
            self.finish_reason = Reason.STOP.value
        return text
