"""Drafts never change an answer: a whole ring on real models, with and without them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from parallax.fabric.errors import FrameRefused
from parallax.node.conductor import Conductor, Output
from parallax.node.runner import Runner
from parallax.node.sampler import TokenChooser, choose_block, draw
from parallax.node.speculation import Speculation
from parallax.node.stage import Stage
from parallax.proto import wire_pb2 as wire
from tests.models import make_model
from tests.node.pretend import Timing
from tests.node.rings import TEXTS, Ring, Whole, admit, load_stages, retain, trim

ModelOf = Callable[[str], Path]

TEXT, OTHER = TEXTS[0], TEXTS[1]
GREEDY = wire.Sampling(temperature=0, top_p=1, repetition_penalty=1)
SEEDED = wire.Sampling(temperature=0.7, top_p=0.95, repetition_penalty=1, seed=3)
PENALISED = wire.Sampling(
    temperature=0.8,
    top_p=1,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    seed=8,
    logit_bias={97: 4.0, 32: -100.0},
)
# So likely to repeat that most drafts stand, and not so that all do.
LOOPING = wire.Sampling(
    temperature=1.0,
    top_p=1,
    repetition_penalty=1,
    seed=5,
    logit_bias=dict.fromkeys(range(65, 70), 9.0),
)


class RealRing:
    """A conductor and runners: frames go through every stage as bytes, in order."""

    def __init__(self, stages: list[Stage], *, draft_tokens: int, block_tokens: int = 4) -> None:
        number = len(stages)
        shape = wire.RingShape(
            lanes=number,
            lane_rows=4,
            chunk_tokens=8,
            window_frames=16,
            context_tokens=2000,
            draft_tokens=draft_tokens,
            block_tokens=block_tokens,
        )
        self.conductor = Conductor(7, shape, number, [stage.cache_cost() for stage in stages])
        self.runners = [Runner(s, epoch=7, index=i, count=number) for i, s in enumerate(stages)]
        self.frames: deque[wire.Frame] = deque()
        self.answers: dict[int, list[int]] = {}
        self.ends: dict[int, int] = {}
        self.blocks: list[int] = []
        # As if a token more cost little: blocks grow.
        self.timing = Timing(number, lambda tokens: 0.01 + 0.001 * tokens)

    def take(self, out: Output) -> None:
        self.frames.extend(out.frames)
        for frame in out.frames:
            self.timing.sent(frame)
        for event in out.tokens:
            answer = self.answers.setdefault(event.request, [])
            assert event.index == len(answer)
            answer.append(event.token)
        for end in out.ends:
            self.ends[end.request] = end.reason

    def step(self) -> None:
        sent = frame = self.frames.popleft()
        if frame.kind == wire.DECODE:
            self.blocks.append(len(frame.tokens))
        for runner in self.runners:
            frame = runner.run(wire.Frame.FromString(frame.SerializeToString()))
        frame.slowest_s = 0.0
        self.timing.returned(sent, frame)
        self.take(self.conductor.returned(frame, now=self.timing.now))

    def run_out(self) -> None:
        while self.frames:
            self.step()

    def submit(
        self,
        request: int,
        prompt: list[int],
        sampling: wire.Sampling,
        max_tokens: int,
        end: int = 999,
    ) -> None:
        order = wire.Submit(
            request=request,
            attempt=1,
            prompt=prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            end_tokens=[end],
        )
        self.take(self.conductor.submit(order))


def alone(folder: Path, prompt: list[int], sampling: wire.Sampling, tokens: int) -> list[int]:
    """mlx-lm's logits and the counted sampler, one token after the other."""
    whole = Whole(folder)
    for start in range(0, len(prompt) - 1, 8):
        whole.run(prompt[start : min(start + 8, len(prompt) - 1)])
    answer: list[int] = []
    while len(answer) < tokens:
        logits = whole.run([(prompt + answer)[-1]])[-1]
        answer.append(draw(logits, sampling, prompt, answer))
    return answer


