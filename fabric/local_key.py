"""The secret by which the command on the scheduler's own machine is let in.

A scheduler writes ``cli.key`` into its state directory at each start, readable by its
user alone, and takes it away at its end. The command reads it for the same
``--state-dir``, and sends it to no other address than the one that it is for.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from parallax.fabric.errors import BadSetting
from parallax.fabric.hosts import ANYWHERE, address, is_loopback

FILE_NAME = "cli.key"

_MOST_BYTES = 4096


@dataclass(frozen=True, slots=True)
class LocalKey:
    """What the file holds."""

    host: str  # where HTTP listens, an address
    port: int
    secret: str = field(repr=False)
    certificate: str | None = None  # PEM file of the certificate that HTTP shows
    name: str = ""  # by which HTTP was told to listen there, if it was one

    @property
    def to(self) -> str:
        """The one address that the secret is sent to.

        Another account of this machine may listen at the same port of each other one.
        """
        return ANYWHERE.get(self.host, self.host)

    def is_for(self, host: str, port: int) -> bool:
        """Whether who asks for this host means the scheduler that wrote it.

        Names count for what they stand for here, whatever they lead to: that one's own name,
        and ``localhost`` where its address is a loopback one.
        """
        if port != self.port:
            return False
        asked = address(host)
        if asked is not None:
            return asked == address(self.to)
        if self.name and host.lower() == self.name.lower():
            return True
        return is_loopback(host) and is_loopback(self.to)


@contextlib.contextmanager
def kept(state_dir: Path, key: LocalKey) -> Iterator[None]:
    """The file is there for as long as the block lasts.

    Raises:
        BadSetting: the state directory cannot be written.
    """
    path = state_dir / FILE_NAME
    fresh = path.with_suffix(".new")
    told = {
        "host": key.host,
        "port": key.port,
        "key": key.secret,
        "certificate": key.certificate,
        "name": key.name,
    }
    try:
        fresh.unlink(missing_ok=True)
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(told, file)
        fresh.replace(path)
    except OSError as error:
        raise BadSetting(
            f"The state directory {state_dir} cannot be written",
            error.strerror or str(error),
            "Correct its rights, or use another one: --state-dir",
            setting="state_dir",
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def read(state_dir: Path) -> LocalKey | None:
    """What a scheduler that runs with this state directory wrote, if this user may read it."""
    try:
        with open(state_dir / FILE_NAME, encoding="utf-8") as file:
            told = json.loads(file.read(_MOST_BYTES))
        return LocalKey(
            str(told["host"]),
            int(told["port"]),
            str(told["key"]),
            None if told["certificate"] is None else str(told["certificate"]),
            str(told["name"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
