"""A model of stages that only obeys, for tests of the conductor: plain lists, no clocks."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from parallax.node.conductor import Conductor, Output
from parallax.node.prefill_pace import SMALLEST_TOKENS
from parallax.proto import wire_pb2 as wire

VOCABULARY = 97
END = 0
NEVER = VOCABULARY  # an end token that no answer has


def next_token(history: list[int]) -> int:
    """The token a pretend model gives after a history: any pure function will do."""
    value = 17
    for token in history:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCABULARY


Model = Callable[[list[int]], int]
PASSED_BY = -1  # in caches: a draft that the last stage has not computed


def lone_answer(
    prompt: list[int], max_tokens: int, end: int = END, model: Model = next_token
) -> tuple[list[int], int]:
    """What a request must get, whatever runs beside it."""
    answer: list[int] = []
    while True:
        token = model(prompt + answer)
        if token == end:
            return answer, wire.END_STOP
        answer.append(token)
        if len(answer) >= max_tokens:
            return answer, wire.END_LENGTH


class Timing:
    """When frames come back from a ring of equal stages, each of which runs one after the other.

    Args:
        stage_s: how long a stage takes for a frame of so many tokens.
        hop_s: from a stage to the next, and back from the last one.
    """

    def __init__(self, stages: int, stage_s: Callable[[int], float], hop_s: float = 0.0) -> None:
        self.now = 0.0
        self.stage_s = stage_s
        self._hop_s = hop_s
        self._free_at = [0.0] * stages
        self._sent_at: dict[int, float] = {}

    def sent(self, frame: wire.Frame) -> None:
        self._sent_at[frame.number] = self.now

    def returned(self, frame: wire.Frame, back: wire.Frame) -> None:
        """Moves on to when ``frame`` comes ``back``, with the time that its stages took."""
        at = self._sent_at.pop(frame.number)
        stage_s = self.stage_s(len(frame.tokens)) if frame.tokens else 0.0
        passed_by = frame.kind == wire.DECODE and not back.tokens
        for stage, free_at in enumerate(self._free_at):
            last = stage == len(self._free_at) - 1
            seconds = 0.0 if last and passed_by else stage_s
            self._free_at[stage] = max(at, free_at) + seconds
            at = self._free_at[stage] + self._hop_s
            back.slowest_s = max(back.slowest_s, seconds)
        self.now = max(self.now, at)


@dataclass
class PretendRing:
    """Runs frames as stages do: commands in order, rows in lane order, caches by sequence.

    It also holds the conductor to what may be kept: ``cost`` says what caches can do.
    """

    conductor: Conductor
    grid: int
    window: int
    cost: wire.CacheCost = field(default_factory=wire.CacheCost)
    budget: int = 0
    frames: deque[wire.Frame] = field(default_factory=deque)
    caches: dict[int, list[int]] = field(default_factory=dict)
    lanes: dict[int, list[int]] = field(default_factory=dict)
    decoded: set[int] = field(default_factory=set)  # sequences with decoded tokens in their caches
    kept: dict[int, list[int]] = field(default_factory=dict)
    prefilled: int = 0  # tokens
    cached: dict[int, int] = field(default_factory=dict)  # as the first token of a request says
    expected: int = 0
    answers: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    most_in_flight: int = 0
    kinds: list[int] = field(default_factory=list)
    model: Model = next_token
    timing: Timing = field(default_factory=lambda: Timing(1, lambda tokens: 0.0))
    drawn: dict[int, int | None] = field(default_factory=dict)  # None: a draft was wrong
    true: dict[int, int] = field(default_factory=dict)  # tokens known to be no drafts
    blocks: list[tuple[int, bool]] = field(default_factory=list)  # tokens, passed by

    def take(self, out: Output) -> None:
        self.frames.extend(out.frames)
        for frame in out.frames:
            self.timing.sent(frame)
        self.most_in_flight = max(self.most_in_flight, len(self.frames))
        for event in out.tokens:
            answer = self.answers.setdefault(event.request, [])
            assert event.index == len(answer), "an index was skipped or repeated"
            assert event.request not in self.ends, "a token after the end"
            answer.append(event.token)
            if event.cached_tokens:
                assert event.request not in self.cached, "told twice"
                self.cached[event.request] = event.cached_tokens
        for end in out.ends:
            assert end.request not in self.ends, "two ends"
            self.ends[end.request] = end.reason

    @property
    def load(self) -> wire.HeadLoad:
        return self.conductor.load()

    def step(self) -> None:
        frame = self.frames.popleft()
        assert frame.number == self.expected
        self.expected += 1
        self.kinds.append(frame.kind)
        for command in frame.commands:
            self.obey(command)
        back = wire.Frame(epoch=frame.epoch, number=frame.number, kind=frame.kind)
        if frame.kind == wire.PREFILL:
            back.slowest_s = 0.001 * (1 + len(frame.tokens))
            back.last_s = 0.8 * back.slowest_s
            cache = self.caches.setdefault(frame.sequence, [])
            finest = min(self.grid, SMALLEST_TOKENS)
            assert len(cache) % finest == 0, "a chunk does not begin on the grid"
            assert len(frame.tokens) <= self.grid
            cache.extend(frame.tokens)
            self.prefilled += len(frame.tokens)
        elif frame.kind == wire.DECODE:
            rows = self.lanes[frame.lane]
            assert len(rows) == frame.rows
            assert len(frame.tokens) == frame.rows or frame.rows == 1
            self.decoded.update(rows)
            if frame.rows == 1:
                self.run_block(rows[0], frame, back)
            else:
                assert not frame.ahead
                for sequence, token in zip(rows, frame.tokens, strict=True):
                    self.caches[sequence].append(token)
                    self.check_history(sequence)
                    back.tokens.append(self.model(self.caches[sequence]))
                    self.drawn[sequence] = back.tokens[-1]
        self.timing.returned(frame, back)
        self.take(self.conductor.returned(back, now=self.timing.now))
        self.check_budget()

    def run_block(self, sequence: int, frame: wire.Frame, back: wire.Frame) -> None:
        """Tokens of one row, as the last stage runs them."""
        cache = self.caches[sequence]
        wrong = frame.ahead and self.drawn[sequence] != frame.tokens[0]
        self.blocks.append((len(frame.tokens), wrong))
        if wrong:
            cache.extend([PASSED_BY] * len(frame.tokens))
            self.drawn[sequence] = None
            return
        for place, token in enumerate(frame.tokens):
            cache.append(token)
            if not place and not frame.ahead:
                self.check_history(sequence)
            back.tokens.append(self.model(cache))
        drafts = list(frame.tokens[1:])
        stands = drafts == list(back.tokens[:-1])
        self.drawn[sequence] = back.tokens[-1] if stands else None

    def check_history(self, sequence: int) -> None:
        """A sequence's caches hold nothing that was only assumed."""
        cache = self.caches[sequence]
        for length in range(self.true[sequence], len(cache)):
            assert cache[length] == self.model(cache[:length]), "a draft that was wrong is left"
        self.true[sequence] = len(cache)

    def check_budget(self) -> None:
        """Kept prefixes never stand in the way of live sequences; of these, one always may live."""
        load = self.load
        live = load.decoding + load.prefilling
        if self.budget and (live > 1 or load.prefixes.kept):
            assert load.charged_bytes + load.prefixes.kept_bytes <= self.budget

    def obey(self, command: wire.Command) -> None:
        if command.HasField("admit"):
            admit = command.admit
            cache = self.caches.setdefault(admit.sequence, [])
            history = [*admit.prompt, *admit.generated]
            assert cache == history[:-1], "admitted before its prefill was complete"
            self.lanes.setdefault(admit.lane, []).append(admit.sequence)
            self.true[admit.sequence] = len(history)
        elif command.HasField("trim"):
            cache = self.caches[command.trim.sequence]
            assert command.trim.tokens < len(cache), "nothing to trim"
            assert len(cache) < self.cost.trim_tokens, "caches of this length cannot be cut"
            del cache[command.trim.tokens :]
            assert PASSED_BY not in cache, "trimmed by too little"
            self.drawn.pop(command.trim.sequence)
        elif command.HasField("retain"):
            sequence, handle = command.retain.sequence, command.retain.handle
            assert handle not in self.kept
            cache = self.caches[sequence]
            if sequence in self.true:
                self.check_history(sequence)
            assert self.cost.forks, "nothing may be kept of this model"
            assert self.cost.answers or sequence not in self.decoded, "decoded tokens are kept"
            if len(cache) >= self.cost.trim_tokens:
                assert len(cache) % self.grid == 0, "kept between boundaries"
            self.kept[handle] = list(cache)
        elif command.HasField("fork"):
            fork = command.fork
            assert fork.sequence not in self.caches
            kept = self.kept[fork.handle]
            assert 0 < fork.tokens <= len(kept)
            assert fork.tokens == len(kept) or len(kept) < self.cost.trim_tokens, "cannot be cut"
            self.caches[fork.sequence] = kept[: fork.tokens]
        elif command.HasField("evict"):
            del self.kept[command.evict.handle]
        elif command.HasField("drop"):
            self.decoded.discard(command.drop.sequence)
            self.true.pop(command.drop.sequence, None)
            del self.caches[command.drop.sequence]
            for lane in list(self.lanes):
                if command.drop.sequence in self.lanes[lane]:
                    self.lanes[lane].remove(command.drop.sequence)
                    if not self.lanes[lane]:
                        del self.lanes[lane]

    def run_out(self) -> None:
        while self.frames:
            self.step()


def make_ring(
    *,
    stages: int = 2,
    lanes: int = 2,
    rows: int = 4,
    grid: int = 8,
    budget: int = 0,
    cost: wire.CacheCost | None = None,
    draft_tokens: int = 0,
    block_tokens: int = 1,
    window: int = 16,
    context_tokens: int = 10_000,
    model: Model = next_token,
) -> PretendRing:
    shape = wire.RingShape(
        lanes=lanes,
        lane_rows=rows,
        chunk_tokens=grid,
        window_frames=window,
        cache_bytes=budget,
        context_tokens=context_tokens,
        draft_tokens=draft_tokens,
        block_tokens=block_tokens,
    )
    cost = cost or wire.CacheCost(bytes_per_token=1)
    conductor = Conductor(7, shape, stages, [cost] * stages)
    return PretendRing(conductor, grid, window, cost, budget, model=model)


def submit(request: int, prompt: list[int], max_tokens: int = 20, end: int = END) -> wire.Submit:
    return wire.Submit(
        request=request, attempt=1, prompt=prompt, max_tokens=max_tokens, end_tokens=[end]
    )


def prompt_of(rng: random.Random, longest: int = 60) -> list[int]:
    return [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, longest))]
