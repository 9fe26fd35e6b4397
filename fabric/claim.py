"""One process for each identity: a lock on a file in the state directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from parallax.fabric.errors import BadSetting


@contextlib.contextmanager
def claim(state_dir: Path, role: str) -> Iterator[None]:
    """Holds ``state_dir/ROLE.lock`` for as long as the block lasts.

    A state directory that is not there is made, for its owner alone.

    Two processes with one identity would push each other out of the cluster
    for ever. The system lets go of the lock when its holder ends, however it ends.

    Raises:
        BadSetting: another process of this role uses the state directory, or it
            cannot be written.
    """
    path = state_dir / f"{role}.lock"
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BadSetting(
            f"The state directory {state_dir} cannot be used",
            error.strerror or str(error),
            "Correct its rights, or use another one: --state-dir",
            setting="state_dir",
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadSetting(
                f"Another {role} already runs with the state directory {state_dir}",
                f"A {role}'s identity is kept there, and only one can have it",
                "Stop the other one, or give this one a --state-dir of its own",
                setting="state_dir",
            ) from None
        yield
    finally:
        os.close(handle)