REPEATING = [*b"abcdefgh" * 5]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALISED, LOOPING])
@pytest.mark.parametrize("cuts", [[], [1, 2, 3]])
def test_answers_with_drafts_are_those_of_mlx_lm_without(
    sampling: wire.Sampling, cuts: list[int], model_of: ModelOf, verdicts: Path
) -> None:
    folder = model_of("qwen3")
    stages = load_stages(folder, cuts, verdicts)
    for prompt in (REPEATING, TEXT[:30]):
        expected = alone(folder, prompt, sampling, 45)
        for block_tokens in (1, 8):
            ring = RealRing(stages, draft_tokens=24, block_tokens=block_tokens)
            ring.submit(1, prompt, sampling, 45)
            ring.run_out()
            assert ring.answers[1] == expected
            assert all(runner.rows == 0 for runner in ring.runners)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "deepseek_v3"])
def test_every_family_answers_as_without_drafts(
    kind: str, model_of: ModelOf, verdicts: Path
) -> None:
    """Where blocks round otherwise, frames have one token."""
    folder = model_of(kind)
    stages = load_stages(folder, [2], verdicts)
    blocks = 8 if all(stage.takes_blocks for stage in stages) else 1
    assert (blocks > 1) is (kind != "deepseek_v3")
    ring = RealRing(stages, draft_tokens=24, block_tokens=blocks)
    ring.submit(1, REPEATING[:20], LOOPING, 40)
    ring.run_out()
    assert ring.answers[1] == alone(folder, REPEATING[:20], LOOPING, 40)
    assert ring.conductor.load().drafted_tokens > 0


@pytest.mark.parametrize("seed", range(2))
def test_drafts_cut_off_before_a_window_wraps_leave_it_as_it_was(
    seed: int, tmp_path: Path, verdicts: Path
) -> None:
    folder = make_model(tmp_path / "windowed", "gemma3_text", sliding_window=48)
    stages = load_stages(folder, [2], verdicts)
    assert all(stage.takes_blocks for stage in stages)
    sampling = wire.Sampling()
    sampling.CopyFrom(LOOPING)
    sampling.seed = seed
    sampling.logit_bias.update(dict.fromkeys(range(65, 67), 20.0))
    ring = RealRing(stages, draft_tokens=24, block_tokens=8)
    ring.submit(1, REPEATING[:12], sampling, 60)
    ring.run_out()
    assert ring.answers[1] == alone(folder, REPEATING[:12], sampling, 60)
    load = ring.conductor.load()
    assert load.drafted_tokens > load.accepted_tokens


def test_drafts_and_blocks_there_really_were_right_and_wrong_ones(
    model_of: ModelOf, verdicts: Path
) -> None:
    """Else the tests above would show nothing."""
    ring = RealRing(load_stages(model_of("qwen3"), [2], verdicts), draft_tokens=24, block_tokens=8)
    ring.submit(1, REPEATING, LOOPING, 200)
    ring.run_out()
    load = ring.conductor.load()
    assert load.accepted_tokens > 20
    assert load.drafted_tokens - load.accepted_tokens > 20
    assert max(ring.blocks) > 2


def test_an_end_token_inside_a_block_ends_the_answer_there(
    model_of: ModelOf, verdicts: Path
) -> None:
    folder = model_of("qwen3")
    stages = load_stages(folder, [2], verdicts)
    whole = alone(folder, REPEATING, LOOPING, 120)
    for place in range(60, 110, 16):
        end = whole[place]
        expected = whole[: whole.index(end)]
        ring = RealRing(stages, draft_tokens=24, block_tokens=8)
        ring.submit(1, REPEATING, LOOPING, 120, end=end)
        ring.run_out()
        assert ring.answers.get(1, []) == expected
        assert ring.ends[1] == wire.END_STOP
        assert all(runner.rows == 0 for runner in ring.runners)


def test_any_length_is_kept_to_the_token(model_of: ModelOf, verdicts: Path) -> None:
    folder = model_of("qwen3")
    stages = load_stages(folder, [2], verdicts)
    whole = alone(folder, REPEATING, GREEDY, 40)
    for tokens in range(25, 41, 5):
        ring = RealRing(stages, draft_tokens=24, block_tokens=8)
        ring.submit(1, REPEATING, GREEDY, tokens)
        ring.run_out()
        assert ring.answers[1] == whole[:tokens]


