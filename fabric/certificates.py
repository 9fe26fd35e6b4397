"""X.509 certificates that an Ed25519 identity answers for, as libp2p's TLS specification has it.

TLS keys are ECDSA P-256 (gRPC takes no Ed25519 certificates). Each certificate carries the public
key of an identity and its signature over the TLS key (libp2p specs, tls/tls.md, "libp2p Public Key
Extension"), so whoever knows a peer id can tell whether a certificate is that peer's, without
asking anybody. A certificate names its peer once more as a DNS name, for TLS itself to check.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from parallax.fabric.errors import PeerMismatch
from parallax.fabric.identity import Identity, peer_id_of, public_key_of

MOST_BYTES = 4096  # of a certificate or a request; ours have less than 1,000

_BINDING = x509.ObjectIdentifier("1.3.6.1.4.1.53594.1.1")
_PREFIX = b"libp2p-tls-handshake:"
_KEY_HEAD = bytes((0x08, 0x01, 0x12, 0x20))  # protobuf: key type 1 (Ed25519), 32 bytes of key
_SIGNATURE_BYTES = 64
_DOMAIN = ".parallax"

# Certificates that stand for a key which lies beside them have no use for an end (RFC 5280,
# 4.1.2.5), and none for a beginning: clocks that were never set show 1970.
ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)
FOREVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
SKEW = timedelta(days=2)  # clocks may be that much behind the one of the authority


@dataclass(frozen=True, slots=True)
class Bound:
    """A certificate, and the peer whose it is."""

    certificate: x509.Certificate
    peer_id: str

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def dns_name(peer_id: str) -> str:
    """The name by which TLS knows a peer: its public key in base32, a label of 52 letters.

    Raises:
        BadSetting: it is no peer id.
    """
    text = base64.b32encode(public_key_of(peer_id)).decode("ascii")
    return text.rstrip("=").lower() + _DOMAIN


def peer_of_name(name: str) -> str | None:
    """The peer id that a name made by :func:`dns_name` stands for; None for any other."""
    label = name.removesuffix(_DOMAIN).upper()
    try:
        public = base64.b32decode(label + "=" * (-len(label) % 8))
        return peer_id_of(public) if name.endswith(_DOMAIN) else None
    except (binascii.Error, ValueError):
        return None


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key for TLS."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as its file holds it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def self_signed(identity: Identity, key: ec.EllipticCurvePrivateKey) -> Bound:
    """What a peer shows to those who know nothing but its peer id."""
    certificate = (
        _builder(dns_name(identity.peer_id), dns_name(identity.peer_id), key.public_key())
        .not_valid_before(ALWAYS)
        .not_valid_after(FOREVER)
        .add_extension(_binding(identity, key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Bound(certificate, identity.peer_id)


def authority_of(identity: Identity, key: ec.EllipticCurvePrivateKey) -> Bound:
    """The certificate of a cluster's authority, which its scheduler's identity answers for."""
    public = key.public_key()
    name = _authority_name(identity.peer_id)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(ALWAYS)
        .not_valid_after(FOREVER)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(_binding(identity, public), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Bound(certificate, identity.peer_id)


def signing_request(identity: Identity, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A request for a certificate (PKCS #10, DER), bound to the identity."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, dns_name(identity.peer_id))])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .add_extension(_binding(identity, key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.DER)


def issue(
    request: bytes,
    peer_id: str,
    authority: Bound,
    key: ec.EllipticCurvePrivateKey,
    ends: datetime,
    now: datetime,
) -> Bound:
    """The certificate that a request asks for, valid for both sides of a connection.

    Of the request only the key and its binding are taken.

    Args:
        request: as :func:`signing_request` makes it.
        peer_id: whose request it has to be.
        authority: who issues.
        key: the authority's.
        ends: until when it is valid.
        now: the authority's time.

    Raises:
        PeerMismatch: it is no request of this peer, or not signed by the key it names.
    """
    try:
        asked = x509.load_der_x509_csr(request[:MOST_BYTES])
        public = asked.public_key()
        valid = asked.is_signature_valid
        found = _bound_peer(asked.extensions, public)
    except Exception as error:  # the parser's errors have no common class, and more may come
        raise _unproven("What came is no request for a certificate", str(error)) from None
    if not valid or not isinstance(public, ec.EllipticCurvePublicKey):
        raise _unproven("A request for a certificate is not signed by its key", "")
    if found != peer_id:
        raise PeerMismatch(
            "A request for a certificate is somebody else's",
            f"it is bound to {found}, not to {peer_id}",
            expected=peer_id,
            found=found,
        )
    binding = asked.extensions.get_extension_for_oid(_BINDING)
    certificate = (
        _builder(dns_name(peer_id), authority.certificate.subject, public)
        .not_valid_before(min(now, ends) - SKEW)
        .not_valid_after(ends)
        .add_extension(_issuer(key), critical=False)
        .add_extension(binding.value, critical=False)
        .sign(key, hashes.SHA256())
    )
    return Bound(certificate, peer_id)


def read(data: bytes) -> Bound:
    """A certificate (DER or PEM) whose identity's signature is right.

    Its own signature, its issuer and its dates are not looked at.

    Raises:
        PeerMismatch: it proves no identity.
    """
    pem = data[:MOST_BYTES].lstrip().startswith(b"-----")
    try:
        load = x509.load_pem_x509_certificate if pem else x509.load_der_x509_certificate
        certificate = load(data[:MOST_BYTES])
        return Bound(certificate, _bound_peer(certificate.extensions, certificate.public_key()))
    except Exception as error:  # as above
        raise _unproven("A certificate that came cannot be read", str(error)) from None


def issued_by(certificate: Bound, authority: Bound) -> bool:
    """Whether this authority signed it."""
    try:
        certificate.certificate.verify_directly_issued_by(authority.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _builder(
    subject: str, issuer: str | x509.Name, public: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    """What all certificates of peers have in common."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer if isinstance(issuer, x509.Name) else name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(subject)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _authority_name(peer_id: str) -> x509.Name:
    # Its own name for each cluster: TLS then says "unknown issuer" and not "wrong signature".
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"authority.{dns_name(peer_id)[:40]}")]
    )


