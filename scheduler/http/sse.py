"""Server-sent events of OpenAI's kind, built as bytes by hand.

The hot path of streaming: one JSON string is encoded for each delta; everything
around it is put together once for each answer.
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from aiohttp import web

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold events back
}


def event(value: Any) -> bytes:
    """One event with this JSON value."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def response() -> web.StreamResponse:
    """A stream's response, its headers not sent yet."""
    return web.StreamResponse(headers=HEADERS)


class ChunkWriter:
    """``chat.completion.chunk`` events of one answer."""

    __slots__ = ("_head", "_tail", "_usage_null")

    def __init__(self, head: dict[str, Any], *, usage: bool) -> None:
        """``head``: id, object, created, model and the like. ``usage``: null until the end."""
        self._head = "data: " + json.dumps(head, separators=(",", ":"))[:-1] + ',"choices":['
        self._usage_null = ',"usage":null' if usage else ""
        self._tail = '},"finish_reason":null}]' + self._usage_null + "}\n\n"

    def role(self, index: int) -> bytes:
        """The first chunk of a choice."""
        return self._chunk(index, '"role":"assistant","content":""')

    def text(self, index: int, text: str) -> bytes:
        """A delta."""
        return self._chunk(index, '"content":' + quoted(text))

    def finish(self, index: int, reason: str) -> bytes:
        """The last chunk of a choice."""
        choice = f'{{"index":{index},"delta":{{}},"finish_reason":{quoted(reason)}}}]'
        return (self._head + choice + self._usage_null + "}\n\n").encode()

    def usage(self, usage: dict[str, Any], metrics: dict[str, Any]) -> bytes:
        """The chunk after the last, where ``stream_options.include_usage`` asked for it."""
        tail = json.dumps({"usage": usage, "metrics": metrics}, separators=(",", ":"))[1:]
        return (self._head + "]," + tail + "\n\n").encode()

    def _chunk(self, index: int, delta: str) -> bytes:
        choice = f'{{"index":{index},"delta":{{{delta}'
        return (self._head + choice + self._tail).encode()
