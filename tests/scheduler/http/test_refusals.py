"""What is refused: each with its status, its code and the field's name."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging

import pytest

from parallax.fabric.errors import (
    BadSetting,
    InternalError,
    ModelNotFound,
    NoRing,
    QueueFull,
    QueueTimeout,
    RingLost,
)
from parallax.fabric.limits import Limits
from parallax.scheduler.http.requests import parse_json
from parallax.scheduler.http.server import make_app, serve
from parallax.scheduler.metrics import Metrics
from tests.scheduler.http.scripted import Scripted, site, until

JSON = {"Content-Type": "application/json"}
USER = [{"role": "user", "content": "Hi"}]

WRONG = {
    "temperature": [-0.1, 2.5, "hot", True, [1]],
    "top_p": [0, -1, 1.1],
    "top_k": [-1, 1.5, "3"],
    "min_p": [-0.1, 1.5],
    "presence_penalty": [-3, 3],
    "frequency_penalty": [2.1],
    "repetition_penalty": [0, -1],
    "seed": [1.5, "1", 1 << 64],
    "max_tokens": [0, -5, 1.5, "10"],
    "max_completion_tokens": [0],
    "n": [0, 17, True],
    "stream": ["yes", 1],
    "model": [3, ["a"]],
    "stop": [3, {}, ["a"] * 17],
    "stop.0": [""],
    "stop.1": [["a", ""]],
    "messages": [[], "Hi", None],
    "messages.0.role": [[{"role": "robot", "content": "a"}], [{"content": "a"}]],
    "messages.1.content": [[*USER, {"role": "user"}], [*USER, {"role": "user", "content": 3}]],
    "messages.0.content.0.text": [[{"role": "user", "content": [{"type": "text"}]}]],
    "messages.0.colour": [[{"role": "user", "content": "a", "colour": "red"}]],
    "sampling_params": [[], "a"],
    "sampling_params.top_k": [{"top_k": -1}],
    "sampling_params.topk": [{"topk": 1}],
    "stream_options.include_usage": [{"include_usage": "yes"}],
    "logit_bias.17": [{"17": 101}],
    "logit_bias.x": [{"x": 1}],
    "logit_bias.260": [{"260": 1}],
    f"logit_bias.{'0' * 40}": [{"0" * 5000: 1}],
    "logit_bias": [{str(i): 1 for i in range(1025)}],
    "sampling_params.stop_token_ids": [{"stop_token_ids": [1] * 1025}],
    "messages.0.tool_calls.0.function.arguments": [
        [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
            }
        ]
        for arguments in ("{", "[" * 50_000, "NaN", "9" * 99_999)
    ],
    "messages.0.content": [[{"role": "user", "content": [{"type": "text", "text": ""}] * 4097}]],
    "colour": ["red"],
}

UNSUPPORTED = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "logprobs": True,
    "top_logprobs": 3,
    "response_format": {"type": "json_object"},
    "reasoning_effort": "high",
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {"search_context_size": "low"},
    "sampling_params.json_schema": {"json_schema": "{}"},
    "messages.0.content.1.type": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": "http://x"}},
            ],
        }
    ],
}


async def test_wrong_fields_are_refused_by_name_and_nothing_is_run(says):
    cluster = says("a")
    async with site(cluster) as here:
        for field, values in WRONG.items():
            for value in values:
                status, answer = await here.chat(**{field.split(".")[0]: value})
                error = answer["error"]
                assert (status, error["param"]) == (400, field), (field, value, answer)
                assert set(error) == {"message", "type", "param", "code"}
                assert error["type"] == "invalid_request_error"
                assert field in error["message"]
        assert cluster.generations == []
        assert (await here.chat())[0] == 200


async def test_unsupported_fields_are_refused_by_name(says):
    async with site(says("a")) as here:
        for field, value in UNSUPPORTED.items():
            status, answer = await here.chat(**{field.split(".")[0]: value})
            assert (status, answer["error"]["param"]) == (400, field), answer
            assert answer["error"]["code"] == "unsupported_parameter", field


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"messages":' + b'[{"a":' * 50_000,
    ],
    ids=lambda body: body[:12].decode("latin-1") + str(len(body)),
)
async def test_what_is_no_json_object_is_refused(says, body):
    cluster = says("a")
    async with (
        site(cluster) as here,
        here.session.post(here.url + "/v1/chat/completions", data=body, headers=JSON) as response,
    ):
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "invalid_request_error"
        assert cluster.generations == []


async def test_a_body_over_the_limit_is_413_whether_it_says_so_or_not(says):
    async with site(says("a"), body_bytes=1000) as here:

        async def unsaid():
            for _ in range(100):
                yield b" " * 100

        url = here.url + "/v1/chat/completions"
        for data in (b" " * 10_000, unsaid()):
            async with here.session.post(url, data=data, headers=JSON) as response:
                assert response.status == 413
                assert (await response.json())["error"]["code"] == "body_too_large"
        assert (await here.chat())[0] == 200


async def test_another_model_is_404(says):
    async with site(says("a")) as here:
        status, answer = await here.chat(model="gpt-9")
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        async with here.session.get(here.url + "/v1/models/gpt-9") as response:
            assert response.status == 404


async def test_no_model_chosen_is_503(folder):
    async with site(Scripted(folder, chosen=False)) as here:
        status, answer = await here.chat(model="any")
        assert (status, answer["error"]["code"]) == (503, "routing_not_ready")
        async with here.session.get(here.url + "/v1/models") as response:
            assert (await response.json())["data"] == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (QueueFull("Full", retry_after_s=7), (429, "queue_full", "7")),
        (QueueTimeout("Busy"), (429, "pipelines_busy", "5")),
        (NoRing("None"), (503, "routing_not_ready", "5")),
        (RingLost("Lost"), (503, "ring_lost", "5")),
        (InternalError("Oh"), (500, "internal_error", None)),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_errors_before_the_first_token_keep_their_status(folder, error, told, stream):
    async with site(Scripted(folder, script=[error])) as here:
        body = {"messages": USER, "stream": stream}
        async with here.session.post(here.url + "/v1/chat/completions", json=body) as response:
            code = (await response.json())["error"]["code"]
            assert (response.status, code, response.headers.get("Retry-After")) == told


async def test_a_full_queue_is_told_before_anything_is_done_about_the_prompt(folder):
    """A prompt that is too long shows whether it has been looked at."""
    for full, told in ((None, 400), (QueueFull("Full", retry_after_s=7), 429)):
        async with site(Scripted(folder, context_tokens=1, full=full)) as here:
            assert (await here.chat())[0] == told


async def test_an_error_after_the_first_token_ends_the_stream_without_done(folder, tokenizer):
    script = [*tokenizer.encode("ab"), RingLost("The ring broke")]
    async with site(Scripted(folder, script=script)) as here:
        events = await here.events()
        assert '"content":"b"' in events[-2]
        assert events[-1] == (
            '{"error":{"message":"The ring broke.","type":"server_error",'
            '"param":null,"code":"ring_lost"}}'
        )


@pytest.mark.parametrize("defect", [KeyError("secret"), TimeoutError("secret")])
async def test_a_defect_after_the_first_token_is_told_inside_the_stream(folder, tokenizer, defect):
    async with site(Scripted(folder, script=[*tokenizer.encode("ab"), defect])) as here:
        events = await here.events()
        assert json.loads(events[-1])["error"]["code"] == "internal_error"
        assert "secret" not in events[-1]
        counted = b'requests_total{outcome="internal_error"} 1.0'
        await until(lambda: counted in here.metrics.page())


@pytest.mark.parametrize("stream", [False, True])
async def test_a_defect_is_logged_and_told_without_its_trace(folder, caplog, stream):
    async with site(Scripted(folder, script=[KeyError("secret")])) as here:
        with caplog.at_level(logging.ERROR):
            status, answer = await here.chat(stream=stream)
        assert (status, answer["error"]["code"]) == (500, "internal_error")
        assert "secret" not in str(answer)
        assert "Traceback" in caplog.text
        assert "secret" in caplog.text


async def test_a_generator_that_ends_without_a_finish_is_a_defect(folder, says):
    cluster = says("a")

    async def generate(generation):
        for _ in ():
            yield _

    cluster.generate = generate
    async with site(cluster) as here:
        assert (await here.chat())[0] == 500
        assert (await here.chat(stream=True))[0] == 500


async def test_unknown_paths_and_methods_have_the_same_shape(says):
    async with site(says("a")) as here:
        async with here.session.get(here.url + "/nowhere") as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "not_found"
        async with here.session.get(here.url + "/v1/chat/completions") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            assert (await response.json())["error"]["code"] == "method_not_allowed"
        async with here.session.post(here.url + "/v1/models") as response:
            assert response.status == 405
            assert response.headers["Allow"] == "GET, HEAD"


async def test_messages_that_the_template_refuses_are_400(tmp_path, folder):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    template = "{{ raise_exception('Roles must alternate') }}"
    settings = (folder / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(settings.replace('"chat_template"', '"unused"'))
    (tmp_path / "chat_template.jinja").write_text(template)
    async with site(Scripted(tmp_path)) as here:
        status, answer = await here.chat()
        assert (status, answer["error"]["param"]) == (400, "messages")
        assert "Roles must alternate" in answer["error"]["message"]


async def test_a_prompt_without_a_token_is_400_and_reaches_no_ring(tmp_path, folder):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    cluster = Scripted(tmp_path, script=[72])
    async with site(cluster) as here:
        status, told = await here.chat("")
        assert (status, told["error"]["param"]) == (400, "messages")
        assert cluster.generations == []
        assert (await here.chat("H"))[0] == 200


async def test_a_model_without_a_tokenizer_is_told_so(tmp_path):
    async with site(Scripted(tmp_path)) as here:
        status, answer = await here.chat()
        assert (status, answer["error"]["code"]) == (422, "model_broken")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "model_name"),
        ({"model_name": ""}, "model_name"),
        ({"model_name": 3}, "model_name"),
        ({"model_name": "a", "init_nodes_num": 0}, "init_nodes_num"),
        ({"model_name": "a", "init_nodes_num": "2"}, "init_nodes_num"),
        ({"model_name": "a", "init_nodes_num": True}, "init_nodes_num"),
        ({"model_name": "a", "is_local_network": "yes"}, "is_local_network"),
        ({"model_name": "a", "colour": 1}, "colour"),
    ],
)
async def test_a_wrong_choice_of_model_is_refused_by_field(says, body, field):
    async with (
        site(says("a")) as here,
        here.session.post(here.url + "/scheduler/init", json=body) as response,
    ):
        assert response.status == 400
        assert (await response.json())["error"]["param"] == field
        assert here.cluster.choices == []


async def test_a_model_that_cannot_be_chosen_is_told(says):
    cluster = says("a")
    cluster.refusal = ModelNotFound("No such model", model="x")
    async with (
        site(cluster) as here,
        here.session.post(here.url + "/scheduler/init", json={"model_name": "x"}) as response,
    ):
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "head",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nZ\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: application/json\r\nContent-Encoding: gzip\r\n"
        b"Content-Length: 5\r\n\r\nabcde",
    ],
    ids=["method", "version", "header", "chunk", "gzip"],
)
async def test_bytes_that_are_no_http_are_answered_and_not_logged(says, caplog, head):
    async with site(says("a")) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(head)
        answer = await reader.read(1000)
        writer.close()
        assert b" 400 Bad Request\r\n" in answer
        assert b"Traceback" not in answer
        assert (await here.chat())[0] == 200
    assert "Traceback" not in caplog.text


async def test_a_compressed_body_is_read_and_a_bomb_is_413(says):
    async with site(says("a"), body_bytes=100_000) as here:
        small = json.dumps({"messages": USER}).encode()
        for body, status in ((small, 200), (b" " * 50_000_000, 413)):
            async with here.session.post(
                here.url + "/v1/chat/completions",
                data=gzip.compress(body),
                headers=JSON | {"Content-Encoding": "gzip"},
            ) as response:
                assert response.status == status


async def test_an_address_that_is_not_ours_is_a_bad_setting(says):
    app = make_app(says("a"), limits=Limits(), metrics=Metrics())
    with pytest.raises(BadSetting, match=r"192\.0\.2\.1"):
        await serve(app, "192.0.2.1", 0)


def test_what_people_write_is_not_kept_once_it_is_read():
    first, second = (parse_json(b'{"content": "something private"}') for _ in range(2))
    assert first == second
    assert first["content"] is not second["content"]
