"""``status``, ``nodes`` and ``models`` against prepared answers."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from parallax.cli.nodes import came_with
from parallax.cli.tables import layers, size
from tests.cli.canned import EMPTY, STATUS, canned, message
from tests.cli.processes import parallax
from tests.cli.terminals import terminal


@pytest.mark.parametrize("verb", ["status", "nodes", "models", "chat"])
def test_no_cluster_exits_with_5_and_advice(tmp_path: Path, verb: str) -> None:
    with socket.socket() as taken:  # bound and not listening: refused, and nobody else's
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        done = parallax(tmp_path, verb, "--port", str(port), text="hello")
    assert done.returncode == 5
    assert f"No cluster answers at http://127.0.0.1:{port}" in done.stderr
    assert "parallax run" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_shows_model_nodes_rings_and_requests(tmp_path: Path) -> None:
    with canned() as cluster:
        done = parallax(tmp_path, "status", "--url", cluster.url)
    assert done.returncode == 0, done.stderr
    for said in ("builtin  available", "8 layers", "Apple M4", "0-3", "reading 25%", "11.5 GB"):
        assert said in done.stdout
    assert "Ring 3 ready: studio 0-3 -> attic 4-7" in done.stdout
    assert "1 running, 2 waiting" in done.stdout


def test_a_node_that_is_put_aside_says_why_and_for_how_long(tmp_path: Path) -> None:
    aside = {"why": "Rings with it broke 2 times in a row; attic said: \x1b[2Jgone", "seconds": 41}
    node = {"name": "studio", "state": "aside", "aside": aside}
    with canned() as cluster:
        told = {**STATUS, "node_list": [node, {"name": "attic", "state": "ready", "aside": None}]}
        cluster.answers["/cluster/status_json"] = (200, message(told))
        for verb in ("status", "nodes"):
            shown = " ".join(parallax(tmp_path, verb, "--url", cluster.url).stdout.split())
            assert "studio is put aside for 41 s more. Rings with it broke 2 times" in shown
            assert shown.count("put aside") == 1
            assert "\x1b" not in shown


def test_what_others_wrote_cannot_steer_the_terminal(tmp_path: Path) -> None:
    with canned() as cluster:
        for verb in ("status", "nodes"):
            done = parallax(tmp_path, verb, "--url", cluster.url)
            assert "studio" in done.stdout
            assert "\x1b" not in done.stdout


def test_status_of_an_empty_cluster_says_how_to_join(tmp_path: Path) -> None:
    with canned() as cluster:
        cluster.answers["/cluster/status_json"] = (200, message(EMPTY))
        status = parallax(tmp_path, "status", "--url", cluster.url).stdout
        nodes = parallax(tmp_path, "nodes", "--url", cluster.url).stdout
    assert "No model is chosen yet" in status
    for shown in (status, nodes):
        assert "No nodes yet" in shown
        assert "parallax join -s 12D3KooW" in shown


def test_json_is_the_status_as_it_came(tmp_path: Path) -> None:
    with canned() as cluster:
        status = parallax(tmp_path, "status", "--json", "--url", cluster.url)
        nodes = parallax(tmp_path, "nodes", "--json", "--url", cluster.url)
    assert json.loads(status.stdout) == STATUS
    assert json.loads(nodes.stdout) == STATUS["node_list"]


def test_watching_prints_a_line_for_each_message_where_there_is_no_terminal(
    tmp_path: Path,
) -> None:
    with canned() as cluster:
        done = parallax(tmp_path, "status", "--watch", "--url", cluster.url)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [STATUS, EMPTY]


def test_watching_on_a_terminal_shows_tables(tmp_path: Path) -> None:
    with (
        canned() as cluster,
        terminal(tmp_path, "status", "--watch", "--url", cluster.url, kind="xterm") as screen,
    ):
        screen.wait_for("reading 25%")
        screen.wait_for("No nodes yet")
        assert screen.process.wait(10) == 0


def test_models_marks_the_one_that_is_served(tmp_path: Path) -> None:
    catalog = {"data": [{"name": "builtin", "size": "2M", "provider": "Parallax"}]}
    with canned() as cluster:
        cluster.answers["/model/list"] = (200, json.dumps(catalog).encode())
        cluster.answers["/v1/models"] = (200, b'{"data": [{"id": "mine"}]}')
        done = parallax(tmp_path, "models", "--json", "--url", cluster.url)
        table = parallax(tmp_path, "models", "--url", cluster.url)
    assert [(m["name"], m["served"]) for m in json.loads(done.stdout)] == [
        ("mine", True),
        ("builtin", False),
    ]
    assert "builtin" in table.stdout


def test_an_error_of_the_cluster_keeps_its_exit_status(tmp_path: Path) -> None:
    body = {"error": {"message": "No ring.", "type": "server_error", "code": "routing_not_ready"}}
    with canned() as cluster:
        cluster.answers["/cluster/status_json"] = (503, json.dumps(body).encode())
        done = parallax(tmp_path, "status", "--url", cluster.url)
    assert done.returncode == 3
    assert "No ring." in done.stderr


@pytest.mark.parametrize(
    "answer", [(404, b"not here"), (200, b"<html>"), (200, b"[]"), (200, b"{}")]
)
def test_another_web_server_is_told_apart(tmp_path: Path, answer: tuple[int, bytes]) -> None:
    with canned() as cluster:
        cluster.answers["/cluster/status_json"] = answer
        done = parallax(tmp_path, "status", "--url", cluster.url)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("url", ["studio:3001", "ftp://studio", "http://", "http://studio:many"])
def test_what_is_no_url_exits_with_6(tmp_path: Path, url: str) -> None:
    done = parallax(tmp_path, "status", "--url", url)
    assert done.returncode == 6
    assert "is no address of a cluster" in done.stderr


def test_sizes_and_layers_are_written_as_people_do() -> None:
    assert [size(n) for n in (0, 999, 1500, 11.5e9, 512e6, 2e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "11.5 GB",
        "512 MB",
        "2.0 TB",
    ]
    assert [layers(r) for r in ([0, 4], [7, 8], None)] == ["0-3", "7", "-"]


def test_of_those_with_the_same_token_twenty_are_named_and_the_others_counted() -> None:
    shown = [{"node_id": f"12D{n}", "name": f"mac\x1b{n}"} for n in range(20)]
    said = came_with({"same_token": shown, "same_token_count": 63})
    assert said.endswith("mac19 (12D19), and 43 more")
    assert "\x1b" not in said
    assert "more" not in came_with({"same_token": shown[:1], "same_token_count": 1})
