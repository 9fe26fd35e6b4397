"""Drafts in a real cluster: the same answers, sooner, whatever comes between."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, boot
from tests.reference import Reference
from tests.system.test_answers import sampling_of
from tests.system.test_life import kill_stage

REPEATING = "the river runs uphill, " * 8
# A bias that large leaves so few signs that they soon repeat, and not for certain.
LOOPING = {"temperature": 1.0, "seed": 4, "logit_bias": {str(t): 9.0 for t in range(65, 70)}}
GREEDY = {"temperature": 0}
PENALISED = {"temperature": 0.7, "seed": 9, "frequency_penalty": 0.1, "presence_penalty": 0.2}


def expected(reference: Reference, prompt: str, tokens: int, fields: dict[str, Any]) -> str:
    plain = {k: v for k, v in fields.items() if k != "logit_bias"}
    sampling = sampling_of(plain)
    for token, bias in fields.get("logit_bias", {}).items():
        sampling.logit_bias[int(token)] = bias
    return reference.text(reference.sampled(prompt, tokens, sampling, ends=False))


def drafts(cluster: Cluster) -> tuple[float, float]:
    """Drafted and accepted tokens, as the metrics say; they come once a second."""
    with urllib.request.urlopen(f"{cluster.url}/metrics", timeout=60) as answer:
        page = answer.read().decode()
    names = ("parallax_drafted_tokens_total", "parallax_accepted_draft_tokens_total")
    found = [re.search(rf"^{name} (\S+)$", page, re.MULTILINE) for name in names]
    drafted, accepted = (float(f.group(1)) if f else 0.0 for f in found)
    return drafted, accepted


def accepted(status: dict[str, Any]) -> dict[int, int]:
    """Accepted tokens, by the rings that there are."""
    return {ring["epoch"]: ring["load"]["accepted_tokens"] for ring in status["rings"]}


def ask(cluster: Cluster, prompt: str, tokens: int, fields: dict[str, Any]) -> str:
    answer = cluster.chat(prompt, max_tokens=tokens, ignore_eos=True, **fields)
    text: str = answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == tokens
    return text


@pytest.mark.parametrize("fields", [GREEDY, LOOPING, PENALISED], ids=["greedy", "loop", "penalty"])
def test_answers_that_repeat_are_those_of_mlx_lm_and_are_counted(
    fields: dict[str, Any], two_nodes: Cluster, reference: Reference
) -> None:
    counted, before = drafts(two_nodes)[1], accepted(two_nodes.status())
    whole = expected(reference, REPEATING, 150, fields)
    for _ in range(20):  # a ring that other processes disturb sends drafts seldom
        assert ask(two_nodes, REPEATING, 150, fields) == whole
        now = accepted(two_nodes.status())
        gained = sum(tokens - before.get(epoch, 0) for epoch, tokens in now.items())
        if gained > 20 or fields is PENALISED:
            break
    assert gained > 20 or fields is PENALISED
    load = two_nodes.status()["rings"][0]["load"]
    assert load["drafted_tokens"] >= load["accepted_tokens"]
    # Those of rings before this one are counted too, if a busy machine had any break.
    two_nodes.wait(lambda _: drafts(two_nodes)[1] >= counted + gained)
    total, now = drafts(two_nodes)[1], accepted(two_nodes.status())
    assert total <= counted + sum(before.values()) + sum(now.values())


def test_a_request_that_comes_while_another_is_drafted_gets_its_own_answer(
    two_nodes: Cluster, reference: Reference
) -> None:
    long = expected(reference, REPEATING, 600, LOOPING)
    short = expected(reference, "Who is there?", 25, PENALISED)
    with ThreadPoolExecutor(1) as pool:
        before = two_nodes.status()["rings"][0]["load"]["accepted_tokens"]
        first = pool.submit(ask, two_nodes, REPEATING, 600, LOOPING)
        two_nodes.wait(
            lambda s: first.done() or s["rings"][0]["load"]["accepted_tokens"] > before + 10
        )
        for _ in range(3):
            assert ask(two_nodes, "Who is there?", 25, PENALISED) == short
        assert first.result(120) == long


def test_a_ring_that_breaks_while_it_drafts_goes_on_with_the_same_answer(
    model: Path, reference: Reference
) -> None:
    tokens = 900
    whole = expected(reference, REPEATING, tokens, LOOPING)
    with boot(model, nodes=2) as cluster, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, cluster, REPEATING, tokens, LOOPING)
        cluster.wait(
            lambda s: answer.done() or any(r["load"]["accepted_tokens"] > 10 for r in s["rings"])
        )
        kill_stage(cluster, 1)
        assert answer.result(120) == whole


@pytest.fixture
def without(model: Path) -> Iterator[Cluster]:
    with boot(model, nodes=2, flags=["--no-speculation"]) as cluster:
        yield cluster


def test_switched_off_nothing_is_drafted_and_the_answer_is_the_same(
    without: Cluster, reference: Reference
) -> None:
    assert ask(without, REPEATING, 60, GREEDY) == expected(reference, REPEATING, 60, GREEDY)
    without.wait(lambda s: s["rings"][0]["load"]["decoding"] == 0)
    assert without.status()["rings"][0]["load"]["drafted_tokens"] == 0
    assert drafts(without) == (0, 0)
