"""mlx-lm in one process: what every answer of a cluster is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from parallax.node.sampler import draw
from parallax.proto import wire_pb2 as wire

Chat = str | list[dict[str, str]]  # one user message, or all messages


class Reference:
    """One model, whole, in this process."""

    def __init__(self, folder: Path) -> None:
        loaded = load(str(folder))
        self.model: Any = loaded[0]
        self.tokenizer: Any = loaded[1]

    def prompt(self, text: Chat) -> list[int]:
        """Token ids of a chat."""
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    def greedy(self, text: Chat, tokens: int) -> list[int]:
        """Token ids by mlx-lm's own generation, up to an end-of-turn token."""
        answer: list[int] = []
        for token, _ in generate_step(mx.array(self.prompt(text)), self.model, max_tokens=tokens):
            if int(token) in self.tokenizer.eos_token_ids:
                break
            answer.append(int(token))
        return answer

    def sampled(
        self, text: Chat, tokens: int, sampling: wire.Sampling, *, ends: bool = True
    ) -> list[int]:
        """Token ids by Parallax's sampler over mlx-lm's own logits."""
        prompt = self.prompt(text)
        cache = make_prompt_cache(self.model)
        logits = self.model(mx.array([prompt]), cache=cache)[0, -1]
        answer: list[int] = []
        while len(answer) < tokens:
            token = draw(logits, sampling, prompt, answer)
            if ends and token in self.tokenizer.eos_token_ids:
                break
            answer.append(token)
            logits = self.model(mx.array([[token]]), cache=cache)[0, -1]
        return answer

    def text(self, ids: list[int]) -> str:
        """What the ids say."""
        said: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return said
