"""A bare TLS handshake: who is at an address, before anything is said there.

gRPC's Python credentials take no verifier, so a peer of whom nothing but the peer id is known is
first met like this, and its very certificate is then what gRPC is told to expect. The same look
tells afterwards why a connection could not be made, which gRPC does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from datetime import UTC, datetime

from parallax.fabric.addresses import host_port
from parallax.fabric.certificates import Bound, issued_by, read
from parallax.fabric.credentials import Credentials, load_chain, out_of_time
from parallax.fabric.errors import ClusterError, LinkBroken, NotAdmitted, PeerMismatch
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire


async def meet(endpoint: wire.Endpoint, limits: Limits) -> Bound:
    """The certificate that is shown there, whose identity is proved; nothing is sent but TLS.

    Raises:
        PeerMismatch: what is shown proves no identity.
        LinkBroken: nobody answers, or not in TLS.
    """
    bound, _ = await _look(endpoint, limits, None)
    return bound


async def why_refused(
    endpoint: wire.Endpoint, expected_peer_id: str, credentials: Credentials, limits: Limits
) -> ClusterError | None:
    """Why TLS with a member cannot be had at an address; None if nothing is wrong with it."""
    where = host_port(endpoint.host, endpoint.port)
    try:
        bound, turned_away = await _look(endpoint, limits, credentials)
    except ClusterError as error:
        return error
    if bound.peer_id != expected_peer_id:
        return mismatch(where, expected_peer_id, bound.peer_id)
    own, authority = credentials.papers.own, credentials.papers.authority
    if not issued_by(bound, authority):
        return NotAdmitted(
            f"{where} belongs to another cluster",
            "Its certificate is not from the authority that this machine knows",
            "If the cluster was set up anew, join it again",
            reason="authority",
        )
    now = datetime.now(UTC)
    for shown, whose in (
        (bound, f"The certificate of {where}"),
        (own, "This machine's certificate"),
    ):
        over = out_of_time(shown, whose, now)
        if over is not None:
            return over
    if turned_away is not None:
        return NotAdmitted(
            f"{where} does not accept this machine's certificate",
            turned_away,
            "It may have ended, or be of another cluster: check the clocks, or join again",
            reason="certificate",
        )
    return None


def mismatch(where: str, expected: str, found: str) -> PeerMismatch:
    """Somebody else is at an address."""
    return PeerMismatch(
        f"Somebody else answers at {where}",
        f"it is {found}, not {expected}",
        "Copy the join command anew from the page or from 'parallax run'",
        expected=expected,
        found=found,
    )


async def _look(
    endpoint: wire.Endpoint, limits: Limits, credentials: Credentials | None
) -> tuple[Bound, str | None]:
    """The certificate there, and why ours is turned away, if it is shown and is."""
    where = host_port(endpoint.host, endpoint.port)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the identity in it is checked below
    context.set_alpn_protocols(["h2"])
    turned_away: str | None = None
    try:
        if credentials is not None:
            load_chain(context, credentials.papers)
        async with asyncio.timeout(limits.connect_s):
            reader, writer = await asyncio.open_connection(
                endpoint.host, endpoint.port, ssl=context, server_hostname=""
            )
            try:
                shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
                if credentials is not None:
                    turned_away = await _verdict(reader)
            finally:
                writer.transport.abort()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except ssl.SSLError as error:
        raise LinkBroken(
            f"{where} does not speak TLS 1.3: another program answers there, or an older Parallax",
            _words(error),
        ) from None
    except TimeoutError:
        raise LinkBroken(f"{where} does not answer in TLS") from None
    except OSError as error:
        raise LinkBroken(_words(error)) from None
    return read(shown or b""), turned_away


async def _verdict(reader: asyncio.StreamReader) -> str | None:
    """Whether the other side goes on after our certificate; gRPC servers speak first."""
    try:
        return None if await reader.read(1) else "It closed the connection"
    except ssl.SSLError as error:
        return f"It answers: {_words(error)}"
    except OSError:
        return "It closed the connection"


def _words(error: OSError) -> str:
    """What went wrong, without OpenSSL's file names and numbers."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or "no TLS").replace("_", " ").lower()
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
