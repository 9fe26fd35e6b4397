"""What the tests of this folder share."""

from __future__ import annotations

import pytest

from tests.chaos.arena import make_arena_model
from tests.chaos.kills import Expected
from tests.reference import Reference


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """The model that is hurt, undisturbed."""
    model = make_arena_model(tmp_path_factory.mktemp("chaos") / "model")
    return Expected(Reference(model), model)
