"""Many connections at once to a listener, in a process of its own: it must live."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

from parallax.fabric.certificates import dns_name
from tests.trust import member, peer

THREADS = 16
HANDSHAKES = 150  # of each thread; gRPC's core aborted after 250 to 1,200 in all


def shake_hands(port: int, context: ssl.SSLContext, made: list[int]) -> None:
    for _ in range(HANDSHAKES):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=dns_name(peer("alice"))),
        ):
            made.append(1)


def test_a_listener_outlives_handshakes_on_many_threads(tmp_path: Path) -> None:
    papers = tmp_path / "papers.pem"
    papers.write_bytes(member("alice").papers.pem)
    context = member("me").client_context()
    context.set_alpn_protocols(["h2"])
    made: list[int] = []
    with subprocess.Popen(
        [sys.executable, "-m", "tests.fabric.listening", str(papers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        threads = [
            threading.Thread(target=shake_hands, args=(port, context, made)) for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        child.communicate(timeout=20)
    assert child.returncode == 0
    assert len(made) > HANDSHAKES, "hardly any connection was made"