def test_what_is_kept_of_an_answer_holds_no_drafts(model_of: ModelOf, verdicts: Path) -> None:
    """A second turn begins with the caches of the first, whose end was inside a block."""
    folder = model_of("qwen3")
    stages = load_stages(folder, [2], verdicts)
    whole = alone(folder, REPEATING, LOOPING, 100)
    for tokens in range(70, 100, 8):
        ring = RealRing(stages, draft_tokens=24, block_tokens=8)
        ring.submit(1, REPEATING, LOOPING, 120, end=whole[tokens])
        ring.run_out()
        again = REPEATING + ring.answers[1] + OTHER[:5]
        ring.submit(2, again, GREEDY, 12)
        ring.run_out()
        assert ring.conductor.load().prefixes.hits == 1
        assert ring.answers[2] == alone(folder, again, GREEDY, 12)


@pytest.mark.parametrize("steps", [12, 40])
def test_others_that_come_while_drafts_are_in_the_ring_get_their_own_answers(
    steps: int, model_of: ModelOf, verdicts: Path
) -> None:
    folder = model_of("qwen3")
    ring = RealRing(load_stages(folder, [2], verdicts), draft_tokens=24, block_tokens=4)
    ring.submit(1, REPEATING, LOOPING, 90)
    for _ in range(steps):
        ring.step()
    ring.submit(2, OTHER[:20], SEEDED, 15)
    for _ in range(5):
        ring.step()
    ring.submit(3, TEXT[:9], PENALISED, 15)
    ring.run_out()
    assert ring.answers[1] == alone(folder, REPEATING, LOOPING, 90)
    assert ring.answers[2] == alone(folder, OTHER[:20], SEEDED, 15)
    assert ring.answers[3] == alone(folder, TEXT[:9], PENALISED, 15)


