"""An HTTP server with prepared answers, where a cluster would be."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NODE = {
    "node_id": "12D3KooWM6CgA9iBFZmcYAHA6A2qvbAxqfkmrYiRQuz3XEsk4Ksv",
    "status": "available",
    "gpu_num": 0,
    "gpu_name": "Apple M4",
    "gpu_memory": 16,
    "name": "stu\x1bdio",
    "chip": "Apple M4",
    "platform": "Darwin-arm64",
    "state": "ready",
    "memory_bytes": 16 * 10**9,
    "budget_bytes": 11_500_000_000,
    "layers": [0, 4],
    "load": None,
}
LOADING = NODE | {
    "name": "attic",
    "state": "joining",
    "layers": [4, 8],
    "load": {"done_bytes": 1, "total_bytes": 4, "phase": "reading", "fraction": 0.25},
}
STATUS: dict[str, Any] = {
    "status": "available",
    "model_name": "builtin",
    "init_nodes_num": 2,
    "node_join_command": "parallax join -s 12D3KooW",
    "need_more_nodes": False,
    "node_list": [NODE, LOADING],
    "model": {"name": "builtin", "layers": 8, "context_tokens": 2048, "weight_bytes": 9_600_000},
    "rings": [
        {
            "epoch": 3,
            "status": "ready",
            "stages": [
                {"node_id": "a", "name": "studio", "layers": [0, 4]},
                {"node_id": "b", "name": "attic", "layers": [4, 8]},
            ],
            "load": {"decoding": 1, "prefilling": 0, "free_rows": 15, "lanes": 2},
        }
    ],
    "queue": {"waiting": 2, "running": 1},
    "missing_bytes": None,
    "problem": None,
    "notice": "",
}
EMPTY = STATUS | {
    "status": "waiting",
    "model_name": "",
    "model": None,
    "node_list": [],
    "rings": [],
    "need_more_nodes": True,
}


def events(*chunks: dict[str, Any], done: bool = True) -> bytes:
    """A body of server-sent events."""
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


def piece(text: str) -> dict[str, Any]:
    """One chunk of a streamed answer."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


SPEED = {"choices": [], "usage": {}, "metrics": {"tps": 21.0, "ttft_ms": 12.5, "tokens": 3}}


class Canned:
    """What is asked, and what is answered: ``answers[path]`` is (status, body)."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {
            "/cluster/status_json": (200, message(STATUS)),
            "/cluster/status": (200, message(STATUS) + b"\n" + message(EMPTY) + b"\n"),
            "/health": (200, b'{"status": "ok", "ready": true}'),
        }
        self.posted: list[dict[str, Any]] = []
        self.heard: list[dict[str, str]] = []  # headers
        self.url = ""


def message(status: dict[str, Any]) -> bytes:
    """A status message."""
    return json.dumps({"type": "cluster_status", "data": status}).encode()


@contextlib.contextmanager
def canned() -> Iterator[Canned]:
    """The server, on a free port of loopback."""
    state = Canned()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            state.posted.append(json.loads(self.rfile.read(length)))
            self._answer()

        def _answer(self) -> None:
            state.heard.append(dict(self.headers.items()))
            status, body = state.answers.get(self.path, (404, b"nothing"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: tests read what the command prints."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
