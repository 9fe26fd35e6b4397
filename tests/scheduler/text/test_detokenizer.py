"""Streaming text equals the tokenizer's own decoding, and never breaks a character."""

from __future__ import annotations

import random

import pytest

from parallax.scheduler.text.detokenizer import (
    ByteDetokenizer,
    WindowDetokenizer,
    detokenizers,
)
from tests.scheduler.text.tokenizers_made import ADDED, CORPUS, FAMILIES, SPECIAL


@pytest.fixture(scope="module", params=list(FAMILIES))
def tokenizer(request):
    return FAMILIES[request.param]()


def streamed(make, ids) -> list[str]:
    detokenizer = make()
    return [*(detokenizer.add(token) for token in ids), detokenizer.end()]


def whole(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def test_families_get_the_detokenizer_meant_for_them():
    kinds = {name: type(detokenizers(make())()) for name, make in FAMILIES.items()}
    assert kinds == {
        "byte_level": ByteDetokenizer,
        "llama": ByteDetokenizer,
        "gemma": ByteDetokenizer,
        "metaspace": WindowDetokenizer,
        "wordpiece": WindowDetokenizer,
    }


@pytest.mark.parametrize("text", [*CORPUS[:5], " leading", "", " ", "�", "a�b", "🤖"])
def test_deltas_join_to_the_tokenizers_own_decoding(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    deltas = streamed(detokenizers(tokenizer), ids)
    assert "".join(deltas) == whole(tokenizer, ids)
    if "�" not in text:
        assert not any("�" in delta for delta in deltas)


def test_every_single_token_is_decoded_as_the_tokenizer_does(tokenizer):
    for token in range(tokenizer.get_vocab_size()):
        assert "".join(streamed(detokenizers(tokenizer), [token])) == whole(tokenizer, [token])


def test_special_tokens_are_left_out_and_other_added_ones_kept(tokenizer):
    special, added = tokenizer.token_to_id(SPECIAL), tokenizer.token_to_id(ADDED)
    the = tokenizer.encode("The dog", add_special_tokens=False).ids
    ids = [special, *the, special, added, *the, added, special]
    text = "".join(streamed(detokenizers(tokenizer), ids))
    assert text == whole(tokenizer, ids)
    assert SPECIAL not in text
    assert text.count(ADDED) == 2


def test_ids_beyond_the_tokenizers_vocabulary_have_no_text(tokenizer):
    the = tokenizer.encode("The dog", add_special_tokens=False).ids
    beyond = tokenizer.get_vocab_size() + 100
    ids = [beyond, *the, beyond]
    assert "".join(streamed(detokenizers(tokenizer), ids)) == whole(tokenizer, the)


def test_random_tokens_are_decoded_as_the_tokenizer_does_bytes_that_are_no_text_included():
    tokenizer = FAMILIES["byte_level"]()
    make, draw = detokenizers(tokenizer), random.Random(1)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.get_vocab_size()) for _ in range(draw.randrange(1, 60))]
        assert "".join(streamed(make, ids)) == whole(tokenizer, ids)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_bytes_that_are_no_text_become_one_mark_each(family):
    tokenizer = FAMILIES[family]()
    make = detokenizers(tokenizer)
    letter = tokenizer.token_to_id("b")
    for run in (b"\xff", b"\xe4\xbd", b"\xf0\x9f\xa4", b"\xff\xff\xff", b"\x80\xc3"):
        ids = [letter, *(byte + 1 for byte in run), letter]
        assert "".join(streamed(make, ids)) == whole(tokenizer, ids) == f"b{'�' * len(run)}b"
        assert "".join(streamed(make, ids[:-1])) == whole(tokenizer, ids[:-1])


def test_valid_characters_before_bad_bytes_are_kept_once_shown():
    make = detokenizers(FAMILIES["llama"]())
    ids = [byte + 1 for byte in "你".encode() + b"\xff" + "好".encode()]
    assert "".join(streamed(make, ids)) == "你�好"


def test_characters_are_shown_as_soon_as_they_are_whole():
    tokenizer = FAMILIES["gemma"]()
    ids = [byte + 1 for byte in "你🤖".encode()]
    assert streamed(detokenizers(tokenizer), ids) == ["", "", "你", "", "", "", "🤖", ""]


def test_a_window_goes_on_through_endless_bad_bytes():
    tokenizer = FAMILIES["byte_level"]()
    bad = tokenizer.token_to_id("ÿ")  # the byte 0xFF
    window = WindowDetokenizer(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    deltas = [window.add(bad) for _ in range(100)]
    assert len("".join(deltas)) >= 90
    assert "".join(deltas) + window.end() == "�" * 100


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_window_agrees_with_every_family_on_text(family):
    tokenizer = FAMILIES[family]()
    for text in CORPUS[:5]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        make = lambda: WindowDetokenizer(tokenizer.decode)  # noqa: E731
        assert "".join(streamed(make, ids)) == whole(tokenizer, ids)
