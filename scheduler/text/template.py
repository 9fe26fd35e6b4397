"""A model's chat template: compiled once, rendered within a bound for each chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from parallax.scheduler.text.budget import Budget
from parallax.scheduler.text.sandbox import CountedEnvironment, render

MOST_SOURCE = 1 << 16  # characters of a template; the longest known has some 20,000
STEPS = 200_000  # about a quarter of a second; a chat of ten messages takes some hundreds
STEPS_EACH = 1000  # more for each message; most templates take some tens, some look back at all
STEPS_EACH_CHARACTER = 4  # some templates go through texts as if they were lists of parts
MOST_STEPS = 2_000_000  # some seconds
CHARACTERS = 64 << 20
CHARACTERS_EACH = 64  # more for each of the chat's
MOST_CHARACTERS = 128 << 20  # however long the chat
MADE = 256 << 10  # characters of the prompt that comes of it in the end
MADE_EACH = 4  # more for each of the chat's
MADE_EACH_MESSAGE = 1024
_REASONING = ("reasoning_content", "thinking", "reasoning")

FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class ChatTemplate:
    """A template in the sandbox.

    Raises:
        jinja2.TemplateSyntaxError: it cannot be compiled, or uses what is not there.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MOST_SOURCE:
            raise jinja2.TemplateSyntaxError(f"a template of {len(source)} characters", 1)
        try:
            self._template = CountedEnvironment().from_string(source)
        except jinja2.TemplateSyntaxError:
            raise
        except (RecursionError, MemoryError, SyntaxError, *FAILURES) as error:
            raise jinja2.TemplateSyntaxError(
                f"{type(error).__name__}: {str(error)[:200]}", 1
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
        """The chat as text, up to where the assistant begins.

        Raises:
            one of :data:`FAILURES`: the template refuses these messages, or does too much.
        """
        chat = [_with_reasoning(dict(message)) for message in messages]
        try:
            return self._rendered(chat, values)
        except TypeError:
            if not any(message.get("tool_calls") for message in chat):
                raise
            return self._rendered([_with_texts(message) for message in chat], values)

    def _rendered(self, chat: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
        characters = sum(len(str(value)) for message in chat for value in message.values())
        allowed = min(CHARACTERS + CHARACTERS_EACH * characters, MOST_CHARACTERS)
        steps = STEPS + STEPS_EACH * len(chat) + STEPS_EACH_CHARACTER * characters
        budget = Budget(min(steps, MOST_STEPS), allowed)
        most = MADE + MADE_EACH * characters + MADE_EACH_MESSAGE * len(chat)
        given = {
            **values,
            "messages": chat,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        return render(self._template, budget, given, most)


def _with_texts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of calls as the text that some templates (DeepSeek's) put together with others."""
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(arguments, ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls") or ()
        for arguments in (call["function"]["arguments"],)
    ]
    return {**message, "tool_calls": calls} if calls else dict(message)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under each of the names that templates look for, as transformers has it."""
    reasoning = next((message[n] for n in _REASONING if message.get(n) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
