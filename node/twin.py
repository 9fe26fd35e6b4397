"""The self-check: a tiny random twin of the model, run whole and cut, must agree bit for bit.

The twin has the model's configuration with small dimensions, fewer layers of the same kinds, and
float32 weights, and runs on the CPU backend, where results do not depend on shapes. Whatever a
piece is believed not to need is poisoned with NaN first. A cut that differs is refused; batching
and trimming that differ are switched off by name.

In batches one difference is no defect: a window that has wrapped lies in memory as a ring, and sums
over it run in the ring's order, which in a batch is another than alone. So batches may differ by
rounding where a cache has a window, and by nothing where none has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_unflatten

from parallax.fabric.errors import CutRefused, FrameRefused, ParallaxError
from parallax.node import mlx_lm_seam as seam
from parallax.node.depth import Cut, shallow
from parallax.node.lanes import Lanes
from parallax.node.mlx_lm_seam import Caches, Config, Model, Weights
from parallax.node.shrink import shrunk
from parallax.node.stage import Stage

log = logging.getLogger(__name__)

_FORMAT = 3  # of verdicts on disk; another number makes them be found out anew
_MOST_PARAMETERS = 30_000_000
_TEXT = 40  # tokens; several times the twin's window
_ROUNDING = (
    2e-3  # of the largest logit; deep twins amplify, but a mask wrong by one token shows tenfold
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the twin showed of one cut."""

    works: bool
    batches: bool = False
    trims: bool = False
    forks: bool = False
    answers: bool = False
    blocks: bool = False
    why: str = ""  # what went wrong, in words
    working_cuts: tuple[int, ...] = ()  # told with a refusal


def check_cut(config: Config, first: int, end: int, verdicts: Path | None = None) -> Verdict:
    """Whether layers ``[first, end)`` can be run apart from the others, and how.

    Args:
        config: the model's, as in ``config.json``.
        verdicts: folder of earlier verdicts; new ones are added.

    Raises:
        UnknownArchitecture: mlx-lm has no such model.
        CutRefused: the cut gives wrong answers; names architecture, cut, and cuts that work.
    """
    file = None if verdicts is None else verdicts / _name(config, first, end)
    verdict = _recall(file)
    if verdict is None:
        verdict = _judge(config, first, end)
        _remember(file, verdict)
    if verdict.works:
        return verdict
    cuts = ", ".join(map(str, verdict.working_cuts))
    raise CutRefused(
        f"A {config.get('model_type')} model cannot be cut into layers {first} to {end - 1}",
        verdict.why,
        f"Cut it before one of the layers {cuts}" if cuts else "Run it whole, on one node",
        model_type=config.get("model_type"),
        cut=f"{first}:{end}",
        working_cuts=cuts,
    )


def working_cuts(config: Config) -> list[int]:
    """The layers before which this architecture can be cut in two.

    Raises:
        UnknownArchitecture: mlx-lm has no such model.
    """
    with mx.stream(mx.cpu):
        twin = _twin_of(config)
        return [] if twin is None else _working_cuts(twin)


