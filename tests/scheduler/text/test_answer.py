"""Tokens in, text out, counted."""

from __future__ import annotations

import pytest

from parallax.scheduler.generation import Reason
from parallax.scheduler.text.answer import AnswerText
from parallax.scheduler.text.detokenizer import detokenizers
from tests.scheduler.text.tokenizers_made import FAMILIES

TOKENIZER = FAMILIES["byte_level"]()
MAKE = detokenizers(TOKENIZER)


def ids(text: str) -> list[int]:
    """One token for each byte."""
    alphabet = {byte: TOKENIZER.encode(chr(byte)).ids[0] for byte in range(33, 127)}
    return [alphabet[byte] for byte in text.encode()]


@pytest.mark.parametrize("reason", [Reason.STOP, Reason.LENGTH])
def test_an_answer_ends_with_the_clusters_reason(reason):
    answer = AnswerText(MAKE())
    text = "".join(answer.push(token) for token in ids("hello"))
    assert answer.finish_reason is None
    text += answer.finish(reason)
    assert (text, answer.finish_reason, answer.tokens) == ("hello", reason.value, 5)


def test_a_stop_string_ends_an_answer_and_nothing_is_counted_after_it():
    answer = AnswerText(MAKE(), ["END"])
    text = "".join(answer.push(token) for token in ids("oneENDtwo"))
    assert (text, answer.finish_reason, answer.tokens) == ("one", "stop", 6)
    assert answer.finish(Reason.LENGTH) == ""
    assert answer.finish_reason == "stop"


def test_half_a_stop_string_is_given_back_at_the_end():
    answer = AnswerText(MAKE(), ["END"])
    assert "".join(answer.push(token) for token in ids("oneEN")) == "one"
    assert answer.finish(Reason.LENGTH) == "EN"


def test_half_a_character_at_the_end_is_a_replacement_mark():
    answer = AnswerText(MAKE())
    half = TOKENIZER.token_to_id("ä")  # the byte 0xE4
    assert answer.push(half) == ""
    assert answer.finish(Reason.LENGTH) == "�"


def test_a_stop_string_completed_by_the_last_held_back_character_counts():
    answer = AnswerText(MAKE(), ["�"])
    answer.push(TOKENIZER.token_to_id("ä"))
    assert answer.finish(Reason.LENGTH) == ""
    assert answer.finish_reason == "stop"
