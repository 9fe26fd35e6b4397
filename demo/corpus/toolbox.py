"""The tools that the model sees: the canonical four, well-known others, and made-up ones."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from parallax.demo.corpus.expressions import Expression
from parallax.demo.corpus.expressions import ask as ask_value
from parallax.demo.corpus.expressions import draw as draw_expression
from parallax.demo.corpus.phrases import expand, listed
from parallax.demo.corpus.words import ANIMALS, CITIES, PLACES, THINGS, made_up_word

_DESCRIPTIONS = {
    "calculator": (
        "Evaluate a mathematical expression",
        "Evaluate mathematical expressions",
        "Work out an arithmetic expression.",
        "Calculates the value of an expression",
    ),
    "web_search": ("Search the web", "Search the web for information", "Find pages on the web."),
    "python": ("Run Python code", "Execute Python code in a sandbox", "Run a Python program."),
    "code_generator": ("Generate code from a description", "Write code for a task"),
}
_PARAMETERS = {
    "calculator": {"expression": "Mathematical expression to evaluate"},
    "web_search": {"query": "What to search for"},
    "python": {"code": "Code to run"},
    "code_generator": {"request": "What the code should do", "language": "Programming language"},
}
_OTHERS = {
    "get_weather": ("city|location|place", "[what is|what's|how is] the weather [like|] in {}"),
    "get_current_weather": ("city|location", "[what is|what's] the [current|] weather in {}"),
    "get_time": ("city|timezone", "what time is it in {}"),
    "read_file": ("path|file", "read the file {}"),
    "send_message": ("text|message", "send the message {}"),
    "translate": ("text|sentence", "translate {}"),
    "find_user": ("name|user", "find the user {}"),
}
_TEXTS = (
    "Get the {} in a given place",
    "Get the current {}",
    "{}",
    "Returns the {} for a value",
    "Use this to get {}.",
    "The {} of a city, e.g. San Francisco, CA",
)
_EXTRAS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("unit", {"type": "string", "enum": ["celsius", "fahrenheit"]}),
    ("limit", {"type": "integer", "description": "How many"}),
    ("language", {"type": "string"}),
    ("format", {"type": "string", "enum": ["short", "long"]}),
)
_ARGUMENTS = listed("query name text item city word topic title id")
_SUFFIXES = ("", "", "_tool", "_search", "_finder", "_lookup")
_SEARCHES = (
    "search the web for {}",
    "[look up|google|search] {}",
    "[find|search for] {} [on the web|online|on the internet]",
    "use web_search for {}",
    "[can|could] you search the web for {}",
    "what does the web say about {}",
)
_HELD_OUT_SEARCHES = ("please look for {} on the web", "do a web search on {}")
_RUNS = (
    "run {} in python",
    "[run|execute] this python code: {}",
    "[run|execute] {}",
    "use python to run {}",
    "what does {} print",
)
_HELD_OUT_RUNS = ("let python run {}", "please execute the code {}")
_WRITES = (
    "[generate|write] code [to|that can] {task} in {language}",
    "write [a|some] {language} [function|code|program] to {task}",
    "use code_generator to {task} in {language}",
)
_HELD_OUT_WRITES = ("i need {language} code to {task}",)
_TASKS = tuple(
    f"{verb} {thing}"
    for verb in ("sort", "reverse", "count", "read", "print", "merge", "filter")
    for thing in ("a list", "a file", "numbers", "words", "a table", "lines", "a tree")
)
_LANGUAGES = ("python", "javascript", "go", "rust", "java", "swift")
_USES = (
    "use {tool} for {value}",
    "[call|run|ask|try] {tool} with {value}",
    "{tool} {value}",
    "[can|could] you use {tool} [on|for|with] {value}",
    "what does {tool} say about {value}",
)
_HELD_OUT_USES = ("please let {tool} handle {value}",)


@dataclass(frozen=True, slots=True)
class Task:
    """What somebody wants, the call that gets it, and what a tool may answer."""

    tool: str
    ask: str
    arguments: dict[str, str]
    result: str
    expression: Expression | None = None


def definition(name: str, arguments: dict[str, str], description: str) -> dict[str, Any]:
    """Return a tool in the form of the OpenAI API."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {
                    key: {"type": "string", **({"description": text} if text else {})}
                    for key, text in arguments.items()
                },
                "required": [next(iter(arguments))],
            },
        },
    }


