"""Nodes that are drained, taken back, sent away."""

from __future__ import annotations

import json

import pytest

from parallax.fabric.errors import UnknownNode
from parallax.scheduler.leaving import REMOVE_S, Leaving, find_node

NAMES = {"12D3aaa": "mac", "12D3bbb": "mac-mini", "12D3bcc": "studio", "12D3ddd": "studio"}


@pytest.mark.parametrize(
    ("word", "node_id"),
    [("12D3aaa", "12D3aaa"), ("mac", "12D3aaa"), ("mac-", "12D3bbb"), ("12D3bc", "12D3bcc")],
)
def test_a_node_is_named_by_its_id_its_name_or_how_one_of_them_begins(
    word: str, node_id: str
) -> None:
    assert find_node(word, NAMES) == node_id


@pytest.mark.parametrize(
    ("word", "said"), [("studio", "2 nodes"), ("12D3b", "2 nodes"), ("pc", "No node"), ("", "No")]
)
def test_a_word_that_means_none_or_several_is_refused(word: str, said: str) -> None:
    with pytest.raises(UnknownNode, match=said):
        find_node(word, NAMES)


def test_a_drained_node_stays_so_over_a_restart_until_it_is_taken_back() -> None:
    leaving = Leaving()
    leaving.drain("a", "mac")
    assert leaving.state_of("a", busy=True) == "draining"
    assert leaving.state_of("a", busy=False) == "drained"
    assert leaving.state_of("b", busy=False) is None
    again = Leaving()
    again.recall(json.loads(json.dumps(leaving.told())), now=5)
    assert again.nodes == {"a"}
    assert again.due(busy=[], now=1e9) == [], "it is not to go"
    assert again.take_back("a")
    assert not again.take_back("a")
    assert again.nodes == set()


def test_a_removed_node_goes_when_it_has_nothing_left_or_no_time() -> None:
    leaving = Leaving()
    leaving.remove("a", "mac", now=0)
    leaving.remove("b", "mini", now=10)
    assert leaving.state_of("a", busy=True) == "removing"
    assert leaving.due(busy=["a", "b"], now=1) == []
    assert leaving.due(busy=["b"], now=1) == ["a"]
    assert leaving.due(busy=["a", "b"], now=REMOVE_S) == ["a"]
    leaving.drain("b", "mini")
    assert leaving.due(busy=[], now=11) == ["a", "b"], "a drain makes no removal undone"
    again = Leaving()
    again.recall(leaving.told(), now=100)
    assert again.due(busy=["a", "b"], now=100 + REMOVE_S - 1) == []
    assert again.due(busy=["a", "b"], now=100 + REMOVE_S) == ["a", "b"]


def test_force_is_asked_of_every_node_that_leaves() -> None:
    leaving = Leaving()
    leaving.drain("a", "mac", forced=True)
    assert leaving.forced(["a", "c"])
    leaving.drain("b", "mini")
    assert not leaving.forced(["a", "b"])
    leaving.drain("b", "mini", forced=True)
    leaving.drain("b", "mini")
    assert leaving.forced(["a", "b"]), "what was forced stays so"


@pytest.mark.parametrize("told", [None, 3, [3], [["a"]], "x"])
def test_what_makes_no_sense_is_left_out(told: object) -> None:
    leaving = Leaving()
    leaving.recall(told, now=0)
    assert leaving.nodes == set()
