"""The image holds every package, runs our command, and not as root."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from parallax.fabric.settings import ENROL_PORT, HTTP_PORT
from tests.deploy.tools import long_flags

ROOT = Path(__file__).parents[2]
Instruction = tuple[str, str]


@pytest.fixture
def instructions(deploy: Path) -> list[Instruction]:
    return parse((deploy / "Dockerfile").read_text())


def parse(text: str) -> list[Instruction]:
    """(instruction, arguments) in order, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), " ".join(rest.split())) for name, rest in pairs]


def copied(instructions: list[Instruction]) -> set[str]:
    """What COPY takes from the repository."""
    sources: set[str] = set()
    for name, rest in instructions:
        if name == "COPY" and not rest.startswith("--from="):
            sources.update(rest.split()[:-1])
    return sources


def test_instructions_are_docker_s_own(instructions: list[Instruction]) -> None:
    files = {"FROM", "WORKDIR", "COPY", "RUN", "VOLUME"}
    start = {"ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in instructions} <= files | start
    assert instructions[0][0] == "FROM"


def test_every_copied_path_exists(instructions: list[Instruction]) -> None:
    assert all((ROOT / source).exists() for source in copied(instructions))


def test_every_package_and_metadata_file_is_copied(instructions: list[Instruction]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    files = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied(instructions) == folders | files


def test_the_build_s_context_lets_through_what_is_copied(
    deploy: Path, instructions: list[Instruction]
) -> None:
    lines = (deploy / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied(instructions)


def test_the_image_runs_our_command_without_root(
    instructions: list[Instruction], command: Path
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    final = instructions[max(i for i, (name, _) in enumerate(instructions) if name == "FROM") :]
    values = dict(final)
    (program,) = json.loads(values["ENTRYPOINT"])
    (verb,) = json.loads(values["CMD"])
    assert program in project["project"]["scripts"]
    assert long_flags(command, verb)
    assert values["USER"] == "parallax"
    assert values["EXPOSE"] == f"{HTTP_PORT} {ENROL_PORT} {ENROL_PORT + 1}"


def test_the_image_s_python_is_one_that_we_support(instructions: list[Instruction]) -> None:
    bases = {rest.split()[0] for name, rest in instructions if name == "FROM"}
    assert bases == {"python:3.12-slim"}
