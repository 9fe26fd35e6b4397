"""What the command sends with its requests, to whom, and whose certificates it trusts."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parallax.cli.checks import ports
from parallax.cli.client import connect
from parallax.fabric.errors import BadSetting, KeyRefused, SchedulerUnreachable
from parallax.fabric.local_key import LocalKey, kept, read
from parallax.fabric.settings import ClientSettings, SchedulerSettings, load
from tests.cli.canned import Canned, canned
from tests.cli.processes import parallax, running
from tests.scheduler.http.test_tls import make_pair

SECRET = "px-only-for-here"


@contextlib.contextmanager
def left(folder: Path, port: int, host: str = "127.0.0.1") -> Iterator[None]:
    """What a scheduler leaves for the command."""
    with kept(folder, LocalKey(host, port, SECRET)):
        yield


@pytest.fixture
def cluster() -> Iterator[Canned]:
    with canned() as found:
        yield found


def port_of(cluster: Canned) -> int:
    return int(cluster.url.rsplit(":", 1)[1])


def sent(cluster: Canned, **settings: object) -> str | None:
    """The key that came with a request of a client with these settings."""
    connect(ClientSettings(**settings)).get("/health")  # type: ignore[arg-type]
    return cluster.heard[-1].get("Authorization")


def test_the_scheduler_s_file_is_its_user_s_alone_and_goes_with_it(tmp_path: Path) -> None:
    with left(tmp_path, 3001):
        assert (tmp_path / "cli.key").stat().st_mode & 0o777 == 0o600
        assert read(tmp_path) == LocalKey("127.0.0.1", 3001, SECRET)
        assert SECRET not in str(read(tmp_path))
    assert os.listdir(tmp_path) == []
    for broken in ("", "{}", "[]", '{"port": "x"}', "x" * 10_000):
        (tmp_path / "cli.key").write_text(broken)
        assert read(tmp_path) is None


def test_the_file_s_key_goes_to_the_scheduler_that_wrote_it_and_nowhere_else(
    tmp_path: Path, cluster: Canned
) -> None:
    here = {"url": cluster.url, "state_dir": tmp_path}
    with left(tmp_path, port_of(cluster)):
        assert sent(cluster, **here) == f"Bearer {SECRET}"
        assert sent(cluster, port=port_of(cluster), state_dir=tmp_path) == f"Bearer {SECRET}"
        assert sent(cluster, **here, api_key="px-given") == "Bearer px-given"
        assert sent(cluster, url=cluster.url, state_dir=tmp_path / "other") is None
    with left(tmp_path, port_of(cluster) + 1):
        assert sent(cluster, **here) is None
    with left(tmp_path, port_of(cluster), host="192.168.1.20"):
        assert sent(cluster, **here) is None


@pytest.mark.parametrize(
    ("listens", "asked", "ours"),
    [
        ("127.0.0.1", "localhost", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("::", "::1", True),
        ("0.0.0.0", "192.168.1.20", False),
        ("192.168.1.20", "192.168.1.20", True),
        ("192.168.1.20", "127.0.0.1", False),
        ("127.0.0.1", "evil.example", False),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "::1", False),
        ("0.0.0.0", "::1", False),
        ("::", "127.0.0.1", False),
        ("::", "localhost", True),
        ("::1", "0:0::1", True),
        ("192.168.1.20", "localhost", False),
    ],
)
def test_the_address_of_the_scheduler_is_told_from_others(
    listens: str, asked: str, ours: bool
) -> None:
    assert LocalKey(listens, 3001, SECRET).is_for(asked, 3001) is ours
    assert not LocalKey(listens, 3001, SECRET).is_for(asked, 3002)


def test_localhost_is_the_scheduler_s_address_and_not_where_the_name_leads(
    tmp_path: Path, cluster: Canned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another account listens at ``[::1]``, to which the name leads first."""
    lookup = socket.getaddrinfo

    def elsewhere(host: str, *rest: Any, **more: Any) -> Any:
        assert host == "127.0.0.1", f"{host} is looked up"
        return lookup(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", elsewhere)
    port = port_of(cluster)
    with left(tmp_path, port):
        url = f"http://localhost:{port}"
        assert sent(cluster, url=url, state_dir=tmp_path) == f"Bearer {SECRET}"
    with kept(tmp_path, LocalKey("127.0.0.1", port, SECRET, name="Studio.local")):
        url = f"http://studio.local:{port}"
        assert sent(cluster, url=url, state_dir=tmp_path) == f"Bearer {SECRET}"


def test_a_key_is_not_shown_with_the_settings() -> None:
    settings = ClientSettings(api_key=SECRET)  # type: ignore[arg-type]
    assert SECRET not in f"{settings!r} {settings}"


def test_a_refused_key_is_told_as_the_cluster_tells_it(cluster: Canned) -> None:
    error = {"message": "No such key.", "type": "invalid_request_error", "code": "invalid_api_key"}
    cluster.answers["/admin/keys"] = (401, json.dumps({"error": error}).encode())
    with pytest.raises(KeyRefused, match="No such key"):
        connect(ClientSettings(url=cluster.url)).get("/admin/keys")


def test_a_scheduler_with_a_certificate_is_reached_safely(tmp_path: Path) -> None:
    pair, other = make_pair(tmp_path / "tls"), make_pair(tmp_path / "other")
    state = str(tmp_path / "state")
    flags = ("--tls-cert", str(pair.certificate), "--tls-key", str(pair.key))
    where = ("--loopback-only", "--port", "0", "--grpc-port", "0", "--state-dir", state)
    with running(tmp_path, "run", *where, *flags, "--keys") as scheduler:
        page = scheduler.wait_for("Page: ")
        assert page.startswith("https://127.0.0.1:")
        port = int(page.rsplit(":", 1)[1])
        # On this machine: neither a key nor a certificate has to be named.
        settings = ClientSettings(port=port, state_dir=state)  # type: ignore[arg-type]
        client = connect(settings)
        assert client.base_url == page
        made = client.send("POST", "/admin/keys", {"admin": True})["data"]["key"]
        looked_at = SchedulerSettings(
            port=port, grpc_port=0, tls_cert=pair.certificate, tls_key=pair.key
        )
        assert "served by a Parallax" in next(ports(looked_at)).detail
        # From another machine: the key, and the certificate.
        trusting = ClientSettings(url=page, api_key=made, ca_file=pair.certificate)
        assert connect(trusting).get("/admin/keys")["data"]
        for ca_file in (None, other.certificate):
            wary = ClientSettings(url=page, api_key=made, ca_file=ca_file)
            with pytest.raises(SchedulerUnreachable, match="is not trusted"):
                connect(wary).get("/admin/keys")
        # Somebody else's certificate in the scheduler's place is not taken for it.
        with kept(tmp_path / "tls", LocalKey("127.0.0.1", port, made, str(other.certificate))):
            fooled = ClientSettings(url=page, state_dir=tmp_path / "tls")
            with pytest.raises(SchedulerUnreachable, match="is not trusted"):
                connect(fooled).get("/admin/keys")
        assert scheduler.end() == 0


def test_a_file_without_a_certificate_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for name in ("empty.pem", "none.pem"):
        settings = ClientSettings(url="https://127.0.0.1:1", ca_file=tmp_path / name)
        with pytest.raises(BadSetting, match="No certificate"):
            connect(settings)


def test_a_certificate_that_cannot_be_read_ends_the_start_with_advice(tmp_path: Path) -> None:
    flags = ("--tls-cert", "a.pem", "--tls-key", "b.pem")
    done = parallax(tmp_path, "run", "--loopback-only", "--port", "0", "--grpc-port", "0", *flags)
    assert done.returncode == 6, done.stderr
    assert "cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tls_cert": "a.pem"}, "belong together"),
        ({"cors_origin": ["*"]}, "origin is written"),
        ({"cors_origin": ["https://a.example/path"]}, "origin is written"),
        ({"cors_origin": ["null"]}, "origin is written"),
        ({"allowed_host": ["https://a.example"]}, "no name of a host"),
        ({"keys": "perhaps"}, "auto"),
    ],
)
def test_wrong_settings_of_http_are_refused(flags: dict[str, object], said: str) -> None:
    with pytest.raises(BadSetting, match=said):
        load(SchedulerSettings, flags)


def test_a_client_never_goes_without_checking_a_name() -> None:
    client = connect(ClientSettings(url="https://127.0.0.1:1"))
    assert client._tls is not None
    assert client._tls.check_hostname
    assert client._tls.verify_mode is ssl.CERT_REQUIRED
