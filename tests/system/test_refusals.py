"""What a real cluster says to what it cannot serve, and that it goes on serving others."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, Process, boot
from tests.models import make_model


def refused(
    cluster: Cluster, body: bytes | dict[str, Any], path: str = "/v1/chat/completions"
) -> tuple[int, Any, dict[str, Any]]:
    """Status, headers and error of a request that fails."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        cluster.url + path, data=data, headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as failure:
        urllib.request.urlopen(request, timeout=30)
    with failure.value as answer:
        text = answer.read().decode()
    assert "Traceback" not in text
    return failure.value.code, failure.value.headers, json.loads(text)["error"]


MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 2}, 400, "top_p"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"sampling_params": {"top_k": -3}}, 400, "sampling_params.top_k"),
        ({"frobnicate": 1}, 400, "frobnicate"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"messages": []}, 400, "messages"),
        ({"model": "another"}, 404, None),
    ],
)
def test_a_wrong_field_is_named(
    fields: dict[str, Any], status: int, param: str | None, two_nodes: Cluster
) -> None:
    code, _, error = refused(two_nodes, {"messages": MESSAGES, **fields})
    assert code == status
    if param:
        assert error["param"] == param
    assert error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"messages": NaN}',
        b'{"messages":[{"role":"user","content":"x"}],"top_p":NaN}',
    ],
)
def test_broken_json_is_refused(body: bytes, two_nodes: Cluster) -> None:
    assert refused(two_nodes, body)[0] == 400


def test_a_prompt_of_ten_megabytes_is_too_large(two_nodes: Cluster) -> None:
    body = {"messages": [{"role": "user", "content": "x" * (10 << 20)}]}
    assert refused(two_nodes, body)[0] == 413


def test_a_prompt_longer_than_the_context_names_both_lengths(two_nodes: Cluster) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 2000}]}
    code, _, error = refused(two_nodes, body)
    assert (code, error["code"]) == (400, "context_length_exceeded")
    assert "4096" in error["message"]


@pytest.mark.parametrize(
    ("path", "status"), [("/nowhere", 404), ("/v1/models", 405), ("/cluster/status", 405)]
)
def test_wrong_paths_and_methods(path: str, status: int, two_nodes: Cluster) -> None:
    assert refused(two_nodes, {}, path)[0] == status


def test_an_unknown_model_is_not_chosen_and_the_old_one_serves_on(two_nodes: Cluster) -> None:
    body = {"model_name": "/nowhere/model", "init_nodes_num": 2, "is_local_network": True}
    code, _, error = refused(two_nodes, body, "/scheduler/init")
    assert code == 404
    assert "/nowhere/model" in error["message"]
    assert two_nodes.answers_in_full("Still there?", 3)


