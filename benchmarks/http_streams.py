"""Tokens per second through HTTP, text and server-sent events alone.

    python -m benchmarks.http_streams [--streams 64] [--tokens 2000] [--reports]

A generator in this process stands for the cluster. As a ring's lane does, it hands
out one token to each of so many streams at once and then lets the loop go on. The
clients are another process, so that what is measured is one core of server. With
``--reports`` the tokens come as a head's reports do, serialised, and go through the
scheduler's own dispatcher: its whole path but gRPC.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from time import perf_counter, process_time
from typing import ClassVar
from unittest.mock import patch

from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.scheduler import dispatch
from parallax.scheduler.generation import (
    CatalogModel,
    Finish,
    Generation,
    Reason,
    ServedModel,
    Token,
)
from parallax.scheduler.http.server import make_app, serve
from parallax.scheduler.metrics import Metrics
from tests.trust import member

_TICKS = 4  # of the loop: queue to generator, to flow, to writer, to socket
TEXT = "The quick brown fox jumps over the lazy dog. "


class Faucet:
    """A cluster whose tokens cost nothing."""

    def __init__(self, folder: Path, tokens: tuple[int, ...], streams: int) -> None:
        self._folder = folder
        self._tokens = tokens
        self._streams = streams
        self._queues: list[asyncio.Queue[Token | Finish]] = []
        self.began_s = self.began_cpu_s = 0.0

    async def generate(self, generation: Generation) -> AsyncGenerator[Token | Finish, None]:
        queue: asyncio.Queue[Token | Finish] = asyncio.Queue()
        self._queues.append(queue)
        if len(self._queues) == self._streams:
            self._flowing = asyncio.create_task(self._flow(generation.max_tokens))
        while True:
            event = await queue.get()
            yield event
            if isinstance(event, Finish):
                return

    async def _flow(self, count: int) -> None:
        self.began_s, self.began_cpu_s = perf_counter(), process_time()
        for index in range(count):
            token = Token(index, self._tokens[index % len(self._tokens)])
            for queue in self._queues:
                queue.put_nowait(token)
            # The next step comes when every client has been written this one: each token
            # costs a write of its own, which is the worst case.
            for _ in range(_TICKS):
                await asyncio.sleep(0)
        for queue in self._queues:
            queue.put_nowait(Finish(Reason.LENGTH))

    def check_place(self, client: str) -> None:
        return None

    def served(self) -> ServedModel:
        return ServedModel("bench", self._folder, 1 << 30, 0)

    def catalog(self) -> list[CatalogModel]:
        return []

    def status(self) -> dict[str, object]:
        return {"status": "available"}

    def join_command(self) -> str:
        return ""

    async def choose(self, model: str, nodes: int, local_network: bool) -> None:
        return None


class _Link:
    """A stream to a head that keeps the numbers of the requests that it was sent."""

    made: ClassVar[list[_Link]] = []

    def __init__(self, *_: object) -> None:
        self.sent: list[int] = []
        _Link.made.append(self)

    def submit(self, submit: wire.Submit) -> None:
        self.sent.append(submit.request)

    def cancel(self, cancel: wire.Cancel) -> None:
        """Nobody works on it."""

    async def close(self) -> None:
        """Nothing to end."""


class Reports(Faucet):
    """A cluster whose dispatcher hears from a head that costs nothing."""

    def __init__(self, folder: Path, tokens: tuple[int, ...], streams: int) -> None:
        super().__init__(folder, tokens, streams)
        with patch.object(dispatch, "HeadLink", _Link):
            self._dispatcher = dispatch.Dispatcher(
                Limits(), member("boss"), lambda _epoch, _error: None
            )
            # All are one client's, who gets seven of eight rows.
            self._dispatcher.ring_up(1, "head", [], streams * 8 // 7 + 1, 1.0)
        self._link = _Link.made.pop()
        self._flowing: asyncio.Task[None] | None = None

    async def generate(self, generation: Generation) -> AsyncGenerator[Token | Finish, None]:
        if self._flowing is None:
            self._flowing = asyncio.create_task(self._report(generation.max_tokens))
        async for event in self._dispatcher.generate(generation):
            yield event

    async def _report(self, count: int) -> None:
        requests = self._link.sent
        while len(requests) < self._streams:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self.began_s, self.began_cpu_s = perf_counter(), process_time()
        for index in range(count):
            token = self._tokens[index % len(self._tokens)]
            events = [
                wire.TokenEvent(request=request, attempt=1, index=index, token=token)
                for request in requests
            ]
            load = wire.HeadLoad(decoding=self._streams, lanes=1, budget_bytes=1 << 30)
            packed = wire.HeadReport(epoch=1, tokens=events, load=load).SerializeToString()
            self._dispatcher.head_report(wire.HeadReport.FromString(packed))
            for _ in range(_TICKS):
                await asyncio.sleep(0)
        ends = [
            wire.EndEvent(request=request, attempt=1, reason=wire.END_LENGTH)
            for request in requests
        ]
        self._dispatcher.head_report(wire.HeadReport(epoch=1, ends=ends))


async def read_stream(port: int, tokens: int) -> int:
    """One client, as cheap as can be: how many events its answer of so many tokens had."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    message = {"role": "user", "content": "Hi"}
    body = json.dumps({"messages": [message], "stream": True, "max_tokens": tokens}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    events, tail = 0, b""
    while data := await reader.read(1 << 18):
        events += data.count(b"\n\n") + (tail[-1:] == data[:1] == b"\n")
        tail = (tail + data)[-32:]
    assert b"[DONE]" in tail
    writer.close()
    return events


def drink(port: int, streams: int, tokens: int) -> None:
    """The clients: read everything."""

    async def every() -> None:
        events = await asyncio.gather(*(read_stream(port, tokens) for _ in range(streams)))
        # One for each token, and role, finish reason and [DONE].
        assert set(events) == {tokens + 3}, events

    asyncio.run(every())


def make_folder(folder: Path) -> None:
    """A small byte-level tokenizer that knows whole words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


async def measure(folder: Path, streams: int, tokens: int, kind: type[Faucet]) -> None:
    """Serve, let the clients drink, print."""
    from parallax.scheduler.text.tokenizer import ChatTokenizer

    faucet = kind(folder, ChatTokenizer(folder).encode(TEXT), streams)
    runner, port = await serve(make_app(faucet, limits=Limits(), metrics=Metrics()), "127.0.0.1", 0)
    clients = multiprocessing.get_context("spawn").Process(
        target=drink, args=(port, streams, tokens)
    )
    clients.start()
    await asyncio.to_thread(clients.join)
    wall_s, cpu_s = perf_counter() - faucet.began_s, process_time() - faucet.began_cpu_s
    await runner.cleanup()
    assert clients.exitcode == 0
    total = streams * tokens
    print(f"{socket.gethostname()}, {os.cpu_count()} cores, {streams} streams x {tokens} tokens")
    print(f"{total / wall_s:,.0f} tokens/s, {total / cpu_s:,.0f} tokens/s per core of server")
    print(f"{cpu_s / total * 1e6:.1f} microseconds of CPU per token")


def main() -> None:
    """Read the flags and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--reports", action="store_true")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        asyncio.run(
            measure(Path(folder), flags.streams, flags.tokens, Reports if flags.reports else Faucet)
        )


if __name__ == "__main__":
    main()
