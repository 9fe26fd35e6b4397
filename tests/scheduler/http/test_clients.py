"""Clients that leave, that read slowly, and the official SDK."""

from __future__ import annotations

import asyncio
import json
import socket
from time import perf_counter

import pytest
from openai import AsyncOpenAI, BadRequestError, RateLimitError

from parallax.fabric.errors import PortInUse, QueueFull
from parallax.fabric.limits import Limits
from parallax.scheduler.http import chat as chat_module
from parallax.scheduler.http.server import make_app, serve
from parallax.scheduler.metrics import Metrics
from tests.scheduler.http.scripted import Scripted, site, until

USER = [{"role": "user", "content": "Hi"}]


def request_bytes(**fields) -> bytes:
    body = json.dumps({"messages": USER, **fields}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, 3])
async def test_a_client_that_leaves_closes_its_generator_at_once(folder, tokenizer, stream, tokens):
    never = asyncio.Event()
    cluster = Scripted(folder, script=[*tokenizer.encode("a" * tokens), never])
    async with site(cluster) as here:
        _, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(request_bytes(stream=stream))
        await until(lambda: cluster.running == 1 and cluster.yielded == tokens)
        left_s = perf_counter()
        writer.close()
        await until(lambda: cluster.running == 0)
        assert perf_counter() - left_s < 30
        await until(lambda: b'requests_total{outcome="cancelled"} 1.0' in here.metrics.page())


async def test_a_client_that_leaves_while_tokens_flow_closes_its_generator(says):
    cluster = says("abc", repeats=True)
    cluster.context_tokens = 1 << 30
    async with site(cluster) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(request_bytes(stream=True))
        await reader.read(1000)
        writer.transport.abort()
        left_s = perf_counter()
        await until(lambda: cluster.running == 0)
        assert perf_counter() - left_s < 30


async def test_a_client_that_does_not_read_holds_up_its_own_answer_and_nothing_else(says):
    cluster = says("abc", repeats=True)
    cluster.context_tokens = 1 << 30
    async with site(cluster) as here:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", here.port))
        slow.sendall(request_bytes(stream=True))
        seen = -1
        while cluster.yielded != seen or not seen:  # until nothing moves any more
            seen = cluster.yielded
            await asyncio.sleep(0.2)
        assert cluster.running == 1
        assert seen < 100_000
        assert (await here.chat(max_tokens=5))[0] == 200
        slow.close()
        await until(lambda: cluster.running == 0)


async def test_a_client_that_never_reads_is_let_go_at_the_deadline(says):
    cluster = says("abc", repeats=True)
    cluster.context_tokens = 1 << 30
    limits = {"request_s": 0.3, "queue_wait_s": 0.1, "call_s": 0.3}
    async with site(cluster, **limits) as here:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", here.port))
        slow.sendall(request_bytes(stream=True))
        await until(lambda: cluster.running == 1)
        await until(lambda: cluster.running == 0, 5)
        assert (await here.chat(max_tokens=5))[0] == 200
        slow.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_may_take_longer_than_its_deadline_while_it_grows(
    folder, tokenizer, stream
):
    limits = {"request_s": 1.0, "queue_wait_s": 0.1, "call_s": 1.0}
    pauses = [asyncio.Event() for _ in range(3)]
    text = tokenizer.encode("a")
    script = [*text, *(step for pause in pauses for step in (pause, *text))]
    async with site(Scripted(folder, script=script), **limits) as here:
        loop = asyncio.get_running_loop()
        for number, pause in enumerate(pauses, 1):
            loop.call_later(number * 0.8, pause.set)
        began_s = perf_counter()
        if stream:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
            writer.write(request_bytes(stream=True))
            assert b"[DONE]" in await reader.readuntil(b"[DONE]")
            writer.close()
        else:
            status, answer = await here.chat()
            assert (status, answer["choices"][0]["message"]["content"]) == (200, "aaaa")
        assert perf_counter() - began_s > limits["request_s"] + limits["call_s"]


