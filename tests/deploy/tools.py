"""Checkers of other projects, and what our own command says of itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest


def checker(name: str, package: str) -> str:
    """The path of a checker; without it the test is skipped, but never in CI."""
    path = shutil.which(name)
    if path is None and os.environ.get("CI"):
        pytest.fail(f"CI must have {name} (Debian: {package})")
    if path is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install {package})")
    return path


def verdict(*words: str) -> subprocess.CompletedProcess[str]:
    """What a checker says, and its exit status."""
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)


def long_flags(command: Path, verb: str) -> set[str]:
    """Every ``--flag`` in a verb's help."""
    result = subprocess.run(
        [str(command), verb, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
    )
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", result.stdout))
