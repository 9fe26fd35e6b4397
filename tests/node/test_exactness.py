"""The cluster's tokens are right: logits equal to mlx-lm's own, across architectures and cuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from parallax.fabric.errors import CutRefused
from parallax.node import mlx_lm_seam as seam
from parallax.node.lanes import Lanes
from parallax.node.sampler import draw
from parallax.node.stage import Stage
from parallax.node.weights import load_stage
from parallax.proto import wire_pb2 as wire
from tests.models import make_model
from tests.node.rings import (
    TEXTS,
    Ring,
    Script,
    Whole,
    admit,
    difference,
    drop,
    load_stages,
    parts,
    quiet,
)

ModelOf = Callable[[str], Path]

WINDOWED = ["llama_sliding", "gemma3_text", "gpt_oss"]
UNWINDOWED = ["qwen3", "llama", "qwen3_moe", "deepseek_v3", "qwen3_next", "mamba2"]
LAYERS = 4

# Windows are 8 tokens: these steps cross them in a chunk, at a chunk's end, and token by token.
STEPS = [5, 9, 1, 3, 12, *[1] * 12]


@pytest.mark.parametrize("kind", [*UNWINDOWED, *WINDOWED])
def test_at_every_cut_every_step_gives_mlx_lms_logits_bit_for_bit(
    kind: str, model_of: ModelOf, verdicts: Path
) -> None:
    folder = model_of(kind)
    whole = Whole(folder)
    expected = [whole.run(part) for part in parts(TEXTS[0], STEPS)]
    for cuts in ([], [1], [2], [3], [1, 3]):
        stages = load_stages(folder, cuts, verdicts)
        caches = [stage.new_cache() for stage in stages]
        for part, logits in zip(parts(TEXTS[0], STEPS), expected, strict=True):
            carry: Any = None
            for stage, cache in zip(stages, caches, strict=True):
                carry = stage.forward(mx.array([part], mx.uint32), carry, cache, head=True)
            assert mx.array_equal(carry[0], logits).item(), (cuts, part)


@pytest.mark.parametrize("kind", UNWINDOWED)
def test_rows_of_ragged_batches_equal_their_lone_runs_bit_for_bit(
    kind: str, model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of(kind)
    for cuts in ([2], [1, 3]):
        ring = Ring(load_stages(folder, cuts, verdicts), monkeypatch)
        assert Script(ring, Whole(folder)).run() == 0


@pytest.mark.parametrize("kind", WINDOWED)
def test_windowed_rows_of_ragged_batches_equal_their_lone_runs_but_for_rounding(
    kind: str, model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of(kind)
    for cuts in ([2], [1, 3]):
        ring = Ring(load_stages(folder, cuts, verdicts), monkeypatch)
        assert Script(ring, Whole(folder)).run() < 1e-5


@pytest.mark.parametrize("kind", WINDOWED)
def test_windowed_rows_differ_only_by_the_order_in_which_their_ring_is_summed(
    kind: str, model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both rings turned to begin at the same place, even they agree bit for bit."""
    folder = model_of(kind)
    ring = Ring(load_stages(folder, [2], verdicts), monkeypatch)
    alone = [Whole(folder) for _ in range(2)]
    lengths = [14, 19]
    for row, length in enumerate(lengths):
        ring.prefill(row, TEXTS[row][:length])
        alone[row].run(TEXTS[row][:length])
        # One step apart, so that the two lone rings begin at different places.
        for at in range(length, length + row + 1):
            ring.decode([TEXTS[row][at]], *[admit(row, lane=row)][at - length :], lane=row)
            alone[row].run([TEXTS[row][at]])
        lengths[row] += row + 1
    caches = [r._lanes for r in ring.runners]
    for lanes in caches:
        lanes._alone[0] = lanes._lanes.pop(0).caches
        lanes._lane_of.pop(0)
    join = [admit(0, lane=1)]
    saw_difference = False
    for step in range(9):
        tokens = [TEXTS[1][lengths[1] + step], TEXTS[0][lengths[0] + step]]
        if step > 0:
            for lanes in caches:
                _turn_batch(lanes)
        for whole in alone:
            _turn(whole.caches)
        ring.decode(tokens, *join, lane=1)
        join = []
        for row, whole in ((0, alone[1]), (1, alone[0])):
            found = difference(ring.logits[row], whole.run([tokens[row]])[0])
            saw_difference |= found > 0
    assert not saw_difference