def test_a_client_that_goes_frees_its_row_within_two_seconds(two_nodes: Cluster) -> None:
    tokens = 3000
    body = json.dumps(
        {"messages": MESSAGES, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", two_nodes.http_port), timeout=30) as client:
        client.sendall(head + body)
        received, begin_s = b"", 0.0
        while (count := received.count(b"content")) < 100:
            piece = client.recv(4096)
            assert piece, received
            received += piece
            begin_s = begin_s or time.monotonic()
        rest_s = (tokens - count) * (time.monotonic() - begin_s) / count
        two_nodes.wait(lambda s: s["rings"][0]["load"]["decoding"] == 1)
    status = two_nodes.wait(
        lambda s: s["rings"][0]["load"]["decoding"] == 0 and s["queue"]["running"] == 0,
        timeout_s=max(2.0, rest_s / 3),  # a machine on which all takes longer
    )
    assert status["rings"][0]["status"] == "ready"


@pytest.fixture(scope="module")
def small_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node, one row, one place in the queue, and some patience."""
    model = make_model(tmp_path_factory.mktemp("models") / "tiny", layers=4, hidden=64)
    variables = {
        "PARALLAX_LIMITS__LANE_ROWS": "1",
        "PARALLAX_LIMITS__QUEUE_REQUESTS": "1",
        "PARALLAX_LIMITS__QUEUE_WAIT_S": "3",
        "PARALLAX_LIMITS__SILENCE_S": "60",  # nobody misses a node that is stopped for a while
    }
    with boot(model, nodes=1, variables=variables) as cluster:
        yield cluster


def test_full_rings_mean_429_at_once_or_after_the_wait(small_cluster: Cluster) -> None:
    body = {"messages": MESSAGES, "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    (node,) = small_cluster.nodes
    with ThreadPoolExecutor(3) as pool:
        node.child.send_signal(signal.SIGSTOP)  # what runs does not end meanwhile
        try:
            running = pool.submit(small_cluster.post, "/v1/chat/completions", body)
            small_cluster.wait(lambda s: s["queue"]["running"] == 1)
            others = [pool.submit(refused, small_cluster, body) for _ in range(2)]
            first, last = (each.result() for each in as_completed(others, timeout=60))
        finally:
            node.child.send_signal(signal.SIGCONT)
        code, headers, error = first  # the other one has the place in the queue
        assert (code, error["code"], error["type"]) == (429, "queue_full", "rate_limit_error")
        assert int(headers["Retry-After"]) > 0
        code, headers, error = last
        assert (code, error["code"]) == (429, "pipelines_busy")
        assert int(headers["Retry-After"]) > 0
        assert running.result(timeout=120)["usage"]["completion_tokens"] == 40


def test_without_nodes_there_is_no_ring(tmp_path: Path) -> None:
    with boot(make_model(tmp_path / "m", layers=2, hidden=32), nodes=0) as cluster:
        status = cluster.status()
        assert (status["status"], status["need_more_nodes"]) == ("waiting", True)
        code, headers, error = refused(cluster, {"messages": MESSAGES})
        assert (code, error["code"]) == (503, "routing_not_ready")
        assert headers["Retry-After"]
        answer = urllib.request.urlopen(cluster.url + "/health", timeout=60)
        with answer:
            assert json.load(answer)["ready"] is False


def test_a_model_that_does_not_fit_says_how_much_is_missing(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", layers=4, hidden=128)
    with boot(model, nodes=0) as cluster:
        cluster.join("small", "--memory", "100kB")
        status = cluster.wait(lambda s: s["missing_bytes"])
        assert status["missing_bytes"] > 100_000
        assert "missing" in status["problem"]
        assert status["need_more_nodes"]


def broken_folder(tmp_path: Path, defect: str) -> Path:
    folder = tmp_path / defect
    if defect == "missing":
        return folder
    make_model(folder, layers=2, hidden=32)
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if defect == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif defect == "absurd-header":
        weights.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    elif defect == "no-weights":
        weights.unlink()
    elif defect == "bad-config":
        (folder / "config.json").write_text("{")
    elif defect == "unknown-architecture":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "warp_drive"}))
    return folder


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        ("missing", "no model folder"),
        ("truncated", "model.safetensors"),
        ("absurd-header", "model.safetensors"),
        ("no-weights", "no weights"),
        ("bad-config", "config.json"),
        ("unknown-architecture", "warp_drive"),
    ],
)
def test_a_broken_model_is_a_clear_error_at_start(defect: str, words: str, tmp_path: Path) -> None:
    folder = broken_folder(tmp_path, defect)
    process = Process(
        ["run", "-m", str(folder), "--port", "0", "--grpc-port", "0", "--state-dir", str(tmp_path)],
        {**os.environ, "PARALLAX_LOOPBACK_ONLY": "true"},
    )
    try:
        status = process.child.wait(60)
    finally:
        process.stop()
    assert status == 4
    assert words in process.output
    assert "Traceback" not in process.output


def test_a_scheduler_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with socket.socket() as deaf:  # bound and not listening: refused, and nobody else's
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        process = Process(
            ["join", "-s", f"127.0.0.1:{port}", "--state-dir", str(tmp_path)],
            {**os.environ, "PARALLAX_LOOPBACK_ONLY": "true"},
        )
        try:
            status = process.child.wait(60)
        finally:
            process.stop()
    assert status == 5
    assert str(port) in process.output
    assert "Traceback" not in process.output


def test_a_port_in_use_is_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = Process(
            ["run", "--port", str(port), "--grpc-port", "0", "--state-dir", str(tmp_path)],
            {**os.environ, "PARALLAX_LOOPBACK_ONLY": "true"},
        )
        try:
            status = process.child.wait(60)
        finally:
            process.stop()
    assert status == 6
    assert str(port) in process.output
