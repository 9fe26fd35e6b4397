"""What one client saw of one answer, and clients that write it down."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp


@dataclass(slots=True)
class History:
    """One request as its client saw it. Times are monotonic seconds of the client's machine."""

    name: str = ""  # what was asked, for whoever compares answers
    status: int = 0  # of HTTP; 0: nothing came back
    answer: str = ""  # the id in every event
    text: str = ""
    finishes: list[str] = field(default_factory=list)
    usages: list[int] = field(default_factory=list)  # completion tokens
    done: int = 0  # how often [DONE] came
    late: int = 0  # events behind the finish that add text
    error: str = ""  # code of an error in the body or the stream, or how the connection ended
    asked_s: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of events that bring text
    ended_s: float = 0.0

    @property
    def whole(self) -> bool:
        """It ended as a good answer does."""
        return self.status == 200 and not self.error and bool(self.done) and bool(self.finishes)

    @property
    def pause_s(self) -> float:
        """The longest time between two events with text."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return max((later - earlier for earlier, later in pairs), default=0.0)


Seen = Callable[[History], Awaitable[None] | None]


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    *,
    name: str = "",
    seen: Seen | None = None,
    timeout_s: float = 240.0,
) -> History:
    """Streams one chat completion; whatever goes wrong is part of the history."""
    history = History(name=name, asked_s=time.monotonic())
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with session.post(
            url + "/v1/chat/completions",
            json=body,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        ) as answer:
            history.status = answer.status
            if answer.status != 200:
                history.error = _code(await answer.json())
                return history
            async for line in answer.content:
                if line.startswith(b"data: "):
                    _take(history, line[6:].strip())
                    if seen is not None and (more := seen(history)) is not None:
                        await more
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        history.error = f"connection: {type(error).__name__}"
    except asyncio.CancelledError:
        history.error = "cancelled"
        raise
    finally:
        history.ended_s = time.monotonic()
        if history.status == 200 and not history.done and not history.error:
            history.error = "connection: ended"
    return history


def _take(history: History, data: bytes) -> None:
    if data == b"[DONE]":
        history.done += 1
        return
    event = json.loads(data)
    if "error" in event:
        history.error = _code(event)
        return
    history.answer = event["id"]
    if event.get("usage"):
        history.usages.append(event["usage"]["completion_tokens"])
    for choice in event["choices"]:
        text = choice["delta"].get("content") or ""
        if text:
            history.late += bool(history.finishes)
            history.text += text
            history.arrivals.append(time.monotonic())
        if choice["finish_reason"]:
            history.finishes.append(choice["finish_reason"])


def _code(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("code") or error.get("type")) if isinstance(error, dict) else "error"


def save(histories: list[History], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(asdict(history)) + "\n" for history in histories))


def load(path: Path) -> list[History]:
    """What :func:`save` wrote."""
    return [History(**json.loads(line)) for line in path.read_text().splitlines()]
