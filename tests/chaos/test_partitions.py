"""Networks that lose everything without a word, in one direction or in both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chaos.checker import check
from tests.chaos.history import History
from tests.chaos.kills import Expected, body_of
from tests.chaos.partitions import Room, room, seen_by
from tests.chaos.stops import PROMPT
from tests.chaos.verdicts import wrong_with
from tests.network.namespaces import require

pytestmark = [pytest.mark.network_namespaces, pytest.mark.timeout(400)]

TOKENS = 300
AGAIN_S = 90.0


@pytest.fixture(scope="module")
def histories() -> list[History]:
    return []


@pytest.fixture(scope="module")
def parted(
    expected: Expected, histories: list[History], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Room]:
    require()
    with room(expected.model, tmp_path_factory.mktemp("room"), nodes=3) as made:
        yield made
    verdict = check(made.journal, histories, expected.of_tokens)
    assert verdict.wrong == []
    assert verdict.compared == len(histories)


def whole(room: Room) -> dict[str, Any]:
    """The status once a ring of two serves and everyone is there."""
    deadline = time.monotonic() + AGAIN_S
    while True:
        status = room.status()
        rings = status["rings"]
        serves = bool(rings) and all(ring["status"] == "ready" for ring in rings)
        ready = sum(node["state"] == "ready" for node in status["node_list"])
        if serves and ready >= 3:
            return status
        assert time.monotonic() < deadline, (status, room.scheduler.output)
        time.sleep(0.2)


def stages(room: Room) -> list[str]:
    return [stage["name"] for stage in whole(room)["rings"][0]["stages"]]


def wrong(history: History, expected: Expected, histories: list[History]) -> str:
    histories.append(history)
    return wrong_with(history, expected.text(PROMPT, "seeded", TOKENS), TOKENS)


def test_a_way_that_is_lost_in_one_direction_changes_no_answer(
    parted: Room, expected: Expected, histories: list[History]
) -> None:
    head, last = stages(parted)
    with parted.asking(body_of(PROMPT, "seeded", TOKENS)) as client:
        with parted.one_way(head, last):
            time.sleep(8)  # what is tested is a cut of this length
        assert wrong(seen_by(client), expected, histories) == ""
    whole(parted)


def test_a_node_that_is_cut_off_is_replaced_and_comes_back_as_a_spare(
    parted: Room, expected: Expected, histories: list[History]
) -> None:
    _, last = stages(parted)
    with (
        parted.asking(body_of(PROMPT, "seeded", TOKENS)) as client,
        parted.cut_off(parted.machine(last)),
    ):
        history = seen_by(client)
        assert wrong(history, expected, histories) == ""
        assert history.pause_s < 12, "it was not replaced, but waited for"
    assert last not in stages(parted)


def test_a_scheduler_that_is_cut_off_for_a_while_serves_again_by_itself(
    parted: Room, expected: Expected, histories: list[History]
) -> None:
    stages(parted)
    with parted.asking(body_of(PROMPT, "seeded", TOKENS)) as client:
        with parted.cut_off(parted.machines[0]):
            time.sleep(10)  # what is tested is a cut of this length
        assert wrong(seen_by(client), expected, histories) == ""
    whole(parted)
