"""What begins with a kept prefix against the same request on a ring that keeps nothing: bit by bit.

A conductor drives real stages; logits of every step of every row are compared, not only tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import pytest

from parallax.node.conductor import Conductor, Output
from parallax.node.stage import Stage
from parallax.proto import wire_pb2 as wire
from tests.models import make_model
from tests.node.rings import GREEDY, TEXTS, Ring, difference, load_stages

ModelOf = Callable[[str], Path]

GRID = 8
ROUNDING = 1e-5  # of the largest logit
SEEDED = wire.Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1, seed=1234)
FIRST = TEXTS[0][:45]


@dataclass
class Conducted:
    """A ring of real stages with its conductor. ``steps``: each request's logits, step by step."""

    ring: Ring
    conductor: Conductor
    answers: dict[int, list[int]] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    steps: dict[int, list[mx.array]] = field(default_factory=dict)
    frames: list[wire.Frame] = field(default_factory=list)
    lanes: dict[int, list[int]] = field(default_factory=dict)  # requests in the order of rows
    requests: dict[int, int] = field(default_factory=dict)  # sequence -> request
    now: float = 0.0

    def ask(self, number: int, prompt: list[int], sampling: wire.Sampling, tokens: int) -> None:
        order = wire.Submit(
            request=number, attempt=1, prompt=prompt, sampling=sampling, max_tokens=tokens
        )
        self.requests[len(self.requests) + 1] = number
        self.answers[number], self.steps[number], self.cached[number] = [], [], 0
        self._take(self.conductor.submit(order))

    def run_out(self) -> None:
        while self.frames:
            self.step()

    def step(self) -> None:
        frame = self.frames.pop(0)
        for command in frame.commands:
            if command.HasField("admit"):
                row = self.requests[command.admit.sequence]
                self.lanes.setdefault(command.admit.lane, []).append(row)
            elif command.HasField("drop"):
                for rows in self.lanes.values():
                    rows[:] = [r for r in rows if r != self.requests[command.drop.sequence]]
        for runner in self.ring.runners:
            frame = runner.run(wire.Frame.FromString(frame.SerializeToString()))
        if frame.kind == wire.DECODE:
            for row, number in enumerate(self.lanes[frame.lane]):
                self.steps[number].append(self.ring.logits[row])
        self.now += 0.01
        self._take(self.conductor.returned(frame, self.now))

    def _take(self, out: Output) -> None:
        self.frames += out.frames
        assert all(end.reason == wire.END_LENGTH for end in out.ends)
        for event in out.tokens:
            self.answers[event.request].append(event.token)
            self.cached[event.request] += event.cached_tokens


def conducted(
    stages: list[Stage],
    monkeypatch: pytest.MonkeyPatch,
    *,
    keeps: bool,
    lanes: int = 1,
    drafts: int = 0,
) -> Conducted:
    costs = [stage.cache_cost() for stage in stages]
    if not keeps:
        costs = [wire.CacheCost()] * len(stages)
    shape = wire.RingShape(
        lanes=lanes,
        lane_rows=4,
        chunk_tokens=GRID,
        window_frames=16,
        context_tokens=4096,
        draft_tokens=drafts,
        block_tokens=4,
    )
    return Conducted(Ring(stages, monkeypatch), Conductor(7, shape, len(stages), costs))


def alone(
    stages: list[Stage], monkeypatch: pytest.MonkeyPatch, prompt: list[int], sampling: wire.Sampling
) -> tuple[list[int], list[mx.array]]:
    """A request on a ring that keeps nothing."""
    fresh = conducted(stages, monkeypatch, keeps=False)
    fresh.ask(1, prompt, sampling, 12)
    fresh.run_out()
    assert fresh.cached == {1: 0}
    return fresh.answers[1], fresh.steps[1]


def farthest(found: list[mx.array], expected: list[mx.array]) -> float:
    assert len(found) == len(expected) == 12
    return max(difference(a, b) for a, b in zip(found, expected, strict=True))


def prompts_after(answer: list[int]) -> dict[int, list[int]]:
    """A chat that goes on, one whose last token reads otherwise, a shared beginning, a repeat."""
    return {
        2: [*FIRST, *answer, *TEXTS[1][:9]],
        3: [*FIRST, *answer[:-3], 7, *TEXTS[2][:20]],
        4: [*FIRST[:30], *TEXTS[3][:21]],
        5: FIRST,
        6: [*FIRST[:30], *TEXTS[4][:13]],
    }


