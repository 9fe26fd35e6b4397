"""Three minutes of random kills, stops, drains, farewells and joins: nothing lost, nothing left."""

from __future__ import annotations

import pytest

from tests.chaos.arena import arena
from tests.chaos.checker import check
from tests.chaos.kills import Expected
from tests.chaos.soak import run_soak

SOAK_S = 180.0


@pytest.mark.timeout(600)
def test_a_soak_loses_no_answer_and_leaves_nothing_behind(expected: Expected) -> None:
    with arena(expected.model) as made:
        soak = run_soak(made, expected, seconds=SOAK_S, seed=4)
    verdict = check(made.journal, soak.histories, expected.of_tokens)
    assert soak.wrong == []
    assert soak.left == []
    assert verdict.wrong == []
    assert len(soak.histories) > 20
    assert sum(soak.deeds.values()) > 5
