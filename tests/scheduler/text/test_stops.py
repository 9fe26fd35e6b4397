"""Stop strings end the text where they begin, however the text is cut."""

from __future__ import annotations

import random

import pytest

from parallax.scheduler.text.stops import StopMatcher


def run(stops, pieces) -> tuple[list[str], bool]:
    matcher, shown = StopMatcher(stops), []
    for piece in pieces:
        text, met = matcher.push(piece)
        shown.append(text)
        if met:
            return shown, True
    return [*shown, matcher.flush()], False


def by_definition(stops, text) -> tuple[str, bool]:
    """Up to the stop string that ends first; the longest of those that end together."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "met"),
    [
        ([], ["a", "b"], ["a", "b", ""], False),
        (["STOP"], ["one S", "TO", "P two"], ["one ", "", ""], True),
        (["STOP"], ["one S", "TO", "AST"], ["one ", "", "STOA", "ST"], False),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], True),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
        (["abcd", "bc"], ["a", "b", "c", "d"], ["", "", "a"], True),
        (["bc", "abc"], ["xabc"], ["x"], True),
        (["你好"], ["说你", "好吗"], ["说", ""], True),
        ([""], ["a"], ["a", ""], False),
    ],
)
def test_text_is_held_back_only_while_it_may_become_a_stop(stops, pieces, shown, met):
    assert run(stops, pieces) == (shown, met)


def test_the_outcome_does_not_depend_on_how_text_is_cut():
    draw = random.Random(0)
    for _ in range(3000):
        stops = [
            "".join(draw.choice("ab") for _ in range(draw.randrange(1, 6)))
            for _ in range(draw.randrange(1, 4))
        ]
        text = "".join(draw.choice("abc") for _ in range(draw.randrange(0, 20)))
        pieces, rest = [], text
        while rest:
            size = draw.randrange(1, 5)
            pieces.append(rest[:size])
            rest = rest[size:]
        shown, met = run(stops, pieces)
        assert ("".join(shown), met) == by_definition(stops, text), (stops, pieces)


def test_no_part_of_a_stop_string_is_ever_shown_before_it_is_met():
    draw = random.Random(0)
    for _ in range(1000):
        stop = "".join(draw.choice("ab") for _ in range(draw.randrange(1, 6)))
        text = "".join(draw.choice("ab") for _ in range(12))
        expected, _ = by_definition([stop], text)
        so_far = ""
        matcher = StopMatcher([stop])
        for character in text:
            shown, met = matcher.push(character)
            so_far += shown
            assert expected.startswith(so_far)
            if met:
                break
