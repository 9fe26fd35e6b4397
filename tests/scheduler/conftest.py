"""A cluster with nodes that are only told of, for several files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from parallax.scheduler.cluster import ClusterService
from tests.models import make_model
from tests.scheduler.test_dispatch import Link
from tests.scheduler.told import running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", layers=4, hidden=32)


@pytest.fixture
async def cluster(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ClusterService]:
    """A cluster that is to serve a model of four layers on two nodes."""
    monkeypatch.setattr("parallax.scheduler.dispatch.HeadLink", Link)
    async with running(tmp_path) as made:
        await made.choose(str(model), 2, True)
        yield made