class _Twin:
    """A tiny random model, to be run whole and in pieces."""

    def __init__(self, cut: Cut, weights: Weights) -> None:
        self._config = cut.config
        self.first = cut.first
        self.end = cut.end
        self._weights = weights
        self.whole = self._copy()
        self.layers = len(self.whole.layers)
        vocabulary = _vocabulary(cut.config)
        mx.random.seed(7)
        texts = mx.random.randint(0, vocabulary, (5, _TEXT)).tolist()
        self.texts = cast(list[list[int]], texts)

    def is_finite(self) -> bool:
        """Whether the whole twin gives numbers that can be compared."""
        return all(mx.isfinite(step).all().item() for step in self.lone(self.texts[0], [8, 1]))

    def piece(self, first: int, end: int) -> Stage:
        """Some layers of it, with every weight they should not need poisoned."""
        model = self._copy()
        stage = Stage(model, first, end)
        own = stage.parameters()
        poison = [(n, mx.full(w.shape, mx.nan)) for n, w in self._weights.items() if n not in own]
        model.update(tree_unflatten(poison))
        return stage

    def lone(self, text: list[int], lengths: list[int]) -> list[mx.array]:
        """The whole model's logits for ``text``, in steps of these lengths."""
        caches = seam.new_caches(self.whole)
        return [self.step(part, caches) for part in _parts(text, lengths)]

    def step(self, tokens: list[int], caches: Caches) -> mx.array:
        """The whole model's logits for the tokens that come next."""
        logits: mx.array = self.whole(mx.array([tokens]), cache=caches)
        mx.eval(logits)
        return logits

    def _copy(self) -> Model:
        model = seam.random_model(self._config)
        model.update(tree_unflatten(list(self._weights.items())))
        return model


