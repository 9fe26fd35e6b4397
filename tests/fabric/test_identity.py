"""Peer ids in libp2p's form, and keys that stay."""

from __future__ import annotations

import multiprocessing
import os
import re
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from parallax.fabric.errors import BadSetting, SettingsError
from parallax.fabric.identity import (
    Identity,
    fingerprint,
    load_identity,
    peer_id_of,
    public_key_of,
)

# The Ed25519 key of libp2p's specs, peer-ids/peer-ids.md ("Test vectors").
SPEC_PRIVATE = bytes.fromhex("7e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d")
SPEC_PUBLIC = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
SPEC_PEER_ID = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
# The key inside the first certificate of tls/tls.md, and the peer id given with it.
TLS_PUBLIC = bytes.fromhex("a77f1d92fedb59dddaea5a1c4abd1ac2fbde7d7b879ed364501809923d7c11b9")
TLS_PEER_ID = "12D3KooWM6CgA9iBFZmcYAHA6A2qvbAxqfkmrYiRQuz3XEsk4Ksv"


def test_a_private_key_has_the_peer_id_that_libp2p_gives_it() -> None:
    identity = Identity.of(Ed25519PrivateKey.from_private_bytes(SPEC_PRIVATE))
    assert identity.peer_id == SPEC_PEER_ID


@pytest.mark.parametrize(
    ("public", "peer_id"), [(SPEC_PUBLIC, SPEC_PEER_ID), (TLS_PUBLIC, TLS_PEER_ID)]
)
def test_public_keys_and_peer_ids_are_the_same_thing(public: bytes, peer_id: str) -> None:
    assert peer_id_of(public) == peer_id
    assert public_key_of(peer_id) == public


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "studio",
        TLS_PEER_ID[:-1],
        TLS_PEER_ID + "1",
        TLS_PEER_ID.replace("K", "0", 1),  # not a letter of base58
        "QmfXbAwNjJLXfesgztEHe8HwgVDCMMpZ9Eax1HYq6hn9uE",  # an ECDSA key's, from tls/tls.md
        "12D3KooWé",
    ],
)
def test_what_is_no_peer_id_is_refused(wrong: str) -> None:
    with pytest.raises(BadSetting, match="not a peer id"):
        public_key_of(wrong)


def test_an_identity_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "state" / "identity.key"
    first = load_identity(path)
    assert first.peer_id.startswith("12D3KooW")
    assert load_identity(path).peer_id == first.peer_id
    assert [entry.name for entry in path.parent.iterdir()] == ["identity.key"]


def test_only_the_owner_can_read_the_key_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        load_identity(tmp_path / "state" / "identity.key")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "state" / "identity.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    load_identity(path)
    path.chmod(0o644)
    with pytest.raises(SettingsError, match=r"can be read by others \(mode 0644\)") as caught:
        load_identity(path)
    assert f"chmod 600 {path}" in caught.value.fix


def test_a_damaged_key_is_an_error_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    load_identity(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    with pytest.raises(SettingsError, match="damaged"):
        load_identity(path)
    assert path.read_bytes() == whole[:40]


def test_a_key_of_another_kind_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    path.touch(mode=0o600)
    path.write_bytes(
        x25519.X25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(SettingsError, match="damaged"):
        load_identity(path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="cannot be made or read"):
        load_identity(tmp_path / "file" / "identity.key")


def test_the_private_key_is_not_in_the_repr(tmp_path: Path) -> None:
    identity = load_identity(tmp_path / "identity.key")
    assert repr(identity) == f"Identity(peer_id='{identity.peer_id}')"


def _peer_id_at(path: Path) -> str:
    return load_identity(path).peer_id


def test_processes_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(_peer_id_at, [tmp_path / "identity.key"] * 9, chunksize=1)
    assert len(set(found)) == 1


def test_a_fingerprint_names_both_sides_and_their_roles() -> None:
    found = fingerprint(SPEC_PEER_ID, TLS_PEER_ID)
    assert found == fingerprint(SPEC_PEER_ID, TLS_PEER_ID)
    assert re.fullmatch(r"[A-Z2-7]{4}(-[A-Z2-7]{4}){3}", found)
    other = Identity.of(Ed25519PrivateKey.generate()).peer_id
    pairs = [(TLS_PEER_ID, SPEC_PEER_ID), (SPEC_PEER_ID, other), (other, TLS_PEER_ID)]
    assert len({found, *(fingerprint(*pair) for pair in pairs)}) == 4


def test_a_fingerprint_of_something_else_than_peer_ids_is_refused() -> None:
    with pytest.raises(BadSetting):
        fingerprint(SPEC_PEER_ID, "mallory")
