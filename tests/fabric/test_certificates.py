"""Certificates that an identity answers for: what is taken, and what is not."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from parallax.fabric.authority import Authority
from parallax.fabric.certificates import (
    SKEW,
    dns_name,
    issued_by,
    key_pem,
    new_key,
    peer_of_name,
    read,
    self_signed,
    signing_request,
)
from parallax.fabric.credentials import Credentials, Papers, out_of_time
from parallax.fabric.enrolment import check, prove
from parallax.fabric.errors import PeerMismatch, SettingsError
from parallax.proto import wire_pb2 as wire
from tests.trust import authority, identity, member, peer

OID = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
PREFIX = b"libp2p-tls-handshake:"


def certificate(binding: bytes | None, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate with anything as its binding."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    if binding is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(OID, binding), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def signed_key(name: str, key: ec.EllipticCurvePrivateKey, prefix: bytes = PREFIX) -> bytes:
    """SignedKey in DER, as the specification has it, written down once more."""
    public = identity(name).private.public_key().public_bytes_raw()
    spki = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    signature = identity(name).private.sign(prefix + spki)
    return b"\x30\x68\x04\x24\x08\x01\x12\x20" + public + b"\x04\x40" + signature


def test_a_certificate_says_whose_it_is_in_pem_and_der() -> None:
    bound = self_signed(identity("a"), new_key())
    der = bound.certificate.public_bytes(serialization.Encoding.DER)
    assert read(der).peer_id == read(bound.pem).peer_id == peer("a")


def test_a_binding_written_by_somebody_else_after_the_specification_is_understood() -> None:
    key = new_key()
    assert read(certificate(signed_key("a", key), key)).peer_id == peer("a")


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


def test_a_certificate_that_does_not_prove_its_identity_is_refused() -> None:
    key, other = new_key(), new_key()
    right = signed_key("a", key)
    wrong = {
        "no binding": None,
        "an empty one": b"",
        "a signature of another TLS key": signed_key("a", other),
        "a signature over something else": signed_key("a", key, b"another-protocol:"),
        "another identity's key under the signature": right[:8]
        + signed_key("b", key)[8:40]
        + right[40:],
        "a bit of the signature": changed(right, 60),
        "another type of key": changed(right, 5),
        "a byte too few": right[:-1],
        "a byte too many": right + b"\0",
    }
    for what, binding in wrong.items():
        with pytest.raises(PeerMismatch):
            pytest.fail(f"{what}: {read(certificate(binding, key)).peer_id}")


@pytest.mark.parametrize("junk", [b"", b"junk", b"-----BEGIN CERTIFICATE-----", b"\x30" * 5000])
def test_what_is_no_certificate_is_refused(junk: bytes) -> None:
    with pytest.raises(PeerMismatch):
        read(junk)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The same with a few bytes changed, left out or added."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, what = rng.randrange(len(found)), rng.random()
        if what < 0.7:
            found[at] ^= 1 << rng.randrange(8)
        elif what < 0.85:
            del found[at : at + rng.randrange(1, 5)]
        else:
            found[at:at] = rng.randbytes(rng.randrange(1, 5))
    return bytes(found)


def test_damaged_bytes_are_refused_and_never_taken_for_somebody_else() -> None:
    rng = random.Random(7)
    bound = self_signed(identity("a"), new_key())
    der = bound.certificate.public_bytes(serialization.Encoding.DER)
    request = signing_request(identity("a"), new_key())
    refused = 0
    for _ in range(1000):
        try:
            assert read(damaged(rng, der)).peer_id == peer("a")
        except PeerMismatch:
            refused += 1
        if (other := damaged(rng, request)) != request:
            with pytest.raises(PeerMismatch):
                authority().issue(other, peer("a"), 60)
    assert 300 < refused < 1000


def test_a_version_that_does_not_exist_is_refused() -> None:
    request = bytearray(signing_request(identity("a"), new_key()))
    at = request.index(b"\x02\x01\x00") + 2  # INTEGER 0, the version
    request[at] = 8
    with pytest.raises(PeerMismatch):
        authority().issue(bytes(request), peer("a"), 60)


def test_a_name_for_tls_is_the_peer_id_in_other_letters() -> None:
    name = dns_name(peer("a"))
    assert len(name.split(".")[0]) <= 63
    assert peer_of_name(name) == peer("a")
    for other in ("parallax", "localhost", name.removesuffix(".parallax"), name[1:], ""):
        assert peer_of_name(other) is None


def issue(name: str, life_s: float = 3600.0, scheduler: str = "boss") -> Papers:
    return member(name, scheduler, life_s=life_s).papers


def test_the_authority_issues_for_the_node_that_asks_and_no_other() -> None:
    key = new_key()
    request = signing_request(identity("a"), key)
    bound = authority().issue(request, peer("a"), 60)
    assert bound.peer_id == peer("a")
    with pytest.raises(PeerMismatch):
        authority().issue(request, peer("b"), 60)


def test_a_request_that_its_key_has_not_signed_is_refused() -> None:
    request = signing_request(identity("a"), new_key())
    with pytest.raises(PeerMismatch):
        authority().issue(request[:-1] + bytes((request[-1] ^ 1,)), peer("a"), 60)
    with pytest.raises(PeerMismatch):
        authority().issue(b"\x30" * 100_000, peer("a"), 60)


def test_papers_must_fit_together() -> None:
    mine, other = issue("a"), issue("a", scheduler="other boss")
    assert Papers.from_pem(mine.pem) == mine
    assert mine.scheduler_id == peer("boss")
    with pytest.raises(PeerMismatch):
        Papers.of(mine.key_pem, mine.own.pem, other.authority.pem)
    with pytest.raises(PeerMismatch):
        Papers.of(key_pem(new_key()), mine.own.pem, mine.authority.pem)
    with pytest.raises(PeerMismatch):
        Papers.from_pem(mine.pem[: len(mine.pem) // 2])
    with pytest.raises(PeerMismatch):
        Credentials(identity("b")).adopt(mine)


def test_a_key_is_never_shown() -> None:
    papers = issue("a")
    assert "PRIVATE" not in repr(papers)
    assert "PRIVATE" not in repr(vars(member("a")))


def test_a_certificate_is_good_on_clocks_that_are_a_day_off() -> None:
    papers = issue("a", life_s=7 * 86_400)
    now = datetime.now(UTC)
    assert papers.valid(now - timedelta(days=1))
    assert papers.valid(now + timedelta(days=1))
    assert not papers.valid(now - SKEW - timedelta(minutes=1))
    assert not papers.valid(now + timedelta(days=7, minutes=1))


def test_a_certificate_that_is_over_by_this_clock_says_what_the_clocks_say() -> None:
    now = datetime.now(UTC)
    assert out_of_time(issue("a").own, "It", now) is None
    error = out_of_time(issue("a", life_s=-1).own, "It", now)
    assert error is not None
    assert "clocks" in error.fix
    assert f"{now:%Y-%m-%d %H:%M}" in error.why


def test_an_authority_stays_the_same_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "authority.key"
    first, second = (Authority.load(path, identity("boss")) for _ in range(2))
    assert path.stat().st_mode & 0o777 == 0o600
    bound = first.issue(signing_request(identity("a"), new_key()), peer("a"), 60)
    assert issued_by(bound, read(second.pem))
    assert not issued_by(bound, issue("a").authority)


def test_an_authority_whose_key_others_can_read_or_that_is_damaged_is_not_used(
    tmp_path: Path,
) -> None:
    path = tmp_path / "authority.key"
    Authority.load(path, identity("boss"))
    path.chmod(0o640)
    with pytest.raises(SettingsError, match="0640"):
        Authority.load(path, identity("boss"))
    path.chmod(0o600)
    path.write_bytes(b"junk")
    with pytest.raises(SettingsError, match="damaged"):
        Authority.load(path, identity("boss"))


def request_of(name: str, scheduler: str) -> wire.EnrolRequest:
    request = wire.EnrolRequest(node_id=peer(name), name=name, csr=b"csr", token="token")
    prove(request, identity(name), peer(scheduler))
    return request


def test_a_request_to_join_counts_only_where_and_as_it_was_signed() -> None:
    check(request_of("a", "boss"), peer("boss"))
    with pytest.raises(PeerMismatch):
        check(request_of("a", "boss"), peer("other boss"))
    for field, value in {
        "node_id": peer("b"),
        "name": "b",
        "csr": b"other",
        "token": "other",
        "proof": b"",
    }.items():
        request = request_of("a", "boss")
        setattr(request, field, value)
        with pytest.raises(PeerMismatch):
            check(request, peer("boss"))
