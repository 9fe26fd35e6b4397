"""The README's commands, word for word, against what its first command starts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
)
STARTED = "make run\n"
TESTED = "make test\n"  # what runs this
ADDRESS = "http://127.0.0.1:3001"


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """The page's address, as ``make run`` prints it."""
    if not (ROOT / ".venv" / "dev-installed").exists():
        # Else `make run` would install everything, which takes minutes and the network.
        if os.environ.get("CI"):
            pytest.fail("CI runs the tests by make test, which makes .venv")
        pytest.skip("there is no .venv: run the tests by make test")
    running = subprocess.Popen(
        ["bash", "-c", STARTED],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    overdue = threading.Timer(240, os.killpg, (running.pid, signal.SIGINT))
    overdue.start()
    try:
        assert running.stdout is not None
        printed = ""
        found = None
        while found is None:
            line = running.stdout.readline()
            assert line, f"make run ended:\n{printed}"
            printed += line
            found = re.match(r"Page: (http://\S+)", line)
        # The sample answer is between the question and the address.
        assert re.search(r"^> .+\n\s*\S", printed, re.MULTILINE), printed
        yield found[1].rstrip("/")
    finally:
        overdue.cancel()
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGINT)
        running.communicate(timeout=60)


def test_the_readme_begins_with_make_run_and_make_test() -> None:
    assert BLOCKS[:2] == [STARTED, TESTED]
    assert len(BLOCKS) > 5


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in BLOCKS if block not in (STARTED, TESTED)])
def test_a_block_of_the_readme_works_as_it_stands(page: str, block: str) -> None:
    if "curl" in block and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    # Word for word; only where another program had the port, what was printed counts.
    commands = block.replace(ADDRESS, page).replace("curl ", "curl --fail-with-body -sS ")
    result = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", commands],
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PARALLAX_PORT": page.rsplit(":", 1)[1]},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip()
    if '"stream": true' in block:
        assert result.stdout.rstrip().endswith("data: [DONE]")
