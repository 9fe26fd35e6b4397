"""Who may use the HTTP API, how much, and what they used: decisions, and no I/O.

A key is ``px-`` and 192 random bits. Only its SHA-256 is kept: what is as random as
that cannot be guessed from its digest, so a slow or salted hash would gain nothing.
A digest is looked up in a dictionary, whose timing tells of digests alone.

``now_s`` is monotonic seconds, ``at_s`` Unix seconds.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from parallax.fabric.errors import KeyLimited, KeyRefused, UnknownKey

PREFIX = "px-"
LOCAL = "local"  # id of the secret that the command on the scheduler's own machine uses
WINDOW_S = 60.0
MOST_A_MINUTE = 10_000
MOST_AT_ONCE = 10_000

_RANDOM_BYTES = 24
_BUSY_RETRY_S = 1


@dataclass(frozen=True, slots=True)
class Usage:
    """What was done with a key."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    last_used: int | None = None  # Unix seconds

    def plus(self, other: Usage) -> Usage:
        """Both together; the last use is the later one."""
        last = [at for at in (self.last_used, other.last_used) if at is not None]
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            max(last, default=None),
        )


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it is stored."""

    id: str
    name: str
    digest: str = field(repr=False)
    admin: bool = False
    rate: int | None = None  # requests to /v1 in any minute
    concurrent: int | None = None  # requests to /v1 at a time
    created: int = 0  # Unix seconds
    usage: Usage = Usage()


def new_secret() -> str:
    """A key as its owner sees it, once."""
    return PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def new_id() -> str:
    """A name for a key that gives nothing of it away."""
    return "key_" + secrets.token_hex(4)


def digest_of(secret: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class Holder:
    """A key in use: what it may do, what runs under it, and what it used."""

    __slots__ = ("_begun_s", "_fresh", "_watchers", "record", "revoked", "running")

    def __init__(self, record: KeyRecord) -> None:
        self.record = record
        self.revoked = False
        self.running = 0
        self._begun_s: deque[float] = deque()  # when the requests of the last minute began
        self._fresh = Usage()  # not written yet
        self._watchers: set[Callable[[], None]] = set()

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def admin(self) -> bool:
        return self.record.admin

    @property
    def usage(self) -> Usage:
        """All of it, since the key was made."""
        return self.record.usage.plus(self._fresh)

    def begin(self, now_s: float, at_s: int) -> None:
        """A request to /v1 begins; call :meth:`end` when it is over.

        Raises:
            KeyLimited: over the key's rate or number at a time; it is not counted then.
        """
        record, begun = self.record, self._begun_s
        if record.concurrent is not None and self.running >= record.concurrent:
            raise KeyLimited(
                f"The API key {record.id} has {self.running} requests in progress",
                f"It may have {record.concurrent} at a time",
                "Wait for one of them to end",
                retry_after_s=_BUSY_RETRY_S,
            )
        if record.rate is not None:
            while begun and begun[0] <= now_s - WINDOW_S:
                begun.popleft()
            if len(begun) >= record.rate:
                wait_s = begun[0] + WINDOW_S - now_s
                raise KeyLimited(
                    f"The API key {record.id} has made {record.rate} requests within a minute",
                    "It may not make more",
                    f"Try again in {wait_s:.0f} s",
                    retry_after_s=max(1, int(-(-wait_s // 1))),
                )
            begun.append(now_s)
        self.running += 1
        self._fresh = self._fresh.plus(Usage(requests=1, last_used=at_s))

    def end(self) -> None:
        """A request that began is over."""
        self.running -= 1

    @contextmanager
    def watched(self, revoked: Callable[[], None]) -> Iterator[None]:
        """Tells ``revoked``, once, when the key counts no more while this is entered."""
        self._watchers.add(revoked)
        if self.revoked:
            revoked()
        try:
            yield
        finally:
            self._watchers.discard(revoked)

    def revoke(self) -> None:
        """The key counts no more."""
        self.revoked = True
        for watcher in list(self._watchers):
            watcher()

    def used(self, prompt_tokens: int, completion_tokens: int) -> None:
        """An answer took so many tokens."""
        self._fresh = self._fresh.plus(Usage(0, prompt_tokens, completion_tokens))

    def take_fresh(self) -> Usage | None:
        """What was used since the last call, or None; it is the caller's to write down."""
        fresh = self._fresh
        if fresh == Usage():
            return None
        self.record = replace(self.record, usage=self.record.usage.plus(fresh))
        self._fresh = Usage()
        return fresh


class KeyRing:
    """All keys that count now."""

    def __init__(self, records: Iterable[KeyRecord] = (), local_secret: str | None = None) -> None:
        self._by_digest: dict[str, Holder] = {}
        self._by_id: dict[str, Holder] = {}
        for record in records:
            self.add(record)
        if local_secret is not None:
            local = KeyRecord(LOCAL, LOCAL, digest_of(local_secret), admin=True)
            self._by_digest[local.digest] = Holder(local)

    def add(self, record: KeyRecord) -> None:
        """A new key counts from now on."""
        holder = Holder(record)
        self._by_digest[record.digest] = self._by_id[record.id] = holder

    def revoke(self, key_id: str) -> Holder:
        """This key counts no more.

        Raises:
            UnknownKey: there is none of this id.
        """
        holder = self.get(key_id)
        del self._by_id[key_id], self._by_digest[holder.record.digest]
        holder.revoke()
        return holder

    def get(self, key_id: str) -> Holder:
        """The key of this id.

        Raises:
            UnknownKey: there is none.
        """
        holder = self._by_id.get(key_id)
        if holder is None:
            raise UnknownKey(
                f"There is no API key {key_id[:40]!r}",
                "It was revoked, or never made",
                "'parallax keys list' shows those that there are",
            )
        return holder

    def find(self, secret: str | None) -> Holder:
        """Whose key this is.

        Raises:
            KeyRefused: nobody's, or none was given.
        """
        if not secret:
            raise KeyRefused(
                "This needs an API key",
                "The request brings none",
                "Send it as 'Authorization: Bearer px-…'; 'parallax keys create' on the "
                "scheduler's machine makes one",
            )
        holder = self._by_digest.get(digest_of(secret))
        if holder is None:
            raise KeyRefused(
                "The API key is not valid here",
                "It was revoked, or never made",
                "'parallax keys create' on the scheduler's machine makes a new one",
            )
        return holder

    def holders(self) -> list[Holder]:
        """All keys that were made and not revoked, oldest first."""
        return list(self._by_id.values())

    def take_fresh(self) -> dict[str, Usage]:
        """What was used since the last call, by key id."""
        taken = ((holder.id, holder.take_fresh()) for holder in self._by_id.values())
        return {key_id: usage for key_id, usage in taken if usage is not None}
