"""Tool calls in the Hermes form, the answer after a result, and when not to call."""

from __future__ import annotations

import json
import random

from parallax.demo.corpus import questions
from parallax.demo.corpus.document import (
    Document,
    Message,
    assistant,
    system,
    tool_call,
    tool_result,
    user,
)
from parallax.demo.corpus.phrases import typed
from parallax.demo.corpus.toolbox import Task, any_definition, calculation, describe, draw

_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that can use tools.",
    "Use the tools when they help.",
    "You answer briefly.",
)


def result_text(task: Task, rng: random.Random) -> str:
    """Write a tool's result in one of the forms that tools answer in."""
    if task.expression is None:
        return rng.choice((task.result, task.result, json.dumps({"result": task.result})))
    number = json.loads(task.result)
    return rng.choice(
        (
            task.result,
            task.result,
            json.dumps({"result": number}),
            json.dumps({"result": task.result}),
            json.dumps({"expression": task.expression.code, "result": number}),
            json.dumps({"success": True, "result": task.result, "error": None}),
            f"Success: {task.result}",
            f"{task.expression.code} = {task.result}",
            f"The result is {task.result}",
        )
    )


def finish(task: Task) -> str:
    """Write the answer after a result."""
    if task.expression is None:
        return f"The {task.tool} tool says: {task.result}"
    return f"{task.expression.code} = {task.result}"


def _opening(rng: random.Random) -> list[Message]:
    return [system(rng.choice(_SYSTEMS))] if rng.random() < 0.4 else []


def _toolbox(task: Task, rng: random.Random) -> list[dict[str, object]]:
    tools = {task.tool: describe(task, rng)}
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        extra = any_definition(rng)
        tools.setdefault(extra["function"]["name"], extra)
    listed = list(tools.values())
    rng.shuffle(listed)
    return listed


def sample(rng: random.Random, *, held_out: bool = False) -> Document:
    """Return a conversation with a call, its result and the answer; or a question without."""
    task = draw(rng, held_out=held_out)
    tools, messages = _toolbox(task, rng), _opening(rng)
    if rng.random() < 0.12:
        question = questions.sample(rng, held_out=held_out)
        return Document("tools: no call", [*messages, *question.messages], tools)
    messages += [
        user(typed(task.ask, rng, noise=False)),
        tool_call(task.tool, dict(task.arguments)),
        tool_result(result_text(task, rng)),
        assistant(finish(task)),
    ]
    return Document("tool finishes", messages, tools, must=(finish(task),))


def held_out_cases(rng: random.Random, count: int) -> list[Document]:
    """Return cases for the evaluation: half of them calls, half of them answers to results."""
    cases = []
    for index in range(count):
        task = calculation(rng, held_out=True)
        tools, messages = _toolbox(task, rng), _opening(rng)
        messages += [
            user(typed(task.ask, rng, noise=False)),
            tool_call(task.tool, dict(task.arguments)),
        ]
        if index % 2 == 0:
            cases.append(Document("tool calls", messages, tools))
            continue
        messages += [tool_result(result_text(task, rng)), assistant(finish(task))]
        cases.append(Document("tool finishes", messages, tools, must=(f"= {task.result}",)))
    return cases
