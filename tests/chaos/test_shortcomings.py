"""Disks that fail and memory that runs out, when a stage is read and in the middle of an answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.arena import Arena, start
from tests.chaos.checker import check
from tests.chaos.history import History
from tests.chaos.kills import Expected
from tests.chaos.stops import run_disturbed

FAULTY = "tests.chaos.faulty_node"
RELOAD_S = 3.0

pytestmark = pytest.mark.timeout(300)


class Wounded:
    """An arena whose node0 is broken in the ways that a file says."""

    def __init__(self, arena: Arena, wound: Path) -> None:
        self.arena = arena
        self._wound = wound

    def wound(self, *words: str) -> None:
        self._wound.write_text(" ".join(words))

    def problem(self, *words: str) -> str:
        """What people are told, once all of these words are in it."""

        def told(status: dict[str, Any]) -> bool:
            return all(word in (status["problem"] or "") for word in words)

        return str(self.arena.cluster.wait(told)["problem"])

    def well(self) -> None:
        self.arena.cluster.wait(lambda status: status["problem"] is None)


@pytest.fixture(scope="module")
def histories() -> list[History]:
    return []


@pytest.fixture(scope="module")
def wounded(
    expected: Expected, histories: list[History], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Wounded]:
    wound = tmp_path_factory.mktemp("wounds") / "wound"
    variables = {"CHAOS_WOUND": str(wound), "PARALLAX_LIMITS__RELOAD_S": f"{RELOAD_S}"}
    with start(expected.model, wanted=2, variables=variables) as arena:
        yield Wounded(arena, wound)
        arena.cluster.stop()
        verdict = check(arena.journal, histories, expected.of_tokens)
        assert verdict.wrong == []
        assert verdict.compared == len(histories)


def test_a_node_whose_disk_fails_is_named_and_the_others_make_the_ring(
    wounded: Wounded, expected: Expected, histories: list[History]
) -> None:
    wounded.wound("disk")
    assert wounded.arena.join(module=FAULTY) == "node0"
    wounded.arena.join()
    wounded.problem(
        "node0 could not load layers", "Input/output error", "Check that machine's disk"
    )
    wounded.arena.join()
    status = wounded.arena.wait_whole(2, 1)
    assert {stage["name"] for stage in status["rings"][0]["stages"]} == {"node1", "node2"}
    history, wrong = run_disturbed(wounded.arena, expected, lambda: None, tokens=60)
    histories.append(history)
    assert wrong == ""


def test_a_node_without_memory_is_tried_again_and_used_once_it_has_some(
    wounded: Wounded, expected: Expected, histories: list[History]
) -> None:
    """The answer waits for it: without it the model does not fit."""
    wounded.wound("memory")
    wounded.well()  # it is tried again, when it is needed

    def lose_a_stage() -> None:
        wounded.arena.kill("node1")
        wounded.problem("does not fit", "node0 could not load", "no memory left", "--memory")
        wounded.wound()

    history, wrong = run_disturbed(wounded.arena, expected, lose_a_stage)
    histories.append(history)
    assert wrong == ""
    status = wounded.arena.wait_whole(2, 0)
    assert {stage["name"] for stage in status["rings"][0]["stages"]} == {"node0", "node2"}
    assert status["problem"] is None


def test_a_frame_for_which_there_is_no_memory_costs_a_pause_and_is_told(
    wounded: Wounded, expected: Expected, histories: list[History]
) -> None:
    epoch = wounded.arena.wait_whole(2, 0)["rings"][0]["epoch"]
    history, wrong = run_disturbed(wounded.arena, expected, lambda: wounded.wound("frame"))
    histories.append(history)
    assert wrong == ""
    assert wounded.arena.wait_whole(2, 0)["rings"][0]["epoch"] > epoch
    wounded.arena.cluster.scheduler.wait_for("node0: Stage . failed. There was no memory left")
