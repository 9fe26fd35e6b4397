"""One training document: a conversation, the tools it may use, and what it teaches."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

Message = dict[str, Any]
TEMPLATE_PATH = Path(__file__).resolve().parent.parent / "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class Document:
    """A conversation. The last message is the assistant's, and is what the evaluation expects.

    ``must`` holds strings that a right last message contains; when empty, the whole text counts.
    """

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    must: tuple[str, ...] = ()

    @property
    def prompt(self) -> list[Message]:
        """The messages before the assistant's last one."""
        return self.messages[:-1]

    @property
    def answer(self) -> Message:
        """The assistant's last message."""
        return self.messages[-1]


def user(text: str) -> Message:
    """Return a user's message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Return an assistant's message."""
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    """Return a system message."""
    return {"role": "system", "content": text}


def tool_result(text: str) -> Message:
    """Return what a tool answered."""
    return {"role": "tool", "content": text}


def tool_call(name: str, arguments: dict[str, Any]) -> Message:
    """Return an assistant's message that calls one tool."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": name, "arguments": arguments}},
        ],
    }


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))


def render(document: Document, *, prompt_only: bool = False) -> str:
    """Render a document with the chat template that the model ships with."""
    return _template().render(
        messages=document.prompt if prompt_only else document.messages,
        tools=document.tools or None,
        add_generation_prompt=prompt_only,
    )
