"""Join tokens as the scheduler remembers them: never the token itself, only its hash.

A token has 160 random bits, so one SHA-256 without salt is as hard to turn back as the
token is to guess; slow hashes are for words that people choose.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from enum import Enum

import base58

PREFIX = "pxt_"  # so that people, and programs that look for secrets, know what it is
MOST_CHARACTERS = 256  # of what is taken for a token; real ones have about 32
ID_CHARACTERS = 12
_RANDOM_BYTES = 20


class TokenState(Enum):
    """Whether a token opens the door."""

    GOOD = "good"
    EXPIRED = "expired"
    REVOKED = "revoked"
    USED_UP = "used up"


@dataclass(frozen=True, slots=True)
class Token:
    """What is remembered of a token. Times are seconds since 1970, by the scheduler's clock."""

    id: str
    digest: bytes
    note: str
    created_s: float
    expires_s: float
    uses_limit: int | None = None  # None: as often as one likes
    uses: int = 0
    revoked_s: float | None = None

    def state(self, now: float) -> TokenState:
        """How it stands at ``now``."""
        if self.revoked_s is not None:
            return TokenState.REVOKED
        if now >= self.expires_s:
            return TokenState.EXPIRED
        if self.uses_limit is not None and self.uses >= self.uses_limit:
            return TokenState.USED_UP
        return TokenState.GOOD


def new_token() -> str:
    """A fresh token: letters and digits, safe in a command line."""
    return PREFIX + str(base58.b58encode(secrets.token_bytes(_RANDOM_BYTES)).decode("ascii"))


def digest_of(token: str) -> bytes:
    """What is remembered of a token."""
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def id_of(digest: bytes) -> str:
    """A token's name in lists and logs: it tells nothing of use about the token."""
    return digest.hex()[:ID_CHARACTERS]
