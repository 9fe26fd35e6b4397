"""Inputs to begin with: one or a few of each kind that is meant."""

from __future__ import annotations

import json
import struct
from base64 import b64decode
from collections.abc import Iterator

from parallax.fabric.certificates import new_key, signing_request
from parallax.fabric.enrolment import prove
from parallax.fabric.tensors import Tensor, pack
from parallax.fabric.version import PROTOCOL, mlx_lm_version, mlx_version
from parallax.proto import wire_pb2 as wire
from tests.fuzz.targets import joined
from tests.models import make_config
from tests.trust import authority, identity, peer

_SAMPLING = wire.Sampling(temperature=1, top_p=0.9, top_k=5, repetition_penalty=1.1, seed=3)
_FLOATS = Tensor("float32", (1, 3, 16), bytes(4 * 3 * 16))


def seeds(target: str) -> Iterator[bytes]:
    """Inputs of this target."""
    yield from {
        "frames": _frames,
        "tensors": _tensors,
        "orders": _orders,
        "joins": _joins,
        "enrolments": _enrolments,
        "headers": _headers,
        "chats": _chats,
        "templates": _templates,
    }[target]()


def _frames() -> Iterator[bytes]:
    admit = wire.Admit(sequence=1, prompt=[1, 2, 3, 4], sampling=_SAMPLING)
    commands = {
        "admit": admit,
        "drop": wire.Drop(sequence=1),
        "trim": wire.Trim(sequence=1, tokens=2),
        "retain": wire.Retain(sequence=1, handle=7),
        "fork": wire.Fork(handle=7, sequence=2, tokens=2),
        "evict": wire.Evict(handle=7),
    }
    for index in (0, 1):
        carry = pack(_FLOATS) if index else b""
        one = pack(Tensor("float32", (1, 1, 16), bytes(64))) if index else b""
        chunk = wire.Frame(kind=wire.PREFILL, sequence=1, tokens=[1, 2, 3], rows=1, carry=carry)
        step = wire.Frame(kind=wire.DECODE, tokens=[4], rows=1, carry=one)
        step.commands.add().admit.CopyFrom(admit)
        again = wire.Frame(kind=wire.DECODE, tokens=[4], rows=1, carry=one)
        block = wire.Frame(kind=wire.DECODE, tokens=[4, 5, 6], rows=1, carry=carry, ahead=True)
        sent = [chunk, step, again, block]
        yield bytes([index]) + joined(*(f.SerializeToString() for f in sent))
        for name, command in commands.items():
            beat = wire.Frame(commands=[wire.Command(**{name: command})])
            yield bytes([index]) + joined(*(f.SerializeToString() for f in (chunk, beat, beat)))


def _tensors() -> Iterator[bytes]:
    small = Tensor("bfloat16", (2, 2), bytes(8))
    yield pack(_FLOATS)
    yield pack([small, (None, True, 3, 1.5, "text"), {"a": small, "b": []}])
    yield pack(Tensor("bool", (0, 5), b""))


def _orders() -> Iterator[bytes]:
    shape = wire.RingShape(
        lanes=2, lane_rows=2, chunk_tokens=4, window_frames=12, cache_bytes=1 << 20
    )
    shape.context_tokens, shape.draft_tokens, shape.block_tokens = 64, 8, 4
    places = [
        wire.StagePlace(node_id=name, first=2 * i, end=2 * i + 2) for i, name in enumerate("ab")
    ]
    costs = [wire.CacheCost(bytes_per_token=64, forks=True, answers=True, trim_tokens=99)] * 2
    form = wire.FormRing(epoch=5, stages=places, shape=shape, costs=costs, batches=True)
    submit = wire.Submit(
        request=1, attempt=1, prompt=[1, 2, 3, 4, 5], sampling=_SAMPLING, max_tokens=9
    )
    cancel = wire.Cancel(request=1, attempt=1)
    heads = [
        wire.HeadOrder(epoch=5),
        wire.HeadOrder(epoch=5, submit=submit),
        wire.HeadOrder(epoch=5),
        wire.HeadOrder(epoch=5, cancel=cancel),
        wire.HeadOrder(epoch=5),
    ]
    order = wire.NodeOrder(form=form)
    yield joined(order.SerializeToString(), *(h.SerializeToString() for h in heads))
    stage = wire.StageRange(model=wire.ModelSource(name="m", location="builtin"), end=4)
    fault = wire.Fault(kind="Dismissed", what="No", fields={"a": "b"})
    for order in (
        wire.NodeOrder(welcome=wire.Welcome(scheduler_id="s", heartbeat_s=1)),
        wire.NodeOrder(load=wire.LoadStage(stage=stage, instead_of=[stage])),
        wire.NodeOrder(probe=wire.ProbeLinks(peers=places)),
        wire.NodeOrder(dismiss=wire.Dismiss(fault=fault)),
    ):
        yield joined(order.SerializeToString())