def test_a_cancelled_answer_with_drafts_in_the_ring_leaves_the_next_one_alone(
    model_of: ModelOf, verdicts: Path
) -> None:
    folder = model_of("qwen3")
    ring = RealRing(load_stages(folder, [1, 2, 3], verdicts), draft_tokens=24, block_tokens=1)
    expected = alone(folder, OTHER[:3], GREEDY, 30)
    for request in range(1, 9, 2):
        ring.submit(request, REPEATING, GREEDY, 300)
        while len(ring.answers.get(request, [])) < 20 + request or len(ring.frames) < 2:
            ring.step()
        ring.take(ring.conductor.cancel(wire.Cancel(request=request, attempt=1)))
        ring.submit(request + 1, OTHER[:3], GREEDY, 30)
        ring.run_out()
        assert ring.answers[request + 1] == expected


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_moe", "gemma3_text"])
def test_a_blocks_logits_are_those_of_single_steps_bit_for_bit(
    kind: str, model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of(kind)
    ring = Ring(load_stages(folder, [2], verdicts), monkeypatch)
    start = 2 if kind == "gemma3_text" else 17
    ring.prefill(1, TEXT[:start])
    whole = Whole(folder)
    whole.run(TEXT[:start])
    commands = [admit(1, prompt=TEXT[: start + 1])]
    at = start
    steps = [(1, 1), (2, 0), (1, 0)] if start == 2 else [(4, 0), (3, 5), (1, 7), (8, 0)]
    for right, wrong in steps:
        tokens = TEXT[at : at + right] + OTHER[:wrong]
        ring.send(kind=wire.DECODE, lane=0, tokens=tokens, rows=1, commands=commands)
        logits = ring.block_logits if len(tokens) > 1 else ring.logits
        for place in range(right):
            expected = whole.run([TEXT[at + place]])[0]
            assert mx.array_equal(logits[place], expected).item(), (at, place)
        at += right
        commands = [trim(1, at)] if wrong else []


def test_what_is_sent_ahead_of_a_wrong_draft_is_passed_by_until_a_trim(
    model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of("qwen3")
    ring = Ring(load_stages(folder, [2], verdicts), monkeypatch)
    prompt = TEXT[:12]
    ring.prefill(1, prompt[:-1])
    (first,) = ring.decode(prompt[-1:], admit(1, prompt=prompt))
    wrong = (first + 1) % 200

    def ahead(*tokens: int, commands: tuple[wire.Command, ...] = ()) -> list[int]:
        frame = ring.send(
            kind=wire.DECODE, lane=0, tokens=tokens, rows=1, ahead=True, commands=commands
        )
        return list(frame.tokens)

    assert ahead(wrong) == []
    assert ahead(first, 5) == [], "it would be right a place earlier"
    with pytest.raises(FrameRefused, match="has not been trimmed"):
        ring.runners[1]._lanes.retain(1, 1)
    (second,) = ring.decode([first], trim(1, 12))
    whole = Whole(folder)
    whole.run(prompt[:-1])
    whole.run(prompt[-1:])
    assert mx.array_equal(ring.logits[0], whole.run([first])[0]).item()
    drawn = ahead(second, (second + 1) % 200, 3)
    assert len(drawn) == 3
    assert ahead(drawn[-1]) == [], "a draft inside the block was wrong"


def test_commands_on_what_was_passed_by_are_refused(
    model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = Ring(load_stages(model_of("qwen3"), [], verdicts), monkeypatch)
    prompt = TEXT[:5]
    ring.prefill(1, prompt[:-1])
    (first,) = ring.decode(prompt[-1:], admit(1, prompt=prompt))
    frame = {"kind": wire.DECODE, "lane": 0, "rows": 1, "ahead": True}
    ring.send(**frame, tokens=[(first + 1) % 200])
    for command, why in [
        (retain(1, 9), "has not been trimmed"),
        (admit(2, prompt=[1]), "has not been trimmed"),
        (trim(1, 6), "5 tokens computed"),
    ]:
        with pytest.raises(FrameRefused, match=why):
            ring.runners[0]._command(command)


def test_several_tokens_for_each_of_several_rows_are_refused(
    model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = Ring(load_stages(model_of("qwen3"), [], verdicts), monkeypatch)
    ring.decode([1, 2], admit(1, prompt=[1]), admit(2, prompt=[2]))
    with pytest.raises(FrameRefused, match="lanes of one row"):
        ring.send(kind=wire.DECODE, lane=0, rows=2, tokens=[1, 2, 3, 4])


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALISED])
def test_a_block_is_drawn_as_its_tokens_one_by_one(sampling: wire.Sampling) -> None:
    logits = 3 * mx.random.normal((6, 120), key=mx.random.key(4))
    prompt, answer = [97, 5, 6], [97, 97, 8]
    drafts = [7, 97, 7, 11, 7]
    chooser = TokenChooser(sampling, prompt, answer)
    for _ in range(2):  # the chooser stays where it is
        found = choose_block(logits, chooser, drafts).tolist()
        assert found == [draw(logits[i], sampling, prompt, answer + drafts[:i]) for i in range(6)]
    chooser.advance(7)
    assert chooser.choose(logits[1]).item() == found[1]


# ---------------------------------------------------- the comparison itself can fail


def test_an_acceptance_that_is_off_by_one_is_seen(
    model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of("qwen3")
    right = Speculation.returned

    def one_too_many(self: Speculation, block, drawn, now, stage_s):  # type: ignore[no-untyped-def]
        judged = right(self, block, drawn, now, stage_s)
        more = list(drawn[len(judged.tokens) : len(judged.tokens) + 1])
        return type(judged)(judged.tokens + more, judged.wrong)

    monkeypatch.setattr(Speculation, "returned", one_too_many)
    ring = RealRing(load_stages(folder, [2], verdicts), draft_tokens=24, block_tokens=8)
    ring.submit(1, REPEATING, LOOPING, 100)
    ring.run_out()
    assert ring.answers[1] != alone(folder, REPEATING, LOOPING, 100)


def test_a_chooser_that_takes_wrong_drafts_is_seen(
    model_of: ModelOf, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of("qwen3")
    sampling = wire.Sampling()
    sampling.CopyFrom(LOOPING)
    sampling.frequency_penalty = 0.05

    def advances(self: Runner, sequence: int, tokens: list[int], drafts: list[int]) -> None:
        for token in tokens:
            self._choosers[sequence].advance(token)
        self._drawn[sequence] = tokens[-1] if tokens[:-1] == list(drafts) else None

    stages = load_stages(folder, [2], verdicts)
    expected = alone(folder, REPEATING, sampling, 100)
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(Runner, "_take_block", advances)
        ring = RealRing(stages, draft_tokens=24, block_tokens=8)
        ring.submit(1, REPEATING, sampling, 100)
        ring.run_out()
        assert (ring.answers[1] == expected) is not broken
