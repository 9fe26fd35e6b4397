"""Chats of several turns: what was kept is begun with, and the answers are mlx-lm's own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster import Cluster
from tests.reference import Reference
from tests.system.test_answers import SAMPLED, sampling_of

TOKENS = 40
STEP = 32  # tokens; prefixes are used in such steps


@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLED], ids=["greedy", "seeded"])
def test_every_turn_is_answered_by_mlx_lms_tokens_and_the_turns_before_are_not_computed_again(
    sampling: dict[str, float], two_nodes: Cluster, reference: Reference
) -> None:
    chat = [{"role": "user", "content": f"{sampling}: a river runs uphill. " * 6}]
    ring = two_nodes.status()["rings"][0]
    before, whole = ring["prefix_cache"], True
    known = saved = 0
    for _ in range(3):
        body = {"messages": chat, "max_tokens": TOKENS, **sampling}
        answer = two_nodes.post("/v1/chat/completions", body)
        if sampling is SAMPLED:
            expected = reference.sampled(chat, TOKENS, sampling_of(SAMPLED))
        else:
            expected = reference.greedy(chat, TOKENS)
        text = answer["choices"][0]["message"]["content"]
        assert text == reference.text(expected)
        cached = answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)
        # On a machine that is too busy a ring may break, and what it kept is gone.
        whole = whole and ring["epoch"] in [r["epoch"] for r in two_nodes.status()["rings"]]
        assert cached >= known // STEP * STEP or not whole, "it begins with the prompt before"
        saved += cached
        known = answer["usage"]["prompt_tokens"]
        chat += [{"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}]
    assert saved > 0 or not whole

    def told(status: dict[str, Any]) -> bool:
        now = status["rings"][0]["prefix_cache"]
        return bool(
            now["prompts"] >= before["prompts"] + 3
            and now["hits"] >= before["hits"] + 2
            and now["saved_tokens"] >= before["saved_tokens"] + saved
            and now["kept_bytes"] > 0
        )

    if whole:
        two_nodes.wait(told)
