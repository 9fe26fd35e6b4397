"""Many streams at once: an event for each token, at a cost that does not grow."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from benchmarks.http_streams import TEXT, Faucet, Reports, make_folder, read_stream
from parallax.fabric.limits import Limits
from parallax.scheduler.http.server import make_app, serve
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.text.tokenizer import ChatTokenizer

AROUND = 3  # role, finish reason, [DONE]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that knows whole words."""
    folder = tmp_path_factory.mktemp("words")
    make_folder(folder)
    return folder


async def cost(folder: Path, kind: type[Faucet], streams: int, tokens: int) -> tuple[float, int]:
    """Processor seconds for a token of so many streams of so many tokens; events of a stream."""
    faucet = kind(folder, ChatTokenizer(folder).encode(TEXT), streams)
    app = make_app(faucet, limits=Limits(), metrics=Metrics())
    runner, port = await serve(app, "127.0.0.1", 0)
    try:
        async with asyncio.timeout(300):
            events = await asyncio.gather(*(read_stream(port, tokens) for _ in range(streams)))
        spent_s = time.process_time() - faucet.began_cpu_s
    finally:
        await runner.cleanup()
    assert len(set(events)) == 1
    return spent_s / (streams * tokens), events[0]


@pytest.mark.parametrize("kind", [Faucet, Reports])
async def test_every_token_is_an_event_of_its_own(words: Path, kind: type[Faucet]) -> None:
    _, events = await cost(words, kind, 8, 50)
    assert events == 50 + AROUND


@pytest.mark.parametrize("kind", [Faucet, Reports])
async def test_a_token_costs_no_more_in_long_answers_or_among_many(
    words: Path, kind: type[Faucet]
) -> None:
    few, _ = await cost(words, kind, 4, 250)
    long, _ = await cost(words, kind, 4, 2000)
    many, _ = await cost(words, kind, 64, 125)
    # What grows with the length or with the streams would be eight, or sixteen, times as dear.
    assert long < 4 * few
    assert many < 5 * few