def _issuer(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _binding(identity: Identity, public: ec.EllipticCurvePublicKey) -> x509.UnrecognizedExtension:
    """SignedKey ::= SEQUENCE { publicKey OCTET STRING, signature OCTET STRING }, in DER."""
    key = _KEY_HEAD + public_key_of(identity.peer_id)
    signature = identity.private.sign(_PREFIX + _spki(public))
    body = _octets(key) + _octets(signature)
    return x509.UnrecognizedExtension(_BINDING, bytes((0x30, len(body))) + body)


def _bound_peer(extensions: x509.Extensions, public: object) -> str:
    """The peer whose signature stands in the extensions of ``public``'s certificate."""
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise ValueError("its key is none of ECDSA")
    try:
        value = extensions.get_extension_for_oid(_BINDING).value
    except x509.ExtensionNotFound:
        raise ValueError("it has no identity in it") from None
    data = value.value if isinstance(value, x509.UnrecognizedExtension) else b""
    # Ed25519 keys and signatures have one length each, so there is one form of it.
    size = len(_KEY_HEAD) + 32
    head = bytes((0x30, 4 + size + _SIGNATURE_BYTES, 0x04, size)) + _KEY_HEAD
    key, rest = data[len(head) : len(head) + 32], data[len(head) + 32 :]
    if not data.startswith(head) or rest[:2] != bytes((0x04, _SIGNATURE_BYTES)):
        raise ValueError("its identity is none of Ed25519")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(rest[2:], _PREFIX + _spki(public))
    except InvalidSignature:
        raise ValueError("its identity's signature is wrong") from None
    return peer_id_of(key)


def _spki(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _octets(data: bytes) -> bytes:
    return bytes((0x04, len(data))) + data


def _unproven(what: str, why: str) -> PeerMismatch:
    return PeerMismatch(
        what,
        why,
        "Somebody else may be in between; check the address, and the join command's peer id",
    )
