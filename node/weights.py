"""Loading a stage: only its share of a model's weights is ever read.

First the whole model is made of placeholders, lazy zeros of the shapes in the files' headers, which
cost nothing. Tracing the stage's results back through layers, ``sanitize`` and quantisation tells
exactly which tensors of which files they come from. Then the model is made again with those tensors
lazily loaded, and what belongs to the stage is evaluated, slice by slice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
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

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

_SLICE_BYTES = 64 << 20

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
    placeholders = _placeholders(folder, headers)
    hollow = seam.build_model(folder, placeholders)
    check_range(hollow, first, end)
    verdict = check_cut(config, first, end, verdicts)
    needed = _needed(folder, Stage(hollow, first, end), placeholders)
    stage = Stage(seam.build_model(folder, _lazy_weights(folder, headers, needed)), first, end)
    stage.can_batch &= verdict.batches
    stage.can_trim &= verdict.trims
    _read(folder, stage, progress)
    progress(stage.weight_bytes, stage.weight_bytes, "compiling")
    stage.warm_up()
    mx.clear_cache()
    return stage


def _needed(folder: Path, hollow: Stage, placeholders: Weights) -> set[str]:
    """Names, as in the files, of the tensors that the stage's weights are made of."""
    used = list(hollow.parameters())

    def make(values: list[mx.array]) -> list[mx.array]:
        raw = dict(zip(placeholders, values, strict=True))
        made = seam.named(seam.build_model(folder, raw).parameters())
        return [made[name] for name in used]

    try:
        return reached(make, placeholders)
    except ModelBroken as error:
        # A ``sanitize`` that looks at values cannot be followed; then any tensor may be needed.
        log.debug("every file of %s is opened: %s", folder, error)
        return set(placeholders)


def _placeholders(folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]]) -> Weights:
    found = {}
    for file, tensors in headers.items():
        for name, info in tensors.items():
            if info.dtype not in _TYPES:
                raise ModelBroken(
                    f"{name} has the type {info.dtype}",
                    "MLX does not read it",
                    "Convert the model with mlx_lm.convert",
                    path=folder / file,
                )
            found[name] = mx.zeros(info.shape, _TYPES[info.dtype])
    return found


def _lazy_weights(
    folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]], needed: set[str]
) -> Weights:
    """Every tensor of the model: lazily loaded if needed, else a placeholder."""
    weights = _placeholders(folder, headers)
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
