"""What a process shows of itself on its connections, and by what it judges its peers."""

from __future__ import annotations

import ssl
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Protocol

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from parallax.fabric.certificates import (
    MOST_BYTES,
    Bound,
    issued_by,
    key_pem,
    new_key,
    peer_of_name,
    read,
    self_signed,
)
from parallax.fabric.errors import NotAdmitted, PeerMismatch
from parallax.fabric.identity import Identity

_MARK = b"-----BEGIN CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Papers:
    """A TLS key with its certificate, and the authority that both sides have in common."""

    key_pem: bytes = field(repr=False)
    own: Bound
    authority: Bound

    @classmethod
    def of(cls, key: bytes, certificate: bytes, authority: bytes) -> Papers:
        """Papers that fit together, from PEM.

        Raises:
            PeerMismatch: they do not, or one of them proves no identity.
        """
        papers = cls(key, read(certificate), read(authority))
        try:
            fits = load_pem_private_key(key, None).public_key() == (
                papers.own.certificate.public_key()
            )
        except (ValueError, TypeError):
            fits = False
        if not fits or not issued_by(papers.own, papers.authority):
            raise PeerMismatch("A key, its certificate and its authority do not fit together")
        return papers

    @classmethod
    def from_pem(cls, data: bytes) -> Papers:
        """What :meth:`pem` made.

        Raises:
            PeerMismatch: it is damaged.
        """
        key, *certificates = data[: 4 * MOST_BYTES].split(_MARK)
        if len(certificates) != 2:
            raise PeerMismatch("There have to be a key and two certificates")
        return cls.of(key, _MARK + certificates[0], _MARK + certificates[1])

    @property
    def pem(self) -> bytes:
        """All of it in one piece, for one file."""
        return self.key_pem + self.own.pem + self.authority.pem

    @property
    def peer_id(self) -> str:
        return self.own.peer_id

    @property
    def scheduler_id(self) -> str:
        """Whose authority it is."""
        return self.authority.peer_id

    def valid(self, now: datetime) -> bool:
        """Whether the certificate has begun and not ended."""
        return out_of_time(self.own, "", now) is None

    def left(self, now: datetime) -> timedelta:
        """How long the certificate is still valid."""
        return self.own.certificate.not_valid_after_utc - now


def out_of_time(bound: Bound, what: str, now: datetime) -> NotAdmitted | None:
    """Why a certificate does not count at this machine's time; None if it does."""
    begins, ends = bound.certificate.not_valid_before_utc, bound.certificate.not_valid_after_utc
    if begins <= now < ends:
        return None
    return NotAdmitted(
        f"{what} is not valid by this machine's clock",
        f"It is for {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC, and here it is "
        f"{now:%Y-%m-%d %H:%M} UTC",
        "If that is not the time, set the clocks of both machines; else join again",
        reason="clock",
    )


