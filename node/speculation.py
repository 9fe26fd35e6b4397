"""Blocks of a lone answer in the ring: what was assumed in them, and what their return means.

Pure. A block is a decode frame of one row: tokens of the history from ``start`` on. Its first token
may still be on its way to be drawn: it is then a draft, like the block's others. What comes back
are the draws after each of its tokens. A draft stands if it is the draw at its place; at the first
that is not, the draw is delivered, whatever was assumed behind it is void, and the caches must be
cut to the history before the draw. Since every draw is counted by seed and position, the answer is
the same with and without drafts.

Each token of the answer is also compared with what the history foretold, sent or not: so the odds
of drafts are always known, and where they are bad nothing is sent at all. An answer begins with the
odds of those before it, which tend to be alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from parallax.node.drafts import Drafts
from parallax.node.pace import Pace
from parallax.node.sequences import Sequence
from parallax.proto import wire_pb2 as wire

READ_TOKENS = 512  # of a history at once, so that a long one holds nothing up
LEARNING = 0.25  # weight of the newest draft in the odds
CARRIED = 0.5  # weight of the newest answer in what the next one begins with
# By tokens that agree before the place followed (from 2, 3, 4, 8, 16 on): the odds at first.
LONGEST = (2, 3, 7, 15)
PRIORS = (0.15, 0.25, 0.5, 0.7, 0.85)


@dataclass(slots=True, eq=False)
class Block:
    """Tokens of one frame; ``start`` is the place of the first one in the history."""

    start: int
    tokens: list[int]
    sent_at: float | None = None  # if it is the first one, of one token
    alone: bool = False  # nothing else has been in the ring since then
    void: bool = False  # something assumed before it was wrong, or its answer has ended

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Judged:
    """What a block's return means: the answer's next tokens, and whether drafts were wrong."""

    tokens: list[int]
    wrong: bool


@dataclass(slots=True)
class _Odds:
    """How often the foretold token came, by length of the match."""

    shares: list[float] = field(default_factory=lambda: list(PRIORS))

    def of(self, matched: int) -> float:
        return self.shares[_rank(matched)] if matched else 0.0

    def learn(self, matched: int, hit: bool) -> None:
        rank = _rank(matched)
        self.shares[rank] += LEARNING * (hit - self.shares[rank])

    def after(self, answer: _Odds) -> None:
        """Goes on from what an answer ended with that had begun with these odds."""
        for rank, share in enumerate(answer.shares):
            self.shares[rank] += CARRIED * (share - self.shares[rank])


class Speculation:
    """Drafts for whichever sequence is alone in the ring.

    Args:
        stages: how many the ring has.
        shape: ``draft_tokens`` is the most tokens assumed at once, 0 for none; ``block_tokens``
            the most in one frame.
        costs: their ``trim_tokens`` say how long caches can still be cut.
    """

    def __init__(self, stages: int, shape: wire.RingShape, costs: list[wire.CacheCost]) -> None:
        self._most_ahead = shape.draft_tokens
        self._context_tokens = shape.context_tokens
        self._trim_tokens = min((cost.trim_tokens for cost in costs), default=0)
        self.possible = shape.draft_tokens > 0 and self._trim_tokens > 0
        self._pace = Pace(stages, shape.block_tokens)
        self._sequence: Sequence | None = None
        self._drafts = Drafts()
        self._usual = _Odds()  # of the answers so far
        self._odds = _Odds()
        self._chain: deque[Block] = deque()
        self._returned_at: float | None = None  # of the block before the oldest in the ring
        self.drafted = 0
        self.accepted = 0

    @property
    def in_flight(self) -> bool:
        """Whether a block is in the ring whose return will bring tokens."""
        return bool(self._chain)

    def follow(self, sequence: Sequence) -> None:
        """Reads on in the history of the sequence that is alone now."""
        if sequence is not self._sequence:
            self._sequence = sequence
            self._drafts = Drafts()
            self._usual.after(self._odds)
            self._odds = _Odds(list(self._usual.shares))
        drafts, answer = self._drafts, len(sequence.prompt)
        begin = len(drafts)
        for place, token in enumerate(
            sequence.slice(begin, min(sequence.length, begin + READ_TOKENS)), begin
        ):
            matched = drafts.matched
            hit = drafts.append(token)
            if hit is not None and place >= answer:
                self._odds.learn(matched, hit)

    def first(self, sequence: Sequence, now: float | None, *, alone: bool) -> Block:
        """The block that begins with the history's last token; drafts may follow in it.

        Args:
            alone: nothing else is in the ring.
        """
        self.follow(sequence)
        start = sequence.length - 1
        block = Block(start, [sequence.last_token, *self._drafted(sequence, 1)])
        self.drafted += len(block.tokens) - 1
        if len(block.tokens) == 1:
            block.sent_at, block.alone = now, alone
        self._returned_at = None
        self._chain.append(block)
        return block

    def ahead(self, sequence: Sequence) -> Block | None:
        """One more block of drafts behind those in the ring, if it is worth sending now."""
        if not self._chain:
            return None
        self.follow(sequence)
        drafts = self._drafted(sequence, 0)
        if not drafts:
            return None
        self.drafted += len(drafts)
        self._chain[0].alone = False
        block = Block(self._chain[-1].end, drafts)
        self._chain.append(block)
        return block

    def returned(
        self, block: Block, drawn: Tokens[int], now: float | None, stage_s: float
    ) -> Judged:
        """A block that is not void came back with what was drawn after each of its tokens.

        Raises:
            ValueError: it is not the oldest in the ring, or has another number of draws.
        """
        if not self._chain or self._chain[0] is not block or len(drawn) != len(block.tokens):
            raise ValueError(f"{len(drawn)} draws for a block from token {block.start} on")
        self._chain.popleft()
        self._pace.observe(len(block.tokens), stage_s)
        if now is not None:
            if block.sent_at is not None:
                self._pace.observe_round_trip(now - block.sent_at, alone=block.alone)
            elif self._returned_at is not None:
                self._pace.observe_period(len(block.tokens), now - self._returned_at)
        self._returned_at = now if self._chain else None
        assumed = block.tokens[1:] + (self._chain[0].tokens[:1] if self._chain else [])
        for place, (draft, draw) in enumerate(zip(assumed, drawn, strict=False)):
            if draft != draw:
                self.accepted += place
                self._void()
                return Judged(list(drawn[: place + 1]), wrong=True)
        self.accepted += len(assumed)
        return Judged(list(drawn), wrong=False)

    def forget(self, sequence: Sequence) -> bool:
        """The sequence has ended; whether blocks of it were in the ring, which are void now."""
        if sequence is not self._sequence:
            return False
        self._sequence = None
        self._drafts = Drafts()
        held = bool(self._chain)
        self._void()
        return held

    def _void(self) -> None:
        for block in self._chain:
            block.void = True
        self._chain.clear()

    def _drafted(self, sequence: Sequence, certain: int) -> list[int]:
        """Drafts for a block that has ``certain`` tokens already."""
        if len(self._drafts) < sequence.length or not self._drafts.matched:
            return []
        plan = self._pace.plan(self._odds.of(self._drafts.matched))
        if plan is None or len(self._chain) >= plan.depth:
            return []
        end = self._chain[-1].end if self._chain else sequence.length
        assumed = end - sequence.length
        room = min(
            plan.block - certain,
            min(plan.ahead, self._most_ahead) - assumed,
            self._last_useful(sequence) - end,
        )
        drafts = self._drafts.after(assumed, max(0, room))
        for place, token in enumerate(drafts):
            if token in sequence.end_tokens:
                return drafts[:place]
        return drafts

    def _last_useful(self, sequence: Sequence) -> int:
        """The history's length at which no draft can be needed, or cut off again, any more."""
        most = min(self._context_tokens, len(sequence.prompt) + sequence.max_tokens) - 1
        return min(most, self._trim_tokens - 1)


def _rank(matched: int) -> int:
    return sum(matched > longest for longest in LONGEST)
