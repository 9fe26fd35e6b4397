"""The cluster's answers over HTTP are mlx-lm's own, whatever the cut and the company."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from parallax.proto import wire_pb2 as wire
from tests.cluster import Cluster
from tests.reference import Reference

TOKENS = 64
PROMPTS = [
    "Hi",
    "Tell me about the river that runs uphill, and why nobody minds.",
    "1 + 1 = ?",
    "Ünïcödé 日本語 🙂 and a tail of plain words to follow it",
    "x" * 200,
    "The quick brown fox jumps over the lazy dog. " * 9,
]
SAMPLED = {
    "temperature": 2.0,
    "top_p": 0.99,
    "top_k": 100,
    "presence_penalty": 1.5,
    "frequency_penalty": 1.0,
    "seed": 1234,
}  # penalties make a random model's text varied


def sampling_of(fields: dict[str, float]) -> wire.Sampling:
    values = {"top_p": 1.0, "repetition_penalty": 1.0, **fields}
    return wire.Sampling(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", ["two_nodes", "three_nodes"])
def test_greedy_answers_are_those_of_mlx_lm_in_one_process(
    size: str, prompt: str, reference: Reference, request: pytest.FixtureRequest
) -> None:
    cluster: Cluster = request.getfixturevalue(size)
    answer = cluster.chat(prompt, temperature=0, max_tokens=TOKENS)
    expected = reference.greedy(prompt, TOKENS)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == reference.text(expected)
    assert answer["usage"]["prompt_tokens"] == len(reference.prompt(prompt))
    assert choice["finish_reason"] == ("length" if len(expected) == TOKENS else "stop")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", ["two_nodes", "three_nodes"])
def test_seeded_answers_are_the_same_sampler_over_mlx_lms_logits(
    size: str, prompt: str, reference: Reference, request: pytest.FixtureRequest
) -> None:
    cluster: Cluster = request.getfixturevalue(size)
    answer = cluster.chat(prompt, max_tokens=TOKENS, **SAMPLED)
    expected = reference.sampled(prompt, TOKENS, sampling_of(SAMPLED))
    assert len(set(expected)) > 10, "too monotonous to prove anything"
    assert answer["choices"][0]["message"]["content"] == reference.text(expected)


def test_penalties_and_biases_reach_the_last_stage(
    two_nodes: Cluster, reference: Reference
) -> None:
    fields = {
        "temperature": 0.8,
        "seed": 5,
        "min_p": 0.02,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
    }
    sampling = sampling_of(fields)
    sampling.logit_bias[101] = 3.0
    answer = two_nodes.chat(PROMPTS[1], max_tokens=TOKENS, logit_bias={"101": 3.0}, **fields)
    expected = reference.sampled(PROMPTS[1], TOKENS, sampling)
    assert answer["choices"][0]["message"]["content"] == reference.text(expected)
    plain = reference.sampled(PROMPTS[1], TOKENS, sampling_of({"temperature": 0.8, "seed": 5}))
    assert plain != expected, "the fields change nothing: this test proves nothing"


@pytest.mark.parametrize("fields", [{"temperature": 0}, SAMPLED], ids=["greedy", "seeded"])
def test_sixteen_at_once_each_get_their_lone_answer(
    fields: dict[str, float], two_nodes: Cluster, reference: Reference
) -> None:
    prompts = [f"Request {n}: {'tell me more ' * (n % 7)}{chr(65 + n) * n}" for n in range(16)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda p: two_nodes.chat(p, max_tokens=40, **fields), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = reference.sampled(prompt, 40, sampling_of(fields))
        assert answer["choices"][0]["message"]["content"] == reference.text(expected)
