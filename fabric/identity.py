"""Who a scheduler or a node is: an Ed25519 key in its state directory.

A peer id is the public key itself in libp2p's form: base58btc of the identity
multihash of the protobuf public key (libp2p specs, peer-ids/peer-ids.md), which
always begins with ``12D3KooW``.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import base58
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parallax.fabric.errors import BadSetting, SettingsError
from parallax.fabric.keyfiles import read_secret, write_secret

# identity multihash of 36 bytes; protobuf: key type 1 (Ed25519), 32 bytes of key
_HEAD = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))
_KEY_BYTES = 32
_FINGERPRINT_BYTES = 10
_FINGERPRINT_COST = 1 << 11  # scrypt's N at r=8: about 10 ms and 2 MiB


@dataclass(frozen=True, slots=True)
class Identity:
    """A key pair and the peer id that its public half is."""

    private: Ed25519PrivateKey = field(repr=False)
    peer_id: str

    @classmethod
    def of(cls, private: Ed25519PrivateKey) -> Identity:
        """The identity that a private key makes."""
        return cls(private, peer_id_of(private.public_key().public_bytes_raw()))


def peer_id_of(public: bytes) -> str:
    """The peer id of a raw Ed25519 public key (32 bytes)."""
    if len(public) != _KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {_KEY_BYTES} bytes, not {len(public)}")
    return str(base58.b58encode(_HEAD + public).decode("ascii"))


def public_key_of(peer_id: str) -> bytes:
    """The raw public key (32 bytes) that a peer id is.

    Raises:
        BadSetting: it is not the peer id of an Ed25519 key.
    """
    try:
        raw = base58.b58decode(peer_id)
    except ValueError:
        raw = b""
    if len(raw) != len(_HEAD) + _KEY_BYTES or not raw.startswith(_HEAD):
        raise BadSetting(
            f"'{peer_id}' is not a peer id",
            "A peer id begins with 12D3KooW and has 52 letters and digits",
            "Copy the join command from the page or from 'parallax run'",
            setting="scheduler",
        )
    return bytes(raw[len(_HEAD) :])


@functools.lru_cache(maxsize=1024)
def fingerprint(scheduler_id: str, node_id: str) -> str:
    """What people compare on both screens before they let a node in: "7KQ2-MX4D-A3TB-ZC3E".

    80 bits of both keys. Somebody in the middle can make keys for both sides, so it is a pair
    of equal ones that must be out of reach, 2^40 tries; scrypt (RFC 7914) makes each of them
    take a hundredth of a second instead of a millionth.

    Raises:
        BadSetting: one of them is not a peer id.
    """
    digest = hashlib.scrypt(
        public_key_of(node_id),
        salt=b"parallax-fingerprint:" + public_key_of(scheduler_id),
        n=_FINGERPRINT_COST,
        r=8,
        p=1,
        dklen=_FINGERPRINT_BYTES,
    )
    text = base64.b32encode(digest).decode("ascii")
    return "-".join(text[at : at + 4] for at in range(0, len(text), 4))


def load_identity(path: Path) -> Identity:
    """The identity kept in a file; made, for its owner's eyes only, if there is none.

    Two processes that start at once agree on one key.

    Raises:
        SettingsError: the file cannot be made or read, others may read it, or it holds
            no Ed25519 key.
    """
    if read_secret(path) is None:
        _make(path)
    pem = read_secret(path) or b""
    try:
        private = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise SettingsError(
            f"The identity {path} is damaged",
            "It holds no Ed25519 private key",
            "Put the file back from a copy, or delete it for a new identity",
        )
    return Identity.of(private)


def _make(path: Path) -> None:
    """Writes a new key, unless another process was faster."""
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_secret(path, pem, replace=False)
