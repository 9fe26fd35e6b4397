"""The import table of docs/structure.md, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "proto": set[str](),
    "fabric": {"proto"},
    "node": {"proto", "fabric"},
    "scheduler": {"proto", "fabric"},
    "web": set[str](),
    "cli": {"proto", "fabric", "node", "scheduler", "web", "demo"},
}
PURE = [
    "node/conductor.py",
    "scheduler/admission.py",
    "scheduler/api_keys.py",
    "scheduler/blame.py",
    "scheduler/http/access.py",
    "scheduler/lifecycle.py",
    "scheduler/membership.py",
    "scheduler/model_facts.py",
    "scheduler/plan_exact.py",
    "scheduler/plan_large.py",
    "scheduler/planner.py",
    "scheduler/reconciler.py",
    "scheduler/ring_layout.py",
    "scheduler/router.py",
    "scheduler/setbacks.py",
    "scheduler/shape.py",
    "scheduler/stage_costs.py",
    "scheduler/tokens.py",
    "scheduler/wrong_tokens.py",
]
SHELL_MODULES = {"asyncio", "grpc", "aiohttp", "threading", "socket", "time", "datetime"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every imported name of a file, wherever in it, with its line."""
    return imports_of(path.read_bytes(), path.relative_to(ROOT).parent.parts)


def imports_of(source: bytes, folder: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    package = ("parallax", *folder)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "parallax" and len(parts) > 1 else None


def breaches(path: Path, room: str) -> list[str]:
    allowed = MAY_IMPORT[room] | {room}
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(path)
        if (other := room_of(name)) is not None and other not in allowed
    ]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_the_table_allows(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    assert [breach for path in files for breach in breaches(path, room)] == []


def test_nothing_that_ships_imports_the_tests() -> None:
    files = [path for room in (*MAY_IMPORT, "demo") for path in (ROOT / room).rglob("*.py")]
    named = [f"{path}: {name}" for path in files for _, name in imports(path)]
    assert [entry for entry in named if entry.split(": ")[1].split(".")[0] == "tests"] == []


@pytest.mark.parametrize("name", PURE)
def test_a_pure_machine_has_no_clock_and_no_network(name: str) -> None:
    found = {imported.split(".")[0] for _, imported in imports(ROOT / name)}
    assert found & SHELL_MODULES == set()


@pytest.mark.parametrize(
    ("source", "room"),
    [
        (b"import parallax.scheduler.router", "scheduler"),
        (b"def f():\n    from parallax.scheduler import router", "scheduler"),
        (b"from parallax import scheduler", "scheduler"),
        (b"from ..scheduler import router", "scheduler"),
        (b"from .. import scheduler", "scheduler"),
        (b"from . import stage", "node"),
        (b"from .stage import Stage", "node"),
        (b"import json", None),
    ],
)
def test_the_reader_sees_an_import_in_any_form(source: bytes, room: str | None) -> None:
    assert [room_of(name) for _, name in imports_of(source, ("node",))] == [room]
