"""Fetching weights over real connections: from several members, resumed, checked, bounded."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc.aio
import psutil
import pytest

from parallax.fabric import weights_service
from parallax.fabric.blocks import BLOCK_BYTES
from parallax.fabric.errors import DiskFull, ModelBroken, WeightsMissing
from parallax.fabric.models import PARTS, open_folder
from parallax.node import fetch as fetching
from parallax.node.fetch import Line, describe
from parallax.node.library import Library
from parallax.node.parts import Parts, Shelved
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.weights import ModelWeights
from tests.node.weights_room import LAYERS, LIMITS, Room, source, tensors, weights_room


def spoiled(folder: Path, copy: Path) -> Path:
    """The same files with one bit of each MiB turned round."""
    shutil.copytree(folder, copy)
    for file in copy.glob("*.safetensors"):
        with file.open("r+b") as stream:
            for place in range(1 << 19, file.stat().st_size, BLOCK_BYTES):
                stream.seek(place)
                byte = stream.read(1)[0]
                stream.seek(place)
                stream.write(bytes([byte ^ 4]))
    return copy


Make = Callable[..., contextlib.AbstractAsyncContextManager[Room]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return partial(weights_room, tmp_path)


async def test_only_the_tensors_of_a_stage_come_and_a_wider_stage_fetches_the_difference(
    make: Make,
) -> None:
    async with make() as room:
        parts = await room.parts()
        await room.fetch(parts, tensors(2, 5)).run()
        assert room.same(tensors(2, 5))
        layer = parts.size(tensors(0, 1))
        assert room.scheduler.sent == 3 * layer
        assert room.progress[0] == (0, 3 * layer)
        assert room.progress[-1] == (3 * layer, 3 * layer)
        files = [parts.path / file for file in parts.blocks]
        assert sum(map(os.path.getsize, files)) > 8 * layer, "files have their full size"
        assert room.shelved.used_bytes() < 3.2 * layer, "and holes, which take no room"
        await room.fetch(parts, tensors(3, 7)).run()
        assert room.same(tensors(2, 7))
        assert room.scheduler.sent == 5 * layer


async def test_several_members_deliver_at_once(make: Make) -> None:
    async with make() as room:
        peers = [await room.peer(f"peer{n}", room.whole(room.model.path)) for n in range(2)]
        parts = await room.parts()
        await room.fetch(parts, tensors(0, LAYERS), *peers).run()
        assert room.same(tensors(0, LAYERS))
        shares = [member.sent for member in room.members]
        assert sum(shares) == parts.size(tensors(0, LAYERS))
        assert sum(share > 0 for share in shares) > 1, shares  # the scheduler may come too late


def hold_back(monkeypatch: pytest.MonkeyPatch, folder: Path, other: Path) -> None:
    """Nothing of one folder is given out before something of the other one is."""
    begun, read = threading.Event(), weights_service.read_bytes

    def reading(file: Path, begin: int, end: int) -> bytes:
        if file.is_relative_to(other):
            begun.set()
        elif file.is_relative_to(folder):
            assert begun.wait(60)
        return read(file, begin, end)

    monkeypatch.setattr(weights_service, "read_bytes", reading)


async def test_a_node_gives_on_what_it_fetched_and_nothing_else(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make() as room:
        first = await room.parts()
        await room.fetch(first, tensors(0, 4)).run()
        peer = await room.peer("peer", first)
        room.shelved = Shelved(room.model.path.parent / "other" / "fetched")
        parts = await room.parts()
        before = room.scheduler.sent
        hold_back(monkeypatch, room.model.path, first.path)
        fetch = room.fetch(parts, tensors(2, 6), peer)
        await fetch.run()
        assert room.same(tensors(2, 6))
        layer = parts.size(tensors(0, 1))
        assert 0 < peer.sent <= 2 * layer
        assert peer.sent + room.scheduler.sent - before == 4 * layer


async def test_a_stopped_fetch_closes_no_file_under_a_write(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    under_way = [0]
    open_at_close: list[int] = []
    write, close = Parts.write, Parts.close

    def slow(self: Parts, file: str, block: int, data: memoryview) -> None:
        under_way[0] += 1
        writing.set()
        go_on.wait(60)
        write(self, file, block, data)
        under_way[0] -= 1

    def watched(self: Parts) -> None:
        open_at_close.append(under_way[0])
        close(self)

    monkeypatch.setattr(Parts, "write", slow)
    monkeypatch.setattr(Parts, "close", watched)
    async with make() as room:
        parts = await room.parts()
        task = asyncio.create_task(room.fetch(parts, tensors(0, LAYERS)).run())
        assert await asyncio.to_thread(writing.wait, 60)
        task.cancel()
        asyncio.get_running_loop().call_later(0.2, go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task
    assert open_at_close == [0]
    assert not parts._handles, "a write that came late opened a file again"


async def test_two_who_look_for_the_same_model_begin_one_folder(make: Make) -> None:
    async with make() as room:
        library = Library(room.shelved._place.parent, LIMITS, room.scheduler.line)
        await asyncio.gather(*(library.find(source(room.model)) for _ in range(4)))
        assert isinstance(library.holding(room.model.digest), Parts)
        await library.fetch(room.model.digest, tensors(0, 2), (), (), lambda done, total: None)
        assert room.same(tensors(0, 2))


async def test_what_a_stopped_fetch_left_is_not_fetched_again(make: Make) -> None:
    async with make() as room:
        parts = await room.parts()
        size = parts.size(tensors(0, LAYERS))
        task = asyncio.create_task(room.fetch(parts, tensors(0, LAYERS)).run())

        def stop(sent: int) -> None:
            if sent > size // 2 and not task.cancelling():
                task.cancel()

        room.scheduler.most = stop
        with pytest.raises(asyncio.CancelledError):
            await task
        room.scheduler.most = lambda _: None
        again = await room.parts()
        fetch = room.fetch(again, tensors(0, LAYERS))
        assert 0 < fetch.missing_bytes < 0.7 * size
        before = room.scheduler.sent
        await fetch.run()
        again = room.scheduler.sent - before - fetch.missing_bytes
        assert 0 <= again <= 1 << 20, "beside what was on its way when it was stopped"
        assert room.same(tensors(0, LAYERS))


async def test_wrong_bytes_are_noticed_and_whoever_gave_them_out_is_not_asked_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make() as room:
        bad = spoiled(room.model.path, tmp_path / "bad")
        liar = await room.peer("liar", room.whole(bad))
        parts = await room.parts()
        hold_back(monkeypatch, room.model.path, bad)
        await room.fetch(parts, tensors(0, LAYERS), liar).run()
        assert room.same(tensors(0, LAYERS))
        asked = fetching.IN_FLIGHT * fetching.PARCEL_BYTES
        assert 0 < liar.sent <= asked, "it was asked again"


async def test_a_member_that_goes_away_costs_nothing_but_its_share(make: Make) -> None:
    async with make() as room:
        peer = await room.peer("peer", room.whole(room.model.path))
        parts = await room.parts()
        stopping: list[asyncio.Task[None]] = []

        def go_away(sent: int) -> None:
            if sent > 2 << 20 and not stopping:
                stopping.append(asyncio.create_task(peer.stop()))

        peer.most = go_away
        await room.fetch(parts, tensors(0, LAYERS), peer).run()
        assert room.same(tensors(0, LAYERS))
        assert stopping
        await asyncio.gather(*stopping)


async def test_a_scheduler_that_is_started_again_is_asked_on(make: Make, tmp_path: Path) -> None:
    async with make() as room:
        parts = await room.parts()
        again: list[asyncio.Task[None]] = []

        async def restart() -> None:
            await room.scheduler.stop()
            weights = ModelWeights(tmp_path / "scheduler", room.scheduler.count)
            await weights.offer(room.model)
            await room.scheduler.start(weights)

        def crash(sent: int) -> None:
            if sent > 4 << 20 and not again:
                again.append(asyncio.create_task(restart()))

        room.scheduler.most = crash
        await room.fetch(parts, tensors(0, LAYERS)).run()
        assert again
        await asyncio.gather(*again)
        assert room.same(tensors(0, LAYERS))


async def test_a_fetch_that_nobody_serves_ends_with_a_clear_error(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PATIENCE_S", 0.3)
    async with make() as room:
        parts = await room.parts()
        await room.scheduler.stop()
        with pytest.raises(WeightsMissing, match="Weights of random"):
            await room.fetch(parts, tensors(0, 1)).run()


async def test_memory_stays_bounded_while_much_is_fetched(make: Make) -> None:
    async with make(layer_bytes=16 << 20) as room:
        parts = await room.parts()
        process = psutil.Process()
        before = most = process.memory_info().rss
        task = asyncio.create_task(room.fetch(parts, tensors(0, LAYERS)).run())
        while not task.done():
            most = max(most, process.memory_info().rss)
            await asyncio.wait({task}, timeout=0.01)
        await task
        assert room.scheduler.sent > 120 << 20
        # Both ends are in this process; each has a few blocks in flight.
        assert most - before < 64 << 20, (most - before) >> 20


async def test_sums_are_kept_and_computed_anew_when_a_file_has_changed(
    make: Make, tmp_path: Path
) -> None:
    async with make() as room:
        parts = await room.parts()
        await room.fetch(parts, tensors(0, LAYERS)).run()
        kept = tmp_path / "scheduler" / "sums" / room.model.digest
        file = room.model.path / "model-1-of-2.safetensors"
        blocks = parts.blocks[file.name]
        sums = (kept / f"{file.name}.sums").read_bytes()[32:]
        begin, end = blocks.place(1)
        data = weights_service.read_bytes(file, begin, end)
        assert sums[32:64] == hashlib.sha256(data).digest()
        with file.open("r+b") as stream:
            stream.seek(begin)
            stream.write(bytes(end - begin))
        await room.weights.offer(room.model)
        line = room.scheduler.line()
        ask = wire.SumsAsked(digest=room.model.digest, file=file.name, first=1, count=1)
        told = await (await line.stub()).Sums(ask, timeout=5)
        await line.close()
        assert told.sums == hashlib.sha256(bytes(end - begin)).digest()


async def test_nothing_but_blocks_of_the_known_model_can_be_read(make: Make) -> None:
    async with make() as room:
        first = await room.parts()
        await room.fetch(first, tensors(0, 1)).run()
        peer = await room.peer("peer", first)
        held, _ = first.blocks["model-1-of-2.safetensors"].place(0)
        lines = [room.scheduler.line(), peer.line()]

        async def read(line: Line, digest: str, file: str, *ranges: tuple[int, int]) -> str:
            places = [wire.ByteRange(begin=b, end=e) for b, e in ranges]
            ask = wire.ReadAsked(digest=digest, file=file, ranges=places)
            try:
                async for _ in (await line.stub()).Read(ask, timeout=5):
                    pass
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

        digest, file = room.model.digest, "model-1-of-2.safetensors"
        whole = held, held + 64
        try:
            for line in lines:
                assert await read(line, digest, file, whole) == "OK"
                assert await read(line, "0" * 64, file, whole) == "NOT_FOUND"
                for name in ("config.json", "../model/" + file, str(room.model.path / file), ""):
                    assert await read(line, digest, name, whole) == "INVALID_ARGUMENT"
                for place in ((0, 8), (held, held + 63), (held, 1 << 60), (held, held), (64, 0)):
                    assert await read(line, digest, file, place) == "INVALID_ARGUMENT"
                assert await read(line, digest, file) == "INVALID_ARGUMENT"
                assert await read(line, digest, file, *[whole] * 65) == "INVALID_ARGUMENT"
            second = first.blocks["model-2-of-2.safetensors"].place(0)
            assert (
                await read(peer.line(), digest, "model-2-of-2.safetensors", second)
                == "OUT_OF_RANGE"
            )
            asks = ((0, 65), (0, 0), (10**9, 1), (len(first.blocks[file]), 1))
            for begin, count in asks:
                ask = wire.SumsAsked(digest=digest, file=file, first=begin, count=count)
                with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
                    await (await lines[0].stub()).Sums(ask, timeout=5)
            ask = wire.SumsAsked(digest=digest, file=file, first=0, count=1)
            with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
                await (await lines[1].stub()).Sums(ask, timeout=5)
        finally:
            for line in lines:
                await line.close()


async def test_a_disk_that_fills_is_a_clear_error(make: Make, tmp_path: Path) -> None:
    async with make() as room:
        parts = await room.parts()
        file = parts.path / "model-1-of-2.safetensors"
        file.unlink()
        file.symlink_to("/dev/full")
        with pytest.raises(DiskFull, match="The disk is full"):
            await room.fetch(parts, tensors(0, 1)).run()


def described(*pieces: tuple[str, int, bytes]) -> list[wire.Described]:
    return [wire.Described(file=f, size_bytes=s, data=d) for f, s, d in pieces]


@pytest.mark.parametrize(
    "pieces",
    [
        described(("../config.json", 2, b"{}")),
        described(("/etc/model.safetensors", 2, b"{}")),
        described(("model/../../x.safetensors", 2, b"{}")),
        described(("tokenizer.json", 2, b"{}")),
        described(("model.safetensors\n", 2, b"{}")),
        described(("", 0, b"{}")),
        described(("config.json", 2, b"{}"), ("config.json", 2, b"{}")),
        described(("config.json", 0, b"{}")),
        described(("model.safetensors", 1 << 60, b"{}")),
        described(("config.json", 2, b"{}  more")),
        described(("config.json", 2, b"{}"), ("model.safetensors", 9, bytes(8) + b"{")),
    ],
)
def test_descriptions_that_cannot_be_are_refused(
    pieces: list[wire.Described], tmp_path: Path
) -> None:
    outline = Shelved(tmp_path / "fetched").begin("ab" * 32)

    def take() -> None:
        for piece in pieces:
            outline.take(piece)
        outline.finish("ab" * 32, name="m", location="m")

    with pytest.raises(ModelBroken):
        take()
    assert not (tmp_path / "fetched" / ("ab" * 32)).exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"fetched"}


async def test_another_models_description_is_refused(make: Make) -> None:
    async with make() as room:
        other = wire.ModelSource(name="x", location="x", digest="cd" * 32)
        room.weights._offers[other.digest] = room.weights._offers[room.model.digest]
        line = room.scheduler.line()
        with pytest.raises(ModelBroken, match="another model"):
            await describe(line, room.shelved, other, LIMITS)
        await line.close()


async def test_parts_of_a_model_are_not_taken_for_the_model(make: Make) -> None:
    async with make() as room:
        parts = await room.parts()
        with pytest.raises(ModelBroken, match="only parts"):
            open_folder(parts.path, name="m", location="m")


async def test_models_used_longest_ago_make_room_and_those_in_use_do_not(
    make: Make, tmp_path: Path
) -> None:
    async with make() as room:
        parts = await room.parts()
        await room.fetch(parts, tensors(0, LAYERS)).run()
        digest = room.model.digest
        used = room.shelved.used_bytes()
        place = tmp_path / "node" / "fetched"
        shutil.copytree(parts.path, place / ("ab" * 32))
        os.utime(place / ("ab" * 32) / PARTS, (1, 1))
        limited = Shelved(place, 5 * used // 2)
        limited.make_room(used // 4, [digest])
        assert len(list(place.iterdir())) == 2
        limited.make_room(used, [digest])
        assert [entry.name for entry in place.iterdir()] == [digest]
        with pytest.raises(DiskFull) as error:
            limited.make_room(2 * used, [digest])
        assert int(error.value.fields["missing_bytes"]) > 0
        assert [entry.name for entry in place.iterdir()] == [digest]
