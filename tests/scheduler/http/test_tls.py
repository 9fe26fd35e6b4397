"""HTTP over TLS, with certificates that these tests make."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from parallax.fabric.errors import BadSetting
from parallax.scheduler.http.tls import server_context
from tests.scheduler.http.scripted import site, until
from tests.scheduler.http.test_connections import ends
from tests.scheduler.http.test_guard import refused


@dataclass(frozen=True)
class Pair:
    """A self-signed certificate for this machine, and its key."""

    certificate: Path
    key: Path

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))


def make_pair(folder: Path, password: bytes | None = None) -> Pair:
    """Files in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "studio.local")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives = [
        x509.DNSName("localhost"),
        x509.DNSName("studio.local"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(key, hashes.SHA256())
    )
    pair = Pair(folder / "cert.pem", folder / "key.pem")
    pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    pair.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    return pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path / "tls")


async def test_chats_and_streams_work_over_tls(says, pair):
    async with site(says("Hello"), tls=server_context(pair.certificate, pair.key)) as here:
        url = f"https://localhost:{here.port}/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        connector = aiohttp.TCPConnector(ssl=pair.client())
        async with aiohttp.ClientSession(connector=connector) as session:
            for _ in range(3):  # over one connection
                async with session.post(url, json=body) as response:
                    assert (await response.read()).endswith(b"data: [DONE]\n\n")
                    assert response.connection is None


async def test_old_tls_and_no_tls_are_refused(says, pair):
    old = pair.client()
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    async with site(says("a"), tls=server_context(pair.certificate, pair.key)) as here:
        with pytest.raises(ssl.SSLError):
            await asyncio.open_connection("127.0.0.1", here.port, ssl=old)
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" not in await ends(reader)
        writer.close()
        context = pair.client()
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", here.port, ssl=context, server_hostname="localhost"
        )
        assert writer.get_extra_info("ssl_object").version() in ("TLSv1.2", "TLSv1.3")
        writer.close()
        await writer.wait_closed()


async def test_those_that_never_finish_tls_are_counted_and_closed(says, pair):
    tls = server_context(pair.certificate, pair.key)
    async with site(says("a"), tls=tls, connections=2, header_s=1.5) as here:
        silent = [await asyncio.open_connection("127.0.0.1", here.port) for _ in range(2)]
        await asyncio.sleep(0.1)  # both are taken in before the third comes
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        assert await ends(reader) == b""
        assert refused(here, "too_many_connections") == 1
        writer.close()
        for reader, writer in silent:
            assert await ends(reader) == b""
            writer.close()

        async def served() -> bool:
            try:
                _, writer = await asyncio.open_connection(
                    "127.0.0.1", here.port, ssl=pair.client(), server_hostname="localhost"
                )
            except OSError:
                return False
            writer.close()
            await writer.wait_closed()
            return True

        async with asyncio.timeout(20):
            while not await served():
                pass


async def test_a_client_that_does_not_read_is_ended_over_tls_too(says, pair):
    cluster = says("abc", repeats=True)
    cluster.context_tokens = 1 << 30
    tls = server_context(pair.certificate, pair.key)
    async with site(cluster, tls=tls, reader_s=0.5) as here:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", here.port))
        body = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )

        def ask() -> ssl.SSLSocket:
            secure = pair.client().wrap_socket(raw, server_hostname="localhost")
            secure.sendall(head.encode() + body)
            return secure

        slow = await asyncio.to_thread(ask)
        await until(lambda: refused(here, "slow_reader") == 1, 30)
        await until(lambda: cluster.running == 0, 20)
        assert refused(here, "slow_reader") == 1, "once"
        slow.close()


def missing(folder: Path) -> Pair:
    return Pair(folder / "none.pem", make_pair(folder).key)


def mismatched(folder: Path) -> Pair:
    return Pair(make_pair(folder / "a").certificate, make_pair(folder / "b").key)


def swapped(folder: Path) -> Pair:
    pair = make_pair(folder)
    return Pair(pair.key, pair.certificate)


def garbage(folder: Path) -> Pair:
    pair = make_pair(folder)
    pair.key.write_text("no key")
    return pair


def encrypted(folder: Path) -> Pair:
    return make_pair(folder, b"password")


def unreadable(folder: Path) -> Pair:
    pair = make_pair(folder)
    return Pair(pair.certificate, folder)  # a folder: root may read any file


@pytest.mark.parametrize(
    ("make", "setting", "said"),
    [
        (missing, "tls_cert", "No such file"),
        (mismatched, "tls_key", "do not belong together"),
        (swapped, "tls_cert", "PEM"),
        (garbage, "tls_cert", "PEM"),
        (encrypted, "tls_key", "encrypted"),
        (unreadable, "tls_key", "cannot be read"),
    ],
)
def test_files_that_cannot_serve_are_told_apart(
    tmp_path: Path, make: Callable[[Path], Pair], setting: str, said: str
) -> None:
    pair = make(tmp_path)
    with pytest.raises(BadSetting, match=said) as caught:
        server_context(pair.certificate, pair.key)
    assert caught.value.fields["setting"] == setting
