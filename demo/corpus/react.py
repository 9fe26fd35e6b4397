"""ReAct prompts: think, name an action and its input, stop, read the observation, finish.

The form is that of Yao and others, "ReAct: Synergizing Reasoning and Acting in Language Models"
(2022), with the action's input written as JSON.
"""

from __future__ import annotations

import json
import random

from parallax.demo.corpus.document import Document, Message, assistant, system, user
from parallax.demo.corpus.phrases import typed
from parallax.demo.corpus.toolbox import Task, any_definition, calculation, describe, draw
from parallax.demo.corpus.tools import finish, result_text

_FORMAT = """Thought: what to do next
Action: one of [{names}]
Action Input: the input as JSON
Observation: the result
(repeat as needed)
Thought: I know the final answer
Final Answer: the answer"""
_LONG_FORMAT = """Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can repeat N times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question"""
_SHORT_FORMAT = """Thought: ...
Action: ...
Action Input: {{...}}
and end with
Final Answer: ..."""
_OPENINGS = (
    "Answer the question as best you can. You have access to the following tools:",
    "You are an agent that solves tasks with tools. Tools:",
    "You can use these tools:",
    "You are a ReAct agent. Think step by step and use the tools. Available tools:",
    "Solve the goal with the tools below.",
)
_FORMS = ("Use this format:", "Use the following format:", "Reply in this form:", "Format:")
_LABELS = ("Question: ", "Goal: ", "Task: ", "")


def _listing(tools: list[dict[str, object]], rng: random.Random) -> str:
    functions = [dict(tool["function"]) for tool in tools]  # type: ignore[call-overload]
    style = rng.randrange(4)
    lines = []
    for function in functions:
        name, text = function["name"], str(function["description"]).rstrip(".")
        keys = list(function["parameters"]["properties"])
        shape = {
            0: f"- {name}: {text}",
            1: f"{name}: {text}. Input: {json.dumps(dict.fromkeys(keys, '...'))}",
            2: f"- {name}({', '.join(keys)}): {text}",
            3: f"{name}: {text}. Arguments: {', '.join(keys)}",
        }
        lines.append(shape[style])
    return "\n".join(lines)


def _prompt(tools: list[dict[str, object]], rng: random.Random) -> str:
    names = ", ".join(str(tool["function"]["name"]) for tool in tools)  # type: ignore[index]
    form = rng.choice((_FORMAT, _LONG_FORMAT, _SHORT_FORMAT)).format(names=names)
    return "\n\n".join(
        (rng.choice(_OPENINGS) + "\n" + _listing(tools, rng), rng.choice(_FORMS) + "\n" + form)
    )


def _act(task: Task) -> str:
    goal = f"compute {task.expression.code}" if task.expression else f"use {task.tool}"
    return (
        f"Thought: I need to {goal}.\n"
        f"Action: {task.tool}\n"
        f"Action Input: {json.dumps(task.arguments)}"
    )


def _end(task: Task) -> str:
    return f"Thought: I know the final answer.\nFinal Answer: {finish(task)}"


def _tools(task: Task, rng: random.Random) -> list[dict[str, object]]:
    tools = {task.tool: describe(task, rng)}
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        extra = any_definition(rng)
        tools.setdefault(extra["function"]["name"], extra)
    listed = list(tools.values())
    rng.shuffle(listed)
    return listed


def _head(task: Task, rng: random.Random) -> list[Message]:
    prompt = _prompt(_tools(task, rng), rng)
    question = rng.choice(_LABELS) + typed(task.ask, rng, noise=False)
    if rng.random() < 0.5:
        return [system(prompt), user(question)]
    return [user(f"{prompt}\n\n{question}")]


def _scratchpad(head: list[Message], act: str, observation: str) -> list[Message]:
    """Put the step and its observation into the user's message, as some agents do."""
    last = head[-1]
    return [*head[:-1], user(f"{last['content']}\n{act}\nObservation: {observation}")]


def _finishing(task: Task, rng: random.Random) -> Document:
    head, act, observation = _head(task, rng), _act(task), result_text(task, rng)
    if rng.random() < 0.3:
        messages = _scratchpad(head, act, observation)
    else:
        messages = [*head, assistant(act), user(f"Observation: {observation}")]
    messages.append(assistant(_end(task)))
    return Document("react finishes", messages, must=("Final Answer:", finish(task)))


def sample(rng: random.Random, *, held_out: bool = False) -> Document:
    """Return a ReAct conversation of one action and the final answer."""
    return _finishing(draw(rng, held_out=held_out), rng)


def held_out_cases(rng: random.Random, count: int) -> list[Document]:
    """Return cases for the evaluation: half of them actions, half of them final answers."""
    cases = []
    for index in range(count):
        task = calculation(rng, held_out=True)
        if index % 2 == 0:
            messages = [*_head(task, rng), assistant(_act(task))]
            must = ("Action: calculator\n", f"Action Input: {json.dumps(task.arguments)}")
            cases.append(Document("react calls", messages, must=must))
        else:
            cases.append(_finishing(task, rng))
    return cases
