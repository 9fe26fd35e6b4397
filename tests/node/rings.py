"""Rings of runners in one process, and mlx-lm whole to compare them with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from parallax.node import mlx_lm_seam as seam
from parallax.node import runner as runner_module
from parallax.node.runner import Runner
from parallax.node.sampler import choose_block, choose_rows
from parallax.node.stage import Stage
from parallax.node.weights import load_stage
from parallax.proto import wire_pb2 as wire

GREEDY = wire.Sampling(temperature=0, top_p=1, repetition_penalty=1)

# Varied bytes: no two stretches alike, and longer than any window here.
TEXTS = [
    list(text.encode())
    for text in (
        "The quick brown fox jumps over the lazy dog, twice: 1234567890.",
        "Sphinx of black quartz, judge my vow! Then go home & sleep <late>.",
        "zyxwvutsrqponmlkjihgfedcba 0987654321 ZYXWVUTSRQPONMLKJIHGFEDCBA",
        "if a > b: return {x: [y for y in z]}  # and so on, until it ends",
        "pack my box with five dozen liquor jugs; how vexingly quick they are",
    )
]


def quiet(done: int, total: int, phase: str) -> None:
    """A progress that nobody watches."""


def load_stages(folder: Path, cuts: Sequence[int], verdicts: Path | None) -> list[Stage]:
    """The model's stages, cut before these layers."""
    layers = len(seam.random_model(seam.read_config(folder)).layers)
    bounds = [0, *cuts, layers]
    return [
        load_stage(folder, a, b, progress=quiet, verdicts=verdicts) for a, b in pairwise(bounds)
    ]


class Whole:
    """mlx-lm running the whole model, one sequence."""

    def __init__(self, folder: Path) -> None:
        from mlx_lm.utils import load_model

        self.model, _ = load_model(folder)
        self.caches = seam.new_caches(self.model)

    def again(self) -> Whole:
        """The same model with empty caches."""
        other = object.__new__(Whole)
        other.model, other.caches = self.model, seam.new_caches(self.model)
        return other

    def run(self, tokens: Sequence[int]) -> mx.array:
        """Logits [length, vocabulary] of the tokens that come next."""
        logits = self.model(mx.array([list(tokens)]), cache=self.caches)[0]
        mx.eval(logits)
        return logits


