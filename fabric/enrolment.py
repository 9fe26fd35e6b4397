"""What a node signs when it asks to be let in, so that nobody else can ask in its name.

The identity's signature covers the scheduler that is asked: a request that one scheduler was shown
is worth nothing at another. Every part has a fixed length, so there is one way to read it.
"""

from __future__ import annotations

import hashlib

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from parallax.fabric.errors import BadSetting, PeerMismatch
from parallax.fabric.identity import Identity, public_key_of
from parallax.proto import wire_pb2 as wire

_PREFIX = b"parallax-enrol:2:"


def prove(request: wire.EnrolRequest, identity: Identity, scheduler_id: str) -> None:
    """Signs a request for this scheduler."""
    request.proof = identity.private.sign(_statement(request, scheduler_id))


def check(request: wire.EnrolRequest, scheduler_id: str) -> None:
    """
    Raises:
        PeerMismatch: the request is not signed by the node that it names, for this scheduler.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key_of(request.node_id))
        key.verify(request.proof, _statement(request, scheduler_id))
    except (BadSetting, InvalidSignature):
        raise PeerMismatch(
            "A request to join is not signed by the node that it names",
            "Its key was not there, or it was meant for another scheduler",
        ) from None


def _statement(request: wire.EnrolRequest, scheduler_id: str) -> bytes:
    texts = (request.csr, request.name.encode(), request.token.encode())
    return b"".join(
        (
            _PREFIX,
            public_key_of(scheduler_id),
            public_key_of(request.node_id),
            *(hashlib.sha256(text).digest() for text in texts),
        )
    )
