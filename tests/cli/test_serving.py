"""The shell around a scheduler or a node: signals, the parent's end, errors. Real processes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tests.cli.processes import Running, environment

HEAD = """
import asyncio, sys
from functools import partial
from parallax.cli import serving
from parallax.cli.console import show_failure
from parallax.fabric.errors import PortInUse
from parallax.fabric.events import NodeStarted
from parallax.fabric.settings import NodeSettings, load

async def service(*, on_event, stop):
    on_event(NodeStarted("ID", "studio", 7, ""))
{body}

settings = load(NodeSettings, {{}})
try:
    serving.serve(service, settings, with_parent="--with-parent" in sys.argv)
except Exception as error:
    sys.exit(show_failure(error))
print("over", flush=True)
"""

OBEDIENT = """
try:
    await stop.wait()
finally:
    print("drained", flush=True)
"""
DEAF = """
try:
    await stop.wait()
    print("stopping", flush=True)
    await asyncio.sleep(3600)
finally:
    print("cancelled", flush=True)
"""


@contextlib.contextmanager
def serving(
    home: Path, body: str, *arguments: str, before: str = "", **variables: str
) -> Iterator[Running]:
    script = home / "serving.py"
    script.write_text(before + HEAD.format(body=textwrap.indent(body, "    ")))
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=home,
        env=environment(home) | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started = Running(process)
    try:
        yield started
    finally:
        started.close()


def test_sigterm_and_ctrl_c_let_the_service_finish_and_exit_with_0(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with serving(tmp_path, OBEDIENT) as process:
            assert process.wait_for("Node ID studio listening on ") == "7"
            assert process.end(number) == 0
            process.wait_for("drained")
            process.wait_for("over")


def test_a_second_signal_cuts_a_long_stop_short(tmp_path: Path) -> None:
    with serving(tmp_path, DEAF) as process:
        process.wait_for("Node ID")
        process.process.send_signal(signal.SIGTERM)
        process.wait_for("stopping")
        assert process.end(signal.SIGTERM, timeout_s=10) == 0
        process.wait_for("cancelled")


def test_a_stop_that_takes_too_long_is_cut_short(tmp_path: Path) -> None:
    with serving(
        tmp_path,
        DEAF,
        before="import parallax.cli.serving as s; s.GRACE_S = 0.1\n",
        PARALLAX_LIMITS__DRAIN_S="0.1",
    ) as process:
        process.wait_for("Node ID")
        assert process.end(signal.SIGTERM, timeout_s=10) == 0
        process.wait_for("cancelled")


def test_the_end_of_the_parent_ends_a_service_that_was_told_so(tmp_path: Path) -> None:
    with serving(tmp_path, OBEDIENT, "--with-parent") as process:
        process.wait_for("Node ID")
        assert process.process.stdin is not None
        process.process.stdin.close()
        assert process.process.wait(10) == 0
        process.wait_for("drained")


def test_what_the_parent_writes_does_not_end_the_service(tmp_path: Path) -> None:
    with serving(tmp_path, OBEDIENT, "--with-parent") as process:
        process.wait_for("Node ID")
        assert process.process.stdin is not None
        process.process.stdin.write("hello\n")
        process.process.stdin.flush()
        assert process.end(signal.SIGTERM) == 0


def test_an_error_of_the_service_has_its_exit_status(tmp_path: Path) -> None:
    body = 'raise PortInUse("Port 7 is in use", "because", "take 8", port=7)'
    with serving(tmp_path, body) as process:
        assert process.process.wait(20) == 6
        process.wait_for("Error: Port 7 is in use")
        process.wait_for("  Why: because")
        process.wait_for("  Fix: take 8")


def test_a_defect_is_no_stack_trace(tmp_path: Path) -> None:
    with serving(tmp_path, "raise ZeroDivisionError('oh')") as process:
        assert process.process.wait(20) == 70
        process.wait_for("  Fix: ")
    assert any("ZeroDivisionError: oh" in line for line in process.lines)
    assert not any("Traceback" in line for line in process.lines)


def test_a_service_has_as_many_files_as_the_system_lets_it_have(tmp_path: Path) -> None:
    before = """
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
"""
    body = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
print("most", soft == (10_240 if hard < 0 else min(10_240, hard)), soft > 256, flush=True)
"""
    with serving(tmp_path, body, before=before) as process:
        assert process.wait_for("most ") == "True True"
