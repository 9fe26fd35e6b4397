"""What clients send: parsed, checked, and refused by the field's name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic_core
from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from parallax.fabric.errors import BodyTooLarge, InvalidRequest, TooSlow, UnsupportedField
from parallax.fabric.limits import Limits
from parallax.scheduler.http.keys import BODIES

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_CHOICES = 16
MAX_NAME_CHARACTERS = 100  # of a field's name as it is said back
MAX_BIASES = 1024
MAX_STOP_TOKENS = 1024
MAX_MESSAGES = 16_384
MAX_PARTS = 4096  # of one content

T = TypeVar("T", bound=BaseModel)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], BeforeValidator(_listed), Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Knobs(BaseModel):
    """What may be set at the top level and in ``sampling_params`` alike."""

    model_config = _STRICT

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 31)  # 0: off
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Bias] | None = Field(None, max_length=MAX_BIASES)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stop: Stops | None = None
    max_tokens: int | None = Field(None, ge=1)
    ignore_eos: bool | None = None


class SamplingParams(Knobs):
    """The reference's ``sampling_params`` object."""

    max_new_tokens: int | None = Field(None, ge=1)
    stop_strs: Stops | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=1 << 32)]] | None = Field(
        None, max_length=MAX_STOP_TOKENS
    )


class StreamOptions(BaseModel):
    """OpenAI's ``stream_options``; there is no obfuscation to leave out."""

    model_config = _STRICT

    include_usage: bool = False
    include_obfuscation: bool = False


class ToolCall(BaseModel):
    """A call that the assistant made earlier in the conversation."""

    model_config = _STRICT

    class Function(BaseModel):
        """Its function."""

        model_config = _STRICT

        name: str
        arguments: str

    id: str = ""
    type: str = "function"
    function: Function


class Message(BaseModel):
    """One message; its content is read by :func:`text_of`."""

    model_config = _STRICT

    role: str
    content: Any = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Any = None  # what came with an earlier answer
    parsed: Any = None


class ChatRequest(Knobs):
    """``POST /v1/chat/completions``. What the top level says wins over ``sampling_params``."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    sampling_params: SamplingParams | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)

    def knob(self, name: str, default: Any) -> Any:
        """A value of :class:`Knobs`: the top level's, else that of ``sampling_params``."""
        value = getattr(self, name)
        if value is None and self.sampling_params is not None:
            value = getattr(self.sampling_params, name)
        return default if value is None else value

    @property
    def most_tokens(self) -> int | None:
        """The limit on the answer, under whichever of its names it came."""
        nested = self.sampling_params or SamplingParams()
        for limit in (
            self.max_completion_tokens,
            self.max_tokens,
            nested.max_new_tokens,
            nested.max_tokens,
        ):
            if limit is not None:
                return limit
        return None

    @property
    def stops(self) -> list[str]:
        """The stop strings, under whichever of their names they came."""
        nested = self.sampling_params.stop_strs if self.sampling_params else None
        stops: list[str] = self.knob("stop", nested or [])
        return stops


class InitRequest(BaseModel):
    """``POST /scheduler/init``."""

    model_config = _STRICT

    model_name: str = Field(min_length=1, max_length=1024)
    init_nodes_num: int = Field(1, ge=1, le=100_000)
    is_local_network: bool = True


# Fields of OpenAI's that say something about the caller and nothing about the answer.
_IGNORED = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}


def _empty(value: object) -> bool:
    return value is None or value in ([], {})


def _unset(value: object) -> bool:
    return value is None or value is False or value == 0


# Fields that would change the answer, and the values with which they do not.
_NEUTRAL: Mapping[str, Callable[[object], bool]] = {
    "audio": _empty,
    "best_of": lambda value: value in (None, 1),
    "chat_template": _empty,
    "chat_template_kwargs": _empty,
    "documents": _empty,
    "echo": _unset,
    "function_call": lambda value: value in (None, "none", "auto"),
    "functions": _empty,
    "guided_json": _empty,
    "logprobs": lambda value: value is None or value is False,
    "min_tokens": _unset,
    "modalities": lambda value: value in (None, ["text"]),
    "moderation": _empty,
    "parallel_tool_calls": lambda value: value is None or isinstance(value, bool),
    "prediction": _empty,
    "reasoning": _empty,
    "reasoning_effort": _empty,
    "response_format": lambda value: value in (None, {"type": "text"}),
    "suffix": _empty,
    "tool_choice": lambda value: value in (None, "none", "auto"),
    "tools": _empty,
    "top_logprobs": _unset,
    "verbosity": lambda value: value in (None, "medium"),
    "web_search_options": _empty,
}

