"""Nodes that say what makes no sense, over a real stream: refused and counted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from parallax.fabric.addresses import listening_addresses
from parallax.fabric.channels import listen, open_channel
from parallax.fabric.errors import MessageRefused
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from parallax.scheduler.control import MembershipService, NodeLink
from tests.trust import authority, everyone, member, peer


class Desk:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.heard: list[str | None] = []
        self.refused: list[str] = []
        self.lost = asyncio.Event()

    def node_hello(self, hello: wire.Hello, link: NodeLink) -> None:
        self.heard.append("hello")

    def node_report(self, node_id: str, link: NodeLink, report: wire.NodeReport) -> None:
        self.heard.append(report.WhichOneof("report"))

    def node_lost(self, node_id: str, link: NodeLink, reason: str) -> None:
        self.lost.set()

    def message_refused(self, sender: str, error: MessageRefused) -> None:
        self.refused.append(sender)

    def certificate_s(self, node_id: str) -> float:
        return 60.0


HELLO = wire.Hello(facts=wire.NodeFacts(node_id=peer("n")))


async def attend(desk: Desk, *reports: Any) -> list[wire.NodeOrder]:
    """One stream with these reports; the orders that came back."""
    gate = everyone()
    service = MembershipService(desk, authority(), Limits(), gate)
    addresses = listening_addresses(loopback_only=True)
    server, port = await listen(
        addresses,
        0,
        credentials=member("boss"),
        gate=gate,
        limits=Limits(),
        register=lambda server: rpc.add_MembershipServicer_to_server(service, server),
    )

    async def sent() -> AsyncIterator[wire.NodeReport]:
        for report in reports:
            yield report
        await asyncio.sleep(60)

    endpoint = wire.Endpoint(host=addresses[0].host, port=port, kind="loopback")
    channel, _ = await open_channel(
        [endpoint], peer("boss"), limits=Limits(), credentials=member("n")
    )
    try:
        async with asyncio.timeout(30):
            return [order async for order in rpc.MembershipStub(channel).Attend(sent())]
    finally:
        await channel.close()
        await server.stop(None)


async def test_a_hello_without_sense_is_dismissed_with_the_reason() -> None:
    desk = Desk()
    hello = wire.Hello(facts=wire.NodeFacts(node_id=peer("n"), flops=math.nan))
    (order,) = await attend(desk, wire.NodeReport(hello=hello))
    assert order.dismiss.fault.kind == "MessageRefused"
    assert "flops" in order.dismiss.fault.why
    assert (desk.heard, desk.refused) == ([], ["hello"])


async def test_a_report_without_sense_ends_its_stream_with_the_reason() -> None:
    desk = Desk()
    beat = wire.NodeReport(heartbeat=wire.Heartbeat(since_progress_s=1))
    wild = wire.NodeReport(heartbeat=wire.Heartbeat(since_progress_s=math.inf))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await attend(desk, wire.NodeReport(hello=HELLO), beat, wild, beat)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "since_progress_s" in str(caught.value.details())
    await asyncio.wait_for(desk.lost.wait(), 30)
    assert (desk.heard, desk.refused) == (["hello", "heartbeat"], [peer("n")])
