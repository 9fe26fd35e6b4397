"""Networks that lose everything without a word, in one direction or in both, or are slow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from parallax.fabric.limits import DEFAULT_LIMITS
from tests.chaos.checker import check
from tests.chaos.history import History
from tests.chaos.kills import Expected, body_of
from tests.chaos.partitions import Room, room, seen_by
from tests.chaos.stops import PROMPT
from tests.chaos.verdicts import wrong_with
from tests.network.namespaces import require

pytestmark = [pytest.mark.network_namespaces, pytest.mark.timeout(400)]

TOKENS = 300
OTHER_PROMPT = "Who told you of the other river, down there?"  # of which no prefix is kept
CHUNK_TOKENS = 31  # odd: pieces of prompts have no halves
AGAIN_S = 90.0


@pytest.fixture(scope="module")
def histories() -> list[History]:
    return []


@pytest.fixture(scope="module")
def parted(
    expected: Expected, histories: list[History], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Room]:
    require()
    one_size = {"PARALLAX_LIMITS__CHUNK_TOKENS": f"{CHUNK_TOKENS}"}
    with room(expected.model, tmp_path_factory.mktemp("room"), 3, one_size) as made:
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


def wrong(
    history: History, expected: Expected, histories: list[History], prompt: str = PROMPT
) -> str:
    histories.append(history)
    return wrong_with(history, expected.text(prompt, "seeded", TOKENS), TOKENS)


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


def rate(history: History, begin_s: float, end_s: float) -> float:
    """Events with text each second, from one moment of this machine to another."""
    return sum(begin_s < at < end_s for at in history.arrivals) / (end_s - begin_s)


def accused(room: Room, since: int) -> list[str]:
    """What the scheduler has said against anybody, behind so many lines."""
    words = (" is silent", " broke: ", " left", " hangs", "Problem: ")
    return [line for line in room.scheduler.lines[since:] if any(word in line for word in words)]


def test_a_link_that_becomes_slow_slows_the_answer_and_nobody_is_accused(
    parted: Room, expected: Expected, histories: list[History]
) -> None:
    require(slow=True)
    ring, said = whole(parted)["rings"][0], len(parted.scheduler.lines)
    with parted.asking(body_of(PROMPT, "seeded", TOKENS)) as client:
        with parted.slowed(parted.machine(ring["stages"][1]["name"]), 128_000, queue_s=0.4):
            begin_s = time.monotonic()
            time.sleep(5)  # what is tested is slowness of this length
            end_s = time.monotonic()
        history = seen_by(client)
    assert wrong(history, expected, histories) == ""
    slow = rate(history, begin_s + 0.5, end_s)
    assert 1 < slow < 30, "the link was not slow, or nothing went on"
    assert rate(history, end_s + 0.5, history.ended_s) > 1.5 * slow
    assert accused(parted, said) == []
    assert whole(parted)["rings"][0]["epoch"] == ring["epoch"]


def test_a_piece_of_a_prompt_may_travel_for_longer_than_anybody_may_be_silent(
    parted: Room, expected: Expected, histories: list[History]
) -> None:
    """Keepalive and TCP's own time-out are for links that carry nothing, not for slow ones."""
    require(slow=True)
    ring, said = whole(parted)["rings"][0], len(parted.scheduler.lines)
    begin_s = time.monotonic()
    with ExitStack() as slow:
        slow.enter_context(
            parted.slowed(parted.machine(ring["stages"][1]["name"]), 64_000, queue_s=0.4)
        )
        with parted.asking(body_of(OTHER_PROMPT, "seeded", TOKENS)) as client:
            slow.close()
            took_s = time.monotonic() - begin_s
            history = seen_by(client)
    assert wrong(history, expected, histories, OTHER_PROMPT) == ""
    assert took_s > 2 * DEFAULT_LIMITS.silence_s, "31 tokens, 31 KiB, take 4 s"
    assert accused(parted, said) == []
    assert whole(parted)["rings"][0]["epoch"] == ring["epoch"]


def test_while_a_way_is_lost_in_one_direction_the_answer_goes_on_with_the_spare(
    parted: Room, expected: Expected, histories: list[History]
) -> None:
    """The last one of this room: one of the two is put aside for longer than it takes."""
    head, last = stages(parted)
    with (
        parted.asking(body_of(PROMPT, "seeded", TOKENS)) as client,
        parted.one_way(head, last),
    ):
        history = seen_by(client)
        assert wrong(history, expected, histories) == ""
        assert history.pause_s < 20, "the same two were tried too often"
        status = parted.status()
        aside = {node["name"] for node in status["node_list"] if node["state"] == "aside"}
        serve = {stage["name"] for ring in status["rings"] for stage in ring["stages"]}
        assert len(aside & {head, last}) == 1
        assert len(serve) == 2
        assert not aside & serve
