"""Loading a stage: only its share of a model's weights is ever read, and of that only what is new.

First the whole model is made of placeholders, lazy zeros of the shapes in the files' headers, which
cost nothing. Tracing the stage's results back through layers, quantisation and ``sanitize`` tells
which tensors of which files they come from. Then the model is made again with those tensors lazily
loaded; weights that another stage of the model holds are taken over, and the others are evaluated,
slice by slice, while threads read ahead of them (``readahead.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_unflatten

from parallax.fabric.errors import ModelBroken, ModelNotFound, ModelTooBig
from parallax.fabric.safetensors import TensorInfo, folder_headers
from parallax.node import mlx_lm_seam as seam
from parallax.node import spare_memory
from parallax.node.mlx_lm_seam import Weights
from parallax.node.readahead import Extent, ReadAhead
from parallax.node.shortcomings import is_out_of_memory
from parallax.node.stage import Stage, check_range
from parallax.node.trace import reached
from parallax.node.twin import check_cut

Headers = Mapping[str, Mapping[str, TensorInfo]]
Progress = Callable[[int, int, str], None]
Steps = Generator[frozenset[str] | None, None, Stage]

_SLICE_BYTES = 16 << 20  # some 10 ms: frames of a ring that serves meanwhile go in between
_LAYER = re.compile(r"\D*\.\d+\.")  # a name up to its first number
_NUMBER = re.compile(r"\.(\d+)\.")

# MLX's types for the format's; MLX reads 8-bit floats as their bits.
_TYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "F8_E4M3": mx.uint8,
    "F8_E8M0": mx.uint8,
    "F8_E5M2": mx.uint8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "C64": mx.complex64,
}


def load_stage(
    folder: Path,
    first: int,
    end: int,
    *,
    progress: Progress,
    verdicts: Path | None = None,
    held: Weights | None = None,
    budget_bytes: int = 0,
) -> Stage:
    """Loads layers ``[first, end)`` of a model in one go; see :func:`load_steps`."""
    steps = load_steps(
        folder,
        first,
        end,
        progress=progress,
        verdicts=verdicts,
        held=held,
        budget_bytes=budget_bytes,
    )
    while True:
        try:
            next(steps)
        except StopIteration as done:
            stage: Stage = done.value
            return stage


def load_steps(
    folder: Path,
    first: int,
    end: int,
    *,
    progress: Progress,
    verdicts: Path | None = None,
    held: Weights | None = None,
    budget_bytes: int = 0,
) -> Steps:
    """Loads layers ``[first, end)`` of a model, ready to run, in steps of some milliseconds.

    Every step is to be taken on the MLX thread; other work may be done there between them. One
    step yields the names of the tensors that are read from then on: before it no byte of them is.

    Args:
        folder: Hugging Face layout.
        progress: told (done bytes, total bytes, phase) as loading goes on; phases are
            "checking", "reading", "compiling". What is held already counts as done.
        verdicts: folder where results of the self-check are kept.
        held: evaluated weights of the same model, by name; the stage shares those that it needs,
            the others are taken out of it before anything is read.
        budget_bytes: the most that the stage may take; 0: no limit.

    Raises:
        ModelNotFound: there is no such folder.
        ModelBroken: a file is missing, cut short or unreadable, or does not fit the others.
        ModelTooBig: it takes more than ``budget_bytes``; nothing has been read then.
        UnknownArchitecture: mlx-lm has no such model.
        CutRefused: these layers cannot be run apart from the others.
        RuntimeError: MLX got no memory (``shortcomings.py``).
    """
    progress(0, 0, "checking")
    held = {} if held is None else held
    if not folder.is_dir():
        raise ModelNotFound(f"There is no model folder {folder}", model=folder)
    config = seam.read_config(folder)
    seam.model_classes(config)
    headers = folder_headers(folder)
    if not headers:
        raise ModelBroken(
            f"{folder.name} has no weights",
            "there is no model*.safetensors in it",
            "Fetch the model again",
            path=folder,
        )
    hollow = _hollow(folder, headers)
    model = seam.build_model(folder, hollow.weights)
    check_range(model, first, end)
    yield None
    verdict = check_cut(config, first, end, verdicts)
    yield None
    hollow_stage = Stage(model, first, end)
    shapes = hollow_stage.parameters()
    _check_room(
        folder, hollow_stage, sum(a.nbytes for a in _distinct(shapes.values())), budget_bytes
    )
    for name in set(held) - set(shapes):
        del held[name]
    needed = hollow.needed([array for name, array in shapes.items() if name not in held])
    yield frozenset(needed)
    weights = hollow.weights | _lazy_weights(folder, headers, needed)
    model = seam.build_model(folder, weights)
    if held:
        model.update(tree_unflatten(list(held.items())))
    stage = Stage(model, first, end)
    stage.can_batch &= verdict.batches
    stage.can_trim &= verdict.trims
    stage.can_fork &= verdict.forks
    stage.keeps_answers &= verdict.answers
    stage.takes_blocks &= verdict.blocks
    stage.weights = stage.parameters()
    stage.weight_bytes = sum(array.nbytes for array in _distinct(stage.weights.values()))
    yield None
    with ReadAhead(_extents(folder, headers, needed)) as ahead:
        yield from _read(folder, stage, held, ahead, progress)
    progress(stage.weight_bytes, stage.weight_bytes, "compiling")
    stage.warm_up()
    spare_memory.give_back()
    return stage


def _check_room(folder: Path, stage: Stage, weight_bytes: int, budget_bytes: int) -> None:
    if not 0 < budget_bytes < weight_bytes:
        return
    missing = weight_bytes - budget_bytes
    raise ModelTooBig(
        f"Layers {stage.first} to {stage.end - 1} of {folder.name} do not fit here",
        f"they take {weight_bytes} bytes, {missing} more than it may hold",
        "Raise --memory, or add nodes",
        needed_bytes=weight_bytes,
        available_bytes=budget_bytes,
        missing_bytes=missing,
    )


@dataclass(frozen=True, slots=True)
class _Hollow:
    """Placeholders for every tensor of a model, made from one seed for each group of them."""

    weights: Weights
    seeds: Weights  # by group
    groups: dict[str, str]  # by name of tensor

    def needed(self, results: Iterable[mx.array]) -> set[str]:
        """Names of the tensors in whose groups are some that the results are made of."""
        live = reached(results, self.seeds)
        return {name for name, group in self.groups.items() if group in live}


def _hollow(folder: Path, headers: Headers) -> _Hollow:
    """A group is what lies in one file and belongs to one layer; few enough to be traced at once.

    Raises:
        ModelBroken: a tensor has a type that MLX does not read.
    """
    weights, seeds, groups = {}, {}, {}
    for file, tensors in headers.items():
        for name, info in tensors.items():
            if info.dtype not in _TYPES:
                raise ModelBroken(
                    f"{name} has the type {info.dtype}",
                    "MLX does not read it",
                    "Convert the model with mlx_lm.convert",
                    path=folder / file,
                )
            group = groups[name] = " ".join((file, info.dtype, _layer(name)))
            if group not in seeds:
                seeds[group] = mx.zeros((), _TYPES[info.dtype])
            weights[name] = mx.broadcast_to(seeds[group], info.shape)
    return _Hollow(weights, seeds, groups)


def _layer(name: str) -> str:
    """The part of a tensor's name that says of which layer it is."""
    found = _LAYER.match(name)
    return found[0] if found else name


