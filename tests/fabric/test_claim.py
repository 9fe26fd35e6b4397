"""One process for each identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallax.fabric.claim import claim
from parallax.fabric.errors import BadSetting


def test_a_state_directory_has_one_node_and_one_scheduler(tmp_path: Path) -> None:
    with (
        claim(tmp_path, "node"),
        claim(tmp_path, "scheduler"),
        pytest.raises(BadSetting, match="Another node already runs"),
        claim(tmp_path, "node"),
    ):
        pytest.fail("claimed twice")
    with claim(tmp_path, "node"):
        assert (tmp_path / "node.lock").exists()


def test_a_place_that_cannot_be_written_is_a_setting_to_correct(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadSetting, match="cannot be used"), claim(tmp_path / "file", "node"):
        pytest.fail("claimed a file")


def test_a_new_state_directory_is_its_owner_s_alone(tmp_path: Path) -> None:
    with claim(tmp_path / "a" / "b", "node"):
        assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
