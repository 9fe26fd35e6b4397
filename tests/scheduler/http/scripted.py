"""A cluster that answers from a script: what HTTP needs of one, and no ring."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from parallax.fabric.limits import Limits
from parallax.scheduler.api_keys import KeyRing
from parallax.scheduler.gate import Gate
from parallax.scheduler.generation import (
    CatalogModel,
    Finish,
    Generation,
    Reason,
    ServedModel,
    Token,
)
from parallax.scheduler.http.access import Access
from parallax.scheduler.http.server import make_app, serve
from parallax.scheduler.metrics import Metrics

Step = int | Exception | asyncio.Event


@dataclass
class Scripted:
    """Yields ``script``: token ids, errors to raise, events to wait for; then finishes."""

    folder: Path
    script: list[Step] = field(default_factory=list)
    reason: Reason = Reason.STOP
    context_tokens: int = 4096
    chosen: bool = True
    repeats: bool = False  # the script begins again and again
    generations: list[Generation] = field(default_factory=list)
    choices: list[tuple[str, int, bool]] = field(default_factory=list)
    refusal: Exception | None = None
    full: Exception | None = None  # raised before any work is done
    running: int = 0
    yielded: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, generation: Generation) -> AsyncGenerator[Token | Finish, None]:
        self.generations.append(generation)
        self.running += 1
        index = 0
        try:
            while True:
                for step in self.script:
                    if isinstance(step, Exception):
                        raise step
                    if isinstance(step, asyncio.Event):
                        await step.wait()
                        continue
                    await asyncio.sleep(0)
                    if index == generation.max_tokens:
                        yield Finish(Reason.LENGTH)
                        return
                    if step in generation.end_tokens:
                        yield Finish(Reason.STOP)
                        return
                    yield Token(index, step)
                    index += 1
                    self.yielded += 1
                if not self.repeats:
                    break
            yield Finish(self.reason)
        finally:
            self.running -= 1
            self.closed.set()

    def check_place(self, client: str) -> None:
        if self.full is not None:
            raise self.full

    def served(self) -> ServedModel | None:
        if not self.chosen:
            return None
        return ServedModel("org/tiny", self.folder, self.context_tokens, 1_700_000_000)

    def catalog(self) -> list[CatalogModel]:
        return [CatalogModel("Qwen/Qwen3-0.6B", "0.6B", "Qwen")]

    def status(self) -> dict[str, object]:
        return {"status": "available", "model_name": "org/tiny", "running": self.running}

    def join_command(self) -> str:
        return "parallax join -s 12D3KooWTest"

    async def choose(self, model: str, nodes: int, local_network: bool) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.choices.append((model, nodes, local_network))


@dataclass
class Site:
    """A running server over a scripted cluster."""

    cluster: Scripted
    url: str
    port: int
    session: aiohttp.ClientSession
    metrics: Metrics
    app: web.Application

    async def chat(self, content: Any = "Hi", **fields: Any) -> tuple[int, Any]:
        """Status and JSON of one chat request."""
        body = {"messages": [{"role": "user", "content": content}], **fields}
        async with self.session.post(self.url + "/v1/chat/completions", json=body) as response:
            return response.status, await response.json()

    async def events(self, content: Any = "Hi", **fields: Any) -> list[str]:
        """The data of every event of one streamed chat."""
        body = {"messages": [{"role": "user", "content": content}], "stream": True, **fields}
        async with self.session.post(self.url + "/v1/chat/completions", json=body) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"] == "text/event-stream"
            raw = (await response.read()).decode()
        parts = [part for part in raw.split("\n\n") if part and not part.startswith(":")]
        assert all(part.startswith("data: ") for part in parts)
        return [part.removeprefix("data: ") for part in parts]


@asynccontextmanager
async def site(
    cluster: Scripted,
    *,
    access: Access | None = None,
    keys: KeyRing | None = None,
    tls: ssl.SSLContext | None = None,
    gate: Gate | None = None,
    **limits: Any,
) -> AsyncIterator[Site]:
    """Serve this cluster at a free port."""
    metrics = Metrics()
    app = make_app(
        cluster,
        limits=Limits(**limits),
        metrics=metrics,
        access=access,
        keys=keys,
        gate=gate,
    )
    runner, port = await serve(app, "127.0.0.1", 0, tls)
    try:
        async with aiohttp.ClientSession() as session:
            url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
            yield Site(cluster, url, port, session, metrics, app)
    finally:
        await runner.cleanup()


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until this holds; the test fails when it does not in time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
