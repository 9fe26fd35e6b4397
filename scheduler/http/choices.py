"""The answers of one request as they grow: text, counts, times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from parallax.scheduler.generation import Token
from parallax.scheduler.http.flow import Arrival
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.text.answer import AnswerText


class Choices:
    """Tokens of every choice in, text out; knows usage and speed at any time."""

    def __init__(
        self,
        answers: Sequence[AnswerText],
        *,
        prompt_tokens: int,
        began_s: float,
        metrics: Metrics,
    ) -> None:
        self.answers = answers
        self.open = len(answers)
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = 0  # of the first choice: the others begin with its prompt
        self._began_s = began_s
        self._first_s: float | None = None
        self._last_s = began_s
        self._latest: list[float | None] = [None] * len(answers)
        self._metrics = metrics

    def take(self, batch: Iterable[Arrival]) -> list[tuple[int, str, str | None]]:
        """What these events add: (choice, text, finish reason where it ends now)."""
        added: list[tuple[int, str, str | None]] = []
        for index, event, at_s in batch:
            answer = self.answers[index]
            if answer.finish_reason is not None:
                continue  # came after a stop string
            if isinstance(event, Token):
                self._time(index, at_s)
                if event.cached_tokens and index == 0:
                    self._cached_tokens = event.cached_tokens
                text = answer.push(event.id)
            else:
                text = answer.finish(event.reason)
            reason = answer.finish_reason
            if text or reason is not None:
                added.append((index, text, reason))
            if reason is not None:
                self.open -= 1
        return added

    @property
    def tokens(self) -> int:
        """Completion tokens delivered so far, over all choices."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def outcome(self) -> str:
        """How the first choice ended."""
        return self.answers[0].finish_reason or "open"

    def usage(self) -> dict[str, Any]:
        """OpenAI's ``usage``; its details only where there is something to tell."""
        tokens = self.tokens
        usage: dict[str, Any] = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
        }
        if self._cached_tokens:
            usage["prompt_tokens_details"] = {"cached_tokens": self._cached_tokens}
        return usage

    def speed(self) -> dict[str, Any]:
        """Tokens per second after the first, time to the first, and how many."""
        first_s = self._last_s if self._first_s is None else self._first_s
        tokens, decode_s = self.tokens, self._last_s - first_s
        after_first = tokens - len(self.answers)
        return {
            "tps": round(after_first / decode_s, 2) if decode_s > 0 and after_first > 0 else None,
            "ttft_ms": round((first_s - self._began_s) * 1000, 2),
            "tokens": tokens,
        }

    def _time(self, index: int, at_s: float) -> None:
        latest = self._latest[index]
        if latest is not None:
            self._metrics.observe_between(at_s - latest)
        elif self._first_s is None:
            self._first_s = at_s
            self._metrics.observe_first(at_s - self._began_s)
        self._latest[index] = self._last_s = at_s
