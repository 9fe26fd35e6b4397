"""What may lie in a model's folder: plain files that are its own, of sane sizes and numbers.

A folder is untrusted: somebody made it, and it may have come from anywhere.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parallax.fabric.errors import ModelBroken

JSON_BYTES = 4 << 20  # of a configuration; those with thousands of added tokens have 1 or 2 MB
INDEX_BYTES = 64 << 20  # of the index of a model's weight files: a line for each tensor
TOKENIZER_BYTES = 128 << 20  # of a vocabulary as JSON; the largest known have some 40 MB
PIECES_BYTES = 32 << 20  # of one in other forms; the largest known have some 10 MB
MOST_FILES = 4096
MOST_VALUES = 200_000  # of one JSON file, all in all
# Of brackets and commas, one of which stands before every value, and which stand in texts too.
MOST_MARKS = 500_000
MOST_INDEX_VALUES = 1_000_000  # tensors; experts in four bits, each of three tensors, make 210,000
MOST_TOKENIZER_MARKS = 6_000_000  # the largest known have some 2 million
MOST_LINES = 3_000_000  # of a vocabulary that has one piece in each
MOST_DEPTH = 32
MOST_LAYERS = 4096
MOST_COUNT = 1 << 20  # of heads, experts and whatever else is counted
MOST_NUMBER = 1 << 48
_COUNTED = re.compile(r"(?:num|n)_(?:\w+_)?(?:layers?|experts?|heads?|blocks?|groups?)$")

_REFETCH = "Fetch the model again, from a source that you trust."
# Patterns of files that are read whole, and of how many bytes they may be.
READ = {
    "*.json": JSON_BYTES,
    "*.jinja": JSON_BYTES,
    "*.txt": PIECES_BYTES,
    "*.tiktoken": PIECES_BYTES,
    "*.model": PIECES_BYTES,
}
_VOCABULARIES = dict.fromkeys(
    ("tokenizer.json", "vocab.json", "tekken.json"), (TOKENIZER_BYTES, MOST_TOKENIZER_MARKS)
)
# JSON that is read by us or by the tokenizer library; what else lies there may be of any size.
_NEEDED = re.compile(
    r"(?:(?:generation_|tokenizer_|processor_|preprocessor_)?config|tokenizer|special_tokens_map|"
    r"added_tokens|vocab|tekken|chat_template|.*\.index)\.json"
)
_WEIGHTS = "*.safetensors"
_PIECE = 1 << 20
_JSON_MARKS = (b",", b"[", b"{")


def check_files(folder: Path, name: str) -> frozenset[Path]:
    """See that every file a model is read from is a plain one, of this folder, and not too large.

    A link may lead to another file of the folder, or, in the hub's cache, to where that keeps the
    files of all snapshots of the same model.

    Returns:
        Files that nothing needs and that are too large to be read: the log of a training, say.

    Raises:
        ModelBroken: one is not.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    count = 0
    beside: set[Path] = set()
    for pattern, limit in [*READ.items(), (_WEIGHTS, 0)]:
        for file in folder.glob(pattern):
            count += 1
            if count > MOST_FILES:
                raise ModelBroken(f"The model {name} has more than {MOST_FILES} files", path=folder)
            most, marks = _VOCABULARIES.get(file.name, (limit, MOST_MARKS))
            if file.name.endswith(".index.json"):
                most, marks = INDEX_BYTES, MOST_INDEX_VALUES
            needed = file.suffix != ".json" or _NEEDED.fullmatch(file.name) is not None
            _check_file(file, name, roots, most if needed else 0)
            if not needed and file.stat().st_size > most:
                beside.add(file)
            elif file.suffix == ".json":
                _check_marks(file, marks, _JSON_MARKS)
            elif file.suffix in (".txt", ".tiktoken"):
                _check_marks(file, MOST_LINES, (b"\n", b"\r"))
    return frozenset(beside)


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


def _check_marks(file: Path, most: int, marks: Sequence[bytes]) -> None:
    """Python makes some 60 bytes of a list that takes three, so values are counted beforehand."""
    try:
        with file.open("rb") as stream:
            while piece := stream.read(_PIECE):
                most -= _count(piece, marks)
                if most < 0:
                    raise ModelBroken(_what(file), "it has too many values", _REFETCH, path=file)
    except OSError as error:
        raise ModelBroken(_what(file), _why(error), _REFETCH, path=file) from error


def _count(text: bytes, marks: Sequence[bytes]) -> int:
    return sum(text.count(mark) for mark in marks)


def _what(path: Path) -> str:
    return f"{path.name} of {path.parent.name} cannot be read"


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
    what = _what(path)
    most, values, marks = JSON_BYTES, MOST_VALUES, MOST_MARKS
    if path.name.endswith(".index.json"):
        most, values, marks = INDEX_BYTES, MOST_INDEX_VALUES, MOST_INDEX_VALUES
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise ModelBroken(what, "it is no plain file", _REFETCH, path=path)
        if facts.st_size > most:
            raise ModelBroken(what, f"it has {facts.st_size} bytes", _REFETCH, path=path)
        with path.open("rb") as stream:
            text = stream.read(most + 1)
    except OSError as error:
        raise ModelBroken(what, _why(error), _REFETCH, path=path) from error
    if _count(text, _JSON_MARKS) > marks:
        raise ModelBroken(what, "it has too many values", _REFETCH, path=path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelBroken(
            f"{path.name} of {path.parent.name} is not valid JSON", str(error), _REFETCH, path=path
        ) from error
    _check_form(value, path, values)
    return text, value if isinstance(value, dict) else {}


def _check_form(value: object, path: Path, left: int) -> None:
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