# Of each prompt above, how much is found again, in chunks of 8 tokens. Dense models have the answer
# too, latent attention only what was prefilled (decoding leaves other bits). Where nothing can be
# cut a prompt's last boundary serves, and a beginning that many share from the third time on.
EXPECTED = {
    "qwen3": [56, 48, 24, 40, 24],
    "qwen3_moe": [56, 48, 24, 40, 24],
    "deepseek_v3": [40, 48, 24, 40, 24],
    "llama_sliding": [40, 40, 0, 40, 24],
    "gemma3_text": [40, 40, 0, 40, 24],
    "mamba2": [40, 40, 0, 40, 24],
    "qwen3_next": [40, 40, 0, 40, 24],
}


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [
        *((kind, GREEDY) for kind in EXPECTED),
        *((kind, SEEDED) for kind in ("qwen3", "gemma3_text", "mamba2")),
    ],
)
def test_a_prompt_that_begins_with_a_kept_prefix_is_answered_as_if_nothing_were_kept(
    kind: str,
    sampling: wire.Sampling,
    model_of: ModelOf,
    verdicts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = load_stages(model_of(kind), [2], verdicts)
    ring = conducted(stages, monkeypatch, keeps=True)
    ring.ask(1, FIRST, sampling, 12)
    ring.run_out()
    for number, prompt in prompts_after(ring.answers[1]).items():
        ring.ask(number, prompt, sampling, 12)
        ring.run_out()
        expected, logits = alone(stages, monkeypatch, prompt, sampling)
        ring.ring.record(monkeypatch)
        assert ring.answers[number] == expected
        assert farthest(ring.steps[number], logits) == 0, number
    assert [ring.cached[number] for number in range(2, 7)] == EXPECTED[kind]


@pytest.mark.parametrize("kind", ["qwen3", "mamba2", "qwen3_next", "gemma3_text"])
def test_prefixes_kept_out_of_batches_serve_rows_of_batches(
    kind: str, model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = load_stages(model_of(kind), [2], verdicts)
    ring = conducted(stages, monkeypatch, keeps=True, lanes=2)
    first = {n: text[: 45 - n] for n, text in enumerate(TEXTS[:4], 1)}
    for number, prompt in first.items():
        ring.ask(number, prompt, SEEDED if number % 2 else GREEDY, 12)
    ring.run_out()
    second = {n + 10: [*p, *ring.answers[n], *TEXTS[4][: 5 * n]] for n, p in first.items()}
    for number, prompt in second.items():
        ring.ask(number, prompt, SEEDED if number % 2 else GREEDY, 12)
    ring.run_out()
    for number, prompt in {**first, **second}.items():
        sampling = SEEDED if number % 2 else GREEDY
        expected, logits = alone(stages, monkeypatch, prompt, sampling)
        assert ring.answers[number] == expected
        # In a batch, sums over a window that has wrapped run in another order.
        rounding = ROUNDING if kind == "gemma3_text" else 0
        assert farthest(ring.steps[number], logits) <= rounding, number
    assert all(ring.cached[number] >= 32 for number in second)
    assert not any(ring.cached[number] for number in first)


def test_several_choices_of_one_prompt_prefill_it_once(
    model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = load_stages(model_of("qwen3"), [2], verdicts)
    ring = conducted(stages, monkeypatch, keeps=True)
    for number in (1, 2, 3):
        sampling = wire.Sampling(temperature=1, top_p=1, repetition_penalty=1, seed=number)
        ring.ask(number, FIRST, sampling, 12)
    ring.run_out()
    assert [ring.cached[number] for number in (1, 2, 3)] == [0, 40, 40]
    for number in (1, 2, 3):
        sampling = wire.Sampling(temperature=1, top_p=1, repetition_penalty=1, seed=number)
        expected, logits = alone(stages, monkeypatch, FIRST, sampling)
        assert ring.answers[number] == expected
        assert farthest(ring.steps[number], logits) == 0


def test_a_window_that_has_not_wrapped_is_cut_and_goes_on_to_wrap(
    tmp_path: Path, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = load_stages(make_model(tmp_path, "llama_sliding", sliding_window=36), [2], verdicts)
    ring = conducted(stages, monkeypatch, keeps=True)
    ring.ask(1, FIRST[:31], GREEDY, 12)
    ring.run_out()
    prompts = {2: [*FIRST[:21], *TEXTS[1][:9]], 3: [*FIRST[:20], *TEXTS[2][:40]]}
    for number, prompt in prompts.items():
        ring.ask(number, prompt, GREEDY, 12)
        ring.run_out()
        expected, logits = alone(stages, monkeypatch, prompt, GREEDY)
        ring.ring.record(monkeypatch)
        assert ring.answers[number] == expected
        assert farthest(ring.steps[number], logits) == 0
    assert ring.cached == {1: 0, 2: 16, 3: 16}


def test_drafts_leave_nothing_in_what_is_kept(
    model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = load_stages(model_of("qwen3"), [2], verdicts)
    ring = conducted(stages, monkeypatch, keeps=True, drafts=12)
    fresh = Ring(stages, monkeypatch)
    ring.ring.record(monkeypatch)
    for number in range(1, 17):
        prompt = [number, *TEXTS[0][:5] * 6]
        ring.ask(number, prompt, GREEDY, 24 + number % 3)  # ends after, at, and before a step
        ring.run_out()
        known = [*prompt, *ring.answers[number]]
        latest = max(ring.conductor._prefixes._index, key=lambda prefix: prefix.handle)
        whole = GRID * len(latest.steps)
        assert whole >= (len(known) - 1) // GRID * GRID
        for start in range(0, whole, GRID):
            fresh.prefill(number, known[start : start + GRID])
        for here, there in zip(ring.ring.runners, fresh.runners, strict=True):
            kept = here._lanes._kept[latest.handle].caches
            for cache, expected in zip(kept, there._lanes._alone[number], strict=True):
                assert mx.array_equal(cache.keys[..., :whole, :], expected.keys[..., :whole, :])
                assert mx.array_equal(cache.values[..., :whole, :], expected.values[..., :whole, :])
    load = ring.conductor.load()
    assert load.drafted_tokens > load.accepted_tokens > 0
