"""Fetching weights from other members: the shell around the plan.

The scheduler says what the model is and what each block's SHA-256 must be; the bytes come from it
and from other nodes at once. A block is checked before it is written, and written before the next
one of its parcel is taken, so that memory holds a block or two for each parcel in flight.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio

from parallax.fabric.blocks import BLOCK_BYTES, SUM_BYTES, Marks
from parallax.fabric.bounds import check
from parallax.fabric.channels import open_channel
from parallax.fabric.credentials import Credentials
from parallax.fabric.errors import ClusterError, LinkBroken, ParallaxError, WeightsMissing
from parallax.fabric.limits import Limits
from parallax.fabric.tasks import Tasks
from parallax.node.fetch_plan import FetchPlan, Has, Parcel
from parallax.node.parts import Parts, Shelved
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc

T = TypeVar("T")

log = logging.getLogger(__name__)

PARCEL_BYTES = 4 << 20  # at most
PARCEL_BLOCKS = 64
IN_FLIGHT = 3  # parcels asked of one source at once
MOST_SOURCES = 8
PATIENCE_S = 60.0  # nothing comes from anyone
PARCEL_S = 120.0  # one parcel, over a slow link
SETTLE_S = 0.5  # how much work a pulled plug undoes
HEAD_START_S = 0.25  # of peers, before the scheduler is asked too
IDLE_S = 0.05  # until a source for which there is nothing is thought of again
LOOK_S = 1.0  # how often a source is asked what it holds by now

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Place:
    """A member that may have weights."""

    node_id: str
    endpoints: tuple[wire.Endpoint, ...]
    scheduler: bool = False


class Line:
    """The way to one source, opened when it is needed and again after it broke."""

    def __init__(self, place: Place, limits: Limits, credentials: Credentials) -> None:
        self.place = place
        self._limits = limits
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None
        self._left: list[grpc.aio.Channel] = []  # not used any more, and perhaps still read
        self._turn = asyncio.Lock()

    def to(self, place: Place) -> Line:
        """A way of its own to another source, or to the same."""
        return Line(place, self._limits, self._credentials)

    async def stub(self) -> rpc.WeightsAsyncStub:
        """Calls to the source.

        Raises:
            ClusterError: it cannot be reached.
        """
        async with self._turn:
            if self._channel is None:
                self._channel, _ = await open_channel(
                    self.place.endpoints,
                    self.place.node_id,
                    limits=self._limits,
                    credentials=self._credentials,
                    scheduler=self.place.scheduler,
                )
            return rpc.WeightsStub(self._channel)

    async def failed(self, error: Exception) -> str:
        """Why a call failed; a connection that broke is opened again by the next call."""
        if isinstance(error, grpc.aio.AioRpcError):
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                await self.close()
            elif error.code() is grpc.StatusCode.UNAUTHENTICATED:
                await self._leave()  # its certificate has ended: there is a new one
            return error.details() or error.code().name
        return error.sentence if isinstance(error, ParallaxError) else "no answer in time"

    async def _leave(self) -> None:
        """The next call is made over a new connection; what runs over this one goes on."""
        async with self._turn:
            channel, self._channel = self._channel, None
            if channel is not None:
                self._left.append(channel)

    async def close(self) -> None:
        """Ends the connection and what is asked over it."""
        async with self._turn:
            channels = [*self._left, *([self._channel] if self._channel is not None else ())]
            self._left, self._channel = [], None
            for channel in channels:
                await channel.close()


async def describe(
    scheduler: Line, shelved: Shelved, model: wire.ModelSource, limits: Limits
) -> Parts:
    """Asks the scheduler what a model is made of, and begins its folder.

    Raises:
        WeightsMissing: the scheduler does not give it out.
        ModelBroken: what it describes cannot be.
        DiskFull: no room for it.
        ClusterError: the scheduler cannot be reached.
    """
    outline = await asyncio.to_thread(shelved.begin, model.digest)
    stub = await scheduler.stub()
    try:
        async for piece in stub.Describe(wire.ModelAsked(digest=model.digest), timeout=PARCEL_S):
            await asyncio.to_thread(outline.take, piece)
    except grpc.aio.AioRpcError as error:
        raise _missing(model.name, f"the scheduler says: {await scheduler.failed(error)}") from None
    return await asyncio.to_thread(
        lambda: outline.finish(model.digest, name=model.name, location=model.location)
    )


class Fetch:
    """One stage's missing blocks on their way here.

    Args:
        parts: where they go.
        tensors: those that the stage needs.
        scheduler: who says what is right; a source too.
        peers: nodes that may have some of them.
        progress: told (bytes here, bytes needed) as they come.
    """

    def __init__(
        self,
        parts: Parts,
        tensors: Iterable[str],
        scheduler: Line,
        peers: Sequence[Line],
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._parts = parts
        self._scheduler = scheduler
        self._peers = list(peers[:MOST_SOURCES])
        self._limits = limits
        self._progress = progress
        names = list(tensors)
        missing = parts.missing(names)
        self.missing_bytes = sum(
            end - begin
            for file, blocks in missing.items()
            for begin, end in map(parts.blocks[file].place, blocks)
        )
        self._total = parts.size(names)
        self._done = self._total - self.missing_bytes
        turns = (1 + len(self._peers)) * IN_FLIGHT * 2  # so that each source has some
        size = min(PARCEL_BYTES, max(BLOCK_BYTES, self.missing_bytes // turns))
        parcels = [
            Parcel(file, part)
            for file, blocks in missing.items()
            for run in parts.blocks[file].runs(blocks, size)
            for part in _cut(run)
        ]
        self._plan = FetchPlan(parcels, patience_s=PATIENCE_S, now=time.monotonic())
        self._moved = asyncio.Event()
        self._why = "nobody was asked"
        self._writing: set[asyncio.Future[Any]] = set()  # on threads, which cancelling does not end

    async def run(self) -> None:
        """Returns when every block is here and safe on the disk.

        Raises:
            WeightsMissing: nobody gives out what is still missing.
            DiskFull, ModelBroken: the disk cannot take it.
        """
        self._progress(self._done, self._total)
        tasks = Tasks()
        lines = (self._scheduler, *self._peers)
        workers: list[asyncio.Task[None]] = []
        try:
            workers = [tasks.start(self._settle(), awaited=True)]
            known = {line: asyncio.Event() for line in lines}
            for line in lines:
                tasks.start(self._look(line, known))
                workers += [
                    tasks.start(self._work(line, known[line]), awaited=True)
                    for _ in range(IN_FLIGHT)
                ]
            while not self._plan.finished:
                self._moved.clear()
                waiting = asyncio.create_task(self._moved.wait())
                ended, _ = await asyncio.wait(
                    {waiting, *workers}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
                )
                waiting.cancel()
                for task in ended - {waiting}:
                    task.result()  # only a failing disk ends one
                if known[self._scheduler].is_set() and self._plan.hopeless(time.monotonic()):
                    raise _missing(self._parts.folder.name, self._reason())
        finally:
            await tasks.stop()
            await asyncio.gather(*workers, return_exceptions=True)  # several may have failed
            for line in lines:
                await line.close()
            await asyncio.shield(self._let_go())

    async def _let_go(self) -> None:
        """The files are closed when nobody writes any more: their numbers are others' then."""
        await asyncio.gather(*self._writing, return_exceptions=True)
        await asyncio.to_thread(self._end)

    async def _on_disk(self, work: Callable[[], T]) -> T:
        """Runs ``work`` on a thread; whoever waits for it may be cancelled meanwhile."""
        writing = asyncio.get_running_loop().run_in_executor(None, work)
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        return await asyncio.shield(writing)

    def _end(self) -> None:
        try:
            self._parts.settle()
        finally:
            self._parts.close()

    async def _settle(self) -> None:
        while True:
            await asyncio.sleep(SETTLE_S)
            await self._on_disk(self._parts.settle)

    async def _look(self, line: Line, known: Mapping[Line, asyncio.Event]) -> None:
        """Asks a source what it holds, again and again while that may grow."""
        asked = wire.ModelAsked(digest=self._parts.folder.digest)
        if line is self._scheduler:  # it has everything; peers go first, to spare it
            with suppress(TimeoutError):
                async with asyncio.timeout(HEAD_START_S):
                    for peer in self._peers:
                        await known[peer].wait()
            self._plan.offer(line.place.node_id, _everything)
            known[line].set()
            return
        while True:
            try:
                told = await (await line.stub()).Holds(asked, timeout=self._limits.call_s)
                check(told)
            except (ClusterError, grpc.aio.AioRpcError) as error:
                self._why = await line.failed(error)
            else:
                self._plan.offer(line.place.node_id, _has(told, self._parts))
                known[line].set()
                if told.whole:
                    return
            await asyncio.sleep(LOOK_S)

    async def _work(self, line: Line, known: asyncio.Event) -> None:
        """Asks a source for one parcel after the other."""
        await known.wait()
        source = line.place.node_id
        while True:
            parcel = self._plan.next(source, time.monotonic())
            if parcel is None:
                await asyncio.sleep(IDLE_S)
                continue
            arrival = Arrival(parcel, line)
            try:
                await self._parcel(line, arrival)
            except (ClusterError, grpc.aio.AioRpcError, TimeoutError) as error:
                if _awaited(error) and arrival.asked is self._scheduler:
                    self._plan.awaited(source, parcel, time.monotonic())
                    continue
                self._why = await arrival.asked.failed(error)
                self._plan.stopped(source, parcel, arrival.good, time.monotonic())
            except asyncio.CancelledError:
                task = asyncio.current_task()
                self._plan.stopped(source, parcel, arrival.good, time.monotonic())
                if task is None or task.cancelling():
                    raise
                # Else it is the call that was cancelled, with the connection it was made over.
            else:
                if arrival.good == len(parcel.blocks):
                    self._plan.arrived(source, parcel, time.monotonic())
                else:
                    log.warning("%s gave out wrong bytes of %s", source, parcel.file)
                    self._why = f"{source} gave out wrong bytes"
                    self._plan.wrong(source, parcel, arrival.good, time.monotonic())
            self._moved.set()

    async def _parcel(self, line: Line, arrival: Arrival) -> None:
        """One parcel from a source; ends early at a block that is not what it should be."""
        parcel, digest = arrival.parcel, self._parts.folder.digest
        blocks = self._parts.blocks[parcel.file]
        arrival.asked = self._scheduler
        sums = wire.SumsAsked(
            digest=digest,
            file=parcel.file,
            first=parcel.blocks.start,
            count=len(parcel.blocks),
        )
        told = await (await self._scheduler.stub()).Sums(sums, timeout=self._limits.call_s)
        check(told)
        if len(told.sums) != len(parcel.blocks) * SUM_BYTES:
            raise LinkBroken("the scheduler told too few sums")
        arrival.asked = line
        runs = list(blocks.runs(parcel.blocks, BLOCK_BYTES))
        ranges = [
            wire.ByteRange(begin=blocks.place(run[0])[0], end=blocks.place(run[-1])[1])
            for run in runs
        ]
        ask = wire.ReadAsked(digest=digest, file=parcel.file, ranges=ranges)
        call = (await line.stub()).Read(ask, timeout=PARCEL_S)
        try:
            for run in runs:
                async with asyncio.timeout(self._limits.call_s):
                    message = await call.read()
                if not isinstance(message, wire.BytesRead):
                    raise LinkBroken("it ended before all was sent")
                begin = (run.start - parcel.blocks.start) * SUM_BYTES
                good = await self._on_disk(
                    partial(self._take, parcel.file, run, message.data, told.sums[begin:])
                )
                arrival.good += good
                if good:
                    here = blocks.place(run[good - 1])[1] - blocks.place(run[0])[0]
                    self._done += here
                    self._progress(self._done, self._total)
                if good < len(run):
                    return
        finally:
            call.cancel()

    def _take(self, file: str, run: range, data: bytes, sums: bytes) -> int:
        """Writes blocks up to the first that is wrong; how many. On any thread."""
        blocks = self._parts.blocks[file]
        view = memoryview(data)
        for number, block in enumerate(run):
            begin, end = blocks.place(block)
            part, view = view[: end - begin], view[end - begin :]
            wanted = sums[number * SUM_BYTES : (number + 1) * SUM_BYTES]
            if len(part) != end - begin or hashlib.sha256(part).digest() != wanted:
                return number
            self._parts.write(file, block, part)
        return len(run)

    def _reason(self) -> str:
        banned = self._plan.banned
        return f"{self._why}; {len(banned)} gave out wrong bytes" if banned else self._why


@dataclass(slots=True)
class Arrival:
    """A parcel as it comes in: how many of its blocks are here, and who was asked last."""

    parcel: Parcel
    asked: Line
    good: int = 0


def _cut(run: range) -> list[range]:
    return [run[at : at + PARCEL_BLOCKS] for at in range(0, len(run), PARCEL_BLOCKS)]


def _everything(_file: str, _block: int) -> bool:
    return True


def _has(told: wire.HoldsTold, parts: Parts) -> Has:
    """What a source says that it holds."""
    if told.whole:
        return _everything
    held = {
        entry.file: Marks(len(parts.blocks[entry.file]), entry.blocks)
        for entry in told.files
        if entry.file in parts.blocks
    }
    return lambda file, block: file in held and block in held[file]


def _awaited(error: Exception) -> bool:
    """Whether the scheduler fetches the file itself just now."""
    aborted = grpc.StatusCode.ABORTED
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is aborted


def _missing(model: str, why: str) -> WeightsMissing:
    return WeightsMissing(
        f"Weights of {model} that this node needs cannot be had",
        f"They are not on its disk, and the cluster does not give them out: {why}",
        "See that the scheduler still has the model's folder, or give this node the files",
        model=model,
    )
