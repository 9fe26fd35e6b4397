"""launchd and systemd start our command, with flags it has, as nobody special."""

from __future__ import annotations

import plistlib
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.deploy.tools import checker, long_flags, verdict

if TYPE_CHECKING:
    from pathlib import Path

INSTALLED = "/opt/parallax/bin/parallax"
ROLES = {"scheduler": "run", "node": "join"}


def plist(deploy: Path, role: str) -> dict[str, Any]:
    with (deploy / "launchd" / f"org.parallax.{role}.plist").open("rb") as file:
        return plistlib.load(file, fmt=plistlib.FMT_XML)


def unit(deploy: Path, role: str) -> Path:
    return deploy / "systemd" / f"parallax-{role}.service"


def exec_start(deploy: Path, role: str) -> list[str]:
    (line,) = re.findall(r"^ExecStart=(.*)$", unit(deploy, role).read_text(), re.MULTILINE)
    return str(line).split()


def command_lines(deploy: Path, role: str) -> list[list[str]]:
    return [exec_start(deploy, role), plist(deploy, role)["ProgramArguments"]]


@pytest.mark.parametrize("role", ROLES)
def test_services_start_the_role_s_verb_with_a_state_directory(deploy: Path, role: str) -> None:
    for words in command_lines(deploy, role):
        assert words[:2] == [INSTALLED, ROLES[role]]
        assert "--state-dir" in words


@pytest.mark.parametrize("role", ROLES)
def test_services_use_only_flags_that_the_command_has(
    deploy: Path, command: Path, role: str
) -> None:
    known = long_flags(command, ROLES[role])
    assert "--state-dir" in known
    for words in command_lines(deploy, role):
        used = {word for word in words if word.startswith("-")}
        assert used <= known


@pytest.mark.parametrize("role", ROLES)
def test_property_lists_describe_daemons_that_launchd_takes(deploy: Path, role: str) -> None:
    values = plist(deploy, role)
    state = values["ProgramArguments"][values["ProgramArguments"].index("--state-dir") + 1]
    assert values["Label"] == f"org.parallax.{role}"
    assert values["UserName"] == "_parallax"
    assert values["RunAtLoad"] is True
    assert values["KeepAlive"] == {"SuccessfulExit": False}
    assert values["WorkingDirectory"] == state
    assert values["StandardOutPath"] == values["StandardErrorPath"] == f"{state}.log"
    assert all(isinstance(value, str) for value in values["EnvironmentVariables"].values())


@pytest.mark.parametrize("role", ROLES)
def test_environments_hold_only_settings_that_exist(deploy: Path, role: str) -> None:
    from parallax.fabric.settings import KNOWN

    text = unit(deploy, role).read_text() + repr(plist(deploy, role))
    named = set(re.findall(r"PARALLAX_([A-Z_]*[A-Z])", text))
    assert named
    assert {name.lower() for name in named} <= KNOWN


@pytest.mark.parametrize("role", ROLES)
def test_systemd_finds_no_fault_in_the_units(
    deploy: Path, command: Path, tmp_path: Path, role: str
) -> None:
    verify = checker("systemd-analyze", "systemd")
    here = tmp_path / f"parallax-{role}.service"
    # The verifier looks for the program itself, which is installed elsewhere here.
    here.write_text(unit(deploy, role).read_text().replace(INSTALLED, str(command)))
    result = verdict(verify, "verify", "--man=no", str(here))
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_systemd_s_verifier_would_find_a_fault(deploy: Path, command: Path, tmp_path: Path) -> None:
    verify = checker("systemd-analyze", "systemd")
    here = tmp_path / "parallax-node.service"
    text = unit(deploy, "node").read_text().replace(INSTALLED, str(command))
    here.write_text(text.replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"))
    result = verdict(verify, "verify", "--man=no", str(here))
    assert "NoNewPrivilege" in result.stderr


@pytest.mark.parametrize("role", ROLES)
def test_units_take_privileges_away(deploy: Path, role: str) -> None:
    lines = unit(deploy, role).read_text().splitlines()
    for line in (
        "DynamicUser=yes",
        f"StateDirectory=parallax-{role}",
        "Restart=on-failure",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "CapabilityBoundingSet=",
    ):
        assert line in lines
