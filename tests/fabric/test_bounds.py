"""What messages from outside may say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from parallax.fabric.bounds import check, check_hello, check_submit
from parallax.fabric.errors import MessageRefused, ParallaxError, to_fault
from parallax.proto import wire_pb2 as wire

FACTS = wire.NodeFacts(node_id="n", name="studio", memory_bytes=1 << 36, flops=1e12)
HERE = wire.Endpoint(host="fe80::1%en0", port=4000, kind="ethernet")

SENSELESS: dict[str, Any] = {
    "NaN": wire.NodeFacts(flops=math.nan),
    "infinite": wire.LinkReport(round_trip_s=math.inf),
    "negative": wire.Heartbeat(since_progress_s=-1),
    "more memory than there is": wire.NodeFacts(memory_bytes=1 << 60),
    "a name without end": wire.NodeFacts(name="x" * 5000),
    "a name that a terminal obeys": wire.NodeFacts(name="\x1b[2J"),
    "a name that a terminal obeys in one byte": wire.NodeFacts(name="\x9b31m"),
    "a name that runs backwards": wire.NodeFacts(name="\u202eoidtus"),
    "a name with nothing to see": wire.EnrolRequest(name="stu\u200bdio"),
    "a name of two lines, by a separator": wire.NodeFacts(name="a\u2028b"),
    "a version that a terminal obeys": wire.Hello(mlx_version="\x9b31m"),
    "a reason that a terminal obeys": wire.Fault(why="two\nlines \x9b31m"),
    "a name of two lines": wire.NodeFacts(name="a\nb"),
    "inside another": wire.NodeReport(hello=wire.Hello(facts=wire.NodeFacts(flops=math.nan))),
    "in a list": wire.ProbeLinks(peers=[wire.StagePlace(first=1 << 30)]),
    "too long a list": wire.ProbeLinks(peers=[wire.StagePlace()] * 5000),
    "too large a map": wire.Fault(fields={str(i): "" for i in range(5000)}),
    "text in a map": wire.Fault(fields={"a": "\x00"}),
    "no port": wire.Endpoint(port=70_000),
    "two addresses in one": wire.Endpoint(host="10.0.0.1:1,10.0.0.2"),
    "more lanes than rows": wire.RingShape(lanes=1 << 31),
    "a bias that is no number": wire.Sampling(logit_bias={3: math.nan}),
}


@pytest.mark.parametrize("name", SENSELESS)
def test_what_makes_no_sense_is_refused_by_the_name_of_the_field(name: str) -> None:
    with pytest.raises(MessageRefused) as caught:
        check(SENSELESS[name])
    assert caught.value.fields["field"]


def test_every_message_of_the_contract_passes_when_it_is_empty_or_as_it_is_meant() -> None:
    from parallax.proto import wire_pb2

    for descriptor in wire_pb2.DESCRIPTOR.message_types_by_name.values():
        check(getattr(wire_pb2, descriptor.name)())
    check_hello(wire.Hello(facts=FACTS, endpoints=[HERE]))
    check(wire.NodeFacts(name="Jörgs Stüdio 工作室 \N{DESKTOP COMPUTER} №\u00a02"))
    check(wire.Fault(why="joined \u200d, and\tmarked \u200e"))
    check(wire.Sampling(presence_penalty=-2, frequency_penalty=-2, logit_bias={1: -100.0}))
    check(wire.Fault(what="two\nlines", fields={"ours": "1"}))


@pytest.mark.parametrize(
    "hello",
    [
        wire.Hello(endpoints=[HERE]),
        wire.Hello(facts=FACTS, endpoints=[HERE] * 65),
        wire.Hello(facts=FACTS, endpoints=[wire.Endpoint(host="8.8.8.8", port=1)]),
        wire.Hello(facts=FACTS, endpoints=[wire.Endpoint(host="example.org", port=1)]),
        wire.Hello(facts=FACTS, endpoints=[wire.Endpoint(host="10.0.0.1")]),
    ],
)
def test_a_node_that_says_nothing_sensible_of_itself_is_not_taken_in(hello: wire.Hello) -> None:
    with pytest.raises(MessageRefused):
        check_hello(hello)


def test_a_request_without_a_prompt_or_with_wild_penalties_is_refused() -> None:
    check_submit(wire.Submit(prompt=[1], sampling=wire.Sampling(presence_penalty=-2)))
    for submit in (
        wire.Submit(),
        wire.Submit(prompt=[1], sampling=wire.Sampling(presence_penalty=1e9)),
        wire.Submit(prompt=[1], max_tokens=(1 << 32) - 1),
    ):
        with pytest.raises(MessageRefused):
            check_submit(submit)


def test_every_error_of_ours_passes_the_bounds_of_others() -> None:
    check(to_fault(ParallaxError("what \x1b[31m" + "x" * 9999, "why\x00", "fix\n")))
