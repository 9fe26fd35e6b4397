"""What members answer is looked at like what they say unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallax.fabric.channels import listen
from parallax.fabric.limits import Limits
from parallax.fabric.weights_service import WeightsService
from parallax.node.links import measure
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from tests.node.weights_room import LIMITS, LOOPBACK, Member, tensors, weights_room
from tests.trust import everyone, member, peer


class Neighbour(rpc.RingServicer):
    """Answers those who measure the link."""

    def __init__(self, received_bytes: int) -> None:
        self.received_bytes = received_bytes

    async def Probe(self, request: Any, context: Any) -> wire.ProbeReply:
        return wire.ProbeReply(received_bytes=self.received_bytes, node_id=peer("a"))


@pytest.mark.parametrize(("received_bytes", "known"), [(5, True), (1 << 60, False)])
async def test_a_link_to_a_peer_whose_answer_makes_no_sense_is_none(
    received_bytes: int, known: bool
) -> None:
    neighbour = Neighbour(received_bytes)
    server, port = await listen(
        [LOOPBACK],
        0,
        credentials=member("a"),
        gate=everyone(),
        limits=Limits(),
        register=lambda s: rpc.add_RingServicer_to_server(neighbour, s),
    )
    endpoint = wire.Endpoint(host=LOOPBACK.host, port=port, kind="loopback")
    place = wire.StagePlace(node_id=peer("a"), endpoints=[endpoint])
    try:
        assert (await measure(place, LIMITS, member("b")) is not None) == known
    finally:
        await server.stop(None)


class Boasting(WeightsService):
    """Has everything, it says, and a file with a name that a terminal obeys."""

    def __init__(self) -> None:
        super().__init__(lambda digest: None)
        self.asked = 0

    async def Holds(self, request: Any, context: Any) -> wire.HoldsTold:
        return wire.HoldsTold(whole=True, files=[wire.HeldFile(file="\x1b[2J")])

    async def Read(self, request: Any, context: Any) -> Any:
        self.asked += 1
        yield wire.BytesRead()


async def test_a_source_whose_answer_makes_no_sense_is_asked_for_nothing(tmp_path: Path) -> None:
    async with weights_room(tmp_path, 1 << 20) as room:
        service, boaster = Boasting(), Member("boaster")
        room.members.append(boaster)
        await boaster.start(service)
        await room.fetch(await room.parts(), tensors(0, 2), boaster).run()
        assert room.same(tensors(0, 2))
        assert not service.asked
