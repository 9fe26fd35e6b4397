"""How far logits move with batch size, chunk length and cut, and what that could change.

    python -m benchmarks.noise [--model FOLDER] [--dtype bfloat16] [--tokens 256]

One text goes through the model whole and alone, in one piece: its logits at every position are the
reference. Then the same text in other shapes: in chunks, as rows of a batch, cut into stages. On
MLX's CPU backend in float32 nothing moves; on a GPU kernels change with the shape. Printed are the
largest and the mean difference of any logit, in units of the logits and of their last binary
digit in this type, at how many positions the likeliest token changes, and the widest gap between
the two likeliest tokens at which it did: the threshold below which a checker has to allow two
shapes to part.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from benchmarks.bench import machine
from benchmarks.model import make_bench_model
from parallax.node import mlx_lm_seam as seam
from parallax.node.stage import Stage

CHUNKS = (1, 8, 16, 32, 64, 128, 512)
BATCHES = (2, 4, 8, 16)
CUTS = (2, 3, 4)
DECODED = 32  # positions that batches go through one by one
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


@dataclass(frozen=True, slots=True)
class Noise:
    """What one shape does to the logits of the same positions."""

    shape: str
    largest: float  # of any logit's difference
    mean: float
    digits: float  # the largest, in last digits of the largest logit
    changed: int  # positions whose likeliest token is another
    positions: int
    widest_gap: float  # between the two likeliest tokens, where the likeliest changed


def compare(shape: str, reference: mx.array, found: mx.array, dtype: str) -> Noise:
    """Both [positions, vocabulary]."""
    reference, found = reference.astype(mx.float32), found.astype(mx.float32)
    difference = mx.abs(reference - found)
    changed = mx.argmax(reference, -1) != mx.argmax(found, -1)
    best = mx.sort(reference, -1)[:, -2:]
    gaps = mx.where(changed, best[:, 1] - best[:, 0], 0.0)
    size = _number(mx.abs(reference).max())
    digit = EPSILON[dtype] * 2.0 ** math.floor(math.log2(size))
    largest = _number(difference.max())
    return Noise(
        shape,
        largest,
        _number(difference.mean()),
        largest / digit,
        int(_number(changed.sum())),
        reference.shape[0],
        _number(gaps.max()),
    )


def _number(scalar: mx.array) -> float:
    return float(cast(float, scalar.item()))


class Shapes:
    """One model and one text, run in many shapes.

    Args:
        model: an mlx-lm model, whole.
        tokens: the text, [length].
    """

    def __init__(self, model: Any, tokens: mx.array) -> None:
        self._model = model
        self._tokens = tokens

    def chunks(self, length: int) -> mx.array:
        """Logits [positions, vocabulary], the text going in by so many tokens at a time."""
        return self._feed(self._forward(), length)

    def batch(self, rows: int) -> mx.array:
        """The last positions one by one, the text being every second row of a batch."""
        forward = self._forward()
        other = self._tokens[::-1]
        text = mx.stack([self._tokens if row % 2 == 0 else other for row in range(rows)])
        begin = text.shape[1] - DECODED
        mx.eval(forward(text[:, :begin]))
        steps = []
        for place in range(begin, text.shape[1]):
            logits = forward(text[:, place : place + 1])
            mx.eval(logits)
            steps.append(logits[0])
        return mx.concatenate(steps)

    def cut(self, stages: int) -> mx.array:
        """Logits [positions, vocabulary] of the model as so many stages."""
        layers = len(self._model.layers)
        bounds = [layers * i // stages for i in range(stages + 1)]
        carry: Any = None
        for first, end in pairwise(bounds):
            stage = Stage(self._model, first, end)
            carry = stage.forward(self._tokens[None], carry, stage.new_cache(), head=True)
            mx.eval(carry)
            stage.close()
        found: mx.array = carry[0]
        return found

    def _forward(self) -> Callable[[mx.array], mx.array]:
        caches = seam.new_caches(self._model)

        def forward(tokens: mx.array) -> mx.array:
            logits: mx.array = self._model(tokens, cache=caches)
            return logits

        return forward

    def _feed(self, forward: Callable[[mx.array], mx.array], length: int) -> mx.array:
        found = []
        for begin in range(0, self._tokens.size, length):
            logits = forward(self._tokens[None, begin : begin + length])
            mx.eval(logits)
            found.append(logits[0])
        return mx.concatenate(found)


def measure(model: Any, tokens: mx.array, dtype: str) -> Iterator[Noise]:
    """Every shape's noise, as it is found."""
    shapes = Shapes(model, tokens)
    whole = shapes.chunks(tokens.size)
    one_by_one = shapes.chunks(1)[-DECODED:]
    for length in CHUNKS:
        if length < tokens.size:
            yield compare(f"chunks of {length}", whole, shapes.chunks(length), dtype)
    for rows in BATCHES:
        yield compare(f"{rows} rows against 1", one_by_one, shapes.batch(rows), dtype)
    for stages in CUTS:
        if stages <= len(model.layers):
            yield compare(f"{stages} stages", whole, shapes.cut(stages), dtype)


def main() -> None:
    """Reads the flags, makes or loads the model, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=__doc__)
    parser.add_argument("--model", type=Path, help="a folder; else the model of the benchmarks")
    parser.add_argument("--dtype", choices=tuple(EPSILON), default="float32")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    from mlx_lm import load

    with tempfile.TemporaryDirectory(prefix="parallax-noise-") as name:
        folder = arguments.model or make_bench_model(Path(name) / "model", arguments.dtype)
        model, tokenizer = load(str(folder))[:2]
        model.set_dtype(getattr(mx, arguments.dtype))
        mx.random.seed(5)
        tokens = mx.random.randint(0, min(256, len(tokenizer)), (arguments.tokens,))
        facts = machine(arguments.dtype)
        print(f"{facts['device']}, {facts['backend']}, MLX {facts['mlx']}, {arguments.dtype}")
        print(f"{arguments.tokens} tokens of {folder.name}")
        print(f"{'':18}{'largest':>10}{'mean':>10}{'digits':>8}{'changed':>12}{'widest gap':>12}")
        found = []
        for noise in measure(model, tokens.astype(mx.uint32), arguments.dtype):
            found.append(noise)
            print(
                f"{noise.shape:18}{noise.largest:10.3g}{noise.mean:10.3g}{noise.digits:8.3g}"
                f"{noise.changed:6} of {noise.positions:<4}{noise.widest_gap:11.3g}",
                flush=True,
            )
    print(f"threshold: {max(n.widest_gap for n in found):.3g} between the two likeliest logits")
    if arguments.json:
        rows = [asdict(noise) for noise in found]
        arguments.json.write_text(json.dumps({"machine": facts, "noise": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
