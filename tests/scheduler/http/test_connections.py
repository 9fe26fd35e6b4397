"""Clients that are slow, silent or too many: none of them holds anything for long."""

from __future__ import annotations

import asyncio
import socket

import pytest

from parallax.scheduler.http import connections
from parallax.scheduler.http.access import Access
from parallax.scheduler.http.keys import BODIES
from tests.scheduler.http.scripted import site, until
from tests.scheduler.http.test_clients import request_bytes
from tests.scheduler.http.test_guard import refused

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def ends(reader: asyncio.StreamReader) -> bytes:
    """Everything until the server closes."""
    async with asyncio.timeout(20):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


async def dribble(writer: asyncio.StreamWriter, data: bytes) -> None:
    """One byte after the other, never fast enough to be idle, never done."""
    try:
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)
    except ConnectionError:
        return


async def test_headers_that_dribble_in_end_the_connection(says):
    async with site(says("a"), header_s=0.5) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        slow = asyncio.create_task(dribble(writer, GET[:-2] + b"X: " + b"a" * 10_000))
        assert await ends(reader) == b""
        writer.close()
        await slow
        assert refused(here, "slow_request") == 1
        assert (await here.chat())[0] == 200


async def test_the_second_request_of_a_connection_has_no_more_time_than_the_first(says):
    async with site(says("a"), header_s=0.5) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(GET)
        await reader.readuntil(b"}")
        slow = asyncio.create_task(dribble(writer, GET[:-2] + b"X: " + b"a" * 10_000))
        assert await ends(reader) == b""
        writer.close()
        await slow
        assert refused(here, "slow_request") == 1


async def test_a_connection_that_says_nothing_is_closed(says):
    async with site(says("a"), header_s=0.5, keepalive_s=0.7) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        assert await ends(reader) == b""
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(GET)
        assert b"200 OK" in await ends(reader)  # answered, and closed as idle later
        writer.close()
        assert refused(here, "slow_request") == 0


async def test_an_answer_may_take_longer_than_a_head(says):
    cluster, goes_on = says("a"), asyncio.Event()
    cluster.script.insert(0, goes_on)
    async with site(cluster, header_s=0.5) as here:
        chat = asyncio.create_task(here.chat())
        await until(lambda: cluster.running == 1)
        await asyncio.sleep(0.8)  # longer than the limit: nothing is to happen
        goes_on.set()
        assert (await chat)[0] == 200


async def test_a_body_that_does_not_come_is_408(says):
    async with site(says("a"), body_s=0.3, linger_s=0.1) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(request_bytes()[:-1])
        answer = await ends(reader)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code": "request_timeout"' in answer
        writer.close()
        assert refused(here, "request_timeout") == 1


async def test_a_body_without_a_key_is_not_waited_for(says):
    async with site(says("a"), access=Access(keys_required=True)) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(request_bytes()[:-1])
        async with asyncio.timeout(20):
            assert b" 401 " in await reader.readline()
        writer.close()


async def test_bodies_that_come_in_slowly_cannot_take_all_memory(says):
    async with site(says("a"), body_bytes=10_000, bodies_bytes=25_000) as here:
        bodies = here.app[BODIES]
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/json\r\nContent-Length: 9000\r\n\r\n"
        )
        slow = []
        for _ in range(2):
            slow.append((await asyncio.open_connection("127.0.0.1", here.port))[1])
            slow[-1].write(head.encode())
        await until(lambda: bodies.reserved == 18_000)
        status, answer = await here.chat("x" * 8000)
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert (await here.chat("Hi"))[0] == 200  # there is room for small ones
        for writer in slow:
            writer.close()
        await until(lambda: bodies.reserved == 0)
        assert (await here.chat("x" * 8000))[0] == 400  # read, and longer than the context


@pytest.mark.parametrize("path", ["chat", "status"])
async def test_a_client_that_does_not_read_is_ended(says, monkeypatch, path):
    monkeypatch.setattr(connections, "_SEND_BUFFER_BYTES", 4096)
    cluster = says("abc", repeats=True)
    cluster.context_tokens = 1 << 30
    if path == "status":
        cluster.status = lambda: {"filler": "x" * (1 << 20)}
    async with site(cluster, reader_s=0.5) as here:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", here.port))
        line = b"GET /cluster/status HTTP/1.1\r\nHost: localhost\r\n\r\n"
        slow.sendall(request_bytes(stream=True) if path == "chat" else line)
        await until(lambda: refused(here, "slow_reader") == 1, 20)
        await until(lambda: cluster.running == 0, 20)
        assert (await here.chat(max_tokens=5))[0] == 200
        slow.close()


async def test_an_answer_that_nobody_takes_is_not_kept_after_it_ended(says, monkeypatch):
    monkeypatch.setattr(connections, "_SEND_BUFFER_BYTES", 4096)
    async with site(says("a"), reader_s=0.5, keepalive_s=0.1) as here:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", here.port))
        slow.sendall(GET.replace(b"/health", b"/style.css") * 3)  # less than aiohttp waits for
        await until(lambda: refused(here, "slow_reader") == 1, 20)
        assert (await here.chat(max_tokens=5))[0] == 200, "others are served"
        slow.close()


async def test_no_more_connections_than_there_may_be(says):
    async with site(says("a"), connections=3) as here:
        opened = [await asyncio.open_connection("127.0.0.1", here.port) for _ in range(3)]
        for reader, writer in opened:
            writer.write(GET)
            await reader.readuntil(b"}")
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        answer = await ends(reader)
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"Retry-After: 5" in answer
        assert b'"code": "too_many_connections"' in answer
        writer.close()
        assert refused(here, "too_many_connections") == 1
        opened.pop()[1].close()

        async def answered() -> bool:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
            writer.write(GET)
            line = await reader.readline()
            writer.close()
            return b" 200 " in line

        async with asyncio.timeout(20):
            while not await answered():
                pass
        for _, writer in opened:
            writer.close()


def test_one_address_cannot_have_all_connections_but_loopback_may() -> None:
    from parallax.fabric.limits import Limits
    from parallax.scheduler.metrics import Metrics

    limits = Limits(connections=10, connections_per_address=2)
    counted = connections.Connections(None, limits, Metrics())  # type: ignore[arg-type]
    assert [counted.enter("192.0.2.1") for _ in range(3)] == [True, True, False]
    assert counted.enter("192.0.2.2")
    assert [counted.enter("127.0.0.1") for _ in range(8)] == [True] * 7 + [False]
    counted.leave("192.0.2.1")
    assert counted.enter("192.0.2.1")
    for address in ["192.0.2.1"] * 2 + ["192.0.2.2"] + ["127.0.0.1"] * 7:
        counted.leave(address)
    assert counted.open == 0
    assert counted._by_address == {}
