"""What a history says comes next: drafts by looking up its last tokens earlier in it.

Pure. An index of n-grams grows by a few dictionary entries with each token (prompt lookup decoding,
Saxena 2023, with several lengths and without searching). Once a place is found, its continuation is
followed for as long as it is right; where it runs into the end of the history it repeats itself.
"""

from __future__ import annotations

ORDERS = (4, 3, 2)  # lengths of n-grams, the most telling first
MOST_TOKENS = 1 << 15  # of a history; what is longer is followed, and no longer indexed


class Drafts:
    """One history, and what it repeats of itself."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram: where its last occurrence went on
        self._source: int | None = None  # the place whose continuation is followed
        self._matched = 0

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def matched(self) -> int:
        """How many tokens before the end are the same before the place followed; 0: no place."""
        return self._matched

    def append(self, token: int) -> bool | None:
        """Takes the history's next token; whether it is the one foretold, None if none was."""
        tokens = self._tokens
        hit: bool | None = None
        if self._source is not None:
            hit = tokens[self._source] == token
            if hit:
                self._source += 1
                self._matched += 1
            else:
                self._source = None
                self._matched = 0
        tokens.append(token)
        here = len(tokens)
        for order in ORDERS:
            if order > here:
                continue
            gram = tuple(tokens[-order:])
            if self._source is None:
                self._source = self._after.get(gram)
                self._matched = order if self._source is not None else 0
            if here <= MOST_TOKENS:
                self._after[gram] = here
        return hit

    def after(self, skip: int, count: int) -> list[int]:
        """The ``count`` tokens foretold, ``skip`` tokens from now; none where nothing is."""
        if self._source is None:
            return []
        period = len(self._tokens) - self._source
        first = self._source + skip
        return [
            self._tokens[self._source + (at - self._source) % period]
            for at in range(first, first + count)
        ]
