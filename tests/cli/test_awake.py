"""The assertion against sleep, with a stand-in for the command that only macOS has."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import psutil
import pytest

from parallax.cli.awake import COMMAND, awake

PATIENCE_S = 30.0
STAND_IN = """#!/bin/sh
echo "$$ $@" > "$0.told"
exec sleep 600
"""


def told(script: Path) -> list[str]:
    """What the stand-in says of itself: its process id, then its arguments."""
    said = script.with_name(f"{COMMAND}.told")
    deadline = time.monotonic() + PATIENCE_S
    while not said.is_file() or not said.read_text().endswith("\n"):
        assert time.monotonic() < deadline, "it never ran"
        time.sleep(0.01)
    return said.read_text().split()


def test_no_sleep_until_the_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / COMMAND
    script.write_text(STAND_IN)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with awake():
        pid, *arguments = told(script)
        assert arguments == ["-i", "-w", str(os.getpid())]
        assert psutil.pid_exists(int(pid))
    assert not psutil.pid_exists(int(pid))


def test_without_the_command_it_serves_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING), awake():
        assert "may fall asleep" in caplog.text
