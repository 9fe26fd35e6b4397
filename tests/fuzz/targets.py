"""What is fuzzed: for each place where bytes become objects, a function from bytes to nothing.

Each is made by a context that cleans up what it needed.

An input may end in errors of the tree. Anything else that is raised is a crash, and so is taking
seconds or gigabytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from parallax.fabric.errors import InternalError, ParallaxError

Target = Callable[[bytes], None]

MESSAGE_BYTES = 4 << 20
_LENGTH = struct.Struct("<H")


def parts(data: bytes, most: int = 16) -> Iterator[bytes]:
    """The messages of an input: each a 16-bit length and so many bytes, or what is left."""
    for _ in range(most):
        if len(data) < _LENGTH.size:
            return
        (size,) = _LENGTH.unpack_from(data)
        yield data[_LENGTH.size : _LENGTH.size + size]
        data = data[_LENGTH.size + size :]


def joined(*messages: bytes) -> bytes:
    """An input of these messages."""
    return b"".join(_LENGTH.pack(len(m)) + m for m in messages)


@contextlib.contextmanager
def only_our_errors() -> Iterator[None]:
    """Lets errors of the tree pass; a defect of ours is none of them."""
    try:
        yield
    except InternalError:
        raise
    except (ParallaxError, DecodeError):
        return


@contextlib.contextmanager
def frames() -> Iterator[Target]:
    """Frames of a ring of two through a real stage of it; the first byte chooses which."""
    from parallax.fabric.tensors import unpack
    from parallax.node.large_frames import check_large
    from parallax.node.runner import Runner
    from parallax.proto import wire_pb2 as wire
    from tests.models import make_model
    from tests.node.rings import load_stages

    with tempfile.TemporaryDirectory() as folder:
        made = make_model(Path(folder) / "tiny", layers=2, hidden=16)
        stages = load_stages(made, [1], None)

    def run(data: bytes) -> None:
        index = data[0] & 1 if data else 0
        runner = Runner(stages[index], epoch=1, index=index, count=2, most_tokens=600)
        with only_our_errors():
            for number, part in enumerate(parts(data[1:])):
                check_large(part, MESSAGE_BYTES)
                frame = wire.Frame.FromString(part)
                frame.epoch, frame.number = 1, number
                passed = runner.run(frame)
                if passed.carry:
                    unpack(passed.carry)

    yield run


@contextlib.contextmanager
def tensors() -> Iterator[Target]:
    """Trees of tensors, as bytes and as arrays."""
    from parallax.fabric.tensors import pack, unpack
    from parallax.node import arrays

    def run(data: bytes) -> None:
        with only_our_errors():
            tree = unpack(data)
            packed = pack(tree)  # compared as bytes: NaN is not NaN
            assert pack(unpack(packed)) == packed
            arrays.pack(arrays.unpack(data))

    yield run


@contextlib.contextmanager
def orders() -> Iterator[Target]:
    """What a scheduler says to a node, and to a head: the first message is the order."""
    from parallax.fabric.bounds import check, check_form, check_submit
    from parallax.node.conductor import Conductor
    from parallax.proto import wire_pb2 as wire

    def run(data: bytes) -> None:
        with only_our_errors():
            given = list(parts(data))
            if not given:
                return
            order = wire.NodeOrder.FromString(given[0])
            check(order)
            if not order.HasField("form"):
                return
            form = order.form
            check_form(form)
            conductor = Conductor(form.epoch, form.shape, len(form.stages), list(form.costs))
            now, waiting = 0.0, deque[wire.Frame]()
            for message in given[1:]:
                now += 1.0
                head = wire.HeadOrder.FromString(message)
                if head.HasField("submit"):
                    check_submit(head.submit)
                    waiting += conductor.submit(head.submit).frames
                elif head.HasField("cancel"):
                    waiting += conductor.cancel(head.cancel).frames
                else:
                    waiting += conductor.beat(now).frames
                for _ in range(min(4, len(waiting))):
                    frame = waiting.popleft()
                    back = wire.Frame(epoch=frame.epoch, number=frame.number, kind=frame.kind)
                    if frame.kind == wire.DECODE:
                        back.tokens.extend([1] * len(frame.tokens))
                    waiting += conductor.returned(back, now).frames
                conductor.load().SerializeToString()

    yield run


@contextlib.contextmanager
def joins() -> Iterator[Target]:
    """A node's hello, and what it reports then, to a real cluster that is to serve a model."""
    from parallax.fabric.bounds import check, check_hello
    from parallax.fabric.models import open_folder
    from parallax.fabric.settings import SchedulerSettings
    from parallax.proto import wire_pb2 as wire
    from parallax.scheduler.chosen import Chosen
    from parallax.scheduler.cluster import ClusterService
    from parallax.scheduler.control import NodeLink
    from parallax.scheduler.metrics import Metrics
    from parallax.scheduler.model_facts import read_facts
    from parallax.scheduler.store import Store
    from tests.models import make_model
    from tests.trust import member

    place = tempfile.TemporaryDirectory()
    home = Path(place.name)
    path = make_model(home / "tiny", layers=4, hidden=16)
    folder = open_folder(path, name="tiny", location=str(path))
    facts = read_facts(folder)
    settings = SchedulerSettings(state_dir=home)

    async def attend(data: bytes) -> None:
        messages = list(parts(data))
        store: Any = _ClosedStore()
        cluster = ClusterService(settings, member("boss"), store, Metrics(), lambda _: None)
        cluster._wishes.chosen = Chosen(folder, facts, 1)
        link = NodeLink()
        try:
            with only_our_errors():
                hello = wire.Hello.FromString(messages[0] if messages else b"")
                check_hello(hello)
                cluster.node_hello(hello, link)
                for message in messages[1:]:
                    report = wire.NodeReport.FromString(message)
                    check(report)
                    cluster.node_report(hello.facts.node_id, link, report)
                cluster.status()
                cluster._tick(1e9)
        finally:
            await cluster._tasks.stop()

    class _ClosedStore(Store):
        """Nothing is written: what would need an epoch is past what is looked at here."""

        def __init__(self) -> None:
            pass

        async def next_epoch(self) -> int:
            await asyncio.Event().wait()
            return 0

    with place, asyncio.Runner() as runner:
        yield lambda data: runner.run(attend(data))


