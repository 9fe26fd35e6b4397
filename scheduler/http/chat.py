"""``POST /v1/chat/completions``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from aiohttp import web

from parallax.fabric.errors import InternalError, KeyRefused, ParallaxError, RingLost
from parallax.scheduler.http import errors, sse
from parallax.scheduler.http.acceptance import Chat, accept
from parallax.scheduler.http.flow import Arrival, Flow
from parallax.scheduler.http.guard import holder_of
from parallax.scheduler.http.keys import LIMITS, METRICS

KEEP_ALIVE_S = 3.0  # of silence, then a comment: rings move, or are mended
_Batch = list[Arrival]


def routes() -> list[web.RouteDef]:
    """The endpoint."""
    return [web.post("/v1/chat/completions", completions)]


async def completions(request: web.Request) -> web.StreamResponse:
    """Answer a chat, as one object or as a stream of chunks."""
    metrics, limits = request.app[METRICS], request.app[LIMITS]
    began_s = perf_counter()
    chat: Chat | None = None
    outcome = "cancelled"
    try:
        chat = await accept(request, began_s)
        metrics.accepted(len(chat.generation.prompt))
        # The cluster ends a request at its deadline; this also ends a client that never reads.
        async with asyncio.timeout(chat.patience_s) as chat.patience:
            response = await (_stream if chat.streams else _whole)(request, chat)
        outcome = chat.outcome
        return response
    except ParallaxError as error:
        outcome = error.row.code
        raise
    except TimeoutError as error:
        if chat is not None and chat.started:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the client does not read") from error
        raise RingLost(
            "The answer took too long", f"Nothing came of it for {limits.request_s:g} s"
        ) from error
    except Exception as error:
        if not isinstance(error, ConnectionError):
            outcome = InternalError("").row.code
        raise
    finally:
        tokens = 0 if chat is None else chat.choices.tokens
        metrics.ended(outcome, tokens, perf_counter() - began_s)
        holder = holder_of(request)
        if chat is not None and holder is not None:
            holder.used(len(chat.generation.prompt), tokens)


async def _whole(request: web.Request, chat: Chat) -> web.StreamResponse:
    """The answer as one object, when it is complete."""
    choices = chat.choices
    texts: list[list[str]] = [[] for _ in choices.answers]
    flow = chat.flow(request)
    try:
        with _while_key_counts(request, flow):
            while choices.open:
                for index, text, reason in choices.take(await _next(chat, flow)):
                    texts[index].append(text)
                    if reason is not None:
                        flow.drop(index)
    finally:
        await flow.close()
    value = chat.head("chat.completion") | {
        "choices": [
            {
                "index": i,
                "message": {"role": "assistant", "content": "".join(texts[i])},
                "finish_reason": answer.finish_reason,
            }
            for i, answer in enumerate(choices.answers)
        ],
        "usage": choices.usage(),
        "metrics": choices.speed(),
    }
    return web.Response(body=json.dumps(value).encode(), content_type="application/json")


async def _stream(request: web.Request, chat: Chat) -> web.StreamResponse:
    """The answer as it grows. Headers go out with the first event, so that 429 stays 429."""
    flow = chat.flow(request)
    try:
        with _while_key_counts(request, flow):
            batch = await _next(chat, flow)
        response = sse.response()
        await response.prepare(request)
        chat.started = True
        try:
            with _while_key_counts(request, flow):
                await _write(response, chat, flow, batch)
        except ConnectionError:
            raise  # nobody reads any more
        except Exception as error:
            told = error if isinstance(error, ParallaxError) else errors.defect(request, error)
            chat.failed = told.row.code
            await response.write(sse.event(errors.body(told)))
        await response.write_eof()
        return response
    finally:
        await flow.close()


async def _write(response: web.StreamResponse, chat: Chat, flow: Flow, batch: _Batch) -> None:
    """All events, those that are ready together in one write."""
    choices = chat.choices
    chunks = sse.ChunkWriter(chat.head("chat.completion.chunk"), usage=chat.shows_usage)
    parts = [chunks.role(i) for i in range(len(choices.answers))]
    with _Silence(flow) as silence:
        while True:
            for index, text, reason in choices.take(batch):
                if text:
                    parts.append(chunks.text(index, text))
                if reason is not None:
                    parts.append(chunks.finish(index, reason))
                    flow.drop(index)
            if not choices.open:
                break
            if not batch:
                parts.append(sse.KEEP_ALIVE)
            if parts:
                silence.broken()
                await response.write(b"".join(parts))
                parts.clear()
            batch = await _next(chat, flow)
    if chat.shows_usage:
        parts.append(chunks.usage(choices.usage(), choices.speed()))
    parts.append(sse.DONE)
    await response.write(b"".join(parts))


async def _next(chat: Chat, flow: Flow) -> _Batch:
    batch = await flow.ready()
    if batch:
        chat.renew()
    if not batch and flow.ended:
        raise InternalError("The answer broke off", "The cluster gave no reason for its end")
    return batch


@contextmanager
def _while_key_counts(request: web.Request, flow: Flow) -> Iterator[None]:
    """Ends the flow with an error when the request's key is revoked."""
    holder = holder_of(request)
    if holder is None:
        yield
        return
    error = KeyRefused("The API key was revoked", "What runs under it ends with it")
    with holder.watched(lambda: flow.fail(error)):
        yield


class _Silence:
    """Nudges a flow when nothing was written for a while: one timer, not one per token."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._loop = asyncio.get_running_loop()
        self._since_s = self._loop.time()

    def __enter__(self) -> _Silence:
        self._timer = self._loop.call_later(KEEP_ALIVE_S, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def broken(self) -> None:
        """Something is being written now."""
        self._since_s = self._loop.time()

    def _look(self) -> None:
        due_s = self._since_s + KEEP_ALIVE_S
        if self._loop.time() >= due_s:
            self._flow.nudge()
            due_s = self._loop.time() + KEEP_ALIVE_S
        self._timer = self._loop.call_at(due_s, self._look)
