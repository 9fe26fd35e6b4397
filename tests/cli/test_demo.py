"""``parallax demo``: the whole cluster in real processes, and nothing of it left behind."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.cli.processes import Running, parallax, running
from tests.models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model: what it says is nonsense, and text."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", layers=4, hidden=32)


def children(process: Running) -> list[psutil.Process]:
    return psutil.Process(process.process.pid).children(recursive=True)


def wait_until_gone(processes: list[psutil.Process], timeout_s: float = 30) -> None:
    _, alive = psutil.wait_procs(processes, timeout_s)
    assert alive == []


def test_one_prompt_is_answered_on_standard_output_and_all_processes_end(
    tmp_path: Path, model: Path
) -> None:
    done = parallax(
        tmp_path, "demo", "-m", str(model), "--prompt", "hello", "--port", "0", timeout_s=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Page" not in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_however_a_demo_ends_nothing_of_it_is_left(
    tmp_path: Path, model: Path, number: signal.Signals
) -> None:
    state = tmp_path / "state"
    with running(
        tmp_path, *("demo", "-m", str(model), "--port", "0", "--state-dir", str(state))
    ) as demo:
        page = demo.wait_for("Page: ", timeout_s=120)
        started = children(demo)
        assert len(started) == 3
        status = parallax(tmp_path, "status", "--json", "--url", page)
        assert json.loads(status.stdout)["status"] == "available"
        answer = parallax(tmp_path, "chat", "hello", "--max-tokens", "8", "--url", page)
        assert answer.returncode == 0, answer.stderr
        begin = time.monotonic()
        ended = demo.end(number)
        wait_until_gone(started)
        assert time.monotonic() - begin < 10
        if number is not signal.SIGKILL:
            assert ended == 0
    for log in state.glob("*.log"):
        assert "Traceback" not in log.read_text()


def test_a_node_that_dies_ends_the_demo_with_what_it_said(tmp_path: Path, model: Path) -> None:
    with running(tmp_path, "demo", "-m", str(model), "--port", "0") as demo:
        demo.wait_for("Page: ", timeout_s=120)
        started = children(demo)
        node = next(p for p in started if "node-2" in p.cmdline())
        node.kill()
        assert demo.process.wait(40) == 5
        demo.wait_for("Error: The node-2 ended with exit status -9")
        wait_until_gone(started)


def test_a_model_that_is_not_there_is_said_in_the_schedulers_words(tmp_path: Path) -> None:
    done = parallax(tmp_path, "demo", "-m", str(tmp_path / "none"), "--port", "0", timeout_s=120)
    assert done.returncode == 5
    assert "The scheduler ended with exit status 4" in done.stderr
    assert str(tmp_path / "none") in done.stderr


def test_a_taken_port_is_said_in_the_schedulers_words(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        done = parallax(tmp_path, "demo", "--port", str(port), timeout_s=120)
    assert done.returncode == 5
    assert "ended with exit status 6" in done.stderr
