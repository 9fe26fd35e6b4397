"""A node's stream to its scheduler: how it begins, and that it always ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from parallax.fabric.addresses import listening_addresses
from parallax.fabric.channels import listen
from parallax.fabric.errors import MessageRefused
from parallax.fabric.limits import Limits
from parallax.node.attendance import Attendance
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from tests.trust import everyone, member, peer, tally

LIMITS = Limits(disconnect_s=0.2)


class Silent(rpc.MembershipServicer):
    """A scheduler that listens, and never says or ends anything."""

    def __init__(self) -> None:
        self.heard: list[str | None] = []
        self.news = asyncio.Condition()

    async def Attend(self, request_iterator: Any, context: Any) -> AsyncIterator[wire.NodeOrder]:
        async for report in request_iterator:
            async with self.news:
                self.heard.append(report.WhichOneof("report"))
                self.news.notify_all()
        await asyncio.Event().wait()
        yield wire.NodeOrder()

    async def heard_of(self, kind: str) -> None:
        async with asyncio.timeout(60), self.news:
            await self.news.wait_for(lambda: kind in self.heard)


@asynccontextmanager
async def silent() -> AsyncIterator[tuple[Silent, list[wire.Endpoint]]]:
    service = Silent()
    addresses = listening_addresses(loopback_only=True)

    def register(server: grpc.aio.Server) -> None:
        rpc.add_MembershipServicer_to_server(service, server)

    server, port = await listen(
        addresses,
        0,
        credentials=member("boss"),
        gate=everyone(),
        limits=LIMITS,
        register=register,
    )
    try:
        yield service, [wire.Endpoint(host=addresses[0].host, port=port, kind="loopback")]
    finally:
        await server.stop(None)


async def nothing(connect: object) -> None:
    """Nobody needs a channel beside the stream."""


async def test_what_a_node_holds_is_told_first_and_its_goodbye_needs_no_answer() -> None:
    async def no_orders(order: wire.NodeOrder) -> None:
        raise AssertionError(order)

    async with silent() as (scheduler, endpoints):
        stopping = asyncio.Event()
        held = [wire.NodeReport(ready=wire.StageReady(weight_bytes=n)) for n in (1, 2)]
        attending = asyncio.create_task(
            Attendance(LIMITS, member("node"), tally(), lambda now: 0.0).attend(
                endpoints,
                peer("boss"),
                wire.Hello(),
                orders=no_orders,
                health=lambda now: [],
                held=lambda: held,
                beside=nothing,
                stopping=stopping,
            )
        )
        await scheduler.heard_of("heartbeat")
        assert scheduler.heard[:4] == ["hello", "ready", "ready", "heartbeat"]
        stopping.set()
        async with asyncio.timeout(60):
            await attending
        await scheduler.heard_of("goodbye")


class Senseless(rpc.MembershipServicer):
    """A scheduler whose order makes no sense."""

    async def Attend(self, request_iterator: Any, context: Any) -> AsyncIterator[wire.NodeOrder]:
        peers = [wire.StagePlace(node_id="\x1b[2J")]
        yield wire.NodeOrder(probe=wire.ProbeLinks(peers=peers))
        await asyncio.Event().wait()


async def test_an_order_without_sense_ends_the_stream_and_is_not_followed() -> None:
    async def no_orders(order: wire.NodeOrder) -> None:
        raise AssertionError(order)

    addresses = listening_addresses(loopback_only=True)
    server, port = await listen(
        addresses,
        0,
        credentials=member("boss"),
        gate=everyone(),
        limits=LIMITS,
        register=lambda server: rpc.add_MembershipServicer_to_server(Senseless(), server),
    )
    try:
        async with asyncio.timeout(60):
            with pytest.raises(MessageRefused, match="node_id"):
                await Attendance(LIMITS, member("node"), tally(), lambda now: 0.0).attend(
                    [wire.Endpoint(host=addresses[0].host, port=port, kind="loopback")],
                    peer("boss"),
                    wire.Hello(),
                    orders=no_orders,
                    health=lambda now: [],
                    held=list,
                    beside=nothing,
                    stopping=asyncio.Event(),
                )
    finally:
        await server.stop(None)
