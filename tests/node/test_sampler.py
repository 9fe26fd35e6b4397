"""Counted randomness, penalties and filters."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import pytest
from mlx_lm import sample_utils

from parallax.node.sampler import TokenChooser, choose_rows, counted_key, draw, min_p, top_k, top_p
from parallax.proto import wire_pb2 as wire

VOCABULARY = 50


def sampling(**values: object) -> wire.Sampling:
    defaults = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    return wire.Sampling(**(defaults | values))  # type: ignore[arg-type]


def some_logits(seed: int = 0, rows: int | None = None) -> mx.array:
    shape = (VOCABULARY,) if rows is None else (rows, VOCABULARY)
    return 3 * mx.random.normal(shape, key=mx.random.key(seed))


def answer(values: wire.Sampling, count: int, prompt: list[int] | None = None) -> list[int]:
    found: list[int] = []
    for position in range(count):
        found.append(draw(some_logits(position), values, prompt or [], found))
    return found


def test_keys_of_positions_and_seeds_do_not_repeat() -> None:
    seeds = [0, 1, 2, 2**63, 2**64 - 1]
    keys = [counted_key(seed, position) for seed in seeds for position in range(2000)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 1 << 64 for key in keys)


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    one = answer(sampling(seed=1), 40)
    assert one == answer(sampling(seed=1), 40)
    assert one != answer(sampling(seed=2), 40)


def test_a_draw_depends_on_nothing_drawn_before() -> None:
    values = sampling(seed=9)
    answer(values, 5)
    mx.random.seed(123)
    logits = some_logits(77)
    assert draw(logits, values, [1], [2, 3]) == draw(logits, values, [4, 5], [6, 7])


def test_draws_follow_the_distribution() -> None:
    logits = mx.log(mx.array([0.5, 0.3, 0.15, 0.05]))
    values = sampling(seed=4)
    choosers = [TokenChooser(values, [], [0] * position) for position in range(2000)]
    tokens = [int(chooser.choose(logits).item()) for chooser in choosers]
    shares = [Counter(tokens)[token] / len(tokens) for token in range(4)]
    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)


def test_a_low_temperature_sharpens_and_zero_is_the_first_of_the_likeliest() -> None:
    logits = mx.array([1.0, 3.0, 3.0, 0.0])
    assert draw(logits, sampling(temperature=0), [], []) == 1
    cold = [draw(mx.array([1.0, 2.0, 0.0]), sampling(temperature=0.05, seed=s), [], []) for s in range(50)]  # fmt: skip # noqa: E501
    assert set(cold) == {1}


@pytest.mark.parametrize("temperature", [1e-20, 1e-39, 1e-300])
def test_the_coldest_temperatures_draw_the_likeliest(temperature: float) -> None:
    logits = mx.array([0.0, 1.0, 2.0, 0.5])
    assert draw(logits, sampling(temperature=temperature), [], []) == 2


def test_rows_of_a_batch_are_drawn_as_alone() -> None:
    several = [
        sampling(seed=1),
        sampling(temperature=0),
        sampling(seed=2, top_p=0.8, repetition_penalty=1.3),
        sampling(seed=1, temperature=0.5, top_k=5, logit_bias={3: 5.0}),
        sampling(temperature=0, frequency_penalty=1.0),
    ]
    logits = some_logits(5, rows=len(several))
    choosers = [TokenChooser(values, [1, 2], [3, 3, row]) for row, values in enumerate(several)]
    together = choose_rows(logits, choosers).tolist()
    alone = [draw(logits[row], v, [1, 2], [3, 3, row]) for row, v in enumerate(several)]
    assert together == alone
    backwards = choose_rows(logits[::-1], choosers[::-1]).tolist()
    assert backwards == alone[::-1]


def test_greedy_rows_take_one_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TokenChooser, "choose")
    logits = some_logits(5, rows=3)
    choosers = [TokenChooser(sampling(temperature=0), [], []) for _ in range(3)]
    assert choose_rows(logits, choosers).tolist() == mx.argmax(logits, axis=-1).tolist()


def test_a_chooser_that_advances_is_one_that_was_told_the_whole_answer() -> None:
    values = sampling(seed=3, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.4)
    chooser = TokenChooser(values, [5, 6], [])
    found: list[int] = []
    for position in range(20):
        token = int(chooser.choose(some_logits(position)).item())
        assert token == draw(some_logits(position), values, [5, 6], found)
        chooser.advance(token)
        found.append(token)


def test_a_banned_token_is_never_chosen() -> None:
    logits = mx.zeros((VOCABULARY,)).at[7].add(200.0)
    for temperature in (0, 0.3, 1.0, 2.0):
        for seed in range(20):
            values = sampling(temperature=temperature, seed=seed, logit_bias={7: -100.0})
            assert draw(logits, values, [7], [7]) != 7


def test_a_bias_is_added_to_its_tokens_alone() -> None:
    logits = some_logits(1)
    lifted = sampling(temperature=0, logit_bias={4: 100.0, 5: 1.0})
    assert draw(logits, lifted, [], []) == 4
    assert draw(logits, sampling(temperature=0, logit_bias={4: 0.0}), [], []) == int(
        mx.argmax(logits).item()
    )


def test_repetition_looks_at_prompt_and_answer_as_mlx_lm_does() -> None:
    logits = some_logits(2)
    prompt, generated = [1, 2, 3, 2], [4, 4, 40]
    penalty = sample_utils.make_repetition_penalty(1.7, context_size=100)
    expected = penalty(mx.array(prompt + generated), mx.array(logits)[None])[0]
    chooser = TokenChooser(sampling(repetition_penalty=1.7), prompt, generated)
    assert mx.array_equal(chooser._process(logits), expected).item()


def test_presence_and_frequency_look_at_the_answer_alone_as_openai_says() -> None:
    logits = some_logits(3)
    prompt, generated = [1, 2, 3], [4, 4, 4, 5]
    values = sampling(presence_penalty=0.5, frequency_penalty=0.25)
    found = TokenChooser(values, prompt, generated)._process(logits)
    expected = mx.array(logits)
    expected[4] -= 0.5 + 3 * 0.25
    expected[5] -= 0.5 + 0.25
    assert mx.allclose(found, expected, rtol=0, atol=1e-6).item()
    assert mx.array_equal(TokenChooser(values, prompt, [])._process(logits), logits).item()


@pytest.mark.parametrize("seed", range(5))
def test_filters_are_mlx_lms(seed: int) -> None:
    logits = some_logits(seed)
    logprobs = logits - mx.logsumexp(logits)
    for mass in (0.1, 0.5, 0.9, 0.999):
        assert mx.array_equal(
            top_p(logprobs, mass), sample_utils.apply_top_p(logprobs, mass)
        ).item()
    for share in (0.01, 0.2, 1.0):
        assert mx.array_equal(
            min_p(logprobs, share), sample_utils.apply_min_p(logprobs, share)
        ).item()
    for count in (1, 5, VOCABULARY - 1):
        assert mx.array_equal(
            top_k(logprobs, count), sample_utils.apply_top_k(logprobs, count)
        ).item()


def test_filters_leave_only_what_they_should() -> None:
    best = int(mx.argmax(some_logits(1)).item())
    second = int(mx.argsort(some_logits(1))[-2].item())
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"top_p": 0.0}, {"min_p": 1.0}):
        drawn = {draw(some_logits(1), sampling(seed=s, temperature=5, **narrow), [], []) for s in range(30)}  # fmt: skip # noqa: E501
        assert drawn == {best}
    two = {
        draw(some_logits(1), sampling(seed=s, temperature=9, top_k=2), [], []) for s in range(60)
    }
    assert two == {best, second}
    every = sampling(top_k=10 * VOCABULARY, seed=1)
    assert draw(some_logits(1), every, [], []) == draw(some_logits(1), sampling(seed=1), [], [])


def test_half_precision_logits_are_drawn_in_float32() -> None:
    logits = some_logits(8).astype(mx.bfloat16)
    values = sampling(seed=6, top_p=0.9)
    assert draw(logits, values, [], []) == draw(logits.astype(mx.float32), values, [], [])


def test_ids_beyond_the_vocabulary_change_nothing() -> None:
    odd = sampling(logit_bias={10**6: 5.0}, repetition_penalty=1.2, presence_penalty=1.0)
    usual = sampling(repetition_penalty=1.2, presence_penalty=1.0)
    strange = TokenChooser(odd, [3, VOCABULARY, 10**6], [4, 10**7])
    plain = TokenChooser(usual, [3], [4])
    logits = some_logits(1)
    assert mx.array_equal(strange._process(logits), plain._process(logits)).item()
