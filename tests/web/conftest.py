"""A real browser in front of a real cluster."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.cluster import Cluster, boot
from tests.models import make_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

expect.set_options(timeout=30_000)  # joining measures the machine, and CI has two cores

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP rebound.example 127.0.0.1",
]


@pytest.fixture(scope="package")
def chromium() -> str:
    """The browser's path; where there is none tests are skipped, but never in CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None and os.environ.get("CI"):
        pytest.fail("CI must have Chromium (Debian: chromium)")
    if found is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    return found


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """One browser for a module: its event loop must be gone before other tests start theirs."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of its own, with nothing remembered."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(30_000)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, by its folder."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", layers=5)


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    """A scheduler and two nodes, the model loaded."""
    with boot(model, nodes=2) as cluster:
        yield cluster
