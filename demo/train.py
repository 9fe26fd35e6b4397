"""Train the built-in model from a fixed seed, on text that ``corpus`` generates.

Run ``python -m parallax.demo.train``. PyTorch is needed here only; it is no dependency of the
product. Two CPU cores take about an hour. The rate falls as a cosine of the time spent or, with
``--steps``, of the steps made. A training that was stopped goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from parallax.demo import model_path
from parallax.demo.batches import Encoder, batches
from parallax.demo.network import Network, Shape, export

SEED = 20_260
WARM_UP_STEPS = 100
LAST_RATE = 0.02
SAVE_EVERY_S = 240.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to train. ``steps`` of 0 plans by ``minutes`` instead."""

    minutes: float
    steps: int
    tokens: int
    rate: float
    start: float


class Training:
    """A network, its optimizer, and how far it has come."""

    def __init__(self, plan: Plan, encoder: Encoder) -> None:
        torch.manual_seed(SEED)
        self.plan, self.encoder = plan, encoder
        self.network = Network(Shape())
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.1
        )
        self.step, self.tokens, self.seconds = 0, 0, 0.0

    @property
    def progress(self) -> float:
        """How much of the plan is done, from 0 to 1."""
        if self.plan.steps:
            return min(1.0, self.step / self.plan.steps)
        return min(1.0, self.seconds / (60 * self.plan.minutes))

    def _scale(self) -> float:
        falling = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * self.progress))
        return min(1.0, (self.step + 1) / WARM_UP_STEPS) * falling

    def learn(self, ids: Tensor, marks: Tensor) -> float:
        """Make one step on one batch and return its loss."""
        scale = self._scale()
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * scale
        wanted = marks[:, 1:]
        logits = self.network(ids[:, :-1], wanted)
        loss = F.cross_entropy(logits, ids[:, 1:][wanted])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += ids.numel()
        return loss.item()

    def save(self, path: Path) -> None:
        """Write everything that is needed to go on."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": (self.step, self.tokens, self.seconds),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path, *, weights_only: bool) -> None:
        """Go on from a saved state, or take its weights alone for a fine-tuning."""
        state = torch.load(path)
        self.network.load_state_dict(state["network"])
        if not weights_only:
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.tokens, self.seconds = state["done"]

    def endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches until the plan is done."""
        rng = random.Random(SEED + self.step)
        while self.progress < 1.0:
            stage = self.plan.start + (1 - self.plan.start) * self.progress
            yield from batches(self.encoder, rng, stage, self.plan.tokens)


def run(training: Training, folder: Path, log: Path, state: Path) -> None:
    """Train to the end of the plan, saving on the way, and export the model."""
    saved, mean = time.monotonic(), 0.0
    for ids, marks in training.endless():
        begun = time.monotonic()
        loss = training.learn(ids, marks)
        training.seconds += time.monotonic() - begun
        mean = loss if not mean else 0.98 * mean + 0.02 * loss
        if training.step % 100 == 0:
            row = {
                "step": training.step,
                "tokens": training.tokens,
                "seconds": round(training.seconds, 1),
                "progress": round(training.progress, 4),
                "loss": round(mean, 4),
            }
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
        if time.monotonic() - saved > SAVE_EVERY_S:
            training.save(state)
            saved = time.monotonic()
        if training.progress >= 1.0:
            break
    training.save(state)
    encoder = training.encoder
    weights = training.network.state_dict()
    export(weights, training.network.shape, folder, eos=encoder.end, pad=encoder.pad)


def main() -> None:
    """Read the plan, train and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=0, help="plan by steps, not by time")
    parser.add_argument("--tokens", type=int, default=1_500, help="ids in a batch")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--start", type=float, default=0.0, help="progress of the mixture at first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--weights", type=Path, help="begin with the weights of a saved state")
    parser.add_argument("--out", type=Path, default=model_path())
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        options.minutes,
        options.steps,
        options.tokens,
        options.rate,
        options.start,
    )
    training = Training(plan, Encoder(options.out))
    state, log = options.work / "state.pt", options.work / "log.jsonl"
    if options.weights:
        training.load(options.weights, weights_only=True)
    elif options.resume:
        training.load(state, weights_only=False)
    run(training, options.out, log, state)


if __name__ == "__main__":
    main()
