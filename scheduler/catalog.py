"""Models that may be chosen: the built-in one, those on this disk, and well-known hub ids."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from parallax.fabric.errors import ModelError
from parallax.fabric.model_files import read_json
from parallax.fabric.models import BUILTIN, builtin_path
from parallax.fabric.safetensors import folder_headers
from parallax.scheduler.generation import CatalogModel, ServedModel
from parallax.scheduler.model_facts import parameter_count

LOCAL_PROVIDER = "local"
BUILTIN_PROVIDER = "Parallax"
_MOST_LOCAL = 200  # of one folder: a list that a person can read

WELL_KNOWN = (
    CatalogModel("Qwen/Qwen3-0.6B", "0.6B", "Qwen"),
    CatalogModel("Qwen/Qwen3-1.7B", "1.7B", "Qwen"),
    CatalogModel("Qwen/Qwen3-4B", "4B", "Qwen"),
    CatalogModel("Qwen/Qwen3-8B", "8B", "Qwen"),
    CatalogModel("Qwen/Qwen3-32B", "32B", "Qwen"),
    CatalogModel("Qwen/Qwen3-30B-A3B", "30B", "Qwen"),
    CatalogModel("mlx-community/Qwen3-0.6B-4bit", "0.6B", "mlx-community"),
    CatalogModel("mlx-community/Qwen3-8B-4bit", "8B", "mlx-community"),
    CatalogModel("mlx-community/Qwen3-30B-A3B-4bit", "30B", "mlx-community"),
    CatalogModel("mlx-community/Llama-3.2-3B-Instruct-4bit", "3B", "mlx-community"),
    CatalogModel("mlx-community/Mistral-7B-Instruct-v0.3-4bit", "7B", "mlx-community"),
    CatalogModel("mlx-community/Llama-3.3-70B-Instruct-4bit", "70B", "mlx-community"),
)

_SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[Bb](?![A-Za-z])")


def list_models(state_dir: Path, served: ServedModel | None = None) -> list[CatalogModel]:
    """Every model by name once: built-in, current, ``state_dir/models``, local cache, well-known.

    Reads headers from the disk, each folder's once.
    """
    found: dict[str, CatalogModel] = {}
    for model in _all(state_dir, served):
        found.setdefault(model.name, model)
    return list(found.values())


def size_text(parameters: float) -> str:
    """Parameters as people write them: 0.6B, 8B, 235B, 2.4M."""
    unit, letter = (1e9, "B") if parameters >= 1e8 else (1e6, "M")
    count = parameters / unit
    return f"{count:.0f}{letter}" if count >= 9.95 else f"{count:.2g}{letter}"


def _all(state_dir: Path, served: ServedModel | None) -> Iterator[CatalogModel]:
    with contextlib.suppress(ModelError):  # an installation without it offers the others
        yield CatalogModel(BUILTIN, _folder_size(builtin_path()) or "", BUILTIN_PROVIDER)
    if served is not None:
        yield _described(served.name, served.folder)
    for folder in _folders(state_dir / "models"):
        yield _described(folder.name, folder)
    for name, folder in _cached():
        yield _described(name, folder)
    yield from WELL_KNOWN


def _described(name: str, folder: Path) -> CatalogModel:
    provider, slash, base = name.partition("/")
    match = _SIZE_IN_NAME.search(base) if slash else None
    size = size_text(float(match.group(1)) * 1e9) if match else _folder_size(folder) or ""
    return CatalogModel(name, size, provider if slash else LOCAL_PROVIDER)


def _folders(place: Path) -> list[Path]:
    """Model folders in a folder, by name."""
    try:
        entries = sorted(entry for entry in place.iterdir() if _is_model(entry))
    except OSError:
        return []
    return entries[:_MOST_LOCAL]


def _cached() -> list[tuple[str, Path]]:
    """Hub ids and snapshots in the local Hugging Face cache, by id."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found: list[tuple[str, Path]] = []
    for repository in sorted(Path(HF_HUB_CACHE).glob("models--*--*"))[:_MOST_LOCAL]:
        snapshots = [entry for entry in repository.glob("snapshots/*") if _is_model(entry)]
        if snapshots:
            name = repository.name.removeprefix("models--").replace("--", "/", 1)
            found.append((name, max(snapshots, key=lambda entry: entry.stat().st_mtime)))
    return found


def _is_model(entry: Path) -> bool:
    return (entry / "config.json").is_file() and any(entry.glob("model*.safetensors"))


def _folder_size(folder: Path) -> str | None:
    """Size of a model on disk; None if its files cannot be read."""
    try:
        changed = max(file.stat().st_mtime_ns for file in folder.glob("model*.safetensors"))
        return _measured(folder, changed)
    except (OSError, ValueError, ModelError):
        return None


@lru_cache(maxsize=4 * _MOST_LOCAL)
def _measured(folder: Path, _changed: int) -> str:
    config = read_json(folder / "config.json")
    tensors = {key: info for file in folder_headers(folder).values() for key, info in file.items()}
    return size_text(parameter_count(config, tensors))
