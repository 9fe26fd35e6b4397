"""The cluster's own authority: who the scheduler has let in has a certificate from here.

Its key lies in the scheduler's state directory. Its certificate is bound to the scheduler's
identity, so a node that knows the peer id knows whether an authority is the right one.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from parallax.fabric.certificates import (
    FOREVER,
    Bound,
    authority_of,
    issue,
    key_pem,
    new_key,
    signing_request,
)
from parallax.fabric.credentials import Papers
from parallax.fabric.errors import SettingsError
from parallax.fabric.identity import Identity
from parallax.fabric.keyfiles import read_secret, write_secret


class Authority:
    """Issues certificates in the name of one scheduler."""

    def __init__(self, identity: Identity, key: ec.EllipticCurvePrivateKey) -> None:
        self._identity = identity
        self._key = key
        self._own = authority_of(identity, key)

    @classmethod
    def load(cls, path: Path, identity: Identity) -> Authority:
        """The authority whose key a file holds; made, for its owner alone, if there is none.

        Raises:
            SettingsError: the file cannot be used, or others may read it.
        """
        if read_secret(path) is None:
            write_secret(path, key_pem(new_key()), replace=False)
        pem = read_secret(path)
        try:
            key = serialization.load_pem_private_key(pem or b"", password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise SettingsError(
                f"The authority's key {path} is damaged",
                "It holds no ECDSA private key",
                "Put the file back from a copy, or delete it: all nodes then join anew",
            )
        return cls(identity, key)

    @property
    def pem(self) -> bytes:
        """Its certificate, which all members know."""
        return self._own.pem

    def issue(self, request: bytes, peer_id: str, life_s: float) -> Bound:
        """A certificate for a peer that was let in, until so many seconds from now.

        Raises:
            PeerMismatch: it is no request of this peer.
        """
        now = datetime.now(UTC)
        ends = now + timedelta(seconds=life_s)
        return issue(request, peer_id, self._own, self._key, ends, now)

    def own_papers(self) -> Papers:
        """What the scheduler itself shows to its nodes. Its end is the authority's own."""
        key = new_key()
        request = signing_request(self._identity, key)
        peer_id = self._identity.peer_id
        bound = issue(request, peer_id, self._own, self._key, FOREVER, datetime.now(UTC))
        return Papers.of(key_pem(key), bound.pem, self.pem)
