"""Choosing tokens, with randomness that is counted and not streamed.

The draw at position p of an answer depends on the logits there, the history, the sampling values
and (seed, p), and on nothing else: not on the batch, the row, the lane, the cut, or on how often
the answer was taken up again by another ring.

Order: logit bias (-100 or less bans); the repetition penalty over prompt and answer; presence and
frequency penalties over the answer, as OpenAI defines them; log-probabilities; top-p, min-p,
top-k (mlx-lm's order and mathematics, ``mlx_lm/sample_utils.py``; its own functions are compiled
around the global random state of one thread, so they are written out here); then, at the
temperature, the Gumbel-max draw. Temperature 0 takes the likeliest token, the lowest id of equals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from parallax.proto import wire_pb2 as wire

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BANNED = -100.0  # OpenAI: a bias of -100 bans a token
_COLDEST = 1e30  # of 1 / temperature: more makes -inf of every log-probability in float32
_SMALLEST_TOP_P = 1e-9  # top-p of 0 means the likeliest token alone


def counted_key(seed: int, position: int) -> int:
    """The 64-bit key of one draw.

    Two rounds of SplitMix64's output function (Steele, Lea, Flood: "Fast splittable pseudorandom
    number generators", OOPSLA 2014): of the seed, then of that plus the position's multiple of the
    golden ratio. Rounds are bijective, so positions of one seed never share a key.
    """
    return _mix((_mix(seed & _MASK) + (position + 1) * _GOLDEN) & _MASK)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class TokenChooser:
    """One sequence's sampling values and the history they look at.

    Args:
        prompt: token ids before the answer.
        generated: token ids of the answer so far.
    """

    def __init__(
        self, sampling: wire.Sampling, prompt: Sequence[int], generated: Sequence[int]
    ) -> None:
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._min_p = sampling.min_p
        self._top_k = sampling.top_k
        self._seed = sampling.seed
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._repetition = sampling.repetition_penalty or 1.0
        self._bias = dict(sampling.logit_bias)
        self._position = len(generated)
        self._looks_back = self._presence or self._frequency or self._repetition != 1.0
        # How often each token of the vocabulary occurs, once its size is known.
        self._prompt = tuple(prompt) if self._repetition != 1.0 else ()
        self._generated = list(generated) if self._looks_back else []
        self._in_prompt: mx.array | None = None
        self._in_answer: mx.array | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token of the bare logits is the choice."""
        return self._temperature == 0 and not self._bias and not self._looks_back

    def choose(self, logits: mx.array) -> mx.array:
        """The next token, lazily, as a scalar.

        Args:
            logits: [vocabulary], any float type.
        """
        logits = self._process(logits.astype(mx.float32))
        if self._temperature == 0:
            return mx.argmax(logits)
        logprobs = self._filter(logits - mx.logsumexp(logits))
        key = mx.random.key(counted_key(self._seed, self._position))
        noise = mx.random.gumbel(logprobs.shape, key=key)
        return mx.argmax(logprobs * min(1 / self._temperature, _COLDEST) + noise)

    def choose_block(self, logits: mx.array, drafts: Sequence[int]) -> mx.array:
        """The next token, and the one after each of ``drafts``, lazily, shape [1 + drafts].

        Each is what :meth:`choose` gives once those before it have been taken. The chooser itself
        stays where it is.

        Args:
            logits: [1 + drafts, vocabulary].
        """
        chosen = [self.choose(logits[0])]
        position, in_answer = self._position, self._in_answer
        for place, draft in enumerate(drafts, 1):
            self.advance(draft)
            chosen.append(self.choose(logits[place]))
        self._position, self._in_answer = position, in_answer
        return mx.stack(chosen)

    def advance(self, token: int) -> None:
        """Takes ``token`` as the answer's next."""
        self._position += 1
        if self._in_answer is not None:
            if token < self._in_answer.shape[0]:  # the logits may be fewer than ids
                self._in_answer = self._in_answer.at[token].add(1)
        elif self._looks_back:
            self._generated.append(token)

    def _process(self, logits: mx.array) -> mx.array:
        vocabulary = logits.shape[-1]
        bias = {token: value for token, value in self._bias.items() if token < vocabulary}
        if bias:
            values = mx.array(list(bias.values()), mx.float32)
            values = mx.where(values <= _BANNED, -math.inf, values)
            logits = logits.at[mx.array(list(bias))].add(values)
        if not self._looks_back:
            return logits
        if self._in_prompt is None or self._in_answer is None:
            self._in_prompt = _count(self._prompt, vocabulary)
            self._in_answer = _count(self._generated, vocabulary)
        counts = self._in_answer
        if self._repetition != 1.0:
            penalty = self._repetition
            seen = (self._in_prompt + counts) > 0
            penalised = mx.where(logits < 0, logits * penalty, logits / penalty)
            logits = mx.where(seen, penalised, logits)
        if self._presence or self._frequency:
            logits = logits - (self._presence * (counts > 0) + self._frequency * counts)
        return logits

    def _filter(self, logprobs: mx.array) -> mx.array:
        if self._top_p < 1:
            logprobs = top_p(logprobs, max(self._top_p, _SMALLEST_TOP_P))
        if self._min_p > 0:
            logprobs = min_p(logprobs, self._min_p)
        if 0 < self._top_k < logprobs.shape[-1]:
            logprobs = top_k(logprobs, self._top_k)
        return logprobs


