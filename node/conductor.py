"""What enters the ring next: the pure core of a ring's head.

Events in (a request, a cancellation, a frame that came back), frames and
answers out. No I/O, no clock of its own, no threads: the shell in
``node/head.py`` hands it ``now`` and carries out what it says.

Order is decided here and nowhere else. Frames get one sequence of numbers;
every stage runs them in that order, so a command in a later frame always finds
the caches as the earlier frames left them, although several frames are in the
ring at once.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from parallax.node.budget import GROWTH_TOKENS, Budget
from parallax.node.flight import Flight
from parallax.node.prefill_pace import PrefillPace
from parallax.node.prefill_queue import PrefillQueue
from parallax.node.prefix_cache import PrefixCache
from parallax.node.sequences import Lane, Phase, Sequence, forecast, is_short, least_padding
from parallax.node.speculation import Block, Speculation
from parallax.proto import wire_pb2 as wire

REMEMBERED = 1024  # requests of which it is known that they were handed back
SPARE_FRAMES = 4  # of the window: drafts leave them to steps, beats and commands
MOST_PATIENCE = 8  # doublings of the room that a request must find that was handed back


@dataclass(slots=True)
class Output:
    """What an event leads to, in order: frames for stage 0, answers for the scheduler."""

    frames: list[wire.Frame] = field(default_factory=list)
    tokens: list[wire.TokenEvent] = field(default_factory=list)
    ends: list[wire.EndEvent] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.frames or self.tokens or self.ends)


class Conductor:
    """The state machine of one ring in one epoch.

    Args:
        epoch: the ring's generation; every frame carries it.
        shape: lanes, rows, chunk grid, window and budget.
        stages: how many stages the ring has.
        costs: what caches cost on each stage.
    """

    def __init__(
        self, epoch: int, shape: wire.RingShape, stages: int, costs: list[wire.CacheCost]
    ) -> None:
        self._epoch = epoch
        self._shape = shape
        self._stages = stages
        self._budget = Budget(shape.cache_bytes, max(1, shape.chunk_tokens), costs)
        self._lanes = [Lane(i) for i in range(max(1, shape.lanes) + shape.spare_lanes)]
        self._sequences: dict[int, Sequence] = {}
        self._by_request: dict[tuple[int, int], Sequence] = {}
        self._prefill = PrefillQueue(shape)
        self._flights: dict[int, Flight] = {}
        self._commands: list[wire.Command] = []
        self._prefixes = PrefixCache(self._commands, self._budget, shape.chunk_tokens, costs)
        self._pace = PrefillPace(shape, costs)
        self._speculation = Speculation(stages, shape, costs)
        self._handed_back: OrderedDict[int, int] = OrderedDict()  # request -> how often
        self._next_number = 0
        self._next_sequence = 1
        self._tokens_in_flight = 0
        self._beats_in_flight = 0
        self._beat_sent_at = 0.0
        self._returned_at = 0.0
        self._now: float | None = None  # while a frame's return is dealt with
        self._grew = False  # whether some cache has begun another step of growth
        self.stepped = False  # whether a decode step has come back
        self.round_trip_s = 0.0
        self.carry_bytes_per_token = 0  # measured by the shell on stage 0's output

    # ------------------------------------------------------------------ events

    def submit(self, order: wire.Submit) -> Output:
        """A request arrives: taken in, or refused at once when there is no room."""
        out = Output()
        key = (order.request, order.attempt)
        if key in self._by_request:
            return out
        sequence = Sequence(
            id=self._next_sequence,
            request=order.request,
            attempt=order.attempt,
            prompt=list(order.prompt),
            generated=list(order.generated),
            sampling=order.sampling,
            max_tokens=order.max_tokens,
            end_tokens=frozenset(order.end_tokens),
        )
        if len(sequence.generated) >= sequence.max_tokens:
            out.ends.append(_end(sequence, wire.END_LENGTH))
            return out
        if self.free_rows < 1 or not self._find_room(sequence):
            out.ends.append(_end(sequence, wire.END_REFUSED))
            return out
        self._next_sequence += 1
        self._sequences[sequence.id] = sequence
        self._by_request[key] = sequence
        sequence.known = self._prefixes.known_tokens(sequence)
        self._prefill.append(sequence)
        self._pump(out)
        return out

    def cancel(self, order: wire.Cancel) -> Output:
        """A request is not wanted any more; its rows and caches go with the next frame."""
        out = Output()
        sequence = self._by_request.get((order.request, order.attempt))
        if sequence is not None:
            self._finish(sequence, wire.END_CANCELLED, out)
            self._pump(out)
        return out

    def returned(self, frame: wire.Frame, now: float) -> Output:
        """A frame came back from the last stage: its credit, and its tokens.

        Raises:
            KeyError: no such frame is in the ring.
        """
        out = Output()
        flight = self._flights.pop(frame.number)
        self._returned_at = self._now = now
        self._tokens_in_flight -= flight.tokens
        if flight.kind == wire.BEAT:
            if flight.sent_at is not None:
                self._beats_in_flight -= 1
                self.round_trip_s = now - flight.sent_at
        elif flight.lane is None:
            self._pace.measured_chunk(flight.tokens, frame.slowest_s, frame.last_s)
        else:
            self.stepped = True
            if flight.tokens == len(flight.rows):
                around_s = None if flight.entered_at is None else now - flight.entered_at
                self._pace.measured_step(flight.lane.id, frame.slowest_s, around_s)
            if flight.block is not None:
                self._take_block(flight.block, flight.rows[0], flight.lane, frame, out)
            else:
                flight.lane.in_flight = False
                for sequence, token in zip(flight.rows, frame.tokens, strict=True):
                    if sequence.alive:
                        self._deliver(sequence, token, out)
            if self._grew:
                self._grew = False
                self._make_way(out)
        self._pump(out)
        self._now = None
        return out

    def beat(self, now: float) -> Output:
        """An empty frame through every compute thread, unless one is on its way."""
        out = Output()
        if not self._beats_in_flight:
            self._beat_sent_at = now
            self._inject(out, wire.Frame(kind=wire.BEAT), Flight(wire.BEAT, 0, sent_at=now))
        return out

    def abandon(self) -> Output:
        """Nobody listens any more: every sequence is dropped, silently."""
        out = Output()
        for sequence in list(self._sequences.values()):
            self._finish(sequence, wire.END_CANCELLED, out)
        out.ends.clear()
        self._pump(out)
        return out

    # ------------------------------------------------------------------- state

    @property
    def idle(self) -> bool:
        """No sequence lives here."""
        return not self._sequences

    @property
    def frames_in_flight(self) -> int:
        """Frames between injection and return."""
        return len(self._flights)

    @property
    def drafted_tokens(self) -> int:
        """Tokens sent before they were drawn, since the epoch began."""
        return self._speculation.drafted

    @property
    def accepted_tokens(self) -> int:
        """Of them, those that were drawn then."""
        return self._speculation.accepted

    @property
    def free_rows(self) -> int:
        """How many more sequences the lanes take."""
        usual = max(1, self._shape.lanes)
        return usual * max(1, self._shape.lane_rows) - len(self._sequences)

    def quiet_s(self, now: float) -> float:
        """How long a beat has been out with nothing at all coming back; 0 when none is out."""
        if not self._beats_in_flight:
            return 0.0
        return now - max(self._beat_sent_at, self._returned_at)

    def load(self) -> wire.HeadLoad:
        """Occupancy, for the scheduler's router."""
        decoding = sum(s.phase is Phase.DECODE for s in self._sequences.values())
        return wire.HeadLoad(
            decoding=decoding,
            prefilling=len(self._sequences) - decoding,
            free_rows=self.free_rows,
            charged_bytes=self._live_bytes(),
            budget_bytes=self._shape.cache_bytes,
            lanes=sum(bool(lane.rows) for lane in self._lanes),
            prefixes=self._prefixes.load(),
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )

    # ----------------------------------------------------------------- answers

    def _deliver(self, sequence: Sequence, token: int, out: Output) -> None:
        if token in sequence.end_tokens:
            self._finish(sequence, wire.END_STOP, out)
            return
        index = len(sequence.generated)
        sequence.generated.append(token)
        self._grew |= sequence.length % GROWTH_TOKENS == 1
        out.tokens.append(
            wire.TokenEvent(
                request=sequence.request,
                attempt=sequence.attempt,
                index=index,
                token=token,
                cached_tokens=sequence.forked,
            )
        )
        sequence.forked = 0
        if index + 1 >= sequence.max_tokens or sequence.length >= self._shape.context_tokens:
            self._finish(sequence, wire.END_LENGTH, out)

    def _take_block(
        self, block: Block, sequence: Sequence, lane: Lane, frame: wire.Frame, out: Output
    ) -> None:
        """What was drawn after a block's tokens, as far as its drafts and those before stand."""
        if block.void:
            return
        judged = self._speculation.returned(block, frame.tokens, self._now, frame.slowest_s)
        for token in judged.tokens:
            if sequence.alive:
                self._deliver(sequence, token, out)
        if sequence.alive and judged.wrong:
            self._trim(sequence, sequence.length - 1)
        lane.in_flight = self._speculation.in_flight

    def _trim(self, sequence: Sequence, tokens: int) -> None:
        """Cuts drafts off that do not stand, if there are any in the caches."""
        if sequence.cached > tokens:
            sequence.cached = tokens
            trim = wire.Trim(sequence=sequence.id, tokens=tokens)
            self._commands.append(wire.Command(trim=trim))

    def _finish(self, sequence: Sequence, reason: wire.EndReason.ValueType, out: Output) -> None:
        sequence.alive = False
        if self._speculation.forget(sequence) and sequence.lane is not None:
            sequence.lane.in_flight = False
        self._trim(sequence, sequence.length)
        del self._sequences[sequence.id]
        del self._by_request[(sequence.request, sequence.attempt)]
        self._prefill.discard(sequence)
        lane = sequence.lane
        if lane is not None:
            if sequence in lane.rows:
                lane.rows.remove(sequence)
            if sequence in lane.joining:
                lane.joining.remove(sequence)
        if reason == wire.END_REFUSED:
            self._handed_back[sequence.request] = self._handed_back.pop(sequence.request, 0) + 1
            if len(self._handed_back) > REMEMBERED:
                self._handed_back.popitem(last=False)
        else:
            self._handed_back.pop(sequence.request, None)
            self._prefixes.ended(sequence, self._live_bytes())
        if sequence.cached or sequence.phase is Phase.DECODE:
            self._commands.append(wire.Command(drop=wire.Drop(sequence=sequence.id)))
        out.ends.append(_end(sequence, reason))

    # ------------------------------------------------------------------ budget

    def _live_bytes(self) -> int:
        """Cache bytes of the sequences on the dearest stage."""
        return self._budget.charge(*self._held())

    def _joined_bytes(self) -> int:
        """The same once everyone has joined a lane, unless it is more now."""
        return max(self._live_bytes(), self._budget.charge(self._forecast(None, 0), ()))

    def _held(self) -> tuple[list[tuple[int, int]], list[int]]:
        """Rows and length of each lane, and the lengths of those in none."""
        lanes = [(lane.members, lane.longest) for lane in self._lanes if lane.members]
        return lanes, [s.length for s in self._sequences.values() if s.lane is None]

    def _find_room(self, sequence: Sequence) -> bool:
        """Whether a new sequence fits; kept prefixes make way for it, its own one last.

        Everyone is charged with room to grow, or the youngest would soon be handed back: one step
        of growth, and twice as many each time that happened to this request. So what is prefilled
        again and again is bounded by what is generated in between.
        """
        limit = self._budget.limit_bytes
        if not limit:
            return True
        times = self._handed_back.get(sequence.request, 0)
        grown = self._forecast(sequence, GROWTH_TOKENS << min(times, MOST_PATIENCE))
        lanes, alone = self._held()
        alone.append(sequence.length)
        prefixes = self._prefixes

        def charge(kept: list[int] | None = None) -> int:
            now = self._budget.charge(lanes, alone, kept or ())
            return max(now, self._budget.charge(grown, (), kept or ()))

        if self._sequences and charge() > limit:
            return False
        own = prefixes.find(sequence)
        while charge(prefixes.kept_bytes) > limit:
            if not prefixes.evict_oldest(spare=own):
                if own is not None:
                    self._begin(sequence)
                    prefixes.evict_oldest()
                break
        return True

    def _forecast(self, extra: Sequence | None, more: int) -> list[tuple[int, int]]:
        """Rows and length of each lane once everyone has joined one and has grown by ``more``."""
        joining = (*self._prefill, *([extra] if extra else ()))
        return forecast(self._lanes, joining, more, self._shape)

    def _make_way(self, out: Output) -> None:
        """Lets kept prefixes go, then hands the youngest sequences back, while caches outgrow
        the budget."""
        limit = self._budget.limit_bytes
        while limit and self._budget.charge(*self._held(), self._prefixes.kept_bytes) > limit:
            if self._prefixes.evict_oldest():
                continue
            if len(self._sequences) < 2:
                return
            youngest = self._sequences[max(self._sequences)]
            self._finish(youngest, wire.END_REFUSED, out)

    # --------------------------------------------------------------- injection

    def _pump(self, out: Output) -> None:
        """Injects whatever may go now: decode steps first, then prefill chunks."""
        self._step_lanes(out)
        while self._prefill and self._prefill_allowed():
            self._inject_chunk(out)
            self._step_lanes(out)
        if self._commands and len(self._flights) < self._shape.window_frames:
            self._inject(out, wire.Frame(kind=wire.BEAT), Flight(wire.BEAT, 0))

    def _prefill_allowed(self) -> bool:
        """Chunks enough to keep every stage busy, few enough that decode steps pass soon."""
        chunks, decoding = self._chunks(), self._decoding()
        if not is_short(self._prefill.next(), self._shape) and not self._pace.due(decoding):
            return False
        # One chunk per stage is in work; one more waits so that stage 0 never idles.
        most = self._stages if decoding else self._stages + 1
        if chunks >= most or len(self._flights) >= self._shape.window_frames:
            return False
        carry = (self._tokens_in_flight + self._shape.chunk_tokens) * self.carry_bytes_per_token
        return chunks == 0 or not self._shape.window_bytes or carry <= self._shape.window_bytes

    def _chunks(self) -> int:
        return sum(flight.kind == wire.PREFILL for flight in self._flights.values())

    def _decoding(self) -> list[int]:
        return [lane.id for lane in self._lanes if lane.in_flight]

    def _inject_chunk(self, out: Output) -> None:
        sequence = self._prefill.next()
        self._begin(sequence)
        start = sequence.cached
        if start < sequence.prefill_length:
            grid = self._pace.next_chunk(
                self._decoding(),
                self._chunks(),
                self._prefill.tokens,
                short=is_short(sequence, self._shape),
            )
            end = min(sequence.prefill_length, (start // grid + 1) * grid)
            tokens = sequence.slice(start, end)
            frame = wire.Frame(kind=wire.PREFILL, sequence=sequence.id, tokens=tokens, rows=1)
            self._inject(out, frame, Flight(wire.PREFILL, len(tokens)))
            self._prefill.taken(sequence, len(tokens))
            sequence.cached = end
            self._prefixes.prefilled(sequence, self._joined_bytes)
        if sequence.cached >= sequence.prefill_length:
            self._prefill.discard(sequence)
            sequence.phase = Phase.READY
            shapes = [(lane.members, lane.longest) for lane in self._lanes]
            lane = self._lanes[least_padding(shapes, sequence.length, self._shape)]
            lane.joining.append(sequence)
            sequence.lane = lane
            self._make_way(out)

    def _begin(self, sequence: Sequence) -> None:
        """Before a sequence's first chunk, and once: what is known of it is not computed again."""
        if not sequence.begun:
            sequence.begun = True
            self._prefixes.begin(sequence)
            sequence.left_at_begin = sequence.prefill_length - sequence.cached

    def _step_lanes(self, out: Output) -> None:
        lone = self._lone()
        for lane in self._lanes:
            if not lane.in_flight and lane.members:
                self._inject_step(lane, lone, out)
        if lone is not None and lone.lane is not None:
            while len(self._flights) < self._shape.window_frames - SPARE_FRAMES:
                block = self._speculation.ahead(lone)
                if block is None:
                    break
                frame = wire.Frame(ahead=True, tokens=block.tokens, rows=1)
                self._inject_decode(frame, lone.lane, block, out)

    def _lone(self) -> Sequence | None:
        """The only sequence in the ring, if drafts may be made for it."""
        if not self._speculation.possible or len(self._sequences) != 1:
            return None
        (sequence,) = self._sequences.values()
        self._speculation.follow(sequence)
        return sequence

    def _inject_step(self, lane: Lane, lone: Sequence | None, out: Output) -> None:
        for sequence in lane.take_joining():
            self._commands.append(
                wire.Command(
                    admit=wire.Admit(
                        sequence=sequence.id,
                        lane=lane.id,
                        prompt=sequence.prompt,
                        generated=sequence.generated,
                        sampling=sequence.sampling,
                    )
                )
            )
            sequence.phase = Phase.DECODE
            lane.rows.append(sequence)
        lane.in_flight = True
        block = None
        tokens = [s.last_token for s in lane.rows]
        if lone is not None:
            block = self._speculation.first(lone, self._now, alone=not self._flights)
            tokens = block.tokens
        frame = wire.Frame(tokens=tokens, rows=len(lane.rows))
        self._inject_decode(frame, lane, block, out)

    def _inject_decode(
        self, frame: wire.Frame, lane: Lane, block: Block | None, out: Output
    ) -> None:
        for sequence in lane.rows:
            sequence.cached = sequence.length if block is None else block.end
        frame.kind = wire.DECODE
        frame.lane = lane.id
        self._pace.stepped(lane.id)
        tokens = len(frame.tokens)
        flight = Flight(wire.DECODE, tokens, lane, tuple(lane.rows), block, entered_at=self._now)
        self._inject(out, frame, flight)

    def _inject(self, out: Output, frame: wire.Frame, flight: Flight) -> None:
        frame.epoch = self._epoch
        frame.number = self._next_number
        frame.commands.extend(self._commands)
        self._commands.clear()
        self._next_number += 1
        self._flights[frame.number] = flight
        self._tokens_in_flight += flight.tokens
        self._beats_in_flight += flight.sent_at is not None
        out.frames.append(frame)


def _end(sequence: Sequence, reason: wire.EndReason.ValueType) -> wire.EndEvent:
    return wire.EndEvent(request=sequence.request, attempt=sequence.attempt, reason=reason)
