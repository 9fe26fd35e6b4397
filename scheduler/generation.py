"""What passes between text (HTTP, chat templates, stop strings) and the cluster (token ids).

Text turns a chat into a :class:`Generation`, the cluster answers with a stream
of :class:`Token` and exactly one :class:`Finish`, or raises one
:class:`~parallax.fabric.errors.ParallaxError`. Nothing above this seam knows of
rings; nothing below it knows of characters.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Sampling:
    """How each token is drawn. The seed is always set by the time a request is accepted."""

    seed: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # 1: off
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer to be generated."""

    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    end_tokens: frozenset[int]  # end-of-turn ids: they end the answer and are not delivered
    client: str = ""  # fair queueing is between clients
    answer: str = ""  # what the client knows the answer by
    choice: int = 0  # which one of that answer's
    vocabulary: int = 1 << 32  # ids below it are the model's, as its configuration says


@dataclass(frozen=True, slots=True)
class Token:
    """The next token of an answer; ``index`` counts from 0 without gaps.

    With the first one: how many of the prompt's tokens were in a cache and not computed.
    """

    index: int
    id: int
    cached_tokens: int = 0


class Reason(Enum):
    """Why the cluster ended an answer."""

    STOP = "stop"  # an end-of-turn token
    LENGTH = "length"  # max_tokens or the context


@dataclass(frozen=True, slots=True)
class Finish:
    """The last event of an answer that ended well."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that the cluster serves or is loading now."""

    name: str
    folder: Path  # config, tokenizer and weights on the scheduler's disk
    context_tokens: int
    created: int  # Unix seconds


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model that may be chosen, in the reference's shape."""

    name: str
    size: str  # parameters, as "0.6B"
    provider: str


class Cluster(Protocol):
    """What the HTTP layer needs of the cluster."""

    def generate(self, generation: Generation) -> AsyncGenerator[Token | Finish, None]:
        """Queue, route and run; closing the generator cancels the request.

        Raises:
            NoRing, QueueFull, QueueTimeout, RingLost, UnknownModel.
        """
        ...

    def check_place(self, client: str) -> None:
        """Whether one more of this client may wait, asked before any work is put into it.

        Raises:
            QueueFull: it may not.
        """
        ...

    def served(self) -> ServedModel | None:
        """The current model, or None before one is chosen."""
        ...

    def catalog(self) -> list[CatalogModel]:
        """Models that may be chosen: the built-in one, local ones, known hub ids."""
        ...

    def status(self) -> dict[str, object]:
        """The ``data`` of a ``cluster_status`` message."""
        ...

    def join_command(self) -> str:
        """``parallax join -s PEER_ID --token TOKEN``."""
        ...

    async def choose(self, model: str, nodes: int, local_network: bool) -> None:
        """Make this the cluster's model, on so many nodes; returns when it is accepted.

        Raises:
            ModelNotFound, ModelBroken, UnknownArchitecture.
        """
        ...
