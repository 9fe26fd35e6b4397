"""The generators: the same text from the same seed, and nothing held out in what they train on."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from itertools import islice

import pytest

from parallax.demo.corpus import (
    copying,
    counting,
    fresh,
    mixture,
    questions,
    react,
    refusals,
    stories,
    sums,
    tools,
)
from parallax.demo.corpus.document import render
from parallax.demo.corpus.expressions import draw
from parallax.demo.corpus.phrases import bare, every, expand, is_held_out
from parallax.demo.evaluate import GATES, cases

SAMPLERS = (copying, counting, questions, react, refusals, stories, sums, tools)


def test_the_same_seed_gives_the_same_text() -> None:
    first = [render(document) for document in mixture.stream(3, 400)]
    assert first == [render(document) for document in mixture.stream(3, 400)]
    assert first != [render(document) for document in mixture.stream(4, 400)]


def test_the_evaluation_asks_the_same_cases_each_time() -> None:
    assert cases(1.0) == cases(1.0)
    assert set(GATES) <= {case.kind for case in cases(1.0)}


def test_every_generator_ends_with_the_assistant() -> None:
    rng = random.Random(1)
    for module in SAMPLERS:
        for held_out in (False, True):
            document = module.sample(rng, held_out=held_out)
            assert document.answer["role"] == "assistant"
            assert document.prompt[-1]["role"] in {"user", "tool"}


def test_there_are_a_hundred_facts_with_many_phrasings_and_some_held_out() -> None:
    facts = questions.facts()
    assert len(facts) >= 100
    assert len({fact.key for fact in facts}) == len(facts)
    for fact in facts:
        assert len(questions.phrasings(fact, held_out=False)) >= 8, fact.key
        assert fact.held_out, fact.key


def test_no_held_out_phrasing_is_trained_on() -> None:
    trained = {
        text for fact in questions.facts() for text in questions.phrasings(fact, held_out=False)
    }
    for fact in questions.facts():
        assert not questions.phrasings(fact, held_out=True) & trained, fact.key


def test_a_fresh_question_for_each_fact_is_in_no_sheet() -> None:
    trained = {
        text for fact in questions.facts() for text in questions.phrasings(fact, held_out=False)
    }
    asked = [bare(case.prompt[-1]["content"]) for case in fresh.cases()]
    assert set(asked) & trained == set()
    answers = {case.answer["content"] for case in fresh.cases()}
    assert answers >= {fact.answer for fact in questions.facts()}
    assert len(asked) == len(set(asked))


def test_no_phrasing_asks_for_two_facts() -> None:
    keys = defaultdict(set)
    for fact in questions.facts():
        for held_out in (False, True):
            for text in questions.phrasings(fact, held_out=held_out):
                keys[text].add(fact.key)
    assert {text: found for text, found in keys.items() if len(found) > 1} == {}


def test_no_prompt_of_the_evaluation_occurs_in_a_sample_of_the_training() -> None:
    trained = {
        bare(message["content"])
        for document in mixture.stream(9, 6_000)
        for message in document.messages
        if message["role"] == "user"
    }
    found = [case for case in cases(1.0) if bare(case.prompt[-1]["content"]) in trained]
    assert found == []


def test_held_out_values_are_never_trained_on() -> None:
    rng = random.Random(2)
    for _ in range(2_000):
        assert not sums.draw(rng, held_out=False).held_out
        assert not is_held_out(draw(rng, held_out=False).code)


def test_a_held_out_sum_was_seen_in_the_other_order() -> None:
    rng = random.Random(2)
    for _ in range(500):
        item = sums.draw(rng, held_out=True)
        if item.sign != "-" and item.left != item.right:
            assert not sums.Sum(item.right, item.sign, item.left).held_out


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [(1, 3, "Counting to 3: 1, 2, 3."), (7, 9, "Counting from 7 to 9: 7, 8, 9.")],
)
def test_counting_names_its_target_first(first: int, last: int, text: str) -> None:
    assert counting.answer(first, last) == text


def test_a_pattern_stands_for_all_its_alternatives() -> None:
    assert every("[a|b] c [d|]") == ["a c d", "a c", "b c d", "b c"]
    assert expand("[a|b] c [d|]", random.Random(1)) in every("[a|b] c [d|]")


def test_expressions_have_the_value_that_they_say() -> None:
    rng = random.Random(5)
    for _ in range(300):
        item = draw(rng, held_out=False)
        assert float(item.value) == pytest.approx(eval(item.code), abs=1e-4)  # noqa: S307


def test_react_inputs_are_json() -> None:
    rng = random.Random(6)
    for case in islice(react.held_out_cases(rng, 40), 0, None, 2):
        _, _, arguments = case.answer["content"].partition("Action Input: ")
        assert list(json.loads(arguments)) == ["expression"]
