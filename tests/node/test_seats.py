"""Seats taken and given up, with a stage that only has to be there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc.aio
import pytest

from parallax.fabric.addresses import listening_addresses
from parallax.fabric.channels import listen, open_channel, stop_listening
from parallax.fabric.data_channel import DataListener
from parallax.fabric.limits import Limits
from parallax.node.compute import Compute
from parallax.node.seats import MOST_EARLY, Seats
from parallax.node.shelf import Shelf
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from tests.trust import everyone, member, peer, tally


class Held:
    """A shelf on which every stage is."""

    def get(self, stage: wire.StageRange) -> object:
        return self


class Refusing(rpc.RingServicer):
    """A neighbour that takes no stream."""

    async def Flow(self, request_iterator: Any, context: Any) -> AsyncIterator[wire.FlowReply]:
        await context.abort(grpc.StatusCode.ABORTED, "no ring here")
        yield wire.FlowReply()


class Node:
    """Seats, and what they told the scheduler."""

    def __init__(
        self, name: str = "me", limits: Limits | None = None, data: DataListener | None = None
    ) -> None:
        self.told: list[wire.NodeReport] = []
        self.compute = Compute(asyncio.get_running_loop())
        self.limits = limits or Limits()
        shelf = cast(Shelf, Held())
        self.credentials = member(name)
        self.tally = tally()
        self.seats = Seats(
            self.credentials,
            self.compute,
            shelf,
            self.limits,
            self.told.append,
            self.tally,
            data,
        )

    def kinds(self) -> list[str | None]:
        return [report.WhichOneof("report") for report in self.told]


@asynccontextmanager
async def node() -> AsyncIterator[Node]:
    made = Node()
    try:
        yield made
    finally:
        await made.seats.leave_all()
        made.compute.stop(5)


LOOPBACK = listening_addresses(loopback_only=True)[:1]


@asynccontextmanager
async def listening_node(
    name: str, data: DataListener | None
) -> AsyncIterator[tuple[Node, wire.StagePlace]]:
    """A node that its neighbours can reach."""
    made = Node(name, Limits(beat_s=0.01), data)

    def register(server: grpc.aio.Server) -> None:
        rpc.add_RingServicer_to_server(made.seats, server)
        rpc.add_HeadServicer_to_server(made.seats, server)

    server, port = await listen(
        LOOPBACK,
        0,
        credentials=made.credentials,
        gate=everyone(made.tally),
        limits=made.limits,
        register=register,
    )
    place = wire.StagePlace(node_id=peer(name))
    place.endpoints.add(host=LOOPBACK[0].host, port=port, kind="loopback")
    try:
        yield made, place
    finally:
        await made.seats.leave_all()
        await stop_listening(server, grace_s=0.1)
        made.compute.stop(5)


def form(epoch: int, *others: wire.StagePlace) -> wire.FormRing:
    me = wire.StagePlace(node_id=peer("me"), first=0, end=2)
    shape = wire.RingShape(lanes=1, lane_rows=1, chunk_tokens=8, window_frames=8, context_tokens=64)
    for number, other in enumerate(others, 1):
        other.first, other.end = 2 * number, 2 * number + 2
    costs = [wire.CacheCost()] * (1 + len(others))
    return wire.FormRing(epoch=epoch, index=0, stages=[me, *others], shape=shape, costs=costs)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("begun", [False, True])
async def test_a_ring_that_is_left_before_its_seat_is_taken_leaves_nothing(begun: bool) -> None:
    async with node() as one:
        busy = threading.Event()
        one.compute.post(lambda: cast(None, busy.wait(5)))
        one.seats.form(form(1))
        if begun:
            await asyncio.sleep(0)
        await one.seats.leave(1)
        busy.set()
        for _ in range(5):
            await one.compute.call(lambda: None)
        assert one.seats.health(0.0) == []
        assert one.kinds() == []


async def test_a_neighbour_that_refuses_breaks_the_ring_at_once() -> None:
    async with node() as one:
        addresses = listening_addresses(loopback_only=True)

        def register(server: grpc.aio.Server) -> None:
            rpc.add_RingServicer_to_server(Refusing(), server)

        server, port = await listen(
            addresses,
            0,
            credentials=member("other"),
            gate=everyone(),
            limits=one.limits,
            register=register,
        )
        try:
            place = wire.StagePlace(node_id=peer("other"), first=2, end=4)
            place.endpoints.add(host=addresses[0].host, port=port, kind="loopback")
            one.seats.form(form(1, place))
            await until(lambda: bool(one.told))
            assert one.kinds() == ["broken"]
            assert one.told[0].broken.fault.kind == "LinkBroken"
            assert "no ring here" in one.told[0].broken.fault.why
            assert one.told[0].broken.fault.fields["peer"] == peer("other")
            await one.seats.leave(1)
        finally:
            await server.stop(None)


def data_listener(kind: str, name: str) -> DataListener | None:
    if kind == "none":
        return None
    listener = DataListener(LOOPBACK, Limits(), member(name), tally())
    if kind == "unreachable":
        listener.close()
    return listener


@pytest.mark.parametrize("first", ["there", "unreachable", "none"])
@pytest.mark.parametrize("second", ["there", "unreachable", "none"])
async def test_frames_go_around_whichever_data_connections_can_be_made(
    first: str, second: str, caplog: pytest.LogCaptureFixture
) -> None:
    listeners = data_listener(first, "one"), data_listener(second, "two")
    async with (
        listening_node("one", listeners[0]) as (one, at_one),
        listening_node("two", listeners[1]) as (two, at_two),
    ):
        at_one.end, at_two.first, at_two.end = 2, 2, 4
        ring = form(1)
        del ring.stages[:]
        ring.stages.extend([at_one, at_two])
        ring.costs.add()
        one.seats.form(ring)
        second_form = wire.FormRing()
        second_form.CopyFrom(ring)
        second_form.index = 1
        two.seats.form(second_form)
        await until(lambda: one.kinds() == ["joined"] and two.kinds() == ["joined"])
        await until(lambda: one.seats.health(0.0)[0].ring_round_trip_s > 0)
        hops = [node.seats.health(0.0)[0].hops for node in (one, two)]
        await until(
            lambda: all(
                node.seats.health(0.0)[0].hops > before + 3
                for node, before in zip((one, two), hops, strict=True)
            )
        )
        slower = sum("go through gRPC" in record.message for record in caplog.records)
        assert slower == [first, second].count("unreachable")
        await two.seats.leave(1)
        await until(lambda: one.kinds() == ["joined", "broken"])
        fault = one.told[-1].broken.fault
        assert (fault.kind, fault.fields["peer"]) == ("LinkBroken", peer("two"))
    for listener in listeners:
        if listener is not None:
            listener.close()


async def test_what_nobody_foresaw_in_forming_breaks_the_ring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("parallax.node.seats.Runner", fail)
    async with node() as one:
        one.seats.form(form(1))
        await until(lambda: bool(one.told))
        assert one.told[0].broken.fault.kind == "InternalError"


@pytest.mark.parametrize("what", ["index", "costs", "lanes", "window", "layers", "epoch", "stages"])
async def test_an_order_that_makes_no_sense_is_refused_and_the_next_one_followed(what: str) -> None:
    async with node() as one:
        wrong = form(1)
        match what:
            case "index":
                wrong.index = 7
            case "costs":
                wrong.costs.add()
            case "lanes":
                wrong.shape.lanes = (1 << 32) - 1
            case "window":
                wrong.shape.window_frames = 0
            case "layers":
                wrong.stages[0].first = 2
            case "epoch":
                wrong.epoch = 0
            case "stages":
                del wrong.stages[:]
        one.seats.form(wrong)
        await until(lambda: one.kinds() == ["broken"])
        assert one.told[0].broken.fault.kind == "MessageRefused"
        one.seats.form(form(2))
        await until(lambda: one.kinds() == ["broken", "joined"])


async def test_epochs_only_grow_until_another_scheduler_gives_them() -> None:
    async with node() as one:
        one.seats.form(form(9))
        await until(lambda: one.kinds() == ["joined"])
        await one.seats.leave(9)
        one.seats.form(form(4))
        await until(lambda: one.kinds() == ["joined", "broken"])
        one.seats.new_scheduler()
        one.seats.form(form(4))
        await until(lambda: len(one.kinds()) == 3)
        assert one.kinds() == ["joined", "broken", "joined"]


async def test_frames_are_taken_from_the_stage_before_and_orders_from_the_scheduler_alone() -> None:
    async with (
        listening_node("one", None) as (one, at_one),
        listening_node("two", None) as (two, at_two),
    ):
        at_one.end, at_two.first, at_two.end = 2, 2, 4
        ring = form(1, at_two)
        ring.stages[0].CopyFrom(at_one)
        one.seats.form(ring)
        second_form = wire.FormRing()
        second_form.CopyFrom(ring)
        second_form.index = 1
        two.seats.form(second_form)
        await until(lambda: one.kinds() == ["joined"] and two.kinds() == ["joined"])

        async def answer(name: str, service: str) -> grpc.StatusCode | None:
            """How the head answers a member that wants to send it frames, or give it orders.

            One message: gRPC may tell of a second that it came too late, and not why.
            """
            channel, _ = await open_channel(
                list(at_one.endpoints), peer("one"), limits=one.limits, credentials=member(name)
            )
            async with channel:
                try:
                    if service == "flow":
                        call: Any = rpc.RingStub(channel).Flow(timeout=30)
                        opening = wire.FlowOpen(epoch=1, from_stage=1, to_stage=0)
                        await call.write(wire.FramePiece(open=opening))
                    else:
                        call = rpc.HeadStub(channel).Serve(timeout=30)
                        await call.write(wire.HeadOrder(epoch=9))
                    await call.read()
                except grpc.aio.AioRpcError as error:
                    return error.code()
                return None

        denied = grpc.StatusCode.PERMISSION_DENIED
        assert await answer("thief", "flow") is denied
        assert await answer("boss", "flow") is denied  # not even the scheduler
        assert await answer("two", "orders") is denied
        assert await answer("boss", "orders") is grpc.StatusCode.ABORTED  # no such ring
        assert one.tally.totals(0.0) == {"stage": 2, "scheduler": 1}
        assert one.kinds() == two.kinds() == ["joined"], "the ring went on"
        await until(lambda: one.seats.health(0.0)[0].ring_round_trip_s > 0)


async def test_a_member_that_opens_many_streams_early_leaves_places_for_the_neighbour() -> None:
    async with (
        listening_node("one", None) as (one, at_one),
        listening_node("two", None) as (two, at_two),
    ):
        channel, _ = await open_channel(
            list(at_one.endpoints), peer("one"), limits=one.limits, credentials=member("greedy")
        )
        async with channel:
            opening = wire.FramePiece(open=wire.FlowOpen(epoch=9, from_stage=1, to_stage=0))
            calls: list[Any] = [rpc.RingStub(channel).Flow(timeout=60) for _ in range(MOST_EARLY)]
            for call in calls:
                await call.write(opening)
            early = one.seats._early
            await until(lambda: early.taken + one.seats.refused_frames == MOST_EARLY)

            at_one.end, at_two.first, at_two.end = 2, 2, 4
            ring = form(1, at_two)
            ring.stages[0].CopyFrom(at_one)
            ring.index = 1
            two.seats.form(ring)
            waiting = early.taken
            await until(lambda: early.taken > waiting or bool(two.told))
            assert not two.told, "it was turned away"
            ring.index = 0
            one.seats.form(ring)
            await until(lambda: bool(one.told and two.told))
            assert one.kinds() == two.kinds() == ["joined"]