async def test_silence_is_filled_with_comments(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(chat_module, "KEEP_ALIVE_S", 0.05)
    pause = asyncio.Event()
    script = [*tokenizer.encode("a"), pause, *tokenizer.encode("b")]
    async with site(Scripted(folder, script=script)) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(request_bytes(stream=True))
        for _ in range(2):
            await reader.readuntil(b": keep-alive\n\n")
        pause.set()
        rest = await reader.readuntil(b"[DONE]")
        assert b'"content":"b"' in rest
        writer.close()


async def test_tokens_ready_together_share_a_write(folder, tokenizer):
    cluster = Scripted(folder)

    async def generate(generation):
        from parallax.scheduler.generation import Finish, Reason, Token

        for index, token in enumerate(tokenizer.encode("together")):
            yield Token(index, token)
        yield Finish(Reason.STOP)

    cluster.generate = generate
    async with site(cluster) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(request_bytes(stream=True))
        raw = await reader.readuntil(b"\r\n0\r\n\r\n")
        body = raw.split(b"\r\n\r\n", 1)[1]
        assert body.count(b"data: ") == 1 + 8 + 1 + 1
        assert body.count(b"\r\n") == 2 + 1 + 1  # one chunk, and the last, empty one
        writer.close()


async def test_a_choice_of_model_is_finished_even_if_the_client_leaves(says):
    cluster, began, goes_on = says("a"), asyncio.Event(), asyncio.Event()
    choose = cluster.choose

    async def slowly(*arguments):
        began.set()
        await goes_on.wait()
        await choose(*arguments)

    cluster.choose = slowly
    async with site(cluster) as here:
        body = b'{"model_name": "builtin"}'
        head = (
            "POST /scheduler/init HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        _, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(head.encode() + body)
        await began.wait()
        writer.close()
        await writer.wait_closed()
        assert (await here.chat())[0] == 200  # the server has seen the client go
        goes_on.set()
        await until(lambda: cluster.choices == [("builtin", 1, True)])


async def test_a_stream_reaches_a_client_of_http_1_0(says):
    async with site(says("Hey")) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(request_bytes(stream=True).replace(b"HTTP/1.1", b"HTTP/1.0"))
        body = (await reader.read()).split(b"\r\n\r\n", 1)[1]  # until the server closes
        assert body.startswith(b"data: ")
        assert body.endswith(b"data: [DONE]\n\n")
        writer.close()


async def test_a_stopping_server_ends_status_streams_at_once(says):
    app = make_app(says("a"), limits=Limits(), metrics=Metrics())
    runner, port = await serve(app, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /cluster/status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    await reader.readuntil(b"cluster_status")
    began_s = perf_counter()
    await runner.cleanup()
    assert perf_counter() - began_s < 30
    writer.close()


async def test_a_taken_port_is_told(says):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        app = make_app(says("a"), limits=Limits(), metrics=Metrics())
        with pytest.raises(PortInUse) as caught:
            await serve(app, "127.0.0.1", port)
        assert caught.value.fields == {"port": str(port)}


async def test_the_official_sdk_chats_streams_and_lists_models(says):
    async with (
        site(says("Hello 你好")) as here,
        AsyncOpenAI(base_url=here.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        answer = await client.chat.completions.create(model="org/tiny", messages=USER)
        assert answer.choices[0].message.content == "Hello 你好"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == 12
        text, usage = "", None
        async for chunk in await client.chat.completions.create(
            model="org/tiny", messages=USER, stream=True, stream_options={"include_usage": True}
        ):
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
            usage = chunk.usage or usage
        assert text == "Hello 你好"
        assert usage.total_tokens == answer.usage.total_tokens
        async with client.chat.completions.stream(model="org/tiny", messages=USER) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "Hello 你好"
        assert [model.id async for model in client.models.list()] == ["org/tiny"]
        assert (await client.models.retrieve("org/tiny")).owned_by == "parallax"
        with pytest.raises(BadRequestError) as refused:
            await client.chat.completions.create(model="org/tiny", messages=USER, temperature=-1)
        assert refused.value.param == "temperature"


async def test_the_official_sdk_sees_a_full_queue_as_a_rate_limit(folder):
    async with (
        site(Scripted(folder, script=[QueueFull("Full")])) as here,
        AsyncOpenAI(base_url=here.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(RateLimitError):
            await client.chat.completions.create(model="org/tiny", messages=USER, stream=True)
