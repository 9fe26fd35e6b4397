"""The ``parallax`` command with a leak: so many bytes of every request are never let go.

    LEAK_BYTES=200 python -m benchmarks.leaking join ...

What ``benchmarks/memory_slope.py --leak`` runs, to show that growth would be seen.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from parallax.cli.main import main
from parallax.node.lanes import Lanes
from parallax.scheduler.metrics import Metrics

LEAK = "LEAK_BYTES"  # not a setting of Parallax


def leak(owner: Any, name: str, size: int, kept: list[bytes]) -> None:
    """Has a method, which is called once for each request, keep so many bytes."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(*given: Any, **named: Any) -> Any:
        kept.append(bytes(size))
        return method(*given, **named)

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    leaked: list[bytes] = []
    for owner, name in ((Lanes, "drop"), (Metrics, "ended")):
        leak(owner, name, int(os.environ[LEAK]), leaked)
    main()
