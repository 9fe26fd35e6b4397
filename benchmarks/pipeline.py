"""mlx's own two-process pipeline, over ``mx.distributed``'s ring, beside a cluster of two nodes.

Both run the same Qwen2 on the same machine; mlx-lm has no pipeline for Qwen3.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.client import one
from benchmarks.figures import Part, Row, Sheet, at_least
from benchmarks.model import prompt_of
from benchmarks.worker import Worker

RANKS = 2
DECODE_TOKENS = 64
PROMPT_TOKENS = 512
STEPS = (64, 128, 512)

DECODE = Row("decode, one stream, two processes", "tokens/s", "mlx's ring pipeline", at_least(2.5))
PREFILL = Row(
    "prompt of 512 tokens, two processes", "tokens/s", "mlx's ring pipeline", at_least(3.0)
)


class Pipeline:
    """So many ranks of mlx-lm; each gets every request, and the first one's answers count."""

    def __init__(self, ranks: list[Worker]) -> None:
        self._ranks = ranks

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request to all and waits for all."""
        for rank in self._ranks:
            rank.tell(**request)
        answers = [rank.answer() for rank in self._ranks]
        return answers[0]


@contextmanager
def pipeline(model: Path, folder: Path) -> Iterator[Pipeline]:
    """A running pipeline on free ports of loopback."""
    hostfile = folder / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(RANKS)]))
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                Worker(
                    "benchmarks.baseline",
                    str(model),
                    "--ring",
                    MLX_RANK=str(rank),
                    MLX_HOSTFILE=str(hostfile),
                )
            )
            for rank in range(RANKS)
        ]
        for rank in ranks:
            rank.answer()
        yield Pipeline(ranks)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one_socket in sockets:
            one_socket.bind(("127.0.0.1", 0))
        return [one_socket.getsockname()[1] for one_socket in sockets]


def measure_pipeline(bench: Bench, sheet: Sheet) -> None:
    """Decode and prompt speed of both."""
    model = bench.qwen2
    with (
        pipeline(model, bench.folder) as theirs,
        bench.cluster(model, RANKS, speculation=False) as ours,
    ):
        prompt = prompt_of(bench.fresh(), PROMPT_TOKENS - bench.overhead_tokens)
        one(ours.url, prompt, 8)
        step = min(
            STEPS,
            key=lambda step: theirs.ask(do="first", prompt=bench.ids(prompt), step=step)["seconds"],
        )
        sheet.note(PREFILL.name, f"the pipeline's best prefill_step_size: {step}")
        for _ in sheet.rounds(bench.rounds):
            short = prompt_of(bench.fresh(), 32)
            answer = theirs.ask(do="decode", prompt=bench.ids(short), tokens=DECODE_TOKENS)
            speed = one(ours.url, short, DECODE_TOKENS).decode_tokens_s
            sheet.compare(DECODE.name, speed, answer["tokens"] / answer["seconds"])
            prompt = prompt_of(bench.fresh(), PROMPT_TOKENS - bench.overhead_tokens)
            answer = theirs.ask(do="first", prompt=bench.ids(prompt), step=step)
            first_s = one(ours.url, prompt, 2).first_s
            sheet.compare(PREFILL.name, PROMPT_TOKENS / first_s, PROMPT_TOKENS / answer["seconds"])


PARTS = (Part("pipeline", (DECODE, PREFILL), measure_pipeline),)
