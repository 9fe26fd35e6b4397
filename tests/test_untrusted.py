"""No product code can turn bytes into code: read from the sources, whatever runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("proto", "fabric", "node", "scheduler", "cli")
MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("torch", "yaml", "code", "codeop", "runpy", "imp"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {("os", "system"), ("os", "popen"), ("numpy", "load"), ("np", "load")}


def dangers(source: bytes) -> Iterator[tuple[int, str]]:
    """What turns bytes, or text, into something that runs."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
            yield node.lineno, node.func.id
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            called = node.func.value.id, node.func.attr
            if called in METHODS:
                yield node.lineno, ".".join(called)
        for keyword in node.keywords:
            forbidden = keyword.arg in ("shell", "trust_remote_code", "allow_pickle")
            if forbidden and not (
                isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            ):
                yield node.lineno, f"{keyword.arg}="


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_in_a_room_runs_what_it_reads(room):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for line, what in dangers(path.read_bytes())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "import torch.serialization",
        "eval('1')",
        "def f(): exec(x)",
        "import os; os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=settings.trust)",
        "numpy.load(x, allow_pickle=True)",
    ],
)
def test_the_check_sees_what_it_looks_for(source):
    assert list(dangers(source.encode()))


def test_no_setting_and_no_field_of_the_api_turns_remote_code_on():
    words = ("trust_remote", "trust-remote", "model_file")
    places = [*(ROOT / "fabric").glob("settings.py"), *(ROOT / "scheduler" / "http").glob("*.py")]
    places += [*(ROOT / "cli").glob("*.py"), ROOT / "proto" / "wire.proto"]
    assert [p for p in places for word in words if word in p.read_text()] == []