def _turn(caches: seam.Caches) -> None:
    """Lone rings in the order of time."""
    for cache in caches:
        if hasattr(cache, "max_size") and cache.keys is not None:
            cache.keys = cache._temporal_order(cache.keys)
            cache.values = cache._temporal_order(cache.values)
            cache._idx = cache.keys.shape[2]


def _turn_batch(lanes: Lanes) -> None:
    for cache in lanes.decode(1, 2, 0).caches:
        if hasattr(cache, "max_size"):
            cache._temporal_order()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_half_precision_crosses_the_cut_bit_for_bit(
    dtype: mx.Dtype, tmp_path: Path, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model(tmp_path / "model", "qwen3")
    file = folder / "model.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    mx.save_safetensors(str(file), {n: mx.array(t.astype(dtype)) for n, t in tensors.items()})
    ring = Ring(load_stages(folder, [1, 3], verdicts), monkeypatch)
    whole = Whole(folder)
    ring.prefill(1, TEXTS[0][:20])
    whole.run(TEXTS[0][:20])
    commands = [admit(1, prompt=TEXTS[0][:21])]
    for token in TEXTS[0][20:30]:
        ring.decode([token], *commands)
        commands = []
        assert ring.logits.dtype == dtype
        assert mx.array_equal(ring.logits[0], whole.run([token])[0]).item()


# deepseek_v3 computes a chunk of one token in another way, and a window's chunks sum in another
# order: there other grids round otherwise. The grid of a ring is fixed, so timing changes nothing.
@pytest.mark.parametrize(
    ("kind", "rounding"),
    [("qwen3", 0), ("llama", 0), ("qwen3_next", 0), ("deepseek_v3", 1e-5), ("gemma3_text", 1e-5)],
)
def test_the_grid_of_prefill_chunks_does_not_change_results(
    kind: str,
    rounding: float,
    model_of: ModelOf,
    verdicts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = model_of(kind)
    ring = Ring(load_stages(folder, [2], verdicts), monkeypatch)
    text = TEXTS[1]
    rows = []
    for sequence, grid in enumerate((40, 16, 7, 3)):
        for start in range(0, 40, grid):
            ring.prefill(sequence, text[start : min(start + grid, 40)])
        ring.decode([text[40]], admit(sequence, lane=sequence), lane=sequence)
        rows.append(ring.logits[0])
    for row in rows[1:]:
        assert difference(row, rows[0]) <= rounding


def test_sampled_tokens_are_those_of_the_sampler_over_mlx_lms_own_logits(
    model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of("qwen3")
    samplings = [
        wire.Sampling(temperature=1.0, top_p=1, repetition_penalty=1, seed=11),
        wire.Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=12),
        wire.Sampling(temperature=0, top_p=1, repetition_penalty=1, presence_penalty=1.5),
        wire.Sampling(
            temperature=1.5, top_p=1, top_k=20, min_p=0.02, frequency_penalty=0.5, seed=2**64 - 1
        ),
    ]
    prompts = [TEXTS[i][: 9 + 5 * i] for i in range(4)]
    expected = []
    for sampling, prompt in zip(samplings, prompts, strict=True):
        whole = Whole(folder)
        whole.run(prompt[:-1])
        answer: list[int] = []
        for _ in range(24):
            logits = whole.run([(prompt + answer)[-1]])[-1]
            answer.append(draw(logits, sampling, prompt, answer))
        expected.append(answer)
        assert len(set(answer)) > 5

    for cuts in ([], [1], [2, 3]):
        ring = Ring(load_stages(folder, cuts, verdicts), monkeypatch)
        answers: list[list[int]] = [[] for _ in prompts]
        rows: list[int] = []
        for step in range(24 + 3 * 3):
            commands = []
            if step % 3 == 0 and step // 3 < 4:
                joining = step // 3
                ring.prefill(joining, prompts[joining][:-1])
                commands.append(
                    admit(joining, prompt=prompts[joining], sampling=samplings[joining])
                )
                rows.append(joining)
            for done in [row for row in rows if len(answers[row]) == 24]:
                commands.append(drop(done))
                rows.remove(done)
            if rows:
                last = [(prompts[row] + answers[row])[-1] for row in rows]
                for row, token in zip(rows, ring.decode(last, *commands), strict=True):
                    answers[row].append(token)
        assert answers == expected


def test_an_answer_taken_up_again_draws_the_same_next_tokens(
    model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of("llama")
    sampling = wire.Sampling(temperature=1, top_p=0.95, repetition_penalty=1.1, seed=5)
    prompt = TEXTS[2][:20]

    def answer(cuts: list[int], generated: list[int], count: int) -> list[int]:
        ring = Ring(load_stages(folder, cuts, verdicts), monkeypatch)
        history = prompt + generated
        ring.prefill(1, history[:-1])
        commands = [admit(1, prompt=prompt, generated=generated, sampling=sampling)]
        found = list(generated)
        for _ in range(count):
            found += ring.decode([(prompt + found)[-1]], *commands)
            commands = []
        return found

    whole = answer([2], [], 20)
    assert answer([1, 3], whole[:9], 11) == whole


def test_a_gemma3n_cut_across_shared_caches_is_refused_with_the_cuts_that_work(
    tmp_path: Path, verdicts: Path
) -> None:
    folder = make_model(tmp_path / "gemma3n", "gemma3n", layers=8)
    with pytest.raises(CutRefused, match="gemma3n") as caught:
        load_stage(folder, 0, 5, progress=quiet, verdicts=verdicts)
    assert caught.value.fields["model_type"] == "gemma3n"
    assert caught.value.fields["cut"] == "0:5"
    assert caught.value.fields["working_cuts"] == "1, 2"
    whole = Whole(folder)
    stages = load_stages(folder, [2], verdicts)
    caches = [stage.new_cache() for stage in stages]
    for part in parts(TEXTS[0], STEPS):
        carry: Any = None
        for stage, cache in zip(stages, caches, strict=True):
            carry = stage.forward(mx.array([part], mx.uint32), carry, cache, head=True)
        assert mx.array_equal(carry[0], whole.run(part)).item()


# ---------------------------------------------------- the comparison itself can fail


def _wrong_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Lanes.admit

    def admit_one_further(self: Lanes, sequence: int, lane: int) -> None:
        for cache in self._alone.get(sequence, []):
            cache.offset += 1
        right(self, sequence, lane)

    monkeypatch.setattr(Lanes, "admit", admit_one_further)


def _wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import cache

    def unpadded(self: Any, length: int, return_array: bool = False, **kwargs: Any) -> mx.array:
        return cache.create_causal_mask(length, offset=self._idx, **kwargs)

    monkeypatch.setattr(cache.BatchKVCache, "make_mask", unpadded)


def _wrong_row_order(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Lanes.drop

    def drop_and_reverse(self: Lanes, sequence: int) -> None:
        right(self, sequence)
        for lane in self._lanes.values():
            if lane.merged:
                for cache in lane.caches:
                    cache.filter(list(reversed(range(len(lane.rows)))))

    monkeypatch.setattr(Lanes, "drop", drop_and_reverse)


@pytest.mark.parametrize("break_it", [_wrong_offset, _wrong_mask, _wrong_row_order])
def test_breaking_offset_mask_or_row_order_is_seen(
    break_it: Callable[[pytest.MonkeyPatch], None],
    model_of: ModelOf,
    verdicts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = model_of("qwen3")
    ring = Ring(load_stages(folder, [2], verdicts), monkeypatch)
    break_it(monkeypatch)
    assert Script(ring, Whole(folder)).run() > 1e-3


def test_a_carry_that_differs_in_one_bit_is_seen(
    model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of("qwen3")
    ring = Ring(load_stages(folder, [2], verdicts), monkeypatch)
    right = Stage.forward

    def nudged(self: Stage, tokens: mx.array, carry: Any, cache: Any, *, head: bool) -> Any:
        if carry is not None:
            carry[0, 0, 0] = carry[0, 0, 0] * (1 + 2**-20)
        return right(self, tokens, carry, cache, head=head)

    monkeypatch.setattr(Stage, "forward", nudged)
    assert Script(ring, Whole(folder)).run() > 0
