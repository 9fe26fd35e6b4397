"""``parallax`` on a machine that does not have the folder ``HIDDEN_FOLDER``: for nodes of tests.

The folder is there, for the scheduler; to this process it is as if it were not.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_HIDDEN = os.environ["HIDDEN_FOLDER"]
_stat = os.stat


def _refuse(path: object) -> None:
    if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(_HIDDEN):
        raise FileNotFoundError(2, "No such file or directory", os.fsdecode(path))


def _blind_stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
    _refuse(path)
    return _stat(path, *arguments, **options)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event in {"open", "os.listdir", "os.scandir"}:
        _refuse(arguments[0])


if __name__ == "__main__":
    os.stat = _blind_stat
    sys.addaudithook(_hook)
    from parallax.cli.main import main

    main()
