"""mlx-lm as a worker: one JSON request per line in, one JSON answer out.

    python -m benchmarks.baseline MODEL [--ring]

In one process, or with ``--ring`` as one rank of mlx's own pipeline over
``mx.distributed``'s ring (``MLX_RANK`` and ``MLX_HOSTFILE`` say which), where every
rank is sent the same requests.

Requests: ``{"do": "decode", "prompt": [...], "tokens": n}``,
``{"do": "batch", "prompts": [[...], ...], "tokens": n}``,
``{"do": "first", "prompt": [...], "step": n}``. Each answer has ``seconds`` and ``tokens``.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import batch_generate, generate_step


def load_whole(path: str) -> tuple[Any, Any]:
    """Model and tokenizer, in this process."""
    model, tokenizer = load(path)[:2]
    return model, tokenizer


def load_share(path: str) -> tuple[Any, Any]:
    """This rank's layers, as ``mlx_lm.utils.sharded_load`` gives them."""
    from mlx_lm.utils import sharded_load

    group = mx.distributed.init(strict=True, backend="ring")
    model, tokenizer = sharded_load(path, pipeline_group=group)[:2]
    return model, tokenizer


def decode(model: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    """One stream: seconds between the first token and the last."""
    answer: list[int] = []
    begin = 0.0
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=tokens):
        answer.append(int(token))
        if len(answer) == 1:
            begin = time.perf_counter()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "tokens": len(answer) - 1, "answer": answer}


def batch(model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """All prompts at once through ``batch_generate``: seconds from start to end."""
    begin = time.perf_counter()
    result = batch_generate(
        model,
        tokenizer,
        prompts,
        max_tokens=tokens,
        completion_batch_size=len(prompts),
        prefill_batch_size=len(prompts),
    )
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "tokens": int(result.stats.generation_tokens)}


def first(model: Any, prompt: list[int], step: int) -> dict[str, Any]:
    """Seconds to the first token with one ``prefill_step_size``."""
    begin = time.perf_counter()
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=1, prefill_step_size=step):
        int(token)
        break
    return {"seconds": time.perf_counter() - begin, "tokens": 1}


def main() -> None:
    """Answers requests until the input ends."""
    model, tokenizer = (load_share if "--ring" in sys.argv else load_whole)(sys.argv[1])
    print(json.dumps({"ready": True, "device": str(mx.default_device())}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        match request["do"]:
            case "decode":
                answer = decode(model, request["prompt"], request["tokens"])
            case "batch":
                answer = batch(model, tokenizer, request["prompts"], request["tokens"])
            case _:
                answer = first(model, request["prompt"], request["step"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
