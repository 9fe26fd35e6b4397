"""What of a model's folder the tokenizer library gets to see: checked files, by known names.

transformers follows links, and opens whatever file its settings name: ``fast_tokenizer_files``,
``vocab_file``, ``merges``, files of folders below. So it reads a folder of our own, in which are
links to the model's own checked files, and settings without such names. A template in
``additional_chat_templates`` is never the one that a chat uses, so none of them is there.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallax.fabric.model_files import READ, check_files, load_json

# Settings in which transformers has other files named, and their contents put in. Where code is
# named it would refuse to read what needs none of it: a tokenizer.json says everything.
_REWRITTEN = ("config.json", "special_tokens_map.json", "tokenizer_config.json")
_NAMING = frozenset(
    (
        "auto_map",
        "gguf_file",
        "init_inputs",
        "merges",
        "sp_model_kwargs",
        "tokenizer_object",
        "vocab",
    )
)
_TEXTS = frozenset(("chat_template", "model_type", "tokenizer_class"))


@contextlib.contextmanager
def plain_folder(folder: Path) -> Iterator[Path]:
    """A folder for the library, of the same name, for as long as it loads.

    Raises:
        ModelBroken: a file is none of this folder's own, too large, or its JSON makes no sense.
    """
    beside = check_files(folder, folder.name)
    with tempfile.TemporaryDirectory(prefix="parallax-") as place:
        shown = Path(place) / (folder.name or "model")
        shown.mkdir()
        for file in {file for pattern in READ for file in folder.glob(pattern)}:
            if file in beside or file.name.endswith(".index.json"):
                continue
            if file.name in _REWRITTEN:
                settings = _without_files(load_json(file)[1])
                (shown / file.name).write_text(json.dumps(settings), encoding="utf-8")
            else:
                (shown / file.name).symlink_to(file.resolve(strict=True))
        yield shown


def _without_files(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not _names_files(name, value)}


def _names_files(name: str, value: object) -> bool:
    if name in _NAMING or name.endswith(("_file", "_files")):
        return True
    # Whatever else may be opened by name.
    return isinstance(value, str) and name not in _TEXTS and _is_file(value)


def _is_file(value: str) -> bool:
    try:
        return len(value) < 4096 and Path(value).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # no path at all
        return False