def draw(
    logits: mx.array, sampling: wire.Sampling, prompt: Sequence[int], generated: Sequence[int]
) -> int:
    """The token that follows ``prompt`` and ``generated``, from their logits [vocabulary]."""
    token = TokenChooser(sampling, prompt, generated).choose(logits).item()
    return cast(int, token)


def choose_rows(logits: mx.array, choosers: Sequence[TokenChooser]) -> mx.array:
    """One token for each row of logits [rows, vocabulary], lazily, shape [rows]."""
    if all(chooser.is_plain for chooser in choosers):
        return mx.argmax(logits, axis=-1)
    return mx.stack([chooser.choose(logits[row]) for row, chooser in enumerate(choosers)])


def choose_block(logits: mx.array, chooser: TokenChooser, drafts: Sequence[int]) -> mx.array:
    """One sequence's next token and those after ``drafts``: logits [1 + drafts, vocabulary]."""
    if chooser.is_plain:
        return mx.argmax(logits, axis=-1)
    return chooser.choose_block(logits, drafts)


def top_p(logprobs: mx.array, mass: float) -> mx.array:
    """Keeps the likeliest tokens that together have at least ``mass`` of the probability."""
    ascending = mx.sort(logprobs)
    probabilities = mx.exp(ascending)
    above = mx.cumsum(probabilities, reverse=True, inclusive=False)
    dropped = (above >= mass * (above[:1] + probabilities[:1])).sum(keepdims=True)
    return mx.where(logprobs < ascending[dropped], -math.inf, logprobs)


def min_p(logprobs: mx.array, share: float) -> mx.array:
    """Keeps tokens at least ``share`` as likely as the likeliest."""
    return mx.where(logprobs < logprobs.max() + math.log(share), -math.inf, logprobs)


def top_k(logprobs: mx.array, count: int) -> mx.array:
    """Keeps the ``count`` likeliest tokens."""
    others = mx.argpartition(-logprobs, kth=count - 1)[count:]
    return _put(logprobs, others, mx.array(-math.inf, logprobs.dtype))


def _put(logits: mx.array, ids: mx.array, values: mx.array) -> mx.array:
    return mx.put_along_axis(logits, ids, mx.broadcast_to(values, ids.shape), axis=-1)


def _count(tokens: Sequence[int], vocabulary: int) -> mx.array:
    """How often each of the vocabulary occurs, float32 [vocabulary]; other ids count nowhere."""
    counts = mx.zeros((vocabulary,))
    known = [token for token in tokens if token < vocabulary]
    return counts.at[mx.array(known)].add(1) if known else counts
