"""What the tests of deploy/ share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def deploy() -> Path:
    """The folder under test."""
    return ROOT / "deploy"


@pytest.fixture
def command() -> Path:
    """The installed ``parallax`` command of this environment."""
    return Path(sys.executable).parent / "parallax"
