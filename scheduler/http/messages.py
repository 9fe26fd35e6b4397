"""Messages of a request as a chat template takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parallax.fabric.errors import InvalidRequest, UnsupportedField
from parallax.scheduler.http.requests import MAX_PARTS, Message, ToolCall, parse_json

# A developer's message is what OpenAI calls a system message of its newer models.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Plain dictionaries: role, content as one string, and what else a template may use.

    Raises:
        InvalidRequest: a role or a content is wrong.
        UnsupportedField: a content part is no text.
    """
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _message(message: Message, where: str) -> dict[str, Any]:
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"`{where}.role` is wrong",
            f"There is no role {message.role[:40]!r}",
            f"Use one of {', '.join(_ROLES)}",
            field=f"{where}.role",
        )
    if message.tool_calls and role != "assistant":
        raise InvalidRequest(
            f"`{where}.tool_calls` is wrong",
            "Only the assistant calls tools",
            field=f"{where}.tool_calls",
        )
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(
            f"`{where}.content` is missing", fix="Give it a text", field=f"{where}.content"
        )
    result: dict[str, Any] = {
        "role": role,
        "content": "" if message.content is None else text_of(message.content, f"{where}.content"),
    }
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            result[name] = value
    if message.tool_calls:
        result["tool_calls"] = [
            _call(call, f"{where}.tool_calls.{i}") for i, call in enumerate(message.tool_calls)
        ]
    return result


def text_of(content: object, where: str) -> str:
    """The text of a content: a string, or a list of text parts.

    Raises:
        InvalidRequest: it is neither.
        UnsupportedField: a part is an image, a sound or a file.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or len(content) > MAX_PARTS:
        raise InvalidRequest(
            f"`{where}` is wrong",
            f"It must be a string or a list of at most {MAX_PARTS} text parts",
            field=where,
        )
    return "".join(_part(part, f"{where}.{i}") for i, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise InvalidRequest(f"`{where}` is wrong", "A part must be an object", field=where)
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"`{where}.type` is missing", fix='Use "text"', field=f"{where}.type")
    if kind != "text":
        raise UnsupportedField(
            f"`{where}.type` {kind[:40]!r} is not supported",
            "Models here read text only",
            'Use "text"',
            field=f"{where}.type",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequest(
            f"`{where}.text` is wrong", "It must be a string", field=f"{where}.text"
        )
    return text


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    """Templates want the arguments as an object; OpenAI sends them as a string of JSON."""
    try:
        arguments = parse_json((call.function.arguments or "{}").encode())
    except ValueError as error:
        raise InvalidRequest(
            f"`{where}.function.arguments` is wrong",
            "It must be a string of JSON",
            field=f"{where}.function.arguments",
        ) from error
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}