_NEUTRAL_SAMPLING: Mapping[str, Callable[[object], bool]] = {
    "json_schema": _empty,
    "min_new_tokens": _unset,
}


async def read_json(request: web.Request, limits: Limits) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        BodyTooLarge: it is over ``limits.body_bytes``.
        TooSlow: it did not come in time.
        QueueFull: too many large ones come in at once.
        InvalidRequest: it is no JSON object.
    """
    size = request.content_length
    if size is not None and size > limits.body_bytes:
        raise too_large(limits)
    if size is None or "Content-Encoding" in request.headers:
        size = limits.body_bytes  # it may grow to that
    try:
        with request.app[BODIES].reserve(size):
            async with asyncio.timeout(limits.body_s):
                body = await request.read()
    except TimeoutError as error:
        raise TooSlow(
            "The request's body did not come in time",
            f"It was not there after {limits.body_s:g} s",
            "Send it faster, or send less",
        ) from error
    except web.RequestPayloadError as error:
        why = " ".join(str(error).split())
        raise InvalidRequest("The request's body cannot be read", why) from error
    try:
        loaded = parse_json(body)
    except ValueError as error:
        raise InvalidRequest("The body is not valid JSON", str(error)) from error
    if not isinstance(loaded, dict):
        raise InvalidRequest("The body must be a JSON object")
    return loaded


def parse_json(body: bytes) -> Any:
    """Strict JSON; raises ValueError.

    NaN and Infinity are no JSON, though many parsers take them. Only names are kept for the next
    body: by default the parser would remember the last 16,384 short strings, whatever people wrote.
    """
    return pydantic_core.from_json(body, allow_inf_nan=False, cache_strings="keys")


def too_large(limits: Limits) -> BodyTooLarge:
    """The body is over the limit."""
    return BodyTooLarge(
        "The request's body is too large",
        f"At most {limits.body_bytes} bytes are taken",
        "Send less text",
        limit_bytes=limits.body_bytes,
    )


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    """A chat request from its JSON.

    Raises:
        InvalidRequest: a field is wrong, missing or unknown.
        UnsupportedField: a field that would change the answer.
    """
    fields = _sift(body, ChatRequest, _NEUTRAL, "")
    nested = fields.get("sampling_params")
    if isinstance(nested, dict):
        neutral = _NEUTRAL_SAMPLING
        fields["sampling_params"] = _sift(nested, SamplingParams, neutral, "sampling_params.")
    return parse(ChatRequest, fields)


def _sift(
    fields: Mapping[str, Any],
    model: type[BaseModel],
    neutral: Mapping[str, Callable[[object], bool]],
    prefix: str,
) -> dict[str, Any]:
    """The fields that matter; those which must not be there raise."""
    kept = {}
    for given, value in fields.items():
        name = given[:MAX_NAME_CHARACTERS]
        if given in model.model_fields:
            kept[name] = value
        elif name in neutral:
            if not neutral[name](value):
                raise UnsupportedField(
                    f"`{prefix}{name}` is not supported",
                    "It would change the answer",
                    "Leave it out",
                    field=prefix + name,
                )
        elif prefix or name not in _IGNORED:
            raise InvalidRequest(
                f"`{prefix}{name}` is not a known field",
                fix="Leave it out, or correct its name",
                field=prefix + name,
            )
    return kept


def parse(model: type[T], fields: Mapping[str, Any]) -> T:
    """Check these fields against a model.

    Raises:
        InvalidRequest: with the name of the first field that is wrong.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part)[:MAX_NAME_CHARACTERS] for part in first["loc"])
        why = {"missing": "It is missing", "extra_forbidden": "It is not a known field"}
        raise InvalidRequest(
            f"`{name}` is wrong", why.get(first["type"], first["msg"]), field=name
        ) from error
