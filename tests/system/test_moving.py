"""Running rings move to better plans: clients see a pause at most, and every token as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tests.cluster import boot
from tests.models import make_model
from tests.reference import Reference
from tests.system.test_answers import PROMPTS, SAMPLED, sampling_of
from tests.system.test_life import kill_stage

MOVE_S = 120.0


def stages(status: dict[str, Any]) -> list[int]:
    return [len(ring["stages"]) for ring in status["rings"] if ring["status"] == "ready"]


def repeatedly(ask: Callable[[], str], over: threading.Event) -> list[str]:
    """Answers one behind the other, so that one is on its way whenever the ring moves."""
    answers = [ask()]
    while not over.is_set():
        answers.append(ask())
    return answers


def test_a_third_node_joins_under_load_and_every_stream_goes_on_as_if_nothing_had_happened(
    model: Path, reference: Reference
) -> None:
    tokens = 200
    asked = [
        (prompt, fields) for prompt in PROMPTS[1:3] for fields in ({"temperature": 0}, SAMPLED)
    ]
    expected = [
        reference.text(reference.sampled(p, tokens, sampling_of(fields), ends=False))
        for p, fields in asked
    ]
    with boot(model, nodes=3) as cluster, ThreadPoolExecutor(len(asked)) as pool:
        kill_stage(cluster, 1)
        before = cluster.wait(lambda s: stages(s) == [2])["rings"][0]["epoch"]
        counts = [0] * len(asked)
        over = threading.Event()

        def ask(number: int) -> str:
            def seen() -> None:
                counts[number] += 1

            prompt, fields = asked[number]
            body = {"max_tokens": tokens, "ignore_eos": True, **fields}
            return cluster.stream(prompt, seen, **body)

        answers = [pool.submit(repeatedly, partial(ask, n), over) for n in range(len(asked))]
        try:
            cluster.wait(lambda _: all(counts))
            cluster.join("third")
            status = cluster.wait(lambda s: stages(s) == [3], MOVE_S)
        finally:
            over.set()
        assert status["rings"][0]["epoch"] > before
        assert len(status["rings"]) == 1
        for answer, text in zip(answers, expected, strict=True):
            assert set(answer.result(timeout=300)) == {text}
        assert cluster.status()["problem"] is None


def test_a_ring_that_cannot_be_held_twice_pauses_and_goes_on(tmp_path: Path) -> None:
    """A node has room for three layers and not for four: the old go before the new come."""
    model = make_model(tmp_path / "wide", layers=6, hidden=512, max_position_embeddings=512)
    reference = Reference(model)
    tokens = 200
    greedy = sampling_of({"temperature": 0})
    expected = reference.text(reference.sampled("Hi", tokens, greedy, ends=False))
    with boot(model, nodes=0, wanted=3) as cluster, ThreadPoolExecutor(2) as pool:
        for name in ("node0", "node1", "node2"):
            cluster.join(name, "--memory", "35MB")
        cluster.wait(lambda s: bool(s["rings"]))
        early = pool.submit(lambda: cluster.answers_in_full("Hi", 4))
        assert early.result(120), "it did not wait"
        cluster.wait(lambda s: stages(s) == [3])
        kill_stage(cluster, 2)
        cluster.wait(lambda s: stages(s) == [2])
        count = 0
        over = threading.Event()

        def seen() -> None:
            nonlocal count
            count += 1

        body = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        ask = partial(cluster.stream, "Hi", seen, **body)
        answers = [pool.submit(repeatedly, ask, over) for _ in range(2)]
        try:
            cluster.wait(lambda _: count > 2)
            cluster.join("third", "--memory", "35MB")
            cluster.wait(lambda s: stages(s) == [3], MOVE_S)
        finally:
            over.set()
        for answer in answers:
            assert set(answer.result(timeout=300)) == {expected}
