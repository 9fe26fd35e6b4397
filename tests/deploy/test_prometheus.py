"""Prometheus takes our scrape file, and it points at the scheduler's port."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parallax.fabric.settings import HTTP_PORT
from tests.deploy.tools import checker, verdict

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path


def check(path: Path) -> subprocess.CompletedProcess[str]:
    promtool = checker("promtool", "prometheus")
    return verdict(promtool, "check", "config", str(path))


def test_promtool_accepts_the_scrape_file(deploy: Path) -> None:
    result = check(deploy / "prometheus.yml")
    assert result.returncode == 0, result.stderr


def test_promtool_would_refuse_a_wrong_key(deploy: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "prometheus.yml"
    wrong.write_text((deploy / "prometheus.yml").read_text().replace("scrape_configs", "scrapes"))
    assert check(wrong).returncode != 0


def test_it_scrapes_the_scheduler_s_default_port(deploy: Path) -> None:
    text = (deploy / "prometheus.yml").read_text()
    assert f"127.0.0.1:{HTTP_PORT}" in text
    assert "metrics_path: /metrics" in text
