"""``POST /v1/chat/completions``."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from aiohttp import web

from parallax.fabric.errors import (
    InternalError,
    InvalidRequest,
    NoRing,
    ParallaxError,
    PromptTooLong,
    RingLost,
    UnknownModel,
)
from parallax.scheduler.generation import Generation, Sampling, ServedModel
from parallax.scheduler.http import errors, sse
from parallax.scheduler.http.choices import Choices
from parallax.scheduler.http.flow import Arrival, Flow
from parallax.scheduler.http.keys import CLUSTER, LIMITS, METRICS, TOKENIZERS
from parallax.scheduler.http.messages import for_template
from parallax.scheduler.http.requests import ChatRequest, parse_chat, read_json
from parallax.scheduler.text.answer import AnswerText
from parallax.scheduler.text.tokenizer import ChatTokenizer

KEEP_ALIVE_S = 10.0
_FLOW_EVENTS = 1024  # ready for one client; beyond that the cluster's own bound holds
_Batch = list[Arrival]


def routes() -> list[web.RouteDef]:
    """The endpoint."""
    return [web.post("/v1/chat/completions", completions)]


async def completions(request: web.Request) -> web.StreamResponse:
    """Answer a chat, as one object or as a stream of chunks."""
    metrics, limits = request.app[METRICS], request.app[LIMITS]
    began_s = perf_counter()
    chat: _Chat | None = None
    outcome = "cancelled"
    try:
        chat = await _accept(request, began_s)
        metrics.accepted(len(chat.generation.prompt))
        # The cluster ends a request at its deadline; this also ends a client that never reads.
        async with asyncio.timeout(limits.request_s + limits.call_s):
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
        raise RingLost("The answer took too long", f"Over {limits.request_s:g} s") from error
    except Exception as error:
        if not isinstance(error, ConnectionError):
            outcome = InternalError("").row.code
        raise
    finally:
        tokens = 0 if chat is None else chat.choices.tokens
        metrics.ended(outcome, tokens, perf_counter() - began_s)


@dataclass(slots=True)
class _Chat:
    """An accepted request."""

    model: ServedModel
    generation: Generation
    choices: Choices
    streams: bool
    shows_usage: bool
    started: bool = False  # a stream's headers are out
    failed: str | None = None  # code of an error that was sent inside the stream

    @property
    def outcome(self) -> str:
        return self.failed or self.choices.outcome

    def flow(self, request: web.Request) -> Flow:
        """The cluster's answers, one for each choice, from seeds that follow each other."""
        cluster, first = request.app[CLUSTER], self.generation
        generations = [first]
        for i in range(1, len(self.choices.answers)):
            seed = (first.sampling.seed + i) % (1 << 64)
            generations.append(replace(first, sampling=replace(first.sampling, seed=seed)))
        return Flow([cluster.generate(generation) for generation in generations], _FLOW_EVENTS)

    def head(self, kind: str) -> dict[str, Any]:
        """What every object of this answer begins with."""
        return {
            "id": str(uuid.uuid4()),
            "object": kind,
            "created": int(time.time()),
            "model": self.model.name,
            "seed": self.generation.sampling.seed,
        }


async def _accept(request: web.Request, began_s: float) -> _Chat:
    """Everything that can be refused is refused here, before anything is queued."""
    chat = parse_chat(await read_json(request, request.app[LIMITS]))
    messages = for_template(chat.messages)
    model = find_model(request, chat.model)
    tokenizers = request.app[TOKENIZERS]
    tokenizer = await tokenizers.of(model)
    sampling = _sampling(chat, tokenizer)
    prompt = await tokenizers.prompt(tokenizer, messages)
    generation = Generation(
        model=model.name,
        prompt=prompt,
        sampling=sampling,
        max_tokens=_max_tokens(chat, model, len(prompt)),
        end_tokens=_end_tokens(chat, tokenizer),
        client=request.remote or "",
    )
    answers = [AnswerText(tokenizer.detokenizer(), chat.stops) for _ in range(chat.n or 1)]
    choices = Choices(
        answers, prompt_tokens=len(prompt), began_s=began_s, metrics=request.app[METRICS]
    )
    usage = chat.stream_options is not None and chat.stream_options.include_usage
    return _Chat(model, generation, choices, bool(chat.stream), usage)


