"""``make bench``: a 2-node cluster through HTTP against mlx-lm in one process, as ratios.

Same machine, same run, rounds interleaved; each figure is a median, with its
smallest and largest value. Writes ``bench-speed.json``. Also runs the memory
check (``benchmarks/memory.py``) unless ``--no-memory`` is given.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import load as load_tokenizer

from benchmarks.client import many, one
from benchmarks.model import make_bench_model
from tests.cluster import boot

STREAMS = 16
DECODE_TOKENS = 96
BATCH_TOKENS = 64
PROMPT_TOKENS = 512
PREFILL_STEPS = (64, 128, 256, 512, 2048)

GOALS = {"decode, one stream": 0.85, "16 streams": 1.35, "first token, 512 tokens": 0.75}


class Baseline:
    """The worker process of ``benchmarks/baseline.py``."""

    def __init__(self, model: Path) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.baseline", str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(30)

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        answer: dict[str, Any] = json.loads(self._child.stdout.readline())
        return answer


def prompt_of(number: int, characters: int) -> str:
    """Varied text of an exact length; the bench model's tokenizer has a token per byte."""
    words = ["river", "stone", "lamp", "seven", "cloud", "paper", "north", "ring", "quiet"]
    text = " ".join(words[(number * 7 + i * i + i) % len(words)] for i in range(characters))
    return text[:characters]


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def measure(rounds: int, nodes: int) -> dict[str, Any]:
    """All figures; absolute ones by side, and the ratios of each round."""
    with tempfile.TemporaryDirectory(prefix="parallax-bench-") as name:
        model = make_bench_model(Path(name) / "bench-qwen3")
        tokenizer = load_tokenizer(model)

        def ids(prompt: str) -> list[int]:
            message = [{"role": "user", "content": prompt}]
            found: list[int] = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=False
            )
            return found

        overhead = len(ids(""))
        short = prompt_of(1, 32)
        long = prompt_of(2, PROMPT_TOKENS - overhead)
        crowd = [prompt_of(n, 24 + n) for n in range(STREAMS)]
        sides: dict[str, dict[str, list[float]]] = {}

        def note(figure: str, side: str, value: float) -> None:
            sides.setdefault(figure, {}).setdefault(side, []).append(value)

        baseline = Baseline(model)
        with boot(model, nodes=nodes) as cluster:
            for prompt in (short, long):  # both sides once, to warm up
                one(cluster.url, prompt, 8)
                baseline.ask(do="decode", prompt=ids(prompt), tokens=8)
            for _ in range(rounds):
                whole = baseline.ask(do="decode", prompt=ids(short), tokens=DECODE_TOKENS)
                note("decode, one stream", "mlx-lm", whole["tokens"] / whole["seconds"])
                answer = one(cluster.url, short, DECODE_TOKENS)
                note("decode, one stream", "cluster", answer.decode_tokens_s)

                prompts = [ids(prompt) for prompt in crowd]
                whole = baseline.ask(do="batch", prompts=prompts, tokens=BATCH_TOKENS)
                note("16 streams", "mlx-lm", whole["tokens"] / whole["seconds"])
                answers, seconds = many(cluster.url, crowd, BATCH_TOKENS)
                total = sum(a.usage["completion_tokens"] for a in answers)
                note("16 streams", "cluster", total / seconds)

                best = min(
                    baseline.ask(do="first", prompt=ids(long), step=step)["seconds"]
                    for step in PREFILL_STEPS
                )
                note("first token, 512 tokens", "mlx-lm", best)
                note("first token, 512 tokens", "cluster", one(cluster.url, long, 2).first_s)
        baseline.close()
    figures = {}
    for figure, by_side in sides.items():
        pairs = zip(by_side["cluster"], by_side["mlx-lm"], strict=True)
        figures[figure] = {
            "mlx-lm": spread(by_side["mlx-lm"]),
            "cluster": spread(by_side["cluster"]),
            "ratio": spread([ours / theirs for ours, theirs in pairs]),
            "goal": GOALS[figure],
        }
    return figures


def show(figures: dict[str, Any]) -> bool:
    """Prints the table; True when every goal is met."""
    print(f"{'':26}{'mlx-lm':>10}{'cluster':>10}{'ratio':>8}{'min':>7}{'max':>7}  goal")
    met = True
    for name, figure in figures.items():
        ratio = figure["ratio"]
        at_most = name.startswith("first token")
        good = ratio["median"] <= figure["goal"] if at_most else ratio["median"] >= figure["goal"]
        met = met and good
        sign = "<=" if at_most else ">="
        unit = "s" if at_most else "/s"
        print(
            f"{name:26}{figure['mlx-lm']['median']:>8.3g}{unit:<2}"
            f"{figure['cluster']['median']:>8.3g}{unit:<2}"
            f"{ratio['median']:>8.2f}{ratio['min']:>7.2f}{ratio['max']:>7.2f}"
            f"  {sign} {figure['goal']:.2f} {'met' if good else 'NOT MET'}"
        )
    return met


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    arguments = parser.parse_args()
    print(
        f"{platform.machine()} {platform.system()}, Python {platform.python_version()}, "
        f"{arguments.nodes} nodes, {arguments.rounds} rounds",
        flush=True,
    )
    figures = measure(arguments.rounds, arguments.nodes)
    met = show(figures)
    Path("bench-speed.json").write_text(json.dumps(figures, indent=2) + "\n")
    if not arguments.no_memory:
        met = subprocess.call([sys.executable, "-m", "benchmarks.memory"]) == 0 and met
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
