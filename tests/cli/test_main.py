"""The command as a whole: its speed, its help, its errors."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from parallax.cli.main import VERBS
from tests.cli.processes import COMMAND, environment, parallax

HEAVY = {"grpc", "mlx", "aiohttp", "pydantic", "zeroconf", "cryptography", "psutil", "mlx_lm"}


# The least that a command written with Typer does.
PLAIN = "import typer; app = typer.Typer(); app.command()(lambda: None); app(prog_name='plain')"


def help_s(home: Path, *command: str) -> float:
    """How long a command takes to explain itself, without what other work takes meanwhile."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [*command, "--help"],
        env=environment(home),
        cwd=home,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_help_comes_within_300_ms(tmp_path: Path) -> None:
    plain, ours = [], []
    for _ in range(4):
        plain.append(help_s(tmp_path, sys.executable, "-c", PLAIN))
        ours.append(help_s(tmp_path, *COMMAND))
    slow = min(plain) / 0.15  # what this machine takes longer than one for which 300 ms are meant
    assert min(ours) < 0.3 * max(1.0, slow), (ours, plain)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from parallax.cli.main import build\n"
        "try: build(['--help'])(['--help'])\n"
        "except SystemExit: pass\n"
        "print('\\nLOADED', *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path),
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = done.stdout.rpartition("LOADED ")[2].split()
    assert "typer" in loaded
    assert not HEAVY & set(loaded)


def test_help_lists_every_verb(tmp_path: Path) -> None:
    shown = parallax(tmp_path, "--help").stdout
    for verb in VERBS:
        assert f" {verb} " in shown


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself(tmp_path: Path, verb: str) -> None:
    done = parallax(tmp_path, verb, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert "--with-parent" not in done.stdout


def test_version_is_shown_as_text_and_as_json(tmp_path: Path) -> None:
    short = parallax(tmp_path, "--version").stdout.split()
    assert short[0] == "parallax"
    lines = parallax(tmp_path, "version").stdout.splitlines()
    assert lines[0].split() == short
    versions = json.loads(parallax(tmp_path, "version", "--json").stdout)
    assert versions["parallax"] == short[1]
    assert {"mlx", "mlx-lm", "protocol", "python"} <= set(versions)


@pytest.mark.parametrize("arguments", [("dance",), ("run", "--dance"), ("run", "--port", "65536")])
def test_a_misspelt_command_line_exits_with_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = parallax(tmp_path, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run",), "unknown key 'prot'"),
        (("join",), "unknown key 'prot'"),
        (("status",), "unknown key 'prot'"),
    ],
)
def test_an_unknown_key_in_the_settings_file_exits_with_6(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "parallax.toml").write_text("prot = 1\n")
    done = parallax(tmp_path, *arguments)
    assert done.returncode == 6
    assert said in done.stderr
    assert "  Why: " in done.stderr
    assert "  Fix: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (("join", "--memory", "lots"), {}, "--memory"),
        (("join", "-s", "12D3KooWnonsense"), {}, "not a peer id"),
        (("join", "-s", "studio"), {}, "not a peer id"),
        (("run", "--log-level", "loud"), {}, "--log-level"),
        (("run",), {"PARALLAX_PORT": "http"}, "PARALLAX_PORT"),
        (("run", "--port", "4001", "--grpc-port", "4001"), {}, "must differ"),
    ],
)
def test_a_wrong_setting_exits_with_6_and_says_where_it_came_from(
    tmp_path: Path, arguments: tuple[str, ...], variables: dict[str, str], said: str
) -> None:
    done = parallax(tmp_path, *arguments, **variables)
    assert done.returncode == 6
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback_of_an_error(tmp_path: Path) -> None:
    done = parallax(tmp_path, "status", "--port", "1", "--log-level", "debug")
    assert done.returncode == 5
    assert "Traceback" in done.stderr
    assert "Error: No cluster answers" in done.stderr
