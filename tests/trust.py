"""A throwaway cluster authority, and members of it by name."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parallax.fabric.authority import Authority
from parallax.fabric.certificates import key_pem, new_key, signing_request
from parallax.fabric.credentials import Credentials, Papers
from parallax.fabric.discovery import Target
from parallax.fabric.identity import Identity
from parallax.fabric.limits import Limits
from parallax.fabric.members import MembersOnly
from parallax.fabric.tally import Tally
from parallax.node.enrolment import Enrolment
from parallax.proto import wire_pb2 as wire


@lru_cache
def identity(name: str) -> Identity:
    """The same one for the same name."""
    return Identity.of(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


def peer(name: str) -> str:
    """The peer id of a name."""
    return identity(name).peer_id


def authority(scheduler: str = "boss") -> Authority:
    """The authority of a scheduler's cluster."""
    return _authority(scheduler)


@lru_cache
def _authority(scheduler: str) -> Authority:
    return Authority(identity(scheduler), new_key())


def member(name: str, scheduler: str = "boss", *, life_s: float = 86_400.0) -> Credentials:
    """A member of a scheduler's cluster, or the scheduler itself."""
    credentials = Credentials(identity(name))
    issuer = authority(scheduler)
    if name == scheduler:
        credentials.adopt(issuer.own_papers())
    else:
        key = new_key()
        bound = issuer.issue(signing_request(identity(name), key), peer(name), life_s)
        credentials.adopt(Papers.of(key_pem(key), bound.pem, issuer.pem))
    return credentials


def tally() -> Tally:
    """One that counts."""
    return Tally(settle_s=0.0)


def everyone(counted: Tally | None = None) -> MembersOnly:
    """A gate that every member may pass."""
    return MembersOnly(lambda _: True, counted or tally())


async def let_in(
    enrol_port: int, name: str, folder: Path, *, token: str = ""
) -> tuple[Credentials, list[wire.Endpoint]]:
    """A node that a running scheduler of this machine has let in, and where members attend."""
    credentials = Credentials(identity(name))
    enrolment = Enrolment(
        credentials,
        folder / f"{name}.pem",
        name=name,
        token=token,
        limits=Limits(),
        on_event=lambda event: None,
    )
    place = wire.Endpoint(host="127.0.0.1", port=enrol_port, kind="loopback")
    _, endpoints = await enrolment.enrol(Target(None, (place,)), named=False)
    return credentials, endpoints
