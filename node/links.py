"""How fast the way to another node is, measured."""

from __future__ import annotations

import time

import grpc.aio

from parallax.fabric.bounds import check
from parallax.fabric.channels import open_channel
from parallax.fabric.credentials import Credentials
from parallax.fabric.errors import MessageRefused, ParallaxError
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc

ROUND_TRIPS = 5


async def measure(
    place: wire.StagePlace, limits: Limits, credentials: Credentials
) -> wire.LinkReport | None:
    """Round trip and bandwidth to one node over its fastest endpoint; None if unreachable.

    The round trip is the smallest of a few empty calls; the bandwidth comes
    from one call with a payload of a piece's size, less that round trip.
    """
    try:
        channel, endpoint = await open_channel(
            list(place.endpoints), place.node_id, limits=limits, credentials=credentials
        )
    except ParallaxError:
        return None
    probe = rpc.RingStub(channel).Probe
    try:
        round_trips = []
        for _ in range(ROUND_TRIPS):
            begin = time.perf_counter()
            check(await probe(wire.ProbeRequest(), timeout=limits.call_s))
            round_trips.append(time.perf_counter() - begin)
        payload = bytes(limits.piece_bytes)
        begin = time.perf_counter()
        reply = await probe(wire.ProbeRequest(payload=payload), timeout=limits.call_s)
        transfer_s = max(1e-6, time.perf_counter() - begin - min(round_trips))
        check(reply)
    except (grpc.aio.AioRpcError, MessageRefused):
        return None
    finally:
        await channel.close()
    return wire.LinkReport(
        node_id=place.node_id,
        endpoint=endpoint,
        round_trip_s=min(round_trips),
        bandwidth_bytes_s=len(payload) / transfer_s,
    )