class Credentials:
    """The papers that count now. They may be replaced at any time, from any thread.

    Begins with a certificate that the identity made for itself: enough for strangers to know who
    this is, and nobody is trusted yet.
    """

    def __init__(self, identity: Identity) -> None:
        self._lock = threading.Lock()
        self._contexts: dict[bool, ssl.SSLContext] = {}
        self.identity = identity
        self._papers = _own_papers(identity)

    @property
    def papers(self) -> Papers:
        return self._papers

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    @property
    def scheduler_id(self) -> str:
        """Whose cluster this is a member of; its own id while it is of none."""
        return self._papers.scheduler_id

    @property
    def member(self) -> bool:
        """Whether there is a certificate of a cluster."""
        return self._papers.own is not self._papers.authority

    def adopt(self, papers: Papers) -> None:
        """Connections that are opened or taken from now on use these."""
        if papers.peer_id != self.identity.peer_id:
            raise PeerMismatch(
                "The certificate is somebody else's",
                expected=self.identity.peer_id,
                found=papers.peer_id,
            )
        with self._lock:
            self._papers = papers
            self._contexts.clear()

    def resign(self) -> None:
        """Is a member of no cluster any more."""
        with self._lock:
            self._papers = _own_papers(self.identity)
            self._contexts.clear()

    def for_channel(self) -> grpc.ChannelCredentials:
        """For a channel to a member of the cluster."""
        papers = self._papers
        return grpc.ssl_channel_credentials(papers.authority.pem, papers.key_pem, papers.own.pem)

    def for_members(self, begun: Callable[[], None]) -> grpc.ServerCredentials:
        """For one address of a listener that takes members alone.

        gRPC asks at each connection whether what it shows has changed, and ``begun`` is told of it.
        It must not be answered with the same once more: gRPC's core takes that for new, and lets go
        of what handshakes on other threads are just being made from, of which the process dies.
        """
        given = self._papers

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            begun()
            if self._papers is given:
                return None
            given = self._papers
            return _configuration(given)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given),
            changed,  # type: ignore[arg-type]  # its stubs leave None out
            require_client_authentication=True,
        )

    def for_strangers(self) -> grpc.ServerCredentials:
        """For a listener that takes anybody and proves its own identity only."""
        papers = _own_papers(self.identity)
        return grpc.ssl_server_credentials([(papers.key_pem, papers.own.pem)])

    def client_context(self) -> ssl.SSLContext:
        """For a plain TLS connection to a member; name it by ``dns_name`` of its peer id."""
        return self._context(server=False)

    def server_context(self) -> ssl.SSLContext:
        """For plain TLS connections from members."""
        return self._context(server=True)

    def _context(self, *, server: bool) -> ssl.SSLContext:
        with self._lock:
            if server not in self._contexts:
                self._contexts[server] = mutual_context(self._papers, server=server)
            return self._contexts[server]


def _configuration(papers: Papers) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(papers.key_pem, papers.own.pem)], papers.authority.pem
    )


def _own_papers(identity: Identity) -> Papers:
    """What an identity says of itself alone."""
    key = new_key()
    bound = self_signed(identity, key)
    return Papers(key_pem(key), bound, bound)


def mutual_context(papers: Papers, *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 where both sides show certificates of one authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=papers.authority.pem.decode("ascii"))
    load_chain(context, papers)
    if server:
        context.num_tickets = 0  # nothing is ever resumed, and clients need not read
    return context


def load_chain(context: ssl.SSLContext, papers: Papers) -> None:
    """Has a context show these papers. Python takes them only from a file."""
    with tempfile.NamedTemporaryFile(prefix="parallax-", suffix=".pem") as file:  # mode 0600
        file.write(papers.key_pem + papers.own.pem)
        file.flush()
        context.load_cert_chain(file.name)


class Call(Protocol):
    """What is asked of a ``grpc.aio.ServicerContext``."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]: ...


def peer_of(context: Call) -> str | None:
    """Who calls, as TLS has proved it; None for one without a certificate of a peer."""
    name = _told(context, "x509_subject_alternative_name")
    return peer_of_name(name.decode("ascii", "replace"))


def end_of(context: Call) -> float | None:
    """When the certificate that the caller showed ends, in seconds since 1970; None without one.

    gRPC tells the certificate of a session that was taken up again too.
    """
    return _end(_told(context, "x509_pem_cert"))


def newest_tls(context: Call) -> bool:
    """Whether the connection is TLS 1.3; gRPC's credentials for Python take 1.2 as well."""
    return _told(context, "ssl_tls_version") == b"TLSv1.3"


def resumed(context: Call) -> bool:
    """Whether the connection was made from an earlier one's keys, its certificate not shown."""
    return _told(context, "ssl_session_reused") != b"false"


def _told(context: Call, key: str) -> bytes:
    return next((bytes(value) for value in context.auth_context().get(key) or ()), b"")


@lru_cache(maxsize=2048)  # a kilobyte each, of as many members as call often
def _end(pem: bytes) -> float | None:
    try:
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
    except ValueError:
        return None