class Ring:
    """Runners in a row; what the last one samples from is kept in ``logits``."""

    def __init__(self, stages: Sequence[Stage], monkeypatch: pytest.MonkeyPatch) -> None:
        count = len(stages)
        self.runners = [Runner(s, epoch=7, index=i, count=count) for i, s in enumerate(stages)]
        self.logits: mx.array = mx.array(0)
        self.block_logits: mx.array = mx.array(0)  # of a lone row's last block, one for each token
        self.number = 0
        self.record(monkeypatch)

    def record(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on logits are this ring's."""

        def recording(logits: mx.array, choosers: Any) -> mx.array:
            self.logits = logits
            return choose_rows(logits, choosers)

        def recording_block(logits: mx.array, chooser: Any, drafts: Sequence[int]) -> mx.array:
            self.block_logits = logits
            self.logits = logits[-1:]
            return choose_block(logits, chooser, drafts)

        monkeypatch.setattr(runner_module, "choose_rows", recording)
        monkeypatch.setattr(runner_module, "choose_block", recording_block)

    def send(self, **fields: Any) -> wire.Frame:
        """One frame through every runner, as bytes between them."""
        frame = wire.Frame(epoch=7, number=self.number, **fields)
        self.number += 1
        for runner in self.runners:
            frame = runner.run(wire.Frame.FromString(frame.SerializeToString()))
        return frame

    def prefill(self, sequence: int, tokens: Sequence[int], *commands: wire.Command) -> wire.Frame:
        return self.send(
            kind=wire.PREFILL, sequence=sequence, tokens=tokens, rows=1, commands=commands
        )

    def decode(self, tokens: Sequence[int], *commands: wire.Command, lane: int = 0) -> list[int]:
        """One step of a lane; the sampled tokens."""
        frame = self.send(
            kind=wire.DECODE, lane=lane, tokens=tokens, rows=len(tokens), commands=commands
        )
        return list(frame.tokens)

    def beat(self, *commands: wire.Command) -> wire.Frame:
        return self.send(kind=wire.BEAT, commands=commands)


def admit(
    sequence: int,
    *,
    lane: int = 0,
    prompt: Iterable[int] = (),
    generated: Iterable[int] = (),
    sampling: wire.Sampling = GREEDY,
) -> wire.Command:
    return wire.Command(
        admit=wire.Admit(
            sequence=sequence, lane=lane, prompt=prompt, generated=generated, sampling=sampling
        )
    )


def drop(sequence: int) -> wire.Command:
    return wire.Command(drop=wire.Drop(sequence=sequence))


def trim(sequence: int, tokens: int) -> wire.Command:
    return wire.Command(trim=wire.Trim(sequence=sequence, tokens=tokens))


def fork(handle: int, sequence: int, tokens: int) -> wire.Command:
    return wire.Command(fork=wire.Fork(handle=handle, sequence=sequence, tokens=tokens))


def retain(sequence: int, handle: int) -> wire.Command:
    return wire.Command(retain=wire.Retain(sequence=sequence, handle=handle))


def evict(handle: int) -> wire.Command:
    return wire.Command(evict=wire.Evict(handle=handle))


def parts(text: Sequence[int], lengths: Iterable[int]) -> list[list[int]]:
    """The text in pieces of these lengths."""
    found, start = [], 0
    for length in lengths:
        found.append(list(text[start : start + length]))
        start += length
    return found


def difference(found: mx.array, expected: mx.array) -> float:
    """The largest difference, as a share of the largest logit; infinite where one is no number."""
    share = (mx.abs(found - expected).max() / mx.abs(expected).max()).item()
    assert isinstance(share, float)
    return share if math.isfinite(share) else math.inf


class Script:
    """Joins and leaves in one lane, each row's logits compared with its lone run in mlx-lm.

    Every sequence has its own text, prefilled in chunks of 6; a join is followed by two steps.
    """

    PREFILLS = (11, 4, 0, 17, 6)
    STEPS = (("join", 0), ("join", 1), ("join", 2), ("join", 3), ("leave", 0), ("leave", 3),
             ("join", 4), ("leave", 2), ("leave", 4))  # fmt: skip

    def __init__(self, ring: Ring, whole: Whole) -> None:
        self.ring = ring
        self.alone: dict[int, Whole] = {}
        self.at: dict[int, int] = {}
        self.whole = whole

    def run(self) -> float:
        """The largest difference of any step of any row, as a share of the largest logit."""
        worst = 0.0
        for action, sequence in self.STEPS:
            command = self.join(sequence) if action == "join" else self.leave(sequence)
            for commands in ([command], [], []):
                tokens = [TEXTS[s][at] for s, at in self.at.items()]
                self.ring.decode(tokens, *commands)
                for row, (s, at) in enumerate(self.at.items()):
                    expected = self.alone[s].run([TEXTS[s][at]])[0]
                    worst = max(worst, difference(self.ring.logits[row], expected))
                    self.at[s] = at + 1
        return worst

    def join(self, sequence: int) -> wire.Command:
        text = TEXTS[sequence]
        length = self.PREFILLS[sequence]
        self.alone[sequence] = self.whole.again()
        for start in range(0, length, 6):
            chunk = text[start : min(start + 6, length)]
            self.ring.prefill(sequence, chunk)
            self.alone[sequence].run(chunk)
        self.at[sequence] = length
        return admit(sequence, prompt=text[: length + 1])

    def leave(self, sequence: int) -> wire.Command:
        del self.at[sequence]
        return drop(sequence)
