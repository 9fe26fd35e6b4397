"""One request from acceptance to its one end. Pure.

The scheduler keeps each request's token ids. When its ring breaks, or its head
hands it back, the request goes again, as its next attempt, with what it has;
only the current attempt's next index is ever taken. So the client sees each
token once, whatever happened below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from parallax.fabric.errors import MessageRefused, ParallaxError
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.generation import Finish, Generation, Reason, Sampling, Token


class Phase(Enum):
    """Where a request is."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Request:
    """One answer: what was asked, what has been generated, where it runs."""

    id: int
    generation: Generation
    deadline: float  # monotonic; later with each token
    phase: Phase = Phase.QUEUED
    epoch: int = 0
    attempt: int = 0
    tokens: list[int] = field(default_factory=list)
    losses: int = 0  # rings that broke on it since its last token
    error: ParallaxError | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.generation.prompt) + len(self.tokens)

    @property
    def history(self) -> tuple[int, ...]:
        """Prompt and answer so far."""
        prompt = self.generation.prompt
        return (*prompt, *self.tokens) if self.tokens else prompt

    def start(self, epoch: int) -> wire.Submit:
        """The request goes to a ring: its next attempt."""
        self.phase = Phase.RUNNING
        self.epoch = epoch
        self.attempt += 1
        return wire.Submit(
            request=self.id,
            attempt=self.attempt,
            prompt=self.generation.prompt,
            generated=self.tokens,
            sampling=to_wire(self.generation.sampling),
            max_tokens=self.generation.max_tokens,
            end_tokens=sorted(self.generation.end_tokens),
        )

    def take(self, event: wire.TokenEvent) -> Token | None:
        """A token arrives; None when it is not the current attempt's next one.

        Raises:
            MessageRefused: the model has no such token.
        """
        current = self.phase is Phase.RUNNING and event.attempt == self.attempt
        if not current or event.index != len(self.tokens):
            return None
        if len(self.tokens) >= self.generation.max_tokens:
            return None
        if event.token >= self.generation.vocabulary:  # it would break the ring that goes on
            raise MessageRefused(f"A head gives token {event.token}, which the model does not have")
        self.tokens.append(event.token)
        self.losses = 0
        return Token(event.index, event.token, 0 if event.index else event.cached_tokens)

    def end(self, event: wire.EndEvent) -> Finish | None:
        """The ring says that the attempt ended.

        Returns:
            The request's end; None when it is an old attempt's, or when the
            request must go again (its phase is then QUEUED).
        """
        if self.phase is not Phase.RUNNING or event.attempt != self.attempt:
            return None
        if event.reason in (wire.END_STOP, wire.END_LENGTH):
            self.phase = Phase.ENDED
            return Finish(Reason.STOP if event.reason == wire.END_STOP else Reason.LENGTH)
        self.phase = Phase.QUEUED
        return None

    def ring_lost(self, epoch: int, *, moved: bool = False) -> bool:
        """An epoch is over; True when this request ran there and must go again.

        A ring that ``moved`` did not break on anything: it does not count against the request.
        """
        if self.phase is Phase.RUNNING and self.epoch == epoch:
            self.phase = Phase.QUEUED
            self.losses += not moved
            return True
        return False

    def fail(self, error: ParallaxError) -> None:
        """The request ends with an error, once."""
        if self.phase is not Phase.ENDED:
            self.phase = Phase.ENDED
            self.error = error

    def cancel(self) -> wire.Cancel | None:
        """The client is gone; what to tell the ring, if it runs on one."""
        running = self.phase is Phase.RUNNING
        self.phase = Phase.ENDED
        return wire.Cancel(request=self.id, attempt=self.attempt) if running else None


def to_wire(sampling: Sampling) -> wire.Sampling:
    """Sampling values as they cross the wire."""
    return wire.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
    )
