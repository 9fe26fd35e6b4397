"""The shipped model, loaded once by mlx-lm."""

from __future__ import annotations

import pytest

from parallax.demo import model_path
from parallax.demo.evaluate import Model


@pytest.fixture(scope="session")
def model() -> Model:
    return Model(model_path())
