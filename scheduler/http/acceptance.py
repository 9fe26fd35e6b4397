"""From a request to what the cluster and the client are given; refusals come from here."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from parallax.fabric.errors import InvalidRequest, NoRing, PromptTooLong, UnknownModel
from parallax.scheduler.generation import Generation, Sampling, ServedModel
from parallax.scheduler.http.choices import Choices
from parallax.scheduler.http.flow import Flow
from parallax.scheduler.http.guard import holder_of
from parallax.scheduler.http.keys import CLUSTER, LIMITS, METRICS, TOKENIZERS
from parallax.scheduler.http.messages import for_template
from parallax.scheduler.http.requests import ChatRequest, parse_chat, read_json
from parallax.scheduler.text.answer import AnswerText
from parallax.scheduler.text.tokenizer import ChatTokenizer

RENEWED_BELOW = 0.99  # of it: sooner than this, the end moves


@dataclass(slots=True)
class Chat:
    """An accepted request."""

    model: ServedModel
    generation: Generation
    choices: Choices
    streams: bool
    shows_usage: bool
    patience_s: float  # without news, after which it is given up
    started: bool = False  # a stream's headers are out
    failed: str | None = None  # code of an error that was sent inside the stream
    patience: asyncio.Timeout | None = None  # ends it

    def renew(self) -> None:
        """Something came of it: patience begins anew, but not for each token."""
        until_s = self.patience.when() if self.patience is not None else None
        if self.patience is None or until_s is None:
            return
        now_s = asyncio.get_running_loop().time()
        if until_s < now_s + RENEWED_BELOW * self.patience_s:
            self.patience.reschedule(now_s + self.patience_s)

    @property
    def outcome(self) -> str:
        return self.failed or self.choices.outcome

    def flow(self, request: web.Request) -> Flow:
        """The cluster's answers, one for each choice, from seeds that follow each other."""
        cluster, first = request.app[CLUSTER], self.generation
        generations = [first]
        for i in range(1, len(self.choices.answers)):
            seed = (first.sampling.seed + i) % (1 << 64)
            sampling = replace(first.sampling, seed=seed)
            generations.append(replace(first, sampling=sampling, choice=i))
        bound = request.app[LIMITS].stream_buffer_events
        return Flow([cluster.generate(generation) for generation in generations], bound)

    def head(self, kind: str) -> dict[str, Any]:
        """What every object of this answer begins with."""
        return {
            "id": self.generation.answer,
            "object": kind,
            "created": int(time.time()),
            "model": self.model.name,
            "seed": self.generation.sampling.seed,
        }


async def accept(request: web.Request, began_s: float) -> Chat:
    """Everything that can be refused is refused here, before anything is queued."""
    chat = parse_chat(await read_json(request, request.app[LIMITS]))
    messages = for_template(chat.messages)
    model = find_model(request, chat.model)
    request.app[CLUSTER].check_place(client_of(request))  # a crowd's prompts are not even read
    tokenizers = request.app[TOKENIZERS]
    tokenizer = await tokenizers.of(model)
    sampling = _sampling(chat, tokenizer)
    prompt = await tokenizers.prompt(tokenizer, messages)
    if not prompt:  # a ring refuses it, and ends
        raise InvalidRequest(
            "The prompt is empty",
            "The model's chat template makes no text of these messages",
            "Send a message with text",
            field="messages",
        )
    if max(prompt) >= tokenizer.vocabulary:
        raise InvalidRequest(
            "The prompt has a token that the model does not know",
            f"Its tokenizer goes beyond the {tokenizer.vocabulary} tokens of the model",
            "Leave special tokens out of the text",
            field="messages",
        )
    generation = Generation(
        model=model.name,
        prompt=prompt,
        sampling=sampling,
        max_tokens=_max_tokens(chat, model, len(prompt)),
        end_tokens=_end_tokens(chat, tokenizer),
        client=client_of(request),
        vocabulary=tokenizer.declared_vocabulary or 1 << 32,
        answer=str(uuid.uuid4()),
    )
    answers = [AnswerText(tokenizer.detokenizer(), chat.stops) for _ in range(chat.n or 1)]
    choices = Choices(
        answers, prompt_tokens=len(prompt), began_s=began_s, metrics=request.app[METRICS]
    )
    usage = chat.stream_options is not None and chat.stream_options.include_usage
    limits = request.app[LIMITS]
    patience_s = limits.request_s + limits.call_s  # the cluster loses its own sooner, and says more
    return Chat(model, generation, choices, bool(chat.stream), usage, patience_s)


def client_of(request: web.Request) -> str:
    """Whose request it is: the queue is fair between those that differ here.

    Whose key it brings, else the address that the connection comes from. What a request says of
    itself (`user`, forwarding headers) does not count, or one client could be many.
    """
    holder = holder_of(request)
    if holder is not None:
        return holder.id
    return (request.remote or "").removeprefix("::ffff:")  # IPv4 on a socket that takes both


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
    seed, own = chat.knob("seed", None), tokenizer.recommended
    return Sampling(
        seed=secrets.randbits(63) if seed is None else seed % (1 << 64),
        temperature=float(chat.knob("temperature", own.get("temperature", 1.0))),
        top_p=float(chat.knob("top_p", own.get("top_p", 1.0))),
        top_k=int(chat.knob("top_k", own.get("top_k", 0))),
        min_p=float(chat.knob("min_p", own.get("min_p", 0.0))),
        presence_penalty=float(chat.knob("presence_penalty", 0.0)),
        frequency_penalty=float(chat.knob("frequency_penalty", 0.0)),
        repetition_penalty=float(
            chat.knob("repetition_penalty", own.get("repetition_penalty", 1.0))
        ),
        logit_bias=_logit_bias(chat.knob("logit_bias", {}), tokenizer.vocabulary),
    )


def _logit_bias(given: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    bias = {}
    for name, value in given.items():
        plain = len(name) <= 10 and name.isascii() and name.isdecimal()
        if not plain or int(name) >= vocabulary:
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
            f"a context of {model.context_tokens} leaves no room for an answer",
            "It is what the model was made for, or what the nodes have memory for",
            f"Send at most {model.context_tokens - 1} tokens",
            prompt_tokens=prompt_tokens,
            context_tokens=model.context_tokens,
        )
    asked = chat.most_tokens
    return left if asked is None else min(asked, left)
