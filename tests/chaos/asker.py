"""``python -m tests.chaos.asker URL``: asks what standard input says, prints what was seen.

For machines whose network only their own processes can reach.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict

import aiohttp

from tests.chaos.history import History, ask


async def main() -> None:
    """One request; a line ``begun`` when its first text is there, then the history."""
    body = json.load(sys.stdin)
    begun = False

    def seen(history: History) -> None:
        nonlocal begun
        if history.text and not begun:
            begun = True
            print("begun", flush=True)

    async with aiohttp.ClientSession() as session:
        history = await ask(session, sys.argv[1], body, name="asked", seen=seen)
    print(json.dumps(asdict(history)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
