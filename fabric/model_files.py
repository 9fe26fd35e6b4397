"""What may lie in a model's folder: plain files that are its own, of sane sizes and numbers.

A folder is untrusted: somebody made it, and it may have come from anywhere.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from parallax.fabric.errors import ModelBroken

JSON_BYTES = 16 << 20  # of a configuration
TOKENIZER_BYTES = 256 << 20  # of a vocabulary; the largest known have some 40 MB
MOST_FILES = 4096
MOST_VALUES = 200_000  # of one JSON file, all in all
MOST_DEPTH = 32
MOST_LAYERS = 4096
MOST_COUNT = 1 << 20  # of heads, experts and whatever else is counted
MOST_NUMBER = 1 << 48
_COUNTED = re.compile(r"(?:num|n)_(?:\w+_)?(?:layers?|experts?|heads?|blocks?|groups?)$")

_REFETCH = "Fetch the model again, from a source that you trust."
# Patterns of files that are read whole, and of how many bytes they may be.
_READ = {
    "*.json": TOKENIZER_BYTES,
    "*.jinja": JSON_BYTES,
    "*.txt": TOKENIZER_BYTES,
    "*.tiktoken": TOKENIZER_BYTES,
    "*.model": TOKENIZER_BYTES,
}
_WEIGHTS = "*.safetensors"


def check_files(folder: Path, name: str) -> None:
    """See that every file a model is read from is a plain one, of this folder, and not too large.

    A link may lead to another file of the folder, or, in the hub's cache, to where that keeps the
    files of all snapshots of the same model.

    Raises:
        ModelBroken: one is not.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    count = 0
    for pattern, limit in [*_READ.items(), (_WEIGHTS, 0)]:
        for file in folder.glob(pattern):
            count += 1
            if count > MOST_FILES:
                raise ModelBroken(f"The model {name} has more than {MOST_FILES} files", path=folder)
            _check_file(file, name, roots, limit)


def _check_file(file: Path, name: str, roots: Iterable[Path], limit: int) -> None:
    try:
        real = file.resolve(strict=True)
        facts = real.stat()
    except (OSError, RuntimeError) as error:  # gone, a link to nowhere, or links in a circle
        raise ModelBroken(
            f"{file.name} of {name} cannot be read", _why(error), _REFETCH, path=file
        ) from error
    if not any(real.is_relative_to(root) for root in roots):
        raise ModelBroken(
            f"{file.name} of {name} lies outside of its folder",
            f"it is a link to {real}",
            "Put the file itself there, or name the folder that it is in.",
            path=file,
        )
    if not stat.S_ISREG(facts.st_mode):
        raise ModelBroken(f"{file.name} of {name} is no plain file", fix=_REFETCH, path=file)
    if limit and facts.st_size > limit:
        raise ModelBroken(
            f"{file.name} of {name} is absurdly large", f"{facts.st_size} bytes", path=file
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder; an empty one where there is no such file.

    Raises:
        ModelBroken: it is no plain file, too large, or no JSON.
    """
    return load_json(path)[1] if path.exists() else {}


def load_json(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The file as it is, and the JSON object that it holds; other values become an empty object.

    Raises:
        ModelBroken: it is not there, no plain file, too large, no JSON, or senselessly nested.
    """
    what = f"{path.name} of {path.parent.name} cannot be read"
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise ModelBroken(what, "it is no plain file", _REFETCH, path=path)
        if facts.st_size > JSON_BYTES:
            raise ModelBroken(what, f"it has {facts.st_size} bytes", _REFETCH, path=path)
        with path.open("rb") as stream:
            text = stream.read(JSON_BYTES + 1)
    except OSError as error:
        raise ModelBroken(what, _why(error), _REFETCH, path=path) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelBroken(
            f"{path.name} of {path.parent.name} is not valid JSON", str(error), _REFETCH, path=path
        ) from error
    _check_form(value, path)
    return text, value if isinstance(value, dict) else {}


def _check_form(value: object, path: Path) -> None:
    left = MOST_VALUES
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if not isinstance(item, (dict, list)):
            continue
        children = item.values() if isinstance(item, dict) else item
        left -= len(item)
        if left < 0 or depth > MOST_DEPTH:
            raise ModelBroken(
                f"{path.name} of {path.parent.name} makes no sense",
                "it is nested too deeply, or has too many values",
                _REFETCH,
                path=path,
            )
        waiting += [(child, depth + 1) for child in children]


def check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """See that no number of a configuration is beyond what any model has.

    Layers, experts, heads become loops and lists when a model is built.

    Raises:
        ModelBroken: one is.
    """
    waiting: list[object] = [config]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
            bad = next((v for v in item if not _sane("", v)), None)
            name = "a list"
        elif isinstance(item, dict):
            waiting += item.values()
            name, bad = next(((k, v) for k, v in item.items() if not _sane(k, v)), ("", None))
        else:
            continue
        if bad is not None:
            raise ModelBroken(
                f"{path.name} of {path.parent.name} makes no sense",
                f"{name[:60]} is {str(bad)[:40]}",
                _REFETCH,
                path=path,
            )


def _sane(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int):
        return True
    if _COUNTED.search(name):
        return -1 <= value <= (MOST_LAYERS if "layer" in name else MOST_COUNT)
    return abs(value) <= MOST_NUMBER


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
