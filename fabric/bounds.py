"""What messages from outside may say: ranges and sizes of every field, whatever the message.

Rules go by type and by name, so that a new field is bounded before anybody thinks of it. The few
messages of the hot path (frames, tokens) are checked where they are used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from parallax.fabric.addresses import is_private
from parallax.fabric.errors import MessageRefused
from parallax.fabric.model_files import MOST_LAYERS
from parallax.fabric.names import controls, unseen
from parallax.proto import wire_pb2 as wire

MOST_CHARACTERS = 4096  # of a string
MOST_NAME = 256  # of a string that names something
MOST_MESSAGES = 4096  # in a list, or entries of a map
MOST_NUMBERS = 1 << 21  # in a list: token ids
MOST_BYTES = 1 << 50
MOST_REAL = 1e18
MOST_ENDPOINTS = 64
MOST_LANES = 4096
MOST_WINDOW = 65_536  # frames
MOST_CHUNK = 8192  # tokens
MOST_EVENTS = 4096  # tokens, and ends, in one report of a ring's head
MOST_TOTAL = 1 << 50  # of what is counted since an epoch began

_NAMES = ("node_id", "name", "chip", "platform", "backend", "kind", "digest", "phase", "host")
_PROSE = ("what", "why", "fix", "value")  # of faults: may have lines
_HOST = re.compile(r"[A-Za-z0-9:._-]{1,253}(?:%[A-Za-z0-9._-]{1,32})?")
_MOST: Mapping[str, int] = {
    "port": 65535,
    "cluster_port": 65535,
    "data_port": 65535,
    "first": MOST_LAYERS,
    "end": MOST_LAYERS,
    "lanes": MOST_LANES,
    "spare_lanes": MOST_LANES,
    "lane_rows": MOST_LANES,
    "chunk_tokens": MOST_CHUNK,
    "block_tokens": MOST_CHUNK,
    "draft_tokens": MOST_CHUNK,
    "window_frames": MOST_WINDOW,
    "accelerators": 1024,
    "free_rows": MOST_LANES * MOST_LANES,
    "kept": MOST_MESSAGES,
    "drafted_tokens": MOST_TOTAL,
    "accepted_tokens": MOST_TOTAL,
    "max_tokens": (1 << 31) - 1,
}
_ANY_SIGN = ("presence_penalty", "frequency_penalty", "logit_bias", "value")

_Check = Callable[[Any], None]


def check(message: Message) -> None:
    """See that every field of a message, and of those in it, is within its range.

    Raises:
        MessageRefused: one is not.
    """
    checks = _checks(message.DESCRIPTOR)
    for field, value in message.ListFields():
        checks[field.name](value)


def check_hello(hello: wire.Hello) -> None:
    """What a node says of itself before it is taken in.

    Raises:
        MessageRefused: it makes no sense.
    """
    check(hello)
    if not hello.facts.node_id:
        raise _refused("hello", "it names no node")
    if len(hello.endpoints) > MOST_ENDPOINTS:
        raise _refused("endpoints", f"a node listens at {len(hello.endpoints)} addresses")
    for endpoint in hello.endpoints:
        if not is_private(endpoint.host) or not endpoint.port:
            raise _refused("endpoints", "an address that is not on the local network")


def check_places(places: Sequence[wire.StagePlace]) -> None:
    """Where other nodes listen.

    Raises:
        MessageRefused: there are absurdly many, or one has no place.
    """
    for place in places:
        if len(place.endpoints) > MOST_ENDPOINTS:
            raise _refused("endpoints", f"a node listens at {len(place.endpoints)} addresses")


def check_form(form: wire.FormRing) -> None:
    """An order to take a seat in a ring.

    Raises:
        MessageRefused: it makes no sense.
    """
    check(form)
    check_places(form.stages)
    shape, stages = form.shape, len(form.stages)
    if not form.epoch:
        raise _refused("epoch", "a ring has no number")
    if not form.index < stages:
        raise _refused("index", f"there is no stage {form.index} of {stages}")
    if len(form.costs) != stages:
        raise _refused("costs", f"there are {len(form.costs)} costs of {stages} stages")
    layer = 0
    for place in form.stages:
        if place.first != layer or place.end <= layer:
            raise _refused("stages", "their layers do not follow each other")
        layer = place.end
    needed = ("lanes", "lane_rows", "chunk_tokens", "window_frames", "context_tokens")
    for name in needed:
        if getattr(shape, name) < 1:
            raise _refused(f"shape.{name}", "a ring without any cannot run")


def check_submit(submit: wire.Submit) -> None:
    """A request on its way to a ring.

    Raises:
        MessageRefused: it makes no sense.
    """
    check(submit)
    if not submit.prompt:
        raise _refused("prompt", "it is empty")
    sampling = submit.sampling
    for name in ("presence_penalty", "frequency_penalty"):
        if abs(getattr(sampling, name)) > 1e3:
            raise _refused(f"sampling.{name}", "it is far from what penalties are")
    if not all(map(math.isfinite, sampling.logit_bias.values())):
        raise _refused("sampling.logit_bias", "a number that is none")


@cache
def _checks(descriptor: Descriptor) -> dict[str, _Check]:
    return {field.name: _check_of(field) for field in descriptor.fields}


def _check_of(field: FieldDescriptor) -> _Check:
    one = _check_one(field)
    if not field.is_repeated:
        return one
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        key, value = (_check_one(kind.fields_by_name[name]) for name in ("key", "value"))
        return lambda entries: _check_map(field.name, entries, key, value)
    if kind is None:
        return lambda items: _check_count(field.name, len(items), MOST_NUMBERS)
    return lambda items: _check_list(field.name, items, one)


def _check_one(field: FieldDescriptor) -> _Check:
    name = field.name
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_MESSAGE:
            return check
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return lambda value: None
        case FieldDescriptor.CPPTYPE_STRING:
            most = MOST_NAME if name in _NAMES else MOST_CHARACTERS
            return lambda value: _check_text(name, value, most)
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            least = -MOST_REAL if name in _ANY_SIGN else 0.0
            return lambda value: _check_real(name, value, least)
        case _:
            most_number = MOST_BYTES if name.endswith("_bytes") else _MOST.get(name, (1 << 64) - 1)
            return lambda value: _check_number(name, value, most_number)


def _check_text(name: str, value: str, most: int) -> None:
    if len(value) > most:
        raise _refused(name, f"{len(value)} characters, more than {most}")
    if name == "host" and not _HOST.fullmatch(value):
        raise _refused(name, "that is no address")
    if controls(value, layout="\n\t" if name in _PROSE else ""):
        raise _refused(name, "control characters in a text")
    if name in _NAMES and unseen(value):
        raise _refused(name, "characters that cannot be seen in a name")


def _check_real(name: str, value: float, least: float) -> None:
    if not least <= value <= MOST_REAL:  # NaN is neither
        raise _refused(name, f"it is {value}")


def _check_number(name: str, value: int, most: int) -> None:
    if not 0 <= value <= most:
        raise _refused(name, f"it is {value}, more than {most}")


def _check_count(name: str, count: int, most: int) -> None:
    if count > most:
        raise _refused(name, f"{count} of them, more than {most}")


def _check_list(name: str, items: Sequence[Any], one: _Check) -> None:
    _check_count(name, len(items), MOST_MESSAGES)
    for item in items:
        one(item)


def _check_map(name: str, entries: Mapping[Any, Any], key: _Check, value: _Check) -> None:
    _check_count(name, len(entries), MOST_MESSAGES)
    for one, other in entries.items():
        key(one)
        value(other)


def _refused(field: str, why: str) -> MessageRefused:
    return MessageRefused("A message makes no sense", f"{field}: {why}", field=field)
