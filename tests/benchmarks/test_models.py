"""The models of the benchmarks do what they are made for."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from benchmarks.copier import alphabet, make_copier, make_counter, misleading, passage_of
from benchmarks.model import plain_tokens, prompt_of
from benchmarks.noise import Shapes, compare, measure
from tests.models import make_model
from tests.reference import Reference


def test_a_copier_says_its_prompt_again(tmp_path: Path) -> None:
    reference = Reference(make_copier(tmp_path / "copier"))
    passage = passage_of(1, 200)
    answer = reference.greedy(f"assistant\n{passage}", 60)
    assert reference.text(answer) == passage[:60]


def test_a_counter_goes_on_in_its_alphabet_whatever_stood_before(tmp_path: Path) -> None:
    reference = Reference(make_counter(tmp_path / "counter"))
    answer = reference.text(reference.greedy(misleading(4), 20))
    signs = "".join(alphabet())
    assert answer in 2 * signs
    assert len(answer) == 20
    assert [reference.text([token]) for token in plain_tokens()] == alphabet()


def test_prompts_have_their_length_and_differ_from_the_beginning() -> None:
    assert [len(prompt_of(number, 40)) for number in (1, 2)] == [40, 40]
    assert prompt_of(1, 40)[:1] != prompt_of(2, 40)[:1]
    passage = passage_of(3, 300)
    grams = [passage[i : i + 3] for i in range(298)]
    assert len(set(grams)) == len(grams)


def test_noise_counts_tokens_that_change_and_the_gap_they_jumped() -> None:
    reference = mx.array([[1.0, 2.0, 0.0], [3.0, 1.0, 0.0]])
    moved = mx.array([[2.5, 2.0, 0.0], [3.0, 1.0, 0.0]])
    noise = compare("some", reference, moved, "float32")
    assert (noise.largest, noise.changed, noise.positions) == (1.5, 1, 2)
    assert noise.widest_gap == 1.0
    assert compare("none", reference, reference, "float32").largest == 0


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="GPUs have noise")
def test_shapes_have_no_noise_on_the_cpu_and_show_what_is_wrong(tmp_path: Path) -> None:
    model = Reference(make_model(tmp_path / "tiny")).model
    tokens = mx.array([(7 * i) % 250 for i in range(48)], mx.uint32)
    found = list(measure(model, tokens, "float32"))
    assert {noise.shape for noise in found} >= {"chunks of 8", "16 rows against 1", "4 stages"}
    assert {noise.largest for noise in found} == {0.0}
    other = Shapes(model, tokens[::-1]).chunks(48)
    assert compare("other", Shapes(model, tokens).chunks(48), other, "float32").changed > 0
