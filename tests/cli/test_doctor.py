"""``parallax doctor`` on this machine, within its loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from tests.cli.canned import canned
from tests.cli.processes import parallax

QUIET = ("doctor", "--loopback-only", "--port", "0", "--grpc-port", "0")


def test_this_machine_is_well_and_every_check_has_its_line(tmp_path: Path) -> None:
    done = parallax(tmp_path, *QUIET)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("python", "versions", "settings", "state", "disk", "HTTP port", "gRPC port"):
        assert f"{name}: " in done.stdout
    for name in ("interfaces", "mDNS", "schedulers", "memory", "compute", "open files"):
        assert f"{name}: " in done.stdout
    assert not any(line.startswith("fail") for line in done.stdout.splitlines())
    assert not (tmp_path / ".parallax").exists()  # looking changes nothing


def test_a_taken_port_is_a_warning_and_a_parallax_behind_it_is_none(tmp_path: Path) -> None:
    with canned() as cluster, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        http_port, grpc_port = cluster.url.rpartition(":")[2], str(taken.getsockname()[1])
        done = parallax(
            tmp_path,
            *("doctor", "--loopback-only", "--json"),
            *("--port", http_port, "--grpc-port", grpc_port),
        )
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["HTTP port"]["grade"] == "ok"
    assert "a Parallax that runs here" in checks["HTTP port"]["detail"]
    assert checks["gRPC port"]["grade"] == "warn"
    assert "--grpc-port" in checks["gRPC port"]["advice"]


def test_an_identity_that_others_can_read_fails_with_exit_status_1(tmp_path: Path) -> None:
    key = tmp_path / "state" / "identity.key"
    key.parent.mkdir()
    key.touch()
    key.chmod(0o644)
    done = parallax(tmp_path, *QUIET, "--state-dir", str(key.parent))
    assert done.returncode == 1
    assert "fail  state: " in done.stdout
    assert f"chmod 600 {key}" in done.stdout


def test_a_state_directory_that_cannot_be_made_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = parallax(tmp_path, *QUIET, "--state-dir", str(tmp_path / "file" / "state"))
    assert done.returncode == 1
    assert "fail  state: " in done.stdout


def test_open_files_are_judged_by_what_a_process_can_give_itself() -> None:
    script = (
        "import resource as r\n"
        "from parallax.cli.checks import open_files\n"
        "_, hard = r.getrlimit(r.RLIMIT_NOFILE)\n"
        "for limits in ((256, hard), (256, 512)):\n"
        "    r.setrlimit(r.RLIMIT_NOFILE, limits)\n"
        "    print([c.grade.value for c in open_files(None)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split("\n")[:2] == ["['ok']", "['warn']"]