@contextlib.contextmanager
def enrolments() -> Iterator[Target]:
    """A stranger's request to join, and a certificate: parsed before there is any trust."""
    from parallax.fabric import bounds
    from parallax.fabric.certificates import read
    from parallax.fabric.enrolment import check
    from parallax.proto import wire_pb2 as wire
    from tests.trust import authority, peer

    issuer, boss = authority(), peer("boss")

    def run(data: bytes) -> None:
        messages = [*parts(data), b"", b""]
        with only_our_errors():
            request = wire.EnrolRequest.FromString(messages[0])
            bounds.check(request)
            with only_our_errors():
                check(request, boss)
            issuer.issue(request.csr, request.node_id, 60.0)
        with only_our_errors():
            read(messages[1])

    yield run


@contextlib.contextmanager
def headers() -> Iterator[Target]:
    """A model's folder: the first message is config.json, what follows a weight file."""
    from parallax.fabric.models import open_folder
    from parallax.fabric.safetensors import read_header
    from parallax.scheduler.model_facts import read_facts

    place = tempfile.TemporaryDirectory()
    path = Path(place.name) / "model"
    path.mkdir()

    def run(data: bytes) -> None:
        size = int.from_bytes(data[:2], "little")
        (path / "config.json").write_bytes(data[2 : 2 + size])
        file = path / "model.safetensors"
        file.write_bytes(data[2 + size :])
        with only_our_errors():
            read_header(file)
        with only_our_errors():
            read_facts(open_folder(path, name="model", location=place.name))

    with place:
        yield run


@contextlib.contextmanager
def chats() -> Iterator[Target]:
    """Bodies of chat requests, up to what goes to a ring."""
    from parallax.fabric.bounds import check_submit
    from parallax.fabric.errors import InvalidRequest
    from parallax.fabric.models import builtin_path
    from parallax.scheduler.generation import Generation
    from parallax.scheduler.http import acceptance
    from parallax.scheduler.http.messages import for_template
    from parallax.scheduler.http.requests import parse_chat, parse_json
    from parallax.scheduler.lifecycle import Request
    from parallax.scheduler.text.answer import AnswerText
    from parallax.scheduler.text.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer(builtin_path())

    def run(data: bytes) -> None:
        with only_our_errors():
            try:
                body = parse_json(data)
            except ValueError as error:
                raise InvalidRequest("no JSON") from error
            if not isinstance(body, dict):
                return
            chat = parse_chat(body)
            prompt = tokenizer.prompt(for_template(chat.messages))
            generation = Generation(
                "builtin",
                prompt,
                acceptance._sampling(chat, tokenizer),
                min(chat.most_tokens or 9, 9),
                acceptance._end_tokens(chat, tokenizer),
                "",
            )
            check_submit(Request(1, generation, deadline=1.0).start(1))
            answer = AnswerText(tokenizer.detokenizer(), chat.stops)
            for token in prompt[:64]:
                answer.push(token)

    yield run


@contextlib.contextmanager
def templates() -> Iterator[Target]:
    """Chat templates, over a chat of three messages."""
    from parallax.scheduler.text.template import FAILURES, ChatTemplate

    chat: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <b>&</b> 你好"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
    ]

    def run(data: bytes) -> None:
        with contextlib.suppress(*FAILURES):
            ChatTemplate(data.decode("utf-8", "replace")).render(chat, {"bos_token": "<s>"})

    yield run


TARGETS: dict[str, Callable[[], contextlib.AbstractContextManager[Target]]] = {
    "frames": frames,
    "tensors": tensors,
    "orders": orders,
    "joins": joins,
    "enrolments": enrolments,
    "headers": headers,
    "chats": chats,
    "templates": templates,
}
