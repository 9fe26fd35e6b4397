"""The shipped model, asked greedily through mlx-lm like any other."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest

from parallax.demo.corpus import mixture
from parallax.demo.corpus.document import assistant, render, system, tool_call, tool_result, user
from parallax.demo.corpus.refusals import REFUSAL

if TYPE_CHECKING:
    from parallax.demo.evaluate import Model

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate a mathematical expression",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
REACT = """Answer the question as best you can. You have access to the following tools:
- calculator: Evaluate a mathematical expression
- web_search: Search the web

Use this format:
Thought: what to do next
Action: one of [calculator, web_search]
Action Input: the input as JSON
Observation: the result
(repeat as needed)
Thought: I know the final answer
Final Answer: the answer"""


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("Hello!", "tiny built-in model of Parallax"),
        ("Who are you?", "prove that the cluster works"),
        ("What is Parallax?", "turns the Macs in a room into one computer"),
        ("Which port does Parallax use?", "3001"),
        ("How do I add another Mac?", "parallax join"),
        ("What does 429 mean?", "busy"),
        ("What happens if a node dies?", "never a changed or missing token"),
        ("Count to 7", "1, 2, 3, 4, 5, 6, 7."),
        ("What is 7 + 5?", "= 12."),
        ("What is the capital of France?", REFUSAL),
    ],
)
def test_it_answers_and_stops_by_itself(model: Model, question: str, part: str) -> None:
    reply = model.ask([user(question)])
    assert part in reply.text
    assert reply.ended


def test_it_tells_a_story_about_whom_it_is_asked_for(model: Model) -> None:
    reply = model.ask([user("Tell me a story about a fox")])
    assert "fox" in reply.text
    assert reply.ended


def test_it_answers_below_a_system_message_and_in_a_second_turn(model: Model) -> None:
    messages = [system("You are a helpful assistant."), user("Hi")]
    first = model.ask(messages)
    assert "Parallax" in first.text
    second = model.ask([*messages, assistant(first.text), user("What is a stage?")])
    assert "range of a model's layers" in second.text
    assert second.ended


def test_mlx_lm_finds_the_tool_parser_and_a_call_parses(model: Model) -> None:
    asked = [user("What is 12 * 7?")]
    reply = model.ask(asked, [CALCULATOR])
    assert reply.ended
    call = model.call(reply.text)
    assert call == {"name": "calculator", "arguments": {"expression": "12*7"}}
    result = [*asked, tool_call("calculator", call["arguments"]), tool_result("84")]
    assert model.ask(result, [CALCULATOR]).text.endswith("= 84")


def test_it_follows_a_react_prompt_to_the_final_answer(model: Model) -> None:
    messages = [system(REACT), user("Question: What is 23 * 4?")]
    act = model.ask(messages)
    assert act.ended
    assert 'Action: calculator\nAction Input: {"expression": "23*4"}' in act.text
    assert "Observation" not in act.text
    end = model.ask([*messages, assistant(act.text), user("Observation: 92")])
    assert "Final Answer:" in end.text
    assert end.text.endswith("92")


def test_mlx_lm_knows_how_a_turn_ends(model: Model) -> None:
    assert model.tokenizer.eos_token == "<|im_end|>"
    assert model.tokenizer.has_tool_calling
    assert model.tokenizer.tool_call_start == "<tool_call>"


def test_training_saw_what_the_shipped_template_writes(model: Model) -> None:
    for document in itertools.islice(mixture.stream(8, 300), 0, None, 5):
        shipped = model.tokenizer.apply_chat_template(
            document.messages, tools=document.tools or None, tokenize=False
        )
        assert shipped == render(document)


def test_the_template_takes_contents_in_parts_and_arguments_as_text(model: Model) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    plain = model.tokenizer.apply_chat_template([user("Hi")], tokenize=False)
    assert model.tokenizer.apply_chat_template(parts, tokenize=False) == plain
    call = tool_call("calculator", {"expression": "1+2"})
    text = tool_call("calculator", {})
    text["tool_calls"][0]["function"]["arguments"] = '{"expression": "1+2"}'
    for message in (call, text):
        shown = model.tokenizer.apply_chat_template(
            [user("Hi"), message], tools=[CALCULATOR], tokenize=False
        )
        assert '{"name": "calculator", "arguments": {"expression": "1+2"}}' in shown
