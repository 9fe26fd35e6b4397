"""What the journal says, and how: entries as msgpack maps, one behind the other. Pure.

No prompt and no text is ever in it. The tokens of answers are there as numbers only when that was
asked for; a running checksum of them always is.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgpack

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Opened:
    """A file begins. Requests are numbered by ``run``: that of one scheduler's process."""

    run: str
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request is the scheduler's: from now on it must end exactly once."""

    request: int
    answer: str  # what its client knows it by
    choice: int
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Started:
    """An attempt went to the ring of an epoch, with so many tokens generated before."""

    request: int
    attempt: int
    epoch: int
    generated: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """Tokens ``[first, first + count)`` of the answer; ``checksum`` is that of all so far."""

    request: int
    attempt: int
    first: int
    count: int
    checksum: int
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Moved:
    """An attempt is over, and the request is to go again."""

    request: int
    attempt: int
    epoch: int
    why: str  # broke, moved, refused


@dataclass(frozen=True, slots=True)
class Ended:
    """The one end of a request."""

    request: int
    reason: str  # stop, length, closed (by its reader), error
    tokens: int
    error: str = ""  # class of the error


@dataclass(frozen=True, slots=True)
class Missed:
    """So many entries could not be written: nothing can be proved of this run."""

    entries: int


Entry = Opened | Accepted | Started | Delivered | Moved | Ended | Missed

KINDS: dict[str, type[Entry]] = {
    kind.__name__.lower(): kind
    for kind in (Opened, Accepted, Started, Delivered, Moved, Ended, Missed)
}


@dataclass(frozen=True, slots=True)
class Record:
    """An entry and when it happened."""

    entry: Entry
    monotonic_s: float
    wall_s: float


@dataclass(slots=True)
class TokenRun:
    """Tokens of one answer that are not yet an entry."""

    request: int
    attempt: int
    first: int
    tokens: list[int]
    monotonic_s: float


class Encoder:
    """Entries in, bytes out; brings tokens that follow each other together.

    Args:
        tokens: whether the tokens themselves are written.
        wall_s: the wall clock's time at ``monotonic_s`` 0.
    """

    def __init__(self, *, tokens: bool, wall_s: float) -> None:
        self._tokens = tokens
        self._wall_s = wall_s
        self._checksums: dict[int, int] = {}
        self._pack = msgpack.Packer()

    def encode(self, noted: Iterable[tuple[float, Entry | TokenRun]]) -> bytes:
        """Entries, each with its monotonic time, as they are to be written."""
        out: list[bytes] = []
        runs: dict[int, TokenRun] = {}
        for monotonic_s, note in noted:
            if isinstance(note, TokenRun):
                run = runs.get(note.request)
                if run is None:
                    runs[note.request] = note
                elif (note.attempt, note.first) == (run.attempt, run.first + len(run.tokens)):
                    run.tokens += note.tokens
                else:  # a gap is for the checker to find, not for us to hide
                    out.append(self._run(run))
                    runs[note.request] = note
                continue
            request = getattr(note, "request", None)
            if request in runs:
                out.append(self._run(runs.pop(request)))
            out.append(self._record(note, monotonic_s))
            if isinstance(note, Ended):
                self._checksums.pop(note.request, None)
        out += map(self._run, runs.values())
        return b"".join(out)

    def _run(self, run: TokenRun) -> bytes:
        checksum = checksum_of(run.tokens, self._checksums.get(run.request, 0))
        self._checksums[run.request] = checksum
        tokens = tuple(run.tokens) if self._tokens else ()
        entry = Delivered(run.request, run.attempt, run.first, len(run.tokens), checksum, tokens)
        return self._record(entry, run.monotonic_s)

    def _record(self, entry: Entry, monotonic_s: float) -> bytes:
        fields = asdict(entry)
        if isinstance(entry, Delivered) and not entry.tokens:
            del fields["tokens"]
        packed: bytes = self._pack.pack(
            {
                "kind": type(entry).__name__.lower(),
                "monotonic_s": monotonic_s,
                "wall_s": self._wall_s + monotonic_s,
                **fields,
            }
        )
        return packed


def checksum_of(tokens: Sequence[int], before: int = 0) -> int:
    """CRC-32 of the tokens as little-endian 32-bit numbers, after those ``before``."""
    return zlib.crc32(b"".join(token.to_bytes(4, "little") for token in tokens), before)


def decode(chunks: Iterable[bytes]) -> Iterator[Record]:
    """The records of a file; one that was cut off at the end is left out.

    Raises:
        ValueError: it is no journal.
    """
    unpacker = msgpack.Unpacker(raw=False, max_buffer_size=1 << 26, max_map_len=32)
    for chunk in chunks:
        unpacker.feed(chunk)
        for fields in unpacker:
            yield _record_of(fields)


def _record_of(fields: Any) -> Record:
    try:
        values = dict(fields)
        kind = KINDS[values.pop("kind")]
        monotonic_s, wall_s = float(values.pop("monotonic_s")), float(values.pop("wall_s"))
        if "tokens" in values and isinstance(values["tokens"], list):
            values["tokens"] = tuple(values["tokens"])
        return Record(kind(**values), monotonic_s, wall_s)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this is no record of a journal: {error!r}") from None
