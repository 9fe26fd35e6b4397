"""Sequences and lanes of one stage: whose cache is where.

A sequence that is being prefilled has caches of its own. Admission makes it the last row of a lane,
which is a batch decoded together. A lane of one row keeps the plain caches (mlx-lm's batch forms
cost a few percent); from the second row on they are merged, padded on the left. All of it is
mlx-lm's own ``merge``, ``extend``, ``filter`` and ``extract``. Every stage runs the same commands
in the same order, so rows agree without anything but commands travelling.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from parallax.fabric.errors import FrameRefused
from parallax.node.mlx_lm_seam import Caches
from parallax.node.stage import Stage

MOST_SEQUENCES = 65_536
MOST_KEPT = 1 << 20


@dataclass(slots=True)
class Lane:
    """One decode batch; ``rows`` are sequences, in the order of the batch."""

    rows: list[int]
    caches: Caches
    merged: bool = False


@dataclass(slots=True)
class _Kept:
    caches: Caches
    tokens: int


class Lanes:
    """The caches of one stage in one epoch.

    Every method raises :class:`FrameRefused` for commands that make no sense here.
    """

    def __init__(self, stage: Stage, most_tokens: int = 1 << 31) -> None:
        self._stage = stage
        self._most_tokens = most_tokens  # of one sequence
        self._alone: dict[int, Caches] = {}  # being prefilled
        self._lanes: dict[int, Lane] = {}
        self._lane_of: dict[int, int] = {}
        self._tokens: dict[int, int] = {}  # in the caches of each sequence
        self._missing: dict[int, int] = {}  # of them, those that were passed by
        self._kept: dict[int, _Kept] = {}
        self._changed: list[Caches] = []

    # ------------------------------------------------------------------ forward

    def prefill(self, sequence: int, tokens: int) -> Caches:
        """Caches of a sequence about to go ``tokens`` forward; new ones when it has none."""
        if sequence in self._lane_of:
            raise _refused(f"sequence {sequence} is already in a lane")
        self._make_room(sequence)
        self._tokens[sequence] = self._grown(sequence, tokens)
        caches = self._alone.get(sequence)
        if caches is None:
            caches = self._alone[sequence] = self._stage.new_cache()
        return caches

    def decode(self, lane: int, rows: int, tokens: int) -> Lane:
        """The lane, about to go ``tokens`` forward in each of its ``rows`` rows."""
        found = self._lanes.get(lane)
        held = len(found.rows) if found is not None else 0
        if found is None or held != rows:
            raise _refused(f"lane {lane} has {held} rows, not {rows}")
        for sequence in found.rows:
            self._tokens[sequence] = self._grown(sequence, tokens)
        return found

    def _grown(self, sequence: int, tokens: int) -> int:
        """How many tokens a sequence will have, at most as many as the ring was formed for."""
        length = self._tokens.get(sequence, 0) + tokens
        if length > self._most_tokens:
            raise _refused(f"{length} tokens, more than the {self._most_tokens} of this ring")
        return length

    def _make_room(self, sequence: int) -> None:
        if sequence not in self._tokens and len(self._tokens) >= MOST_SEQUENCES:
            raise _refused(f"there are {MOST_SEQUENCES} sequences already")

    def pass_by(self, lane: int, tokens: int) -> None:
        """Counts ``tokens`` of a lane's only row without computing them: a trim will follow."""
        (sequence,) = self.decode(lane, 1, tokens).rows
        self._missing[sequence] = self._missing.get(sequence, 0) + tokens

    def changed(self) -> list[Caches]:
        """Caches that commands have touched since this was last asked: still to be evaluated."""
        changed, self._changed = self._changed, []
        return changed

    # ----------------------------------------------------------------- commands

    def admit(self, sequence: int, lane: int) -> None:
        """Makes a sequence the last row of a lane."""
        if sequence in self._lane_of:
            raise _refused(f"sequence {sequence} is already in a lane")
        caches = self._alone.pop(sequence, None)
        if caches is None:
            self._make_room(sequence)
            caches = self._stage.new_cache()  # a prompt of one token
            self._tokens[sequence] = 0
        self._lane_of[sequence] = lane
        joined = self._lanes.get(lane)
        if joined is not None and joined.rows[0] in self._missing:
            raise _refused(f"sequence {joined.rows[0]} has not been trimmed")
        if joined is None:
            self._lanes[lane] = Lane([sequence], caches)
            return
        if not self._stage.can_batch:
            raise _refused(f"lane {lane} has a row, and this architecture takes no more")
        if joined.merged:
            for whole, new in zip(joined.caches, caches, strict=True):
                whole.extend(new.merge([new]))
        else:
            pairs = zip(joined.caches, caches, strict=True)
            joined.caches = [one.merge([one, new]) for one, new in pairs]
            joined.merged = True
        joined.rows.append(sequence)
        self._changed.append(joined.caches)

    def drop(self, sequence: int) -> None:
        """Ends a sequence wherever it is; later rows of its lane move up."""
        if sequence not in self._tokens:
            raise _refused(f"there is no sequence {sequence}")
        del self._tokens[sequence]
        self._missing.pop(sequence, None)
        if self._alone.pop(sequence, None) is not None:
            return
        number = self._lane_of.pop(sequence)
        lane = self._lanes[number]
        row = lane.rows.index(sequence)
        del lane.rows[row]
        if not lane.rows:
            del self._lanes[number]
        elif len(lane.rows) == 1:
            lane.caches = self._extract(lane, lane.rows[0], 1 - row)
            lane.merged = False
            self._changed.append(lane.caches)
        else:
            keep = [i for i in range(len(lane.rows) + 1) if i != row]
            for cache in lane.caches:
                cache.filter(keep)
            self._changed.append(lane.caches)

    def trim(self, sequence: int, tokens: int) -> None:
        """Cuts a sequence's caches to ``tokens``; other rows of its lane stay as they are."""
        held = self._tokens.get(sequence)
        if held is None:
            raise _refused(f"there is no sequence {sequence}")
        if tokens > held:
            raise _refused(f"sequence {sequence} has {held} tokens, not {tokens}")
        computed = held - self._missing.get(sequence, 0)
        if tokens > computed:
            raise _refused(f"sequence {sequence} has {computed} tokens computed, not {tokens}")
        self._missing.pop(sequence, None)
        if sequence in self._alone:
            _shorten(self._alone[sequence], computed - tokens)
        else:
            lane = self._lanes[self._lane_of[sequence]]
            if not lane.merged:
                _shorten(lane.caches, computed - tokens)
            elif tokens < held:
                rows = [self._extract(lane, s, row) for row, s in enumerate(lane.rows)]
                _shorten(rows[lane.rows.index(sequence)], held - tokens)
                columns = zip(*rows, strict=True)
                lane.caches = [column[0].merge(list(column)) for column in columns]
                self._changed.append(lane.caches)
        self._tokens[sequence] = tokens

    def retain(self, sequence: int, handle: int) -> None:
        """Keeps a copy of a sequence's caches as they are now."""
        if handle in self._kept or len(self._kept) >= MOST_KEPT:
            raise _refused(f"handle {handle} is taken, or one too many")
        tokens = self._tokens.get(sequence)
        if tokens is None:
            raise _refused(f"there is no sequence {sequence}")
        if sequence in self._missing:
            raise _refused(f"sequence {sequence} has not been trimmed")
        if sequence in self._alone:
            caches = copy.deepcopy(self._alone[sequence])
        else:
            lane = self._lanes[self._lane_of[sequence]]
            row = lane.rows.index(sequence)
            caches = (
                self._extract(lane, sequence, row) if lane.merged else copy.deepcopy(lane.caches)
            )
        self._kept[handle] = _Kept(caches, tokens)
        self._changed.append(caches)

    def fork(self, handle: int, sequence: int, tokens: int) -> None:
        """Starts a sequence with the first ``tokens`` of a kept prefix."""
        kept = self._kept.get(handle)
        if kept is None:
            raise _refused(f"there is no handle {handle}")
        if sequence in self._tokens:
            raise _refused(f"sequence {sequence} already exists")
        if tokens > kept.tokens:
            raise _refused(f"handle {handle} has {kept.tokens} tokens, not {tokens}")
        self._make_room(sequence)
        caches = copy.deepcopy(kept.caches)
        _shorten(caches, kept.tokens - tokens)
        self._alone[sequence] = caches
        self._tokens[sequence] = tokens

    def evict(self, handle: int) -> None:
        """Lets a kept prefix go."""
        if self._kept.pop(handle, None) is None:
            raise _refused(f"there is no handle {handle}")

    def _extract(self, lane: Lane, sequence: int, row: int) -> Caches:
        """One row of a merged lane as plain caches; mlx-lm cannot extract one without tokens."""
        if not self._tokens[sequence]:
            return self._stage.new_cache()
        return [cache.extract(row) for cache in lane.caches]

    # -------------------------------------------------------------------- state

    def rows_of(self, lane: int) -> list[int]:
        """The sequences of a lane, in row order; none if there is no such lane."""
        found = self._lanes.get(lane)
        return list(found.rows) if found is not None else []

    def tokens_of(self, sequence: int) -> int:
        """How many tokens a sequence has in its caches; 0 if there is no such sequence."""
        return self._tokens.get(sequence, 0)

    @property
    def lanes(self) -> int:
        """Lanes with at least one row."""
        return len(self._lanes)

    @property
    def rows(self) -> int:
        """Rows of all lanes."""
        return len(self._lane_of)

    @property
    def nbytes(self) -> int:
        """Bytes of every cache held here."""
        held = [*self._alone.values(), *(lane.caches for lane in self._lanes.values())]
        held += [kept.caches for kept in self._kept.values()]
        return sum(cache.nbytes for caches in held for cache in caches)


def _shorten(caches: Caches, tokens: int) -> None:
    if not tokens:
        return
    if not all(cache.is_trimmable() for cache in caches):
        raise _refused("these caches cannot be cut shorter now")
    for cache in caches:
        cache.trim(tokens)


def _refused(why: str) -> FrameRefused:
    return FrameRefused("A command cannot be carried out", why)