class _Pieces:
    """The twin in pieces, one lane set for each, run like a ring."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.lanes = [Lanes(stage) for stage in stages]

    def prefill(self, sequence: int, tokens: list[int]) -> mx.array:
        carry: Any = None
        for stage, lanes in zip(self.stages, self.lanes, strict=True):
            caches = lanes.prefill(sequence, len(tokens))
            carry = stage.forward(mx.array([tokens], mx.uint32), carry, caches, head=True)
        mx.eval(carry)
        logits: mx.array = carry
        return logits

    def decode(self, tokens: list[int]) -> mx.array:
        """One step of lane 0, which has as many rows as ``tokens``."""
        carry: Any = None
        for stage, lanes in zip(self.stages, self.lanes, strict=True):
            lane = lanes.decode(0, len(tokens), 1)
            column = mx.array(tokens, mx.uint32)[:, None]
            carry = stage.forward(column, carry, lane.caches, head=True)
        mx.eval(carry)
        logits: mx.array = carry
        return logits

    def each(self, command: Callable[[Lanes], None]) -> None:
        for lanes in self.lanes:
            command(lanes)


def _judge(config: Config, first: int, end: int) -> Verdict:
    with mx.stream(mx.cpu):
        twin = _twin_of(config, (first, end))
        if twin is None:
            return Verdict(False, why="no small twin of it can be made to check the cut with")
        cuts = [twin.first, twin.end]
        why = _compare(twin, cuts)
        if why:
            return Verdict(False, why=why, working_cuts=tuple(working_cuts(config)))
        stages = _stages(twin, cuts)
        return Verdict(
            True,
            batches=all(stage.can_batch for stage in stages) and _agrees(_batch, twin, stages),
            trims=all(stage.can_trim for stage in stages) and _agrees(_trim, twin, stages),
            forks=_agrees(_fork, twin, stages, exactly=True),
            answers=_agrees(_answer, twin, stages, exactly=True),
            blocks=_agrees(_block, twin, stages, exactly=True),
        )


def _twin_of(config: Config, cut: tuple[int, int] | None = None) -> _Twin | None:
    """The smallest twin that mlx-lm can make and that computes finite numbers, if any.

    With a cut, it may have fewer layers than the model; the cut is then its own.
    """
    seam.model_classes(config)
    for small in shrunk(seam.with_sizes(config)):
        try:
            place = shallow(small, *cut) if cut else Cut(small, 0, 0)
            model = seam.random_model(place.config)
            if sum(w.size for w in seam.named(model.parameters()).values()) > _MOST_PARAMETERS:
                continue
            for gain in (1.5, 0.5):
                twin = _Twin(place, _random_weights(model, gain))
                if twin.is_finite():
                    return twin
        except seam.DEFECTS as error:
            log.debug("no twin of %s at this size: %s", config.get("model_type"), error)
    return None


def _working_cuts(twin: _Twin) -> list[int]:
    return [cut for cut in range(1, twin.layers) if not _compare(twin, [cut])]


def _stages(twin: _Twin, cuts: list[int]) -> list[Stage]:
    bounds = sorted({0, *cuts, twin.layers})
    return [twin.piece(a, b) for a, b in pairwise(bounds)]


def _compare(twin: _Twin, cuts: list[int]) -> str:
    """What is wrong with these cuts; empty if nothing is."""
    lengths = [3, 7, 9, 1, 1, 1]
    try:
        stages = _stages(twin, cuts)
        pieces = _Pieces(stages)
        whole = twin.lone(twin.texts[0], lengths)
        for expected, part in zip(whole, _parts(twin.texts[0], lengths), strict=True):
            if not mx.array_equal(pieces.prefill(1, part), expected).item():
                return "its layers need more of each other than what one hands to the next"
        owned = [slot for stage in stages for slot in stage.slots]
        if len(set(owned)) != len(owned):
            return "two of its layers share a cache across the cut"
    except (*seam.DEFECTS, ParallaxError) as error:
        log.debug("cuts %s: %s", cuts, error)
        return "its layers cannot run without those before the cut"
    return ""


def _agrees(
    check: Callable[[_Twin, _Pieces], float],
    twin: _Twin,
    stages: list[Stage],
    *,
    exactly: bool = False,
) -> bool:
    rounds = not exactly and _windowed(stages)
    try:
        difference = check(twin, _Pieces(stages))
    except (*seam.DEFECTS, FrameRefused) as error:
        log.debug("%s: %s", check.__name__, error)
        return False
    return difference <= (_ROUNDING if rounds else 0)


def _windowed(stages: list[Stage]) -> bool:
    return any(seam.window_tokens(p) for s in stages for c in s.new_cache() for p in seam.parts(c))


def _difference(found: mx.array, expected: mx.array) -> float:
    """The largest difference, as a share of the largest value; infinite where one is no number."""
    share = cast(float, (mx.abs(found - expected).max() / mx.abs(expected).max()).item())
    return share if math.isfinite(share) else math.inf


def _batch(twin: _Twin, pieces: _Pieces) -> float:
    """Ragged joins and leaves: how far the rows' logits are from those of their lone runs."""
    prefills = [11, 4, 0, 17, 6]
    alone: dict[int, Caches] = {}
    at: dict[int, int] = {}
    worst = 0.0

    def join(row: int) -> None:
        text = twin.texts[row][: prefills[row]]
        alone[row] = seam.new_caches(twin.whole)
        at[row] = len(text)
        if text:
            twin.step(text, alone[row])
            pieces.prefill(row, text)
        pieces.each(lambda lanes: lanes.admit(row, 0))

    def leave(row: int) -> None:
        pieces.each(lambda lanes: lanes.drop(row))
        del at[row]

    script = [(join, 0), (join, 1), (join, 2), (join, 3), (leave, 0), (leave, 3), (leave, 1)]
    for action, changed in [*script, (join, 4)]:
        action(changed)
        for _ in range(2):
            logits = pieces.decode([twin.texts[row][here] for row, here in at.items()])
            for i, row in enumerate(at):
                expected = twin.step([twin.texts[row][at[row]]], alone[row])
                worst = max(worst, _difference(logits[i], expected[0]))
                at[row] += 1
    return worst


def _trim(twin: _Twin, pieces: _Pieces) -> float:
    """A cache cut back to three tokens goes on as if the others had never been."""
    text, other = twin.texts[0], twin.texts[1]
    pieces.prefill(1, text[:5])
    pieces.prefill(1, text[5:6])
    pieces.each(lambda lanes: lanes.trim(1, 3))
    expected = twin.lone(text[:3] + other, [3, 1, 9, 1])[1:]
    parts = zip(_parts(other, [1, 9, 1]), expected, strict=True)
    return max(_difference(pieces.prefill(1, part), logits) for part, logits in parts)


