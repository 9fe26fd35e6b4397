"""Train the built-in model from a fixed seed, on text that ``corpus`` generates.

Run ``python -m parallax.demo.train``. PyTorch is needed here only; it is no dependency of the
product. Two idle CPU cores take about an hour. The rate falls as a cosine of the processor time
spent, so that other work beside it makes it longer, not worse, or, with ``--steps``, of the steps
made. A training that was stopped goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from parallax.demo import model_path
from parallax.demo.batches import Encoder, batches
from parallax.demo.network import Network, Shape, export, imported

SEED = 20_260
WARM_UP_STEPS = 100
LAST_RATE = 0.02
SAVE_EVERY_S = 240.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to train.

    ``minutes`` are of each worker's processor time; they plan when ``steps`` is 0.
    """

    minutes: float
    steps: int
    tokens: int
    rate: float
    start: float
    workers: int


class Training:
    """A network, its optimizer, and how far it has come."""

    def __init__(self, plan: Plan, encoder: Encoder, rank: int) -> None:
        torch.manual_seed(SEED)
        self.plan, self.encoder, self.rank = plan, encoder, rank
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
        """Make one step on one batch of each worker and return their mean loss."""
        begun = time.process_time()
        scale = self._scale()
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * scale
        wanted = marks[:, 1:]
        logits = self.network(ids[:, :-1], wanted)
        loss = F.cross_entropy(logits, ids[:, 1:][wanted])
        torch.autograd.backward(loss)
        mean_loss = self._share(loss.item(), ids.numel(), begun)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return mean_loss

    def _share(self, loss: float, tokens: int, begun: float) -> float:
        """Average gradients over the workers, and count tokens and seconds; return the loss."""
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        counts = torch.tensor([loss, float(tokens), time.process_time() - begun])
        if self.plan.workers > 1:
            flat = torch.cat([counts, *(gradient.flatten() for gradient in gradients)])
            distributed.all_reduce(flat)
            flat /= self.plan.workers
            counts, place = flat[:3], 3
            for gradient in gradients:
                gradient.copy_(flat[place : place + gradient.numel()].view_as(gradient))
                place += gradient.numel()
        self.tokens += round(counts[1].item() * self.plan.workers)
        self.seconds += counts[2].item()
        return counts[0].item()

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
        """Go on from a saved state, or take its or a model's weights alone for a fine-tuning."""
        if path.suffix == ".safetensors":
            self.network.load_state_dict(imported(path, self.network.shape))
            return
        state = torch.load(path)
        self.network.load_state_dict(state["network"])
        if not weights_only:
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.tokens, self.seconds = state["done"]

    def endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches until the plan is done."""
        rng = random.Random(SEED + self.step + 1_000_003 * self.rank)
        while self.progress < 1.0:
            stage = self.plan.start + (1 - self.plan.start) * self.progress
            yield from batches(self.encoder, rng, stage, self.plan.tokens)


def run(training: Training, folder: Path, log: Path, state: Path) -> None:
    """Train to the end of the plan, saving on the way, and export the model."""
    saved, mean = time.monotonic(), 0.0
    for ids, marks in training.endless():
        loss = training.learn(ids, marks)
        mean = loss if not mean else 0.98 * mean + 0.02 * loss
        if training.rank == 0 and training.step % 100 == 0:
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
        if training.rank == 0 and time.monotonic() - saved > SAVE_EVERY_S:
            training.save(state)
            saved = time.monotonic()
        if training.progress >= 1.0:
            break
    if training.rank:
        return
    training.save(state)
    encoder = training.encoder
    weights = training.network.state_dict()
    export(weights, training.network.shape, folder, eos=encoder.end, pad=encoder.pad)


def work(rank: int, options: argparse.Namespace) -> None:
    """Train as one of the workers, each with its own documents and one thread."""
    torch.set_num_threads(1)
    if options.workers > 1:
        rendezvous = f"file://{options.work.resolve()}/workers"
        distributed.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=options.workers
        )
    plan = Plan(
        options.minutes,
        options.steps,
        options.tokens,
        options.rate,
        options.start,
        options.workers,
    )
    training = Training(plan, Encoder(options.out), rank)
    state, log = options.work / "state.pt", options.work / "log.jsonl"
    if options.weights:
        training.load(options.weights, weights_only=True)
    elif options.resume:
        training.load(state, weights_only=False)
    run(training, options.out, log, state)


def main() -> None:
    """Read the plan, train and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=60.0, help="of processor time")
    parser.add_argument("--steps", type=int, default=0, help="plan by steps, not by time")
    parser.add_argument("--tokens", type=int, default=1_500, help="ids in a batch")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--start", type=float, default=0.0, help="progress of the mixture at first")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument(
        "--weights", type=Path, help="begin with the weights of a saved state or a model"
    )
    parser.add_argument("--out", type=Path, default=model_path())
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    (options.work / "workers").unlink(missing_ok=True)
    spawning = multiprocessing.get_context("spawn")
    workers = [
        spawning.Process(target=work, args=(rank, options), daemon=True)
        for rank in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
