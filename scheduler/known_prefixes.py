"""Which rings have seen which beginnings of prompts. Pure.

Only the head of a ring knows what it keeps; this is a guess that costs no messages: what was sent
there last is likely to be there still.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

STEP_TOKENS = 32  # as heads count at the finest
MOST_STEPS = 1 << 15  # remembered of a ring, the latest ones: a million tokens
LEAST_STEPS = 2  # what is shorter is prefilled anew in no time


class KnownPrefixes:
    """Steps of token ids by ring, each as the hash of all tokens up to its end."""

    def __init__(self) -> None:
        self._rings: dict[int, OrderedDict[int, None]] = {}
        self._latest: tuple[Sequence[int], list[int]] = (), []

    def served(self, epoch: int, tokens: Sequence[int]) -> None:
        """These tokens have been, or are about to be, in the caches of a ring."""
        marks = self._marks(tokens)
        if len(marks) < LEAST_STEPS:
            return
        known = self._rings.setdefault(epoch, OrderedDict())
        for mark in reversed(marks):  # of what is forgotten the end goes first
            known[mark] = None
            known.move_to_end(mark)
        while len(known) > MOST_STEPS:
            known.popitem(last=False)

    def length(self, epoch: int, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, a ring has likely kept."""
        known = self._rings.get(epoch)
        if not known:
            return 0
        found = 0
        for mark in self._marks(tokens):
            if mark not in known:
                break
            found += STEP_TOKENS
        return found

    def forget(self, epoch: int) -> None:
        """A ring is no more, and its caches with it."""
        self._rings.pop(epoch, None)

    def _marks(self, tokens: Sequence[int]) -> list[int]:
        if tokens is not self._latest[0]:
            marks, mark = [], 0
            for end in range(STEP_TOKENS, len(tokens) + 1, STEP_TOKENS):
                mark = hash((mark, *tokens[end - STEP_TOKENS : end]))
                marks.append(mark)
            self._latest = tokens, marks
        return self._latest[1]