def describe(task: Task, rng: random.Random) -> dict[str, Any]:
    """Return the definition of the tool that a task needs."""
    name = "python" if task.tool == "python_repl" else task.tool
    if name in _DESCRIPTIONS:
        words = _PARAMETERS[name] if rng.random() < 0.6 else dict.fromkeys(_PARAMETERS[name], "")
        return definition(task.tool, words, rng.choice(_DESCRIPTIONS[name]))
    spoken = task.tool.removeprefix("get_").replace("_", " ")
    about = rng.choice(_TEXTS).format(spoken) if rng.random() < 0.4 else ""
    found = definition(
        task.tool, dict.fromkeys(task.arguments, about), rng.choice(_TEXTS).format(spoken)
    )
    if rng.random() < 0.3:
        key, extra = rng.choice(_EXTRAS)
        found["function"]["parameters"]["properties"].setdefault(key, extra)
    return found


def any_definition(rng: random.Random) -> dict[str, Any]:
    """Return the definition of some tool that stands beside the one that is needed."""
    return describe(draw(rng, held_out=False, share_calculator=0.3), rng)


def _words(rng: random.Random) -> str:
    pool = THINGS + ANIMALS + PLACES
    return " ".join(
        made_up_word(rng) if rng.random() < 0.5 else rng.choice(pool)
        for _ in range(rng.randrange(1, 4))
    )


def _program(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(2, 100), rng.randrange(2, 100)
    code = rng.choice(
        (f"print({a}*{b})", f"print({a}+{b})", f"sum(range({a}))", f"print(max({a}, {b}))")
    )
    value = {
        f"print({a}*{b})": a * b,
        f"print({a}+{b})": a + b,
        f"sum(range({a}))": sum(range(a)),
    }.get(code, max(a, b))
    return code, str(value)


def calculation(rng: random.Random, *, held_out: bool) -> Task:
    """Return a task for the calculator."""
    item = draw_expression(rng, held_out=held_out)
    ask = ask_value(item, rng, held_out=held_out)
    return Task("calculator", ask, {"expression": item.code}, item.value, item)


def draw(rng: random.Random, *, held_out: bool, share_calculator: float = 0.55) -> Task:
    """Draw a task: for the calculator, another canonical tool, or a made-up one."""
    if rng.random() < share_calculator:
        return calculation(rng, held_out=held_out)
    kind = rng.random()
    if kind < 0.25:
        words = _words(rng)
        ask = expand(rng.choice(_HELD_OUT_SEARCHES if held_out else _SEARCHES), rng)
        return Task("web_search", ask.format(words), {"query": words}, _sentence(rng))
    if kind < 0.4:
        code, value = _program(rng)
        ask = expand(rng.choice(_HELD_OUT_RUNS if held_out else _RUNS), rng).format(code)
        return Task(rng.choice(("python", "python_repl")), ask, {"code": code}, value)
    if kind < 0.5:
        task, language = rng.choice(_TASKS), rng.choice(_LANGUAGES)
        ask = expand(rng.choice(_HELD_OUT_WRITES if held_out else _WRITES), rng)
        text = ask.format(task=task, language=language)
        return Task("code_generator", text, {"request": task, "language": language}, "Done.")
    if kind < 0.65:
        tool, (arguments, pattern) = rng.choice(tuple(_OTHERS.items()))
        argument, value = rng.choice(arguments.split("|")), _words(rng)
        if pattern.endswith((" in {}", "user {}")):
            value = (
                rng.choice((*CITIES, "San Francisco", "New York"))
                if rng.random() < 0.4
                else made_up_word(rng).capitalize()
            )
        return Task(tool, expand(pattern, rng).format(value), {argument: value}, _sentence(rng))
    tool = made_up_word(rng) + rng.choice(_SUFFIXES)
    value, argument = _words(rng), rng.choice(_ARGUMENTS)
    ask = expand(rng.choice(_HELD_OUT_USES if held_out else _USES), rng)
    return Task(tool, ask.format(tool=tool, value=value), {argument: value}, _sentence(rng))


def _sentence(rng: random.Random) -> str:
    """Write a short result to carry over into the answer."""
    pattern = rng.choice(
        ("[found|it is|there is|here is] {}", "{}", "the {} is {}", "{} and {}", "[no|one|two] {}")
    )
    return expand(pattern, rng).format(_words(rng), _words(rng))