def find_model(request: web.Request, name: str | None) -> ServedModel:
    """The served model, if it goes by this name.

    Raises:
        NoRing: no model is chosen.
        UnknownModel: another one is served.
    """
    served = request.app[CLUSTER].served()
    if served is None:
        raise NoRing(
            "No model is served yet",
            "None has been chosen",
            "Choose one on the page, or with POST /scheduler/init",
            retry_after_s=request.app[LIMITS].retry_after_s,
        )
    if name is not None and name not in (served.name, served.folder.name):
        raise UnknownModel(
            f"The model {name[:200]!r} is not served here",
            f"This cluster serves {served.name!r}",
            "Use that name, or leave `model` out",
            model=name[:200],
        )
    return served


def _sampling(chat: ChatRequest, tokenizer: ChatTokenizer) -> Sampling:
    seed = chat.knob("seed", None)
    return Sampling(
        seed=secrets.randbits(63) if seed is None else seed % (1 << 64),
        temperature=float(chat.knob("temperature", 1.0)),
        top_p=float(chat.knob("top_p", 1.0)),
        top_k=chat.knob("top_k", 0),
        min_p=float(chat.knob("min_p", 0.0)),
        presence_penalty=float(chat.knob("presence_penalty", 0.0)),
        frequency_penalty=float(chat.knob("frequency_penalty", 0.0)),
        repetition_penalty=float(chat.knob("repetition_penalty", 1.0)),
        logit_bias=_logit_bias(chat.knob("logit_bias", {}), tokenizer.vocabulary),
    )


def _logit_bias(given: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    bias = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdecimal() and int(name[:20]) < vocabulary):
            raise InvalidRequest(
                f"`logit_bias.{name[:40]}` is wrong",
                f"Its name must be a token id below {vocabulary}",
                field=f"logit_bias.{name[:40]}",
            )
        bias[int(name)] = float(value)
    return bias


def _end_tokens(chat: ChatRequest, tokenizer: ChatTokenizer) -> frozenset[int]:
    nested = chat.sampling_params
    more = nested.stop_token_ids if nested and nested.stop_token_ids else []
    ends = frozenset() if chat.knob("ignore_eos", False) else tokenizer.end_tokens
    return ends | frozenset(more)


def _max_tokens(chat: ChatRequest, model: ServedModel, prompt_tokens: int) -> int:
    """What was asked for, cut to what the context still takes."""
    left = model.context_tokens - prompt_tokens
    if left < 1:
        raise PromptTooLong(
            f"The prompt has {prompt_tokens} tokens; "
            f"the model's context of {model.context_tokens} leaves no room for an answer",
            fix="Send less text",
            prompt_tokens=prompt_tokens,
            context_tokens=model.context_tokens,
        )
    asked = chat.most_tokens
    return left if asked is None else min(asked, left)


async def _whole(request: web.Request, chat: _Chat) -> web.StreamResponse:
    """The answer as one object, when it is complete."""
    choices = chat.choices
    texts: list[list[str]] = [[] for _ in choices.answers]
    flow = chat.flow(request)
    try:
        while choices.open:
            for index, text, reason in choices.take(await _next(flow)):
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


async def _stream(request: web.Request, chat: _Chat) -> web.StreamResponse:
    """The answer as it grows. Headers go out with the first event, so that 429 stays 429."""
    flow = chat.flow(request)
    try:
        batch = await _next(flow)
        response = sse.response()
        await response.prepare(request)
        chat.started = True
        try:
            await _write(response, chat, flow, batch)
        except (ConnectionError, TimeoutError):
            raise  # nobody reads any more
        except Exception as error:
            told = error if isinstance(error, ParallaxError) else errors.defect(request, error)
            chat.failed = told.row.code
            await response.write(sse.event(errors.body(told)))
        await response.write_eof()
        return response
    finally:
        await flow.close()


async def _write(response: web.StreamResponse, chat: _Chat, flow: Flow, batch: _Batch) -> None:
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
            batch = await _next(flow)
    if chat.shows_usage:
        parts.append(chunks.usage(choices.usage(), choices.speed()))
    parts.append(sse.DONE)
    await response.write(b"".join(parts))


async def _next(flow: Flow) -> _Batch:
    batch = await flow.ready()
    if not batch and flow.ended:
        raise InternalError("The answer broke off", "The cluster gave no reason for its end")
    return batch


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
