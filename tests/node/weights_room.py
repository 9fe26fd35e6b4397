"""A room in which weights travel: a scheduler with a model, and members that give some of it."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio

from parallax.fabric import weights_service
from parallax.fabric.addresses import Address, Kind
from parallax.fabric.blocks import BLOCK_BYTES, blocks_of
from parallax.fabric.channels import listen, stop_listening
from parallax.fabric.limits import Limits
from parallax.fabric.models import ModelFolder, open_folder
from parallax.fabric.safetensors import folder_headers
from parallax.fabric.weights_service import WeightsService
from parallax.node.fetch import Fetch, Line, Place, describe
from parallax.node.library import Whole
from parallax.node.parts import Parts, Shelved
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from parallax.scheduler.weights import ModelWeights
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
        here = self.shelved.open(self.model.digest, name="random", location="/nowhere/random")
        assert here is not None
        assert not here.missing(names)
        for file, header in folder_headers(self.model.path).items():
            for name in set(names) & set(header):
                places = header[name].begin, header[name].end
                mine = weights_service.read_bytes(here.path / file, *places)
                if mine != weights_service.read_bytes(self.model.path / file, *places):
                    return False
        return True


@contextlib.asynccontextmanager
async def weights_room(folder: Path, layer_bytes: int = 2 << 20) -> AsyncIterator[Room]:
    """A room whose members are there, until the block ends."""
    room = Room(folder, layer_bytes)
    await room.open()
    try:
        yield room
    finally:
        for member in room.members:
            await member.stop()
