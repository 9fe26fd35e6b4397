"""A hub's model without its weights: all that a scheduler needs to plan, and to answer in text.

Small files come whole, of the weight files only their headers (with HTTP ranges). The weights
follow file by file, when a node's layers need them and the node does not have them itself
(``scheduler/weights.py``).
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from parallax.fabric import models
from parallax.fabric.errors import ModelBroken, ModelError
from parallax.fabric.models import PARTS, ModelFolder, is_hub_id, open_folder
from parallax.fabric.safetensors import HEADER_BYTES, header_bytes
from parallax.fabric.weights_service import known_name

log = logging.getLogger(__name__)

FIRST_BYTES = 100_000  # nearly every header is shorter
TIMEOUT_S = 20.0
MOST_FILES = 4096


class _NoRangesError(Exception):
    """The hub does not give out parts of files, or has none of the usual names."""


def resolve(name: str, *, state_dir: Path) -> ModelFolder:
    """A model as this disk has it, or else its outline; see :func:`parallax.fabric.models.resolve`.

    A hub that gives out no parts of files is asked for the whole model. Blocks on the network.

    Raises:
        ModelNotFound, ModelBroken.
    """
    try:
        return models.resolve(name, state_dir=state_dir, download=False)
    except ModelError:
        if not is_hub_id(name) or Path(name).is_dir():
            raise
    place = state_dir / "outlines" / name.replace("/", "--")
    known = _known(place, name)
    if known is not None:
        return known
    try:
        return _outline(place, name)
    except _NoRangesError as error:
        log.info("%s is fetched whole: %s", name, error)
        return models.resolve(name, state_dir=state_dir)


def fetch_file(folder: ModelFolder, file: str) -> Path:
    """The weight file of an outline, fetched from the hub; it is where the hub's client keeps it.

    Raises:
        ModelNotFound: the hub does not give it out now.
        ModelBroken: it is not the file that was outlined.
    """
    path = models.fetch_hub_file(folder.location, file, folder.path.name)
    outlined = folder.path / file
    same = path.stat().st_size == outlined.stat().st_size
    if not same or header_bytes(path) != header_bytes(outlined):
        raise ModelBroken(
            f"{file} of {folder.name} is not what the hub said it is",
            "its header or its size is another",
            "Choose the model again",
            path=path,
        )
    return path


def cached_file(folder: ModelFolder, file: str) -> Path | None:
    """The weight file of an outline, if the hub's client has it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(folder.location, file, revision=folder.path.name)
    return Path(found) if isinstance(found, str) else None


def _known(place: Path, name: str) -> ModelFolder | None:
    """The outline that was made last, if it is whole."""
    found = sorted(place.glob(f"*/{PARTS}"), key=lambda mark: mark.stat().st_mtime)
    for mark in reversed(found):
        try:
            return open_folder(mark.parent, name=name, location=name, parts=True)
        except ModelError:
            shutil.rmtree(mark.parent, ignore_errors=True)
    return None


def _outline(place: Path, name: str) -> ModelFolder:
    """Makes an outline.

    Raises:
        ModelNotFound: the hub has no such model, or does not answer.
        ModelBroken: what it has makes no sense.
        _NoRangesError: see there.
    """
    snapshot = models.fetch_hub_snapshot(name)  # its folder is called by the commit
    commit = snapshot.name
    new = place / f"{commit}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for small in snapshot.iterdir():
        if small.is_file() and not small.name.endswith(".safetensors"):
            shutil.copyfile(small, new / small.name)
    files = [f for f in _listed(name, commit) if known_name(f) and f.endswith(".safetensors")]
    if not 0 < len(files) <= MOST_FILES:
        raise _NoRangesError("it has no weight files of the usual names")
    for file in files:
        head, size = _head(name, file, commit)
        with (new / file).open("wb") as stream:
            stream.write(head)
            stream.truncate(max(size, len(head)))
    (new / PARTS).write_text("{}", encoding="ascii")
    open_folder(new, name=name, location=name, parts=True)
    shutil.rmtree(place / commit, ignore_errors=True)
    new.rename(place / commit)
    os.utime(place / commit / PARTS)
    return open_folder(place / commit, name=name, location=name, parts=True)


def _listed(name: str, commit: str) -> list[str]:
    """The files of a commit.

    Raises:
        _NoRangesError: the hub does not tell.
    """
    import huggingface_hub

    try:
        return [str(f) for f in huggingface_hub.list_repo_files(name, revision=commit)]
    except Exception as error:  # of whatever kind: the usual way then says what is wrong
        raise _NoRangesError(f"its files could not be listed ({type(error).__name__})") from error


def _head(name: str, file: str, commit: str) -> tuple[bytes, int]:
    """A weight file's first bytes up to the end of its header, and its size."""
    data, size = _part(name, file, commit, 0, FIRST_BYTES)
    if len(data) < 8:
        raise _NoRangesError(f"{file} has no header")
    (length,) = struct.unpack("<Q", data[:8])
    end = 8 + int(length)
    if end > HEADER_BYTES or end > size:
        raise _NoRangesError(f"{file} has an impossible header")
    if len(data) < end:
        rest, _ = _part(name, file, commit, len(data), end)
        data += rest
    if len(data) < end:
        raise _NoRangesError(f"{file} was cut short")
    return data[:end], size


def _part(name: str, file: str, commit: str, begin: int, end: int) -> tuple[bytes, int]:
    """Bytes of a hub's file, and the size of the whole of it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = {
        **build_hf_headers(),
        "Range": f"bytes={begin}-{end - 1}",
        "Accept-Encoding": "identity",
    }
    url = hf_hub_url(name, file, revision=commit)
    session: Any = get_session()
    try:
        with session.stream("GET", url, headers=headers, timeout=TIMEOUT_S) as answer:
            whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if answer.status_code != 206 or not whole.isdecimal():
                raise _NoRangesError(f"{file} is not given out in parts ({answer.status_code})")
            data = bytearray()
            for piece in answer.iter_bytes():
                data += piece
                if len(data) > end - begin:
                    raise _NoRangesError(f"more of {file} came than was asked for")
    except _NoRangesError:
        raise
    except Exception as error:  # of whatever kind: the usual way then says what is wrong
        raise _NoRangesError(f"{file} did not come ({type(error).__name__})") from error
    return bytes(data), int(whole)
