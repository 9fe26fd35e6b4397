"""Fetching weights over real connections: from several members, resumed, checked, bounded."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc.aio
import psutil
import pytest

from parallax.fabric import weights_service
from parallax.fabric.addresses import Address, Kind
from parallax.fabric.blocks import BLOCK_BYTES, blocks_of
from parallax.fabric.channels import listen, stop_listening
from parallax.fabric.errors import DiskFull, ModelBroken, WeightsMissing
from parallax.fabric.limits import Limits
from parallax.fabric.models import PARTS, ModelFolder, open_folder
from parallax.fabric.safetensors import folder_headers
from parallax.fabric.weights_service import EACH_READERS, WeightsService
from parallax.node import fetch as fetching
from parallax.node.fetch import Fetch, Line, Place, describe
from parallax.node.library import Whole
from parallax.node.parts import Parts, Shelved
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from parallax.scheduler.weights import EACH_ASKING, ModelWeights
from tests.trust import everyone, member, peer

LIMITS = Limits(connect_s=2.0)
LOOPBACK = Address("127.0.0.1", "lo", Kind.LOOPBACK)
LAYERS = 8


def write_model(folder: Path, layer_bytes: int, layers: int = LAYERS) -> ModelFolder:
    """A model that nothing can run, in two files: layers of random bytes in three tensors each."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "layers": layers}))
    for half in range(2):
        header, at = {}, 0
        for layer in range(half * layers // 2, (half + 1) * layers // 2):
            for part, size in (
                ("norm", 64),
                ("up", layer_bytes * 3 // 4),
                ("down", layer_bytes // 4),
            ):
                entry = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
                header[f"layers.{layer}.{part}"] = entry
                at += size
        text = json.dumps(header).encode()
        with (folder / f"model-{half + 1}-of-2.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for begin in range(0, at, BLOCK_BYTES):
                file.write(os.urandom(min(BLOCK_BYTES, at - begin)))
    return open_folder(folder, name="random", location="/nowhere/random")


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


def tensors(first: int, end: int) -> list[str]:
    return [f"layers.{n}.{part}" for n in range(first, end) for part in ("norm", "up", "down")]


def source(model: ModelFolder) -> wire.ModelSource:
    return wire.ModelSource(name=model.name, location=model.location, digest=model.digest)


class Member:
    """A listener that gives out a folder, and how many bytes it gave out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sent = 0
        self.most: Callable[[int], None] = lambda _: None
        self.server: grpc.aio.Server | None = None
        self.port = 0

    def count(self, size: int) -> None:
        self.sent += size
        self.most(self.sent)

    async def start(self, service: WeightsService) -> None:
        self.server, self.port = await listen(
            [LOOPBACK],
            self.port,
            credentials=member(self.name, "scheduler"),
            gate=everyone(),
            limits=LIMITS,
            register=lambda s: rpc.add_WeightsServicer_to_server(service, s),
        )

    async def stop(self) -> None:
        if self.server is not None:
            server, self.server = self.server, None
            await stop_listening(server, 0.0)

    def line(self, caller: str = "node") -> Line:
        endpoint = wire.Endpoint(host="127.0.0.1", port=self.port, kind="loopback")
        place = Place(peer(self.name), (endpoint,), scheduler=self.name == "scheduler")
        return Line(place, LIMITS, member(caller, "scheduler"))


class Room:
    """A scheduler with a model, peers that have some of it, and a node that has nothing."""

    def __init__(self, tmp_path: Path, layer_bytes: int) -> None:
        self.model = write_model(tmp_path / "model", layer_bytes)
        self.shelved = Shelved(tmp_path / "node" / "fetched")
        self.scheduler = Member("scheduler")
        self.members = [self.scheduler]
        self.progress: list[tuple[int, int]] = []
        self.weights = ModelWeights(tmp_path / "scheduler", self.scheduler.count)

    async def open(self) -> None:
        await self.weights.offer(self.model)
        await self.scheduler.start(self.weights)

    async def peer(self, name: str, holding: weights_service.Holding) -> Member:
        member = Member(name)
        self.members.append(member)
        await member.start(WeightsService({self.model.digest: holding}.get, member.count))
        return member

    def whole(self, folder: Path) -> Whole:
        return Whole(folder, blocks_of(folder_headers(folder)))

    async def parts(self) -> Parts:
        """What the node has: described by the scheduler if it has nothing."""
        found = self.shelved.open(self.model.digest, name="random", location="/nowhere/random")
        if found is not None:
            return found
        line = self.scheduler.line()
        try:
            return await describe(line, self.shelved, source(self.model), LIMITS)
        finally:
            await line.close()

    def fetch(self, parts: Parts, names: list[str], *peers: Member) -> Fetch:
        return Fetch(
            parts,
            names,
            self.scheduler.line(),
            [peer.line() for peer in peers],
            LIMITS,
            lambda done, total: self.progress.append((done, total)),
        )

    def same(self, names: list[str]) -> bool:
        """Whether the node's bytes of these tensors are the scheduler's."""
        here = self.shelved.open(self.model.digest, name="random", location="x")
        assert here is not None
        assert not here.missing(names)
        for file, header in folder_headers(self.model.path).items():
            for name in set(names) & set(header):
                places = header[name].begin, header[name].end
                mine = weights_service.read_bytes(here.path / file, *places)
                if mine != weights_service.read_bytes(self.model.path / file, *places):
                    return False
        return True


Make = Callable[..., contextlib.AbstractAsyncContextManager[Room]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    @contextlib.asynccontextmanager
    async def maker(layer_bytes: int = 2 << 20) -> AsyncIterator[Room]:
        room = Room(tmp_path, layer_bytes)
        await room.open()
        try:
            yield room
        finally:
            for member in room.members:
                await member.stop()

    return maker


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


async def test_a_node_gives_on_what_it_fetched_and_nothing_else(make: Make) -> None:
    async with make() as room:
        first = await room.parts()
        await room.fetch(first, tensors(0, 4)).run()
        peer = await room.peer("peer", first)
        room.shelved = Shelved(room.model.path.parent / "other" / "fetched")
        parts = await room.parts()
        before = room.scheduler.sent
        fetch = room.fetch(parts, tensors(2, 6), peer)
        await fetch.run()
        assert room.same(tensors(2, 6))
        layer = parts.size(tensors(0, 1))
        assert 0 < peer.sent <= 2 * layer
        assert peer.sent + room.scheduler.sent - before == 4 * layer


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
    make: Make, tmp_path: Path
) -> None:
    async with make() as room:
        bad = spoiled(room.model.path, tmp_path / "bad")
        liar = await room.peer("liar", room.whole(bad))
        parts = await room.parts()
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


async def status(call: Awaitable[object]) -> str:
    """How a call ends: OK, or its error."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_a_member_that_takes_nothing_of_what_it_asked_for_leaves_places_for_others(
    make: Make,
) -> None:
    async with make() as room:
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


async def test_descriptions_and_sums_are_counted_for_each_member(make: Make) -> None:
    async with make() as room:
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