def _fork(twin: _Twin, pieces: _Pieces) -> float:
    """A copy goes on as if the original, which went on with other tokens, had never been."""
    text, other = twin.texts[0], twin.texts[1]
    pieces.prefill(1, text[:11])
    pieces.each(lambda lanes: lanes.retain(1, 1))
    pieces.prefill(1, other[:4])
    pieces.each(lambda lanes: lanes.fork(1, 2, 11))
    lengths = [11, 4, 1, 9]
    parts = zip(_parts(text, lengths), twin.lone(text, lengths), strict=True)
    return max(_difference(pieces.prefill(2, part), logits) for part, logits in list(parts)[1:])


def _answer(twin: _Twin, pieces: _Pieces) -> float:
    """Whether what comes after tokens taken one by one shows that they were no chunk."""
    text = twin.texts[0]
    expected = twin.lone(text, [20, 9, 1])[1:]
    for part in _parts(text, [7, *[1] * 13]):
        pieces.prefill(1, part)
    parts = zip(_parts(text[20:], [9, 1]), expected, strict=True)
    return max(_difference(pieces.prefill(1, part), logits) for part, logits in parts)


def _block(twin: _Twin, pieces: _Pieces) -> float:
    """Several tokens at once, wrong ones behind them cut off, are as good as one by one."""
    text, wrong = twin.texts[0], twin.texts[1]
    at, steps = 11, [(2, 0), (5, 3), (1, 7), (4, 0)]
    if _windowed(pieces.stages):  # drafts end before it is full
        at, steps = 2, [(1, 1), (2, 0), (1, 0)]
    pieces.prefill(1, text[:at])
    expected = twin.lone(text, [at, *[1] * sum(right for right, _ in steps)])[1:]
    worst = 0.0
    for right, others in steps:
        logits = pieces.prefill(1, text[at : at + right] + wrong[:others])
        at += right
        for place in range(right):
            worst = max(worst, _difference(logits[:, place], expected.pop(0)[:, 0]))
        for lanes in pieces.lanes:
            lanes.trim(1, at)
    return worst


def _parts(text: list[int], lengths: list[int]) -> list[list[int]]:
    parts, start = [], 0
    for length in lengths:
        parts.append(text[start : start + length])
        start += length
    return parts


def _random_weights(model: Model, gain: float) -> Weights:
    """float32 weights wide enough that every layer shows in the logits."""
    mx.random.seed(3)
    weights = {}
    for name, value in seam.named(model.parameters()).items():
        noise = mx.random.normal(value.shape)
        if value.ndim >= 2:
            weights[name] = noise * (gain / value.shape[-1] ** 0.5)
        else:
            weights[name] = value.astype(mx.float32) + 0.1 * noise
    mx.eval(weights)
    return weights


def _vocabulary(config: Config) -> int:
    sizes = [
        value
        for part in (config, config.get("text_config") or {})
        for key, value in part.items()
        if "vocab_size" in key and type(value) is int
    ]
    return min(sizes, default=64)


def _name(config: Config, first: int, end: int) -> str:
    """A file name for what decides a verdict: the twins' configurations, the cut, the versions."""
    facts = [_FORMAT, seam.VERSION, seam.MLX_VERSION, first, end, list(shrunk(config))]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    kind = "".join(c for c in str(config.get("model_type")) if c.isalnum() or c == "_")
    return f"{kind[:64]}-{first}-{end}-{digest[:16]}.json"


def _recall(file: Path | None) -> Verdict | None:
    if file is None:
        return None
    try:
        held = json.loads(file.read_text())
        return Verdict(**held | {"working_cuts": tuple(held["working_cuts"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _remember(file: Path | None, verdict: Verdict) -> None:
    """Verdicts are worth keeping, not worth failing for."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(asdict(verdict)))
        fresh.replace(file)
    except OSError as error:
        log.warning("the verdict %s could not be kept: %s", file.name, error)
