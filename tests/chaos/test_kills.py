"""A short form of the campaign: plugs are pulled while answers run, and no client sees it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.arena import Arena, arena
from tests.chaos.checker import check
from tests.chaos.kills import KINDS, MOMENTS, Expected, Kill, run_kill


@pytest.fixture(scope="module")
def wounded(expected: Expected) -> Iterator[Arena]:
    with arena(expected.model) as made:
        yield made


def test_a_stage_killed_at_any_moment_costs_a_pause_and_no_token(
    wounded: Arena, expected: Expected
) -> None:
    """Each stage at each moment; a node joins after each, and is the next one's spare."""
    outcomes = []
    for number in range(2 * len(MOMENTS)):
        stage, moment = number % 2, MOMENTS[number // 2]
        kill = Kill(stage, moment, tuple(KINDS)[(number + number // 2) % 2], 64)
        outcomes.append(run_kill(wounded, expected, kill))
        wounded.join()
        wounded.wait_whole(2, 1)
    assert [(o.kill, o.why) for o in outcomes if not o.right] == []
    wounded.cluster.stop()  # the journal is then whole
    histories = [outcome.history for outcome in outcomes]
    verdict = check(wounded.journal, histories, expected.of_tokens)
    assert verdict.wrong == []
    assert verdict.compared == len(outcomes)
    assert verdict.moves >= len(outcomes) - 2  # an answer may be over before the plug is out
