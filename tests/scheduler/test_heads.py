"""The scheduler's stream to a head: however it ends, somebody is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from parallax.fabric.addresses import listening_addresses
from parallax.fabric.channels import listen
from parallax.fabric.errors import ParallaxError
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from parallax.scheduler.heads import HeadLink
from tests.trust import everyone, member, peer


class Talking(rpc.HeadServicer):
    """A head that reports once, of ring 1, and stays."""

    async def Serve(self, request_iterator: Any, context: Any) -> AsyncIterator[wire.HeadReport]:
        yield wire.HeadReport(epoch=1)
        await asyncio.Event().wait()


class Failing:
    """A listener that cannot take a report in."""

    def __init__(self) -> None:
        self.lost: asyncio.Future[ParallaxError] = asyncio.get_running_loop().create_future()

    def head_report(self, report: wire.HeadReport) -> None:
        raise ZeroDivisionError

    def head_lost(self, epoch: int, error: ParallaxError) -> None:
        self.lost.set_result(error)


@pytest.mark.parametrize(
    ("ring", "why"), [(1, "ZeroDivisionError"), (2, "a ring that is not its own")]
)
async def test_a_report_that_cannot_be_taken_in_ends_the_link_aloud(ring: int, why: str) -> None:
    addresses = listening_addresses(loopback_only=True)

    def register(server: grpc.aio.Server) -> None:
        rpc.add_HeadServicer_to_server(Talking(), server)

    server, port = await listen(
        addresses,
        0,
        credentials=member("a"),
        gate=everyone(),
        limits=Limits(),
        register=register,
    )
    listener = Failing()
    endpoint = wire.Endpoint(host=addresses[0].host, port=port, kind="loopback")
    link = HeadLink(ring, peer("a"), [endpoint], listener, Limits(), member("boss"))
    try:
        async with asyncio.timeout(60):
            error = await listener.lost
        assert why in error.why
    finally:
        await link.close()
        await server.stop(None)
