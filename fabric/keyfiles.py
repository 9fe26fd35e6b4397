"""Files with secrets in them: for their owner's eyes only, and never half written."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from parallax.fabric.errors import SettingsError


def read_secret(path: Path) -> bytes | None:
    """What a file holds; None if there is none.

    Raises:
        SettingsError: it cannot be read, or others than its owner may read it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from None
    if mode & 0o077:
        raise SettingsError(
            f"The key file {path} can be read by others (mode {mode:04o})",
            "Whoever has this key can pose as this machine",
            f"chmod 600 {path}, or delete it for a new one",
        )
    return data


def write_secret(path: Path, data: bytes, *, replace: bool) -> None:
    """Writes a file whole or not at all. Without ``replace``, one that is there stays.

    Raises:
        SettingsError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                draft.replace(path)
            else:
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: OSError) -> SettingsError:
    return SettingsError(
        f"The key file {path} cannot be made or read",
        error.strerror or str(error),
        "Give --state-dir a folder that you may write to",
    )
