"""What a history foretells, against a search through it."""

from __future__ import annotations

import random
import time

import pytest

from parallax.node import drafts as drafts_module
from parallax.node.drafts import ORDERS, Drafts


def made_of(history: list[int]) -> Drafts:
    drafts = Drafts()
    for token in history:
        drafts.append(token)
    return drafts


def test_nothing_is_foretold_before_anything_comes_again() -> None:
    drafts = made_of([1, 2, 3, 4, 5])
    assert drafts.after(0, 3) == []
    assert drafts.matched == 0
    assert len(drafts) == 5


def test_two_tokens_that_come_again_go_on_as_the_last_time() -> None:
    drafts = made_of([1, 2, 3, 9, 1, 2, 4, 8, 7, 1, 2])
    assert drafts.after(0, 4) == [4, 8, 7, 1]
    assert drafts.after(2, 2) == [7, 1]
    assert drafts.matched == 2


def test_the_longer_match_counts_more_than_the_later_one() -> None:
    drafts = made_of([5, 1, 2, 3, 9, 6, 1, 2, 4, 9, 5, 1, 2])
    assert drafts.after(0, 1) == [3]


def test_a_place_is_followed_while_it_is_right_and_no_longer() -> None:
    text = [1, 2, 3, 4, 5, 6]
    drafts = made_of([*text, 9, 1, 2])
    assert [drafts.append(token) for token in (3, 4)] == [True, True]
    assert drafts.matched == 4
    assert drafts.append(7) is False
    assert drafts.matched == 0
    assert drafts.append(8) is None


def test_what_runs_into_the_end_repeats_itself() -> None:
    drafts = made_of([7, 8, 9, 7, 8])
    assert drafts.after(0, 8) == [9, 7, 8, 9, 7, 8, 9, 7]
    assert drafts.after(5, 3) == [8, 9, 7]


@pytest.mark.parametrize("seed", range(20))
def test_places_are_those_that_a_search_finds(seed: int) -> None:
    rng = random.Random(seed)
    history: list[int] = []
    drafts = Drafts()
    for _ in range(300):
        token = rng.randrange(4)
        before = drafts.after(0, 1)
        hit = drafts.append(token)
        history.append(token)
        assert hit is ((token == before[0]) if before else None)
        if not hit:
            assert drafts.after(0, 1) == searched(history)


def searched(history: list[int]) -> list[int]:
    for order in ORDERS:
        for end in range(len(history) - 1, order - 1, -1):
            if history[end - order : end] == history[-order:]:
                return [history[end]]
    return []


def test_a_token_costs_the_same_in_a_long_history_and_the_index_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drafts_module, "MOST_TOKENS", 1000)
    rng = random.Random(1)
    drafts = Drafts()
    begin = time.process_time()
    for _ in range(20_000):
        drafts.append(rng.randrange(50_000))
        drafts.after(3, 8)
    assert time.process_time() - begin < 5  # searched, it would take minutes
    assert len(drafts._after) <= 3 * 1000
