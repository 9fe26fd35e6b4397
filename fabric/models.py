"""Where a model is on disk: ``builtin``, a folder, or a hub id.

Only configuration and the headers of the weight files are read; nothing in a
model's folder is ever executed, and a folder that asks for it is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallax.fabric.errors import ModelBroken, ModelError, ModelNotFound
from parallax.fabric.model_files import check_files, check_numbers, load_json
from parallax.fabric.safetensors import folder_headers, header_bytes

BUILTIN = "builtin"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_BASE_NAME = re.compile(r"\w[\w.+ -]{0,127}")
_HUB_FILES = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.tiktoken",
    "tokenizer.model",
    "tiktoken.model",
    "model*.safetensors",
]

DESCRIBING_FILES = ("config.json", "generation_config.json")  # what a stage reads beside weights
PARTS = "parts"  # a file in folders that hold only parts of a model's weights


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model that is whole on this disk."""

    name: str  # what users pass as ``model``: "builtin", a folder's base name, a hub id
    location: str  # "builtin", an absolute path, or a hub id
    path: Path
    digest: str  # SHA-256 over location, config.json and the weight files' headers, in hex
    config: Mapping[str, Any] = field(repr=False)


def resolve(name: str, *, state_dir: Path, download: bool = True) -> ModelFolder:
    """Find the model that a person or the scheduler names, and check that it is whole.

    ``name`` is ``builtin``, a folder (absolute, relative, ``~``, or the base
    name of one in ``state_dir/models``), or a hub id such as
    ``Qwen/Qwen3-0.6B``. A hub id is looked up in the local Hugging Face cache
    first and fetched only if it is not there and ``download`` is set. Blocks
    on the disk and on the network.

    Raises:
        ModelNotFound: there is no such folder or id, or it cannot be fetched now.
        ModelBroken: a file is missing, cut short or unreadable, or the folder
            asks for its own code to be run.
    """
    if name == BUILTIN:
        return open_folder(builtin_path(), name=BUILTIN, location=BUILTIN)
    if not name.strip() or "\0" in name or len(name) > 4096:
        raise ModelNotFound(
            "No model was named",
            fix="Give a folder, a hub id such as Qwen/Qwen3-0.6B, or builtin.",
            model=name[:100].replace("\0", ""),
        )
    folder = _local(name, state_dir)
    if folder is not None:
        return open_folder(folder, name=folder.name, location=str(folder))
    if not is_hub_id(name):
        raise ModelNotFound(
            f"There is no model folder {name}",
            "It is not a folder on this machine, and it is not a hub id either.",
            "Give the path of a folder that holds config.json and model*.safetensors, "
            "a hub id such as Qwen/Qwen3-0.6B, or builtin.",
            model=name,
        )
    return _from_hub(name, download)


