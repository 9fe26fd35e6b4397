"""Frames in, frames out: numbers, commands, acknowledgements, prefix reuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from parallax.fabric.errors import FrameRefused, MessageRefused
from parallax.node import runner as runner_module
from parallax.node.draw_time import TIMED_EVERY
from parallax.node.runner import Runner
from parallax.node.stage import Stage
from parallax.proto import wire_pb2 as wire
from tests.node.rings import (
    TEXTS,
    Ring,
    Whole,
    admit,
    difference,
    drop,
    evict,
    fork,
    load_stages,
    retain,
    trim,
)

TEXT, OTHER = TEXTS[0], TEXTS[1]


@pytest.fixture
def folder(model_of: Callable[[str], Path]) -> Path:
    return model_of("qwen3")


@pytest.fixture
def stages(folder: Path, verdicts: Path) -> list[Stage]:
    return load_stages(folder, [2], verdicts)


@pytest.fixture
def ring(stages: list[Stage], monkeypatch: pytest.MonkeyPatch) -> Ring:
    return Ring(stages, monkeypatch)


@pytest.fixture
def whole(folder: Path) -> Whole:
    return Whole(folder)


def test_a_frame_that_does_not_follow_is_refused(stages: list[Stage]) -> None:
    runner = Runner(stages[0], epoch=3, index=0, count=2)
    runner.run(wire.Frame(epoch=3, number=0))
    for number, epoch in ((2, 3), (0, 3), (1, 4)):
        with pytest.raises(FrameRefused, match="does not follow") as caught:
            runner.run(wire.Frame(epoch=epoch, number=number))
        assert caught.value.fields["number"] == str(number)
    assert runner.run(wire.Frame(epoch=3, number=1)).number == 1


def test_a_stage_passes_commands_and_tokens_on_and_the_last_one_keeps_them(
    stages: list[Stage],
) -> None:
    first = Runner(stages[0], epoch=1, index=0, count=2)
    last = Runner(stages[1], epoch=1, index=1, count=2)
    chunk = wire.Frame(epoch=1, number=0, kind=wire.PREFILL, sequence=5, tokens=TEXT[:4], rows=1)
    passed = first.run(chunk)
    assert list(passed.tokens) == TEXT[:4]
    assert passed.sequence == 5
    assert passed.carry
    returned = last.run(passed)
    assert returned.slowest_s >= passed.slowest_s > 0
    assert 0 < returned.last_s <= returned.slowest_s
    assert passed.last_s == 0
    returned.slowest_s = returned.last_s = 0
    assert returned == wire.Frame(epoch=1, number=0, kind=wire.PREFILL, sequence=5, rows=1)
    step = wire.Frame(
        epoch=1,
        number=1,
        kind=wire.DECODE,
        lane=2,
        tokens=[TEXT[4]],
        rows=1,
        commands=[admit(5, lane=2, prompt=TEXT[:5])],
    )
    passed = first.run(step)
    assert list(passed.commands) == list(step.commands)
    returned = last.run(passed)
    assert not returned.commands
    assert not returned.carry
    assert len(returned.tokens) == 1
    assert (returned.number, returned.lane, returned.rows) == (1, 2, 1)
    beat = wire.Frame(epoch=1, number=2, commands=[drop(5)])
    passed = first.run(beat)
    assert list(passed.commands) == [drop(5)]
    assert last.run(passed) == wire.Frame(epoch=1, number=2)
    assert (first.rows, first.lanes, first.cache_bytes) == (0, 0, 0)


def test_prefill_on_the_last_stage_computes_neither_norm_nor_head(
    stages: list[Stage], ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = 0
    norm = type(stages[1]._model.model.norm)
    right = norm.__call__

    def counting(self: object, x: mx.array) -> mx.array:
        nonlocal norms
        norms += self is stages[1]._model.model.norm
        result: mx.array = right(self, x)
        return result

    monkeypatch.setattr(norm, "__call__", counting)
    ring.prefill(1, TEXT[:9])
    assert norms == 0
    ring.decode([TEXT[9]], admit(1, prompt=TEXT[:10]))
    assert norms == 1


def test_a_prompt_of_one_token_is_admitted_with_empty_caches(ring: Ring, whole: Whole) -> None:
    ring.decode([TEXT[0]], admit(1, prompt=TEXT[:1]))
    assert mx.array_equal(ring.logits[0], whole.run(TEXT[:1])[0]).item()


@pytest.mark.parametrize("kind", ["qwen3", "mamba2", "qwen3_next", "gemma3_text"])
def test_rows_without_tokens_can_be_dropped_kept_and_trimmed(
    kind: str, model_of: Callable[[str], Path], verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of(kind)
    ring = Ring(load_stages(folder, [2], verdicts), monkeypatch)
    whole = Whole(folder)
    both = [admit(1, prompt=TEXT[:1]), admit(2, prompt=OTHER[:1])]
    ring.beat(*both, retain(1, 7), trim(2, 0), drop(1), fork(7, 3, 0), admit(3, lane=1))
    ring.decode([OTHER[0]])
    assert mx.array_equal(ring.logits[0], whole.run(OTHER[:1])[0]).item()
    ring.decode([TEXT[0]], lane=1)
    assert mx.array_equal(ring.logits[0], whole.again().run(TEXT[:1])[0]).item()


def test_several_lanes_do_not_touch_each_other(ring: Ring, whole: Whole) -> None:
    other = whole.again()
    ring.decode([TEXT[0]], admit(1, lane=0, prompt=TEXT[:1]))
    ring.decode([OTHER[0]], admit(2, lane=1, prompt=OTHER[:1]), lane=1)
    whole.run(TEXT[:1])
    other.run(OTHER[:1])
    for at in range(1, 6):
        ring.decode([TEXT[at]], lane=0)
        assert mx.array_equal(ring.logits[0], whole.run([TEXT[at]])[0]).item()
        ring.decode([OTHER[at]], lane=1)
        assert mx.array_equal(ring.logits[0], other.run([OTHER[at]])[0]).item()
    assert [runner.lanes for runner in ring.runners] == [2, 2]


def test_a_dropped_row_leaves_the_others_unchanged_and_frees_its_bytes(
    ring: Ring, whole: Whole
) -> None:
    ring.prefill(1, TEXT[:20])
    ring.prefill(2, OTHER[:5])
    whole.run(OTHER[:5])
    ring.decode([TEXT[20], OTHER[5]], admit(1, prompt=TEXT), admit(2, prompt=OTHER))
    assert mx.array_equal(ring.logits[1], whole.run([OTHER[5]])[0]).item()
    held = [runner.cache_bytes for runner in ring.runners]
    ring.decode([OTHER[6]], drop(1))
    assert mx.array_equal(ring.logits[0], whole.run([OTHER[6]])[0]).item()
    assert [runner.rows for runner in ring.runners] == [1, 1]
    assert all(r.cache_bytes < before for r, before in zip(ring.runners, held, strict=True))
    ring.beat(drop(2))
    assert [runner.cache_bytes for runner in ring.runners] == [0, 0]


def test_a_sequence_dropped_in_the_middle_of_its_prefill_is_gone(ring: Ring) -> None:
    ring.prefill(1, TEXT[:8])
    ring.beat(drop(1))
    assert [runner.cache_bytes for runner in ring.runners] == [0, 0]
    with pytest.raises(FrameRefused, match="no sequence 1"):
        ring.beat(drop(1))


def test_a_kept_prefix_starts_other_sequences_without_being_used_up(
    ring: Ring, whole: Whole
) -> None:
    ring.prefill(1, TEXT[:30])
    ring.prefill(1, OTHER[:3], retain(1, 9))  # goes on after the copy was taken
    for sequence, length in ((2, 30), (3, 12), (4, 30)):
        ring.prefill(sequence, OTHER[:7], fork(9, sequence, length))
        ring.decode([OTHER[7]], admit(sequence, lane=sequence, prompt=[1]), lane=sequence)
        lone = whole.again()
        lone.run(TEXT[:length])
        lone.run(OTHER[:7])
        assert mx.array_equal(ring.logits[0], lone.run([OTHER[7]])[0]).item()
    ring.beat(evict(9), *(drop(s) for s in (1, 2, 3, 4)))
    assert [runner.cache_bytes for runner in ring.runners] == [0, 0]


def test_a_row_of_a_batch_can_be_kept_and_started_from(ring: Ring, whole: Whole) -> None:
    ring.prefill(1, TEXT[:11])
    ring.decode([TEXT[11], OTHER[0]], admit(1, prompt=TEXT), admit(2, prompt=OTHER))
    ring.decode([TEXT[12], OTHER[1]])
    ring.prefill(3, TEXT[13:15], retain(1, 1), fork(1, 3, 13))
    ring.decode([TEXT[15]], admit(3, lane=1, prompt=TEXT), lane=1)
    whole.run(TEXT[:15])
    assert difference(ring.logits[0], whole.run([TEXT[15]])[0]) == 0


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_trimmed_row_goes_on_from_there_and_the_others_stay(
    rows: int, ring: Ring, whole: Whole
) -> None:
    starts = [10, 4, 17][:rows]
    alone = [whole.again() for _ in range(rows)]
    commands = []
    for row, start in enumerate(starts):
        ring.prefill(row, TEXTS[row][:start])
        alone[row].run(TEXTS[row][:start])
        commands.append(admit(row, prompt=TEXTS[row][: start + 1]))
    at = list(starts)
    for step in range(6):
        if step == 3:
            commands = [trim(0, 8)]
            alone[0] = whole.again()
            alone[0].run(TEXTS[0][:8])
            at[0] = 20  # other tokens than before
        ring.decode([TEXTS[row][at[row]] for row in range(rows)], *commands)
        commands = []
        for row in range(rows):
            expected = alone[row].run([TEXTS[row][at[row]]])[0]
            assert mx.array_equal(ring.logits[row], expected).item(), (step, row)
            at[row] += 1


def test_a_cache_without_history_to_go_back_to_is_not_trimmed(
    model_of: Callable[[str], Path], verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("mamba2", "llama_sliding"):  # a state; a window that has wrapped
        ring = Ring(load_stages(model_of(kind), [2], verdicts), monkeypatch)
        ring.prefill(1, TEXT[:12])
        ring.beat(trim(1, 12))
        with pytest.raises(FrameRefused, match="cannot be cut shorter"):
            ring.beat(trim(1, 5))


def test_commands_that_make_no_sense_are_refused(stages: list[Stage]) -> None:
    cases = [
        ([drop(1)], "no sequence 1"),
        ([trim(1, 0)], "no sequence 1"),
        ([retain(1, 1)], "no sequence 1"),
        ([fork(1, 2, 0)], "no handle 1"),
        ([evict(1)], "no handle 1"),
        ([admit(1), admit(1)], "already in a lane"),
        ([admit(1), trim(1, 3)], "has 0 tokens"),
        ([admit(1), retain(1, 1), retain(1, 1)], "handle 1 is taken"),
        ([admit(1), retain(1, 1), fork(1, 1, 0)], "already exists"),
        ([admit(1), retain(1, 1), fork(1, 2, 5)], "has 0 tokens"),
        ([wire.Command()], "no known kind"),
    ]
    for commands, why in cases:
        runner = Runner(stages[0], epoch=1, index=0, count=2)
        with pytest.raises(FrameRefused, match=why):
            runner.run(wire.Frame(epoch=1, number=0, commands=commands))


def test_frames_of_a_wrong_shape_are_refused(stages: list[Stage]) -> None:
    cases = [
        (0, {"kind": wire.DECODE, "tokens": [1, 2], "rows": 1}, "lane 0 has 0 rows, not 1"),
        (0, {"kind": wire.PREFILL, "tokens": [1, 2, 3], "rows": 2}, "do not make 2 rows"),
        (0, {"kind": wire.PREFILL, "tokens": [], "rows": 1}, "do not make 1 rows"),
        (0, {"kind": wire.PREFILL, "tokens": [1], "rows": 0}, "do not make 0 rows"),
        (0, {"kind": wire.PREFILL, "tokens": [1, 2], "rows": 2}, "one row"),
        (1, {"kind": wire.PREFILL, "tokens": [1], "rows": 1, "carry": b"x"}, "carry"),
        (1, {"kind": wire.PREFILL, "tokens": [1], "rows": 1}, "carry"),
        (0, {"kind": wire.PREFILL, "tokens": [1, 1 << 31], "rows": 1}, "none of the model's"),
        (0, {"kind": wire.PREFILL, "tokens": [1] * 9000, "rows": 1}, "9000 tokens"),
        (0, {"commands": [wire.Command(drop=wire.Drop())] * 70_000}, "70000 commands"),
    ]
    for index, fields, why in cases:
        runner = Runner(stages[index], epoch=1, index=index, count=2)
        with pytest.raises(FrameRefused, match=why):
            runner.run(wire.Frame(epoch=1, number=0, **fields))  # type: ignore[arg-type]


def test_a_sequence_grows_no_longer_than_the_ring_was_formed_for(stages: list[Stage]) -> None:
    runner = Runner(stages[0], epoch=1, index=0, count=2, most_tokens=5)
    chunk = {"kind": wire.PREFILL, "sequence": 1, "tokens": [1, 2, 3], "rows": 1}
    runner.run(wire.Frame(epoch=1, number=0, **chunk))  # type: ignore[arg-type]
    with pytest.raises(FrameRefused, match="6 tokens, more than the 5"):
        runner.run(wire.Frame(epoch=1, number=1, **chunk))  # type: ignore[arg-type]


def test_sampling_values_that_are_none_are_refused(stages: list[Stage]) -> None:
    for sampling in (
        wire.Sampling(temperature=math.nan),
        wire.Sampling(top_p=-1),
        wire.Sampling(frequency_penalty=math.inf),
        wire.Sampling(logit_bias={1: math.nan}),
        wire.Sampling(logit_bias=dict.fromkeys(range(5000), 1.0)),
    ):
        runner = Runner(stages[1], epoch=1, index=1, count=2)
        admit = wire.Command(admit=wire.Admit(sequence=1, prompt=[1], sampling=sampling))
        with pytest.raises(MessageRefused, match="makes no sense"):
            runner.run(wire.Frame(epoch=1, number=0, commands=[admit]))


def test_a_lane_of_an_architecture_that_does_not_batch_takes_one_row(
    stages: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages[0], "can_batch", False)
    runner = Runner(stages[0], epoch=1, index=0, count=2)
    runner.run(wire.Frame(epoch=1, number=0, commands=[admit(1), admit(2, lane=1)]))
    with pytest.raises(FrameRefused, match="takes no more"):
        runner.run(wire.Frame(epoch=1, number=1, commands=[admit(3, lane=1)]))


def test_blocks_of_several_tokens_decode_like_single_ones(ring: Ring, whole: Whole) -> None:
    ring.decode([TEXT[0]], admit(1, prompt=TEXT[:1]))
    ring.send(kind=wire.DECODE, lane=0, tokens=TEXT[1:4], rows=1)
    for token in TEXT[:3]:
        whole.run([token])
    assert mx.array_equal(ring.logits[0], whole.run([TEXT[3]])[0]).item()


def test_closing_frees_every_cache(ring: Ring) -> None:
    ring.prefill(1, TEXT[:8])
    for runner in ring.runners:
        assert runner.cache_bytes > 0
        runner.close()
        assert runner.cache_bytes == 0


def test_the_last_stage_tells_drawing_from_layers_and_seldom_waits_for_it(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled, now = 0, 0.0
    settle, choose = runner_module._settle, runner_module.choose_rows

    def slow_in_pairs(logits: mx.array, choosers: list[Any]) -> mx.array:
        nonlocal now
        now += len(choosers) - 1
        return choose(logits, choosers)

    def counting(results: list[Any], caches: list[Any]) -> None:
        nonlocal settled, now
        settled += 1
        now += 10 if caches else 0  # what layers take
        settle(results, caches)

    monkeypatch.setattr(runner_module, "choose_rows", slow_in_pairs)
    monkeypatch.setattr(runner_module, "_settle", counting)
    monkeypatch.setattr(runner_module, "time", SimpleNamespace(perf_counter=lambda: now))
    first = TEXT[:1]
    ring.decode(first * 2, *(admit(at, prompt=first) for at in (1, 2)))
    ring.decode(first, admit(3, lane=1, prompt=first), lane=1)
    assert ring.runners[1].draw_s == 0, "a first frame builds what later ones have"
    more = 2 * TIMED_EVERY
    for _ in range(more):
        ring.decode(first * 2)
        ring.decode(first, lane=1)
    assert [runner.draw_s for runner in ring.runners] == [0, more]
    timed = 2 * 2
    assert settled == 2 * 2 * (1 + more) + timed