def _lazy_weights(folder: Path, headers: Headers, needed: set[str]) -> Weights:
    """The needed tensors, unread; files without any are not opened."""
    weights: Weights = {}
    for file, tensors in headers.items():
        wanted = needed & set(tensors)
        if not wanted:
            continue
        try:
            loaded = cast(Weights, mx.load(str(folder / file)))
        except (RuntimeError, ValueError, OSError) as error:
            raise _unreadable(folder / file, error) from error
        weights |= {name: loaded[name] for name in wanted}
    return weights


def _extents(folder: Path, headers: Headers, needed: set[str]) -> list[Extent]:
    """Where the needed tensors lie, in about the order in which they are evaluated."""
    places = [
        (_order(name), Extent(folder / file, info.begin, info.end))
        for file, tensors in headers.items()
        for name, info in tensors.items()
        if name in needed
    ]
    return [extent for _, extent in sorted(places, key=lambda place: place[0])]


def _order(name: str) -> tuple[int, str]:
    """By layer; what is outside of the layers comes first, as it mostly does in models."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else -1, name


def _distinct(arrays: Iterable[mx.array]) -> list[mx.array]:
    """Tied weights once."""
    return list({id(array): array for array in arrays}.values())


def _read(
    folder: Path, stage: Stage, held: Weights, ahead: ReadAhead, progress: Progress
) -> Generator[None, None, None]:
    """Evaluates the stage's weights in slices, so that progress moves and little is held twice."""
    arrays = _distinct(stage.weights.values())
    here = {id(array) for array in held.values()}
    new = [array for array in arrays if id(array) not in here]
    total = stage.weight_bytes
    done = total - sum(array.nbytes for array in new)
    progress(done, total, "reading")
    batch: list[mx.array] = []
    size = 0
    for number, array in enumerate(new, 1):
        batch.append(array)
        size += array.nbytes
        if size < _SLICE_BYTES and number < len(new):
            continue
        try:
            mx.eval(batch)
        except RuntimeError as error:
            if is_out_of_memory(error):  # the files are well
                raise
            raise _unreadable(folder, error) from error
        done += size
        ahead.read(size)
        progress(done, total, "reading")
        batch, size = [], 0
        yield


def _unreadable(path: Path, error: Exception) -> ModelBroken:
    return ModelBroken(
        f"The weights of {path.name} cannot be read",
        str(error)[:500],
        "Check the disk of this machine; if a file is damaged, fetch the model again",
        path=path,
    )
