"""Who asks for much of a model's files leaves places for others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path

import grpc.aio

from parallax.fabric.weights_service import EACH_READERS
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.weights import EACH_ASKING
from tests.node.weights_room import weights_room


async def status(call: Awaitable[object]) -> str:
    """How a call ends: OK, or its error."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_a_member_that_takes_nothing_of_what_it_asked_for_leaves_places_for_others(
    tmp_path: Path,
) -> None:
    async with weights_room(tmp_path) as room:
        begin, end = (await room.parts()).blocks["model-1-of-2.safetensors"].place(1)
        ask = wire.ReadAsked(
            digest=room.model.digest,
            file="model-1-of-2.safetensors",
            ranges=[wire.ByteRange(begin=begin, end=end)] * 64,  # more than the kernel takes
        )
        greedy, other = room.scheduler.line("greedy"), room.scheduler.line("other")
        try:
            stub = await greedy.stub()
            calls = [stub.Read(ask, timeout=60) for _ in range(EACH_READERS)]
            for call in calls:
                assert isinstance(await call.read(), wire.BytesRead)
            assert await status(stub.Read(ask, timeout=60).read()) == "RESOURCE_EXHAUSTED"
            assert await status((await other.stub()).Read(ask, timeout=60).read()) == "OK"
            assert await status((await other.stub()).Read(ask).read()) == "INVALID_ARGUMENT"
            for call in calls:
                call.cancel()
        finally:
            await greedy.close()
            await other.close()


async def test_descriptions_and_sums_are_counted_for_each_member(tmp_path: Path) -> None:
    async with weights_room(tmp_path) as room:
        with (room.model.path / "generation_config.json").open("wb") as long:
            long.truncate(64 << 20)  # more than the kernel takes
        file = "model-1-of-2.safetensors"
        model = wire.ModelAsked(digest=room.model.digest)
        sums = wire.SumsAsked(digest=room.model.digest, file=file, first=0, count=1)
        greedy, other = room.scheduler.line("greedy"), room.scheduler.line("other")
        try:
            stub, another = await greedy.stub(), await other.stub()
            calls = [stub.Describe(model, timeout=60) for _ in range(EACH_READERS)]
            for call in calls:
                assert isinstance(await call.read(), wire.Described)
            assert await status(stub.Describe(model, timeout=60).read()) == "RESOURCE_EXHAUSTED"
            assert await status(another.Describe(model, timeout=60).read()) == "OK"

            turn = room.weights._offers[room.model.digest].sums._turns[file]
            async with turn:  # as while a disk is slow
                most = EACH_ASKING + 1
                asking = [
                    asyncio.create_task(status(stub.Sums(sums, timeout=60))) for _ in range(most)
                ]
                ended, waiting = await asyncio.wait(
                    asking, timeout=30, return_when=asyncio.FIRST_COMPLETED
                )
                assert [task.result() for task in ended] == ["RESOURCE_EXHAUSTED"]
                waits = asyncio.create_task(status(another.Sums(sums, timeout=60)))
                while not waits.done() and room.weights._asking.taken <= EACH_ASKING:
                    await asyncio.wait({waits}, timeout=0.01)
            assert await waits == "OK"
            assert {await task for task in waiting} == {"OK"}
        finally:
            await greedy.close()
            await other.close()
