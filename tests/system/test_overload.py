"""A real cluster that is asked for far more than it can do."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import aiohttp
import pytest

from tests.cluster import Cluster, boot
from tests.models import make_model

ROWS = 2
PLACES = 16
MINE = 12  # of the places, for a client that is alone: three times what stays free
PATIENCE_S = 120.0
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node with two rows and little memory, and a short queue."""
    model = make_model(tmp_path_factory.mktemp("models") / "tiny", layers=2, hidden=32)
    variables = {
        "PARALLAX_LIMITS__LANE_ROWS": str(ROWS),
        "PARALLAX_LIMITS__QUEUE_REQUESTS": str(PLACES),
        "PARALLAX_LIMITS__SILENCE_S": "60",  # nobody misses a node that is stopped for a while
    }
    with boot(model, nodes=0, wanted=1, variables=variables) as running:
        running.join("small", "--memory", "1250kB")
        running.wait_ready()
        yield running


def body(tokens: int, prompt: str = "Hi", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True, **fields}


def ask_from(address: str, port: int, tokens: int, prompt: str = "Hi") -> int:
    """Completion tokens of one answer, asked for from this address of the machine."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", port, timeout=PATIENCE_S, source_address=(address, 0)
    )
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body(tokens, prompt)), JSON)
        answer = json.load(connection.getresponse())
        return int(answer["usage"]["completion_tokens"])
    finally:
        connection.close()


@contextmanager
def stopped(cluster: Cluster) -> Iterator[None]:
    """Nothing that runs comes to an end meanwhile, so that all who ask find the rows taken."""
    node = cluster.process("small").child
    node.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        node.send_signal(signal.SIGCONT)


def has_address(address: str) -> bool:
    """Whether this machine has it; macOS gives loopback only 127.0.0.1."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def test_a_prompt_that_the_memory_can_never_hold_is_told_at_once_how_much_it_can(
    cluster: Cluster,
) -> None:
    model = cluster.status()["model"]
    assert 256 < model["context_tokens"] < 3000, "less than the model's own 4096"
    connection = http.client.HTTPConnection("127.0.0.1", cluster.http_port, timeout=PATIENCE_S)
    messages = [{"role": "user", "content": "x" * 3500}]
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": messages}), JSON)
    answer = connection.getresponse()
    error = json.load(answer)["error"]
    connection.close()
    assert (answer.status, error["code"]) == (400, "context_length_exceeded")
    assert f"at most {model['context_tokens'] - 1} tokens" in error["message"]


@pytest.mark.skipif(not has_address("127.0.0.2"), reason="loopback has one address here")
def test_a_client_with_one_request_does_not_wait_for_all_of_another_ones(cluster: Cluster) -> None:
    port, tokens, count = cluster.http_port, 200, ROWS + MINE
    with ThreadPoolExecutor(count + 1) as pool:
        with stopped(cluster):
            flood = [pool.submit(ask_from, "127.0.0.1", port, tokens) for _ in range(count)]
            cluster.wait(lambda s: s["queue"] == {"waiting": MINE, "running": ROWS})
            other = pool.submit(ask_from, "127.0.0.2", port, tokens)
            cluster.wait(lambda s: s["queue"]["waiting"] == MINE + 1)
        assert other.result(PATIENCE_S) == tokens
        # It gets the next row; meanwhile the other row, and the one before it, come to an end.
        assert sum(each.done() for each in flood) <= count // 2
        for each in as_completed(flood, timeout=PATIENCE_S):
            assert each.result() == tokens


def test_ten_times_too_many_are_refused_at_once_and_the_admitted_are_served(
    cluster: Cluster,
) -> None:
    tokens, count = 40, 10 * (ROWS + MINE)

    async def one(session: aiohttp.ClientSession) -> int:
        path = cluster.url + "/v1/chat/completions"
        async with session.post(path, json=body(tokens, stream=True)) as answer:
            status, text = answer.status, (await answer.read()).decode()
        if status == 429:
            assert int(answer.headers["Retry-After"]) > 0
            assert json.loads(text)["error"]["code"] == "queue_full"
        else:
            assert text.endswith("data: [DONE]\n\n")
            assert '"finish_reason":"length"' in text
        return status

    async def every() -> list[int]:
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            with stopped(cluster):
                tasks = {asyncio.create_task(one(session)) for _ in range(count)}
                refused = set()
                while len(refused) < count - ROWS - MINE:
                    new, _ = await asyncio.wait(
                        tasks - refused, return_when=asyncio.FIRST_COMPLETED
                    )
                    refused |= new
            return await asyncio.gather(*tasks)

    # The refused do not wait in the queue: all are there while nothing moves in it.
    assert Counter(asyncio.run(every())) == {200: ROWS + MINE, 429: count - ROWS - MINE}
    cluster.wait(lambda s: s["queue"] == {"waiting": 0, "running": 0})


@pytest.mark.skipif(not has_address("127.0.0.2"), reason="loopback has one address here")
def test_a_client_that_comes_when_long_answers_have_all_they_can_is_served_beside_them(
    two_nodes: Cluster,
) -> None:
    rows = 2 * 16  # what one client gets of both stages' lanes

    async def flood() -> int:
        """How many of its answers have ended when the other client has its own."""
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

            async def one() -> None:
                path = two_nodes.url + "/v1/chat/completions"
                async with session.post(path, json=body(3000, stream=True)) as answer:
                    await answer.read()

            tasks = [asyncio.create_task(one()) for _ in range(rows + 4)]
            await asyncio.to_thread(
                two_nodes.wait, lambda s: s["queue"] == {"waiting": 4, "running": rows}
            )
            got = await asyncio.to_thread(ask_from, "127.0.0.2", two_nodes.http_port, 3)
            assert got == 3
            ended = sum(task.done() for task in tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return ended

    assert asyncio.run(flood()) == 0
    two_nodes.wait(lambda s: s["queue"] == {"waiting": 0, "running": 0})


def test_an_answer_that_outgrows_a_small_ring_goes_on_in_a_larger_one(cluster: Cluster) -> None:
    small = cluster.status()["model"]["context_tokens"]
    cluster.join("large", "--memory", "60MB")
    cluster.wait(lambda s: len(s["rings"]) == 2 and {r["status"] for r in s["rings"]} == {"ready"})
    assert cluster.status()["model"]["context_tokens"] > small, "what the larger one takes"
    # Longer than answers are expected to be, or both would go to the larger one at once.
    prompt, tokens = "x" * (small - 700), 800
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(ask_from, "127.0.0.1", cluster.http_port, tokens, prompt) for _ in range(2)
        ]
        assert [each.result() for each in asked] == [tokens, tokens]
