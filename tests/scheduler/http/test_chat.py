"""Chat completions over a real server: shapes, values, limits."""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import replace

import pytest

from parallax.scheduler.generation import Token
from tests.scheduler.http.scripted import Scripted, site


async def test_an_answer_has_exactly_the_references_shape(says, tokenizer):
    async with site(says("Hello there")) as here:
        status, answer = await here.chat("Hi")
        prompt = tokenizer.prompt([{"role": "user", "content": "Hi"}])
        assert status == 200
        uuid.UUID(answer["id"])
        assert answer["object"] == "chat.completion"
        assert isinstance(answer["created"], int)
        assert answer["model"] == "org/tiny"
        assert answer["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello there"},
                "finish_reason": "stop",
            }
        ]
        assert answer["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": 11,
            "total_tokens": len(prompt) + 11,
        }
        assert answer["metrics"]["tokens"] == 11
        assert answer["metrics"]["ttft_ms"] > 0
        assert here.cluster.generations[0].prompt == prompt


async def test_a_stream_begins_with_the_role_and_ends_with_the_reason_and_done(says):
    async with site(says("Hey")) as here:
        events = await here.events()
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in chunks}) == 1
        uuid.UUID(chunks[0]["id"])
        assert all("usage" not in chunk for chunk in chunks)
        choices = [chunk["choices"][0] for chunk in chunks]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["delta"]["content"] for c in choices[1:-1]] == ["H", "e", "y"]
        assert [c["finish_reason"] for c in choices] == [None] * 4 + ["stop"]
        assert choices[-1]["delta"] == {}


async def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(says):
    async with site(says("Hey")) as here:
        events = await here.events(stream_options={"include_usage": True})
        chunks = [json.loads(event) for event in events[:-1]]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 3
        assert set(chunks[-1]["metrics"]) == {"tps", "ttft_ms", "tokens"}


async def test_characters_of_several_tokens_arrive_whole(says):
    text = "naïve 你好 🤖👩‍👩‍👧 end"
    async with site(says(text)) as here:
        events = await here.events()
        deltas = [json.loads(e)["choices"][0]["delta"].get("content", "") for e in events[:-1]]
        assert "".join(deltas) == text
        assert not any("\ufffd" in delta for delta in deltas)
        assert (await here.chat())[1]["choices"][0]["message"]["content"] == text


async def test_a_stop_string_across_tokens_ends_the_answer_and_is_not_shown(says):
    cluster = says("one two STOP three", repeats=True)
    async with site(cluster) as here:
        events = await here.events(stop=["STOP"])
        choices = [json.loads(e)["choices"][0] for e in events[:-1]]
        assert "".join(c["delta"].get("content", "") for c in choices) == "one two "
        assert choices[-1]["finish_reason"] == "stop"
        assert cluster.running == 0
        _, answer = await here.chat(stop="STOP", n=2)
        assert [c["message"]["content"] for c in answer["choices"]] == ["one two "] * 2
        assert answer["usage"]["completion_tokens"] == 24
        assert cluster.running == 0


async def test_half_a_stop_string_at_the_end_is_text(says):
    async with site(says("one ST")) as here:
        _, answer = await here.chat(stop="STOP")
        assert answer["choices"][0]["message"]["content"] == "one ST"


async def test_max_tokens_ends_an_answer_with_length(says):
    async with site(says("abcdef")) as here:
        for fields in (
            {"max_tokens": 3},
            {"max_completion_tokens": 3, "max_tokens": 5},
            {"sampling_params": {"max_tokens": 3}},
            {"sampling_params": {"max_new_tokens": 3}},
            {"max_tokens": 3, "sampling_params": {"max_tokens": 5}},
        ):
            _, answer = await here.chat(**fields)
            assert answer["choices"][0]["message"]["content"] == "abc", fields
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == 3


async def test_the_answer_takes_at_most_what_the_context_leaves(says):
    cluster = says("abc", context_tokens=100)
    async with site(cluster) as here:
        await here.chat()
        await here.chat(max_tokens=1_000_000)
        prompt = len(cluster.generations[0].prompt)
        assert [g.max_tokens for g in cluster.generations] == [100 - prompt] * 2


async def test_a_prompt_over_the_context_is_refused_with_both_counts(says):
    async with site(says("abc", context_tokens=64)) as here:
        status, answer = await here.chat("x" * 100)
        assert status == 400
        assert answer["error"]["code"] == "context_length_exceeded"
        assert "64" in answer["error"]["message"]
        assert str(100 + len("<user\n>\n<assistant\n")) in answer["error"]["message"]