def _joins() -> Iterator[bytes]:
    facts = wire.NodeFacts(
        node_id="n", name="studio", memory_bytes=1 << 36, budget_bytes=1 << 35, flops=1e12
    )
    facts.bandwidth_bytes_s = 1e11
    hello = wire.Hello(
        protocol=PROTOCOL,
        mlx_version=mlx_version(),
        mlx_lm_version=mlx_lm_version(),
        facts=facts,
        endpoints=[wire.Endpoint(host="127.0.0.1", port=9)],
    )
    stage = wire.StageRange(model=wire.ModelSource(name="tiny"), end=4)
    reports = {
        "heartbeat": wire.Heartbeat(count=1),
        "progress": wire.LoadProgress(stage=stage, done_bytes=1, total_bytes=2, phase="reading"),
        "ready": wire.StageReady(stage=stage, weight_bytes=9, batches=True),
        "failed": wire.StageFailed(stage=stage, fault=wire.Fault(kind="CutRefused", what="No")),
        "broken": wire.RingBroken(epoch=1, fault=wire.Fault(kind="LinkBroken")),
        "health": wire.StageHealth(epoch=1, decode_frames=5, hop_s=0.1),
        "link": wire.LinkReport(node_id="n", round_trip_s=0.1, bandwidth_bytes_s=1e9),
        "goodbye": wire.Goodbye(reason="stopped"),
    }
    for name, report in reports.items():
        sent = wire.NodeReport(**{name: report})  # type: ignore[arg-type]
        beat = wire.NodeReport(heartbeat=wire.Heartbeat(count=1))
        yield joined(*(m.SerializeToString() for m in (hello, beat, sent, beat)))


def _enrolments() -> Iterator[bytes]:
    node = identity("node")
    request = wire.EnrolRequest(protocol=PROTOCOL, node_id=node.peer_id, name="studio", token="t")
    request.csr = signing_request(node, new_key())
    prove(request, node, peer("boss"))
    pem = authority().pem
    der = b64decode(b"".join(pem.split(b"\n")[1:-2]))
    for certificate in (pem, der):
        yield joined(request.SerializeToString(), certificate)


def _headers() -> Iterator[bytes]:
    config = json.dumps(make_config("qwen3", layers=1, hidden=16)).encode()
    names = ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight")
    header = {
        name: {"dtype": "F32", "shape": [1, 2], "data_offsets": [8 * i, 8 * i + 8]}
        for i, name in enumerate(names)
    }
    text = json.dumps({"__metadata__": {"format": "mlx"}, **header}).encode()
    yield joined(config) + struct.pack("<Q", len(text)) + text + bytes(16)


def _chats() -> Iterator[bytes]:
    user = {"role": "user", "content": "Hi"}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    for body in (
        {"messages": [user], "stop": ["a", "bc"], "logit_bias": {"7": -1.5}, "n": 2, "seed": -4},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}, user]},
        {"messages": [user], "sampling_params": {"stop_token_ids": [3], "top_k": 4}},
        {"messages": [user], "max_tokens": 5, "temperature": 0, "stream": True, "tools": []},
    ):
        yield json.dumps(body).encode()


def _templates() -> Iterator[bytes]:
    for text in (
        "{% for m in messages %}{{ m.role + ': ' + m['content'] | trim }}\n{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(9) %}{% set n.x = n.x ~ i %}{% endfor %}",
        "{% macro f(m) %}{{ m.content.split(' ')[-1].replace('a', 'b') }}{% endmacro %}"
        "{{ f(messages[0]) }}",
        "{{ '%s' % (3 * 'x') }}{{ '{}'.format(2 ** 5) }}{{ messages | tojson(indent=2) }}",
        "{{ messages | map(attribute='role') | unique | join(', ') | upper }}{{ bos_token }}",
    ):
        yield text.encode()
