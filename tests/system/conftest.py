"""Clusters of real processes that several tests share, and mlx-lm beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, boot
from tests.models import make_model
from tests.reference import Reference


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 6-layer Qwen3."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", layers=6, hidden=64)


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    """The same model in mlx-lm, in this process."""
    return Reference(model)


@pytest.fixture(scope="session")
def two_nodes(model: Path) -> Iterator[Cluster]:
    """A scheduler and two nodes."""
    with boot(model, nodes=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def three_nodes(model: Path) -> Iterator[Cluster]:
    """A scheduler and three nodes."""
    with boot(model, nodes=3) as cluster:
        yield cluster
