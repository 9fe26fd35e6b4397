"""The scheduler's stream to a head: however it ends, somebody is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from parallax.fabric.addresses import listening_addresses
from parallax.fabric.channels import listen
from parallax.fabric.errors import LinkBroken, MessageRefused, ParallaxError
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from parallax.scheduler.heads import HeadLink
from tests.trust import everyone, member, peer


class Talking(rpc.HeadServicer):
    """A head that reports once, and stays."""

    def __init__(self, report: wire.HeadReport) -> None:
        self.report = report

    async def Serve(self, request_iterator: Any, context: Any) -> AsyncIterator[wire.HeadReport]:
        yield self.report
        await asyncio.Event().wait()


class Failing:
    """A listener that cannot take a report in."""

    def __init__(self) -> None:
        self.lost: asyncio.Future[ParallaxError] = asyncio.get_running_loop().create_future()

    def head_report(self, report: wire.HeadReport) -> None:
        raise ZeroDivisionError

    def head_lost(self, epoch: int, error: ParallaxError) -> None:
        self.lost.set_result(error)


OF_NOBODY = wire.HeadReport(epoch=1, tokens=[wire.TokenEvent(request=7)])
# As many as a message between members has room for: two bytes each there, and far more once read.
MILLIONS = wire.HeadReport(epoch=1, tokens=[wire.TokenEvent()] * (2 << 20))


@pytest.mark.parametrize(
    ("report", "kind", "why"),
    [
        (wire.HeadReport(epoch=1), LinkBroken, "ZeroDivisionError"),
        (wire.HeadReport(epoch=2), MessageRefused, "a ring that is not its own"),
        (OF_NOBODY, MessageRefused, "none that it works on"),
        (MILLIONS, MessageRefused, "over 262144 bytes"),
    ],
    ids=["the listener fails", "another ring's", "a request of nobody", "millions of tokens"],
)
async def test_a_report_that_cannot_be_taken_in_ends_the_link_aloud(
    report: wire.HeadReport, kind: type[ParallaxError], why: str
) -> None:
    addresses = listening_addresses(loopback_only=True)

    def register(server: grpc.aio.Server) -> None:
        rpc.add_HeadServicer_to_server(Talking(report), server)

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
    link = HeadLink(1, peer("a"), [endpoint], listener, Limits(), member("boss"))
    try:
        async with asyncio.timeout(60):
            error = await listener.lost
        assert type(error) is kind
        assert why in error.why
    finally:
        await link.close()
        await server.stop(None)