def is_hub_id(name: str) -> bool:
    """Whether a name can be one of the hub's: ``owner/model``."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name


def builtin_path() -> Path:
    """Folder of the model that comes with the package.

    Raises:
        ModelNotFound: this installation does not carry it.
    """
    spec = importlib.util.find_spec("parallax.demo")
    places = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(places[0]) / "model" if places else None
    if path is None or not (path / "config.json").is_file():
        raise ModelNotFound(
            "The built-in model is not in this installation",
            "Its files are missing from the package.",
            "Install parallax-cluster again, or name another model.",
            model=BUILTIN,
        )
    return path.resolve()


def open_folder(path: Path, *, name: str, location: str, parts: bool = False) -> ModelFolder:
    """Check that a folder holds a whole model, and read what it says of itself.

    With ``parts`` it may lack some of the weights' bytes, as fetched models do.

    Raises:
        ModelBroken: see :func:`resolve`.
    """
    if not parts and (path / PARTS).exists():
        raise ModelBroken(
            f"The folder {path} holds only parts of a model",
            "A node keeps there what its own layers need.",
            "Give the folder that the model was fetched from.",
            path=path,
        )
    text, config = _read_config(path / "config.json", name)
    _refuse_code(path, name, config)
    check_files(path, name)
    check_numbers(config, path / "config.json")
    weights = sorted(path.glob("model*.safetensors"))
    if not weights:
        raise ModelBroken(
            f"The model {name} has no weights",
            f"There is no model*.safetensors in {path}.",
            "Fetch it again, or convert it with mlx_lm.convert.",
            path=path,
        )
    _check_shards(path, name)
    folder_headers(path)  # raises ModelBroken for files that are cut short
    # Where it is from counts: a model and what was tuned from it have the same headers.
    digest = hashlib.sha256(location.encode() + b"\0" + text)
    for file in weights:
        digest.update(file.name.encode() + b"\0" + header_bytes(file))
    return ModelFolder(name, location, path, digest.hexdigest(), config)


def _local(name: str, state_dir: Path) -> Path | None:
    """The folder that ``name`` means, or None if it can only be a hub id."""
    if _BASE_NAME.fullmatch(name) and ".." not in name:
        kept = state_dir / "models" / name
        if kept.is_dir():
            return kept.resolve()
    try:
        path = Path(name).expanduser()
        if path.is_dir() and ((path / "config.json").exists() or not _HUB_ID.fullmatch(name)):
            return path.resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError):  # a name too long for a path, or no such ~user
        return None
    if is_file:
        raise ModelNotFound(
            f"{name} is a file, not a model folder",
            fix="Give the folder that holds config.json and model*.safetensors.",
            model=name,
        )
    return None


def _from_hub(name: str, download: bool) -> ModelFolder:
    cached = _fetch(name, local_only=True)
    if cached is not None:
        try:
            return open_folder(cached, name=name, location=name)
        except ModelError:
            if not download:
                raise  # else: an interrupted download; the hub completes it
    fetched = _found(_fetch(name, local_only=False) if download else None, name)
    return open_folder(fetched, name=name, location=name)


def _found(path: Path | None, name: str) -> Path:
    if path is None:
        raise ModelNotFound(
            f"The model {name} is not on this machine",
            "It is not in the local Hugging Face cache, and nothing is downloaded here.",
            f"Fetch it with: hf download {name}",
            model=name,
        )
    return path


def fetch_hub_snapshot(name: str) -> Path:
    """Fetches the files of a hub's model without its weights: a folder called by its commit.

    Raises:
        ModelNotFound: the hub has no such model, or does not answer.
    """
    files = [pattern for pattern in _HUB_FILES if not pattern.endswith(".safetensors")]
    return _found(_fetch(name, local_only=False, patterns=files), name)


def fetch_hub_file(name: str, file: str, commit: str) -> Path:
    """Fetches one file of a hub's model, whose commit is known.

    Raises:
        ModelNotFound: the hub does not give it out.
    """
    return _found(_fetch(name, local_only=False, patterns=[file], commit=commit), name) / file


def _fetch(
    name: str,
    *,
    local_only: bool,
    patterns: list[str] = _HUB_FILES,
    commit: str | None = None,
) -> Path | None:
    """The snapshot of a hub id; None if it is looked for locally and is not there."""
    import huggingface_hub  # imports slowly, and most starts do not need it
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=patterns, local_files_only=local_only, revision=commit
            )
        )
    except (errors.GatedRepoError, errors.RepositoryNotFoundError) as error:
        gated = isinstance(error, errors.GatedRepoError)
        raise ModelNotFound(
            f"The hub does not give out {name}" if gated else f"The hub has no model {name}",
            "Its owner grants access on request." if gated else "",
            f"Ask for access at https://huggingface.co/{name}, then log in with: hf auth login"
            if gated
            else "Check the spelling; a private model needs a login: hf auth login",
            model=name,
        ) from error
    except (errors.HfHubHTTPError, errors.HTTPError, OSError, ValueError) as error:
        if local_only:
            return None
        reason = str(error).strip().splitlines()
        raise ModelNotFound(
            f"The model {name} could not be fetched",
            f"It is not in the local cache, and the hub did not answer: "
            f"{reason[0].removeprefix('Got: ') if reason else type(error).__name__}",
            "Check the network connection, or give a local folder instead.",
            model=name,
        ) from error


def _read_config(path: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    if not path.exists():
        raise ModelBroken(
            f"The model {name} has no config.json",
            f"{path.parent} is not a model folder, or it is incomplete.",
            "Give the folder that holds config.json and model*.safetensors.",
            path=path,
        )
    text, config = load_json(path)
    if not isinstance(config.get("model_type"), str):
        fix = "Fetch the model again."
        raise ModelBroken(f"config.json of {name} names no model_type", "", fix, path=path)
    return text, config


def _refuse_code(path: Path, name: str, config: Mapping[str, Any]) -> None:
    """mlx-lm runs the Python file that ``model_file`` names; we never do.

    ``auto_map`` names code for transformers, which is told never to run it: neither a model nor a
    tokenizer that has a ``tokenizer.json`` needs any of it here.
    """
    if config.get("model_file") is not None:
        raise ModelBroken(
            f"The model {name} wants to run its own code",
            "config.json names a model_file, and code from a model's folder is never executed.",
            "Use a model of an architecture that mlx-lm knows.",
            path=path / "config.json",
        )


def _check_shards(path: Path, name: str) -> None:
    """Every file that the index names lies in the folder, and is there."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        shards = {str(file) for file in load_json(index)[1]["weight_map"].values()}
    except (ModelBroken, KeyError, TypeError, AttributeError) as error:
        why = error.why if isinstance(error, ModelBroken) else str(error)
        raise ModelBroken(f"The weight index of {name} is unreadable", why, path=index) from error
    outside = sorted(s for s in shards if Path(s).name != s or s in {"", ".", ".."})
    if outside:
        raise ModelBroken(
            f"The weight index of {name} points out of its folder",
            f"It names {outside[0]!r}.",
            "Do not use this model; fetch it from a source you trust.",
            path=index,
        )
    absent = sorted(s for s in shards if not (path / s).is_file())
    if absent:
        raise ModelBroken(
            f"The model {name} is incomplete",
            f"{len(absent)} of {len(shards)} weight files are missing, {absent[0]} first.",
            "Fetch the model again.",
            path=path / absent[0],
        )