async def test_sampling_values_reach_the_cluster(says):
    cluster = says("a")
    async with site(cluster) as here:
        values = {
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 7,
            "min_p": 0.25,
            "presence_penalty": -1,
            "frequency_penalty": 1.5,
            "repetition_penalty": 1.25,
            "seed": 42,
            "logit_bias": {"17": -100, "18": 2.5},
        }
        await here.chat(**values)
        await here.chat(sampling_params=values)
        await here.chat(sampling_params=values | {"top_k": 3}, top_k=7)
        expected = values | {"logit_bias": {17: -100.0, 18: 2.5}}
        for generation in cluster.generations:
            for name, value in expected.items():
                assert getattr(generation.sampling, name) == value, name


async def test_a_seed_is_always_assigned_and_told(says):
    cluster = says("a")
    async with site(cluster) as here:
        first, second = [(await here.chat())[1]["seed"] for _ in range(2)]
        assert first != second
        assert [g.sampling.seed for g in cluster.generations] == [first, second]
        _, answer = await here.chat(seed=5, n=3)
        assert answer["seed"] == 5
        assert [g.sampling.seed for g in cluster.generations[2:]] == [5, 6, 7]
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2]


async def test_several_choices_stream_side_by_side(says):
    async with site(says("hey")) as here:
        events = await here.events(n=2, stream_options={"include_usage": True})
        texts = {0: "", 1: ""}
        for event in events[:-2]:
            choice = json.loads(event)["choices"][0]
            texts[choice["index"]] += choice["delta"].get("content", "")
        assert texts == {0: "hey", 1: "hey"}
        assert json.loads(events[-2])["usage"]["completion_tokens"] == 6


async def test_ends_of_turn_come_from_the_model_and_can_be_ignored(says, tokenizer):
    cluster = says("a")
    async with site(cluster) as here:
        await here.chat()
        await here.chat(sampling_params={"ignore_eos": True, "stop_token_ids": [9]})
        assert cluster.generations[0].end_tokens == tokenizer.end_tokens != frozenset()
        assert cluster.generations[1].end_tokens == {9}


async def test_text_parts_and_developer_messages_are_read(says, tokenizer):
    cluster = says("a")
    async with site(cluster) as here:
        messages = [
            {"role": "developer", "content": "Be kind"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "content": "3", "tool_call_id": "1"},
        ]
        status, _ = await here.chat(messages=messages)
        assert status == 200
        text = tokenizer.decode(cluster.generations[0].prompt)
        assert text == "system\nBe kind\nuser\nab\nassistant\n\ntool\n3\nassistant\n"


@pytest.mark.parametrize("model", [None, "org/tiny", "tiny-folder"])
async def test_a_model_may_be_left_out_or_named_in_two_ways(says, model):
    async with site(says("a")) as here:
        fields = {} if model is None else {"model": model}
        assert (await here.chat(**fields))[0] == 200


async def test_openai_fields_that_change_nothing_are_accepted(says):
    async with site(says("a")) as here:
        status, answer = await here.chat(
            user="me",
            metadata={"a": "b"},
            store=True,
            service_tier="auto",
            safety_identifier="x",
            prompt_cache_key="k",
            parallel_tool_calls=True,
            logprobs=False,
            top_logprobs=None,
            tools=[],
            tool_choice="auto",
            response_format={"type": "text"},
            reasoning_effort=None,
            modalities=["text"],
            functions=None,
            temperature=None,
            stop=None,
            n=1,
            stream=False,
        )
        assert status == 200, answer


async def test_a_models_own_sampling_values_hold_where_a_request_names_none(
    folder, tmp_path, tokenizer
):
    own = shutil.copytree(folder, tmp_path / "own")
    values = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    (own / "generation_config.json").write_text(json.dumps(values))
    async with site(Scripted(own, script=list(tokenizer.encode("Hi")))) as here:
        await here.chat("Hi")
        await here.chat("Hi", temperature=0, sampling_params={"top_k": 3})
        first, second = (generation.sampling for generation in here.cluster.generations)
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.95, 20)
    assert first.repetition_penalty == 1.05
    assert (first.min_p, first.presence_penalty) == (0.0, 0.0)
    assert (second.temperature, second.top_p, second.top_k) == (0.0, 0.95, 3)


class Cached(Scripted):
    """Had some of every prompt in a cache: of the choices, each more than the one before."""

    async def generate(self, generation):
        cached = 7 + len(self.generations)
        async for event in super().generate(generation):
            first = isinstance(event, Token) and event.index == 0
            yield replace(event, cached_tokens=cached) if first else event


@pytest.mark.parametrize("n", [1, 2])
async def test_usage_tells_how_much_of_the_prompt_was_cached(n, says):
    script = says("Hey")
    cluster = Cached(script.folder, script.script)
    async with site(cluster) as here:
        _, answer = await here.chat("Hi", n=n)
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 7}
        events = await here.events(stream_options={"include_usage": True})
        details = json.loads(events[-2])["usage"]["prompt_tokens_details"]
        assert details == {"cached_tokens": 7 + n}
