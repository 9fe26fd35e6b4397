"""Stop strings, matched on text across token boundaries.

One Knuth-Morris-Pratt automaton for each stop string (Knuth, Morris, Pratt 1977),
fed character by character: linear in the text whatever the strings, and the
outcome does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through, up to the first stop string to be completed.

    Where several are completed by the same character the longest counts. Text that
    may yet become a stop string is held back until it cannot any more.
    """

    __slots__ = ("_failures", "_held", "_states", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in dict.fromkeys(stops) if stop]
        self._failures = [_failure(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be delivered now, and whether a stop string was met."""
        if not self._stops or not text:
            return text, False
        pending = self._held + text
        for end in range(len(self._held) + 1, len(pending) + 1):
            met = self._step(pending[end - 1])
            if met:
                self._held = ""
                return pending[: end - met], True
        keep = max(self._states)
        cut = len(pending) - keep
        self._held = pending[cut:]
        return pending[:cut], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _step(self, character: str) -> int:
        """Advance every automaton; the length of the longest stop string completed, or 0."""
        met = 0
        for i, stop in enumerate(self._stops):
            state = self._states[i]
            while state and stop[state] != character:
                state = self._failures[i][state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                met = max(met, state)
                state = 0
            self._states[i] = state
        return met


def _failure(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return table
