"""Loading a stage: only its share of a model's weights is ever read.

First the whole model is made of placeholders, lazy zeros of the shapes in the files' headers, which
cost nothing. Tracing the stage's results back through layers, quantisation and ``sanitize`` tells
which tensors of which files they come from. Then the model is made again with those tensors lazily
loaded, and what belongs to the stage is evaluated, slice by slice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx

from parallax.fabric.errors import ModelBroken, ModelNotFound
from parallax.fabric.safetensors import TensorInfo, folder_headers
from parallax.node import mlx_lm_seam as seam
from parallax.node.mlx_lm_seam import Weights
from parallax.node.stage import Stage, check_range
from parallax.node.trace import reached
from parallax.node.twin import check_cut

Headers = Mapping[str, Mapping[str, TensorInfo]]
Progress = Callable[[int, int, str], None]

_SLICE_BYTES = 64 << 20
_LAYER = re.compile(r"\D*\.\d+\.")  # a name up to its first number

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
    folder: Path, first: int, end: int, *, progress: Progress, verdicts: Path | None = None
) -> Stage:
    """Loads layers ``[first, end)`` of a model, ready to run. To be called on the MLX thread.

    Args:
        folder: Hugging Face layout.
        progress: told (done bytes, total bytes, phase) as loading goes on; phases are
            "checking", "reading", "compiling".
        verdicts: folder where results of the self-check are kept.

    Raises:
        ModelNotFound: there is no such folder.
        ModelBroken: a file is missing, cut short or unreadable, or does not fit the others.
        UnknownArchitecture: mlx-lm has no such model.
        CutRefused: these layers cannot be run apart from the others.
    """
    progress(0, 0, "checking")
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
    verdict = check_cut(config, first, end, verdicts)
    needed = hollow.needed(Stage(model, first, end).parameters().values())
    weights = hollow.weights | _lazy_weights(folder, headers, needed)
    stage = Stage(seam.build_model(folder, weights), first, end)
    stage.can_batch &= verdict.batches
    stage.can_trim &= verdict.trims
    _read(folder, stage, progress)
    progress(stage.weight_bytes, stage.weight_bytes, "compiling")
    stage.warm_up()
    mx.clear_cache()
    return stage


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


def _read(folder: Path, stage: Stage, progress: Progress) -> None:
    """Evaluates the stage's weights in slices, so that progress moves and little is held twice."""
    arrays = list({id(array): array for array in stage.parameters().values()}.values())
    total = sum(array.nbytes for array in arrays)
    stage.weight_bytes = total
    done = 0
    progress(0, total, "reading")
    batch: list[mx.array] = []
    size = 0
    for number, array in enumerate(arrays, 1):
        batch.append(array)
        size += array.nbytes
        if size < _SLICE_BYTES and number < len(arrays):
            continue
        try:
            mx.eval(batch)
        except RuntimeError as error:
            raise _unreadable(folder, error) from error
        done += size
        progress(done, total, "reading")
        batch, size = [], 0


def _unreadable(path: Path, error: Exception) -> ModelBroken:
    return ModelBroken(
        f"The weights of {path.name} cannot be read",
        str(error)[:500],
        "Fetch the model again",
        path=path,
    )
