"""One frame in, one frame out: what a stage does in a ring. On the MLX thread only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from parallax.fabric.bounds import MOST_CHUNK, check_submit
from parallax.fabric.errors import FrameRefused
from parallax.node import arrays, spare_memory
from parallax.node.draw_time import DrawTime
from parallax.node.lanes import Lanes
from parallax.node.large_frames import check_counts
from parallax.node.mlx_lm_seam import Caches
from parallax.node.sampler import TokenChooser, choose_block, choose_rows
from parallax.node.stage import Stage
from parallax.proto import wire_pb2 as wire

MOST_TOKENS = 1 << 21
MOST_ROWS = 4096
_GIVE_BACK_EVERY = 256  # frames; as often as mlx-lm clears its cache


class Runner:
    """A stage at its place in one ring of one epoch.

    Args:
        stage: its layers.
        epoch: the ring's generation; frames of others are refused.
        index: the stage's place in the ring, from 0.
        count: how many stages the ring has.
        most_tokens: that one sequence may have.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        epoch: int,
        index: int,
        count: int,
        most_tokens: int = MOST_TOKENS,
    ) -> None:
        self._stage = stage
        self._epoch = epoch
        self._first = index == 0
        self._last = index == count - 1
        self._next_number = 0
        self._most_tokens = most_tokens
        self._lanes = Lanes(stage, most_tokens)
        self._choosers: dict[int, TokenChooser] = {}
        # The draw after each sequence's last token; None: a draft in its caches was not drawn.
        self._drawn: dict[int, int | None] = {}
        self._draw_time = DrawTime()

    def run(self, frame: wire.Frame) -> wire.Frame:
        """Runs a frame's commands, then its tokens, and returns the frame to pass on.

        From the last stage that is the frame for the head: of a DECODE frame the sampled tokens,
        one per row, of any other an empty acknowledgement. A lone row may have several tokens: all
        but the first, and in a frame sent ``ahead`` the first too, are then drafts. The draws after
        each of them come back; frames ahead are passed by when a draft before them was wrong.

        Raises:
            FrameRefused: the frame does not follow the one before, or makes no sense here.
                The epoch is over then.
        """
        if frame.epoch != self._epoch or frame.number != self._next_number:
            raise FrameRefused(
                f"Frame {frame.number} of epoch {frame.epoch} does not follow",
                f"this stage waits for frame {self._next_number} of epoch {self._epoch}",
                epoch=frame.epoch,
                number=frame.number,
            )
        self._next_number += 1
        if frame.number % _GIVE_BACK_EVERY == 0:
            spare_memory.give_back()  # buffers that grown caches have left behind
        check_counts(frame)
        for command in frame.commands:
            self._command(command)
        if frame.kind == wire.DECODE:
            return self._decode(frame)
        if frame.kind == wire.PREFILL:
            return self._prefill(frame)
        _settle([], self._lanes.changed())
        return self._pass_on(frame)

    @property
    def rows(self) -> int:
        """Rows of all lanes."""
        return self._lanes.rows

    @property
    def lanes(self) -> int:
        """Lanes with at least one row."""
        return self._lanes.lanes

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return self._lanes.nbytes

    @property
    def draw_s(self) -> float:
        """Seconds that drawing tokens has taken so far; on the last stage only."""
        return self._draw_time.total_s

    def close(self) -> None:
        """Frees every cache; no frame can run afterwards."""
        self._lanes = Lanes(self._stage, self._most_tokens)
        self._choosers.clear()
        spare_memory.give_back()

    # ------------------------------------------------------------------ frames

    def _decode(self, frame: wire.Frame) -> wire.Frame:
        begin = time.perf_counter()
        length = self._length(frame)
        if length > 1 and frame.rows > 1:
            raise FrameRefused(
                f"Drafts are for lanes of one row, not {frame.rows}",
                epoch=frame.epoch,
                number=frame.number,
            )
        if self._last and self._is_wrong(frame):
            self._lanes.pass_by(frame.lane, length)
            self._drawn.update(dict.fromkeys(self._lanes.rows_of(frame.lane)))
            _settle([], self._lanes.changed())
            return self._pass_on(frame)
        lane = self._lanes.decode(frame.lane, frame.rows, length)
        output = self._forward(frame, length, lane.caches, head=True)
        if not self._last:
            _settle([output], [lane.caches, *self._lanes.changed()])
            passed = self._pass_on(frame, output)
        else:
            caches = [lane.caches, *self._lanes.changed()]
            drawing = None
            if self._draw_time.is_due(frame.lane):
                _settle([output], caches)
                caches, drawing = [], time.perf_counter()
            choosers = [self._choosers[sequence] for sequence in lane.rows]
            if length > 1:
                sampled = choose_block(output[0], choosers[0], frame.tokens[1:])
            else:
                sampled = choose_rows(output[:, -1], choosers)
            _settle([sampled], caches)
            tokens = cast(list[int], sampled.tolist())
            if length > 1:
                self._take_block(lane.rows[0], tokens, frame.tokens[1:])
            else:
                for sequence, chooser, token in zip(lane.rows, choosers, tokens, strict=True):
                    chooser.advance(token)
                    self._drawn[sequence] = token
            end = time.perf_counter()
            if drawing is not None:
                self._draw_time.timed(frame.lane, len(tokens), end - drawing)
            else:
                self._draw_time.untimed(frame.lane, len(tokens), end - begin)
            passed = self._pass_on(frame)
            passed.tokens.extend(tokens)
        passed.slowest_s = max(frame.slowest_s, time.perf_counter() - begin)
        return passed

    def _is_wrong(self, frame: wire.Frame) -> bool:
        """Whether a draft before this frame's draws, in it or not, was not what was drawn."""
        if not frame.ahead:
            return False
        rows = self._lanes.rows_of(frame.lane)
        return len(rows) != 1 or self._drawn.get(rows[0]) != frame.tokens[0]

    def _take_block(self, sequence: int, tokens: list[int], drafts: Sequence[int]) -> None:
        """The history goes on with what was drawn, up to the first draft that was not."""
        chooser = self._choosers[sequence]
        self._drawn[sequence] = tokens[-1]
        for place, token in enumerate(tokens):
            chooser.advance(token)
            if place < len(drafts) and drafts[place] != token:
                self._drawn[sequence] = None
                return

    def _prefill(self, frame: wire.Frame) -> wire.Frame:
        begin = time.perf_counter()
        length = self._length(frame)
        if frame.rows != 1:
            raise FrameRefused(
                f"A chunk of one sequence has one row, not {frame.rows}",
                epoch=frame.epoch,
                number=frame.number,
            )
        caches = self._lanes.prefill(frame.sequence, length)
        output = self._forward(frame, length, caches, head=False)
        _settle([] if self._last else [output], [caches, *self._lanes.changed()])
        passed = self._pass_on(frame, output)
        seconds = time.perf_counter() - begin
        passed.slowest_s = max(frame.slowest_s, seconds)
        if self._last:
            passed.last_s = seconds
        return passed

    def _forward(self, frame: wire.Frame, length: int, caches: Caches, *, head: bool) -> Any:
        given = list(frame.tokens)
        if max(given) >= self._stage.vocabulary:  # MLX reads whatever lies behind the table
            raise FrameRefused(
                f"Token {max(given)} is none of the model's {self._stage.vocabulary}",
                epoch=frame.epoch,
                number=frame.number,
            )
        tokens = mx.array(given, mx.uint32).reshape(frame.rows, length)
        carry = None
        if not self._first:
            carry = arrays.unpack(frame.carry)
            if not self._stage.takes(carry, frame.rows, length):
                raise FrameRefused(
                    "A frame's carry is not what the layer before returns",
                    epoch=frame.epoch,
                    number=frame.number,
                )
        return self._stage.forward(tokens, carry, caches, head=head)

    def _length(self, frame: wire.Frame) -> int:
        length, rest = divmod(len(frame.tokens), frame.rows or 1)
        if not frame.rows or not length or rest or length > MOST_CHUNK or frame.rows > MOST_ROWS:
            raise FrameRefused(
                f"{len(frame.tokens)} tokens do not make {frame.rows} rows",
                epoch=frame.epoch,
                number=frame.number,
            )
        return length

    def _pass_on(self, frame: wire.Frame, output: arrays.ArrayTree = None) -> wire.Frame:
        passed = wire.Frame(
            epoch=frame.epoch,
            number=frame.number,
            kind=frame.kind,
            lane=frame.lane,
            sequence=frame.sequence,
            rows=frame.rows,
        )
        if not self._last:
            passed.ahead = frame.ahead
            passed.commands.extend(frame.commands)
            passed.tokens.extend(frame.tokens)
            if frame.kind != wire.BEAT:
                passed.carry = arrays.pack(output)
        return passed

    # ---------------------------------------------------------------- commands

    def _command(self, command: wire.Command) -> None:
        lanes = self._lanes
        match command.WhichOneof("command"):
            case "admit":
                admit = command.admit
                check_submit(wire.Submit(prompt=[0], sampling=admit.sampling))
                lanes.admit(admit.sequence, admit.lane)
                if self._last:
                    self._choosers[admit.sequence] = TokenChooser(
                        admit.sampling, admit.prompt, admit.generated
                    )
            case "drop":
                lanes.drop(command.drop.sequence)
                self._choosers.pop(command.drop.sequence, None)
                self._drawn.pop(command.drop.sequence, None)
            case "trim":
                lanes.trim(command.trim.sequence, command.trim.tokens)
            case "fork":
                fork = command.fork
                lanes.fork(fork.handle, fork.sequence, fork.tokens)
            case "retain":
                lanes.retain(command.retain.sequence, command.retain.handle)
            case "evict":
                lanes.evict(command.evict.handle)
            case None:
                raise FrameRefused("A command of no known kind", epoch=self._epoch)


def _settle(results: list[Any], caches: list[Caches]) -> None:
    """Evaluates results and caches, once, so that no graph outlives its frame."""
    mx.eval(results, [[cache.state for cache in held] for held in caches])
