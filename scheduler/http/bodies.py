"""How much memory bodies may take while they come in, all together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from parallax.fabric.errors import QueueFull


class Bodies:
    """Counts what the bodies under way may grow to, so that slow senders cannot pin memory."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self.reserved = 0

    @contextlib.contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Keep room for a body of so many bytes while it is read.

        Raises:
            QueueFull: others have it.
        """
        if self.reserved + size_bytes > self._most:
            raise QueueFull(
                "Too many large requests are coming in",
                f"Their bodies may take {self._most} bytes together",
                "Try again in a moment, or send less text",
            )
        self.reserved += size_bytes
        try:
            yield
        finally:
            self.reserved -= size_bytes
