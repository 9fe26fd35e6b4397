"""Where a stage's files are: on this disk, with other members, or on the hub, in this order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from parallax.fabric.blocks import FileBlocks, Marks, blocks_of
from parallax.fabric.errors import ModelBroken, ModelError, ModelNotFound, ParallaxError
from parallax.fabric.limits import Limits
from parallax.fabric.models import ModelFolder, is_hub_id, open_folder, resolve
from parallax.fabric.safetensors import folder_headers
from parallax.fabric.tasks import in_thread
from parallax.fabric.weights_service import Holding
from parallax.node.fetch import Fetch, Line, Place, Progress, describe
from parallax.node.parts import Parts, Shelved
from parallax.proto import wire_pb2 as wire

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Whole:
    """A model of which every file is here."""

    path: Path
    blocks: Mapping[str, FileBlocks]
    marks: Mapping[str, Marks] | None = None

    def file(self, name: str) -> Path:
        """Where one of its weight files is."""
        return self.path / name


class Library:
    """The models whose files this node has, whole or in parts; other members may read them.

    Args:
        state_dir: its ``models`` are looked through, and its ``fetched`` holds what comes.
        scheduler: the way to the scheduler that gives the orders, if there is one.
        cache_bytes: the most that fetched models may take on the disk; None: no limit.
    """

    def __init__(
        self,
        state_dir: Path,
        limits: Limits,
        scheduler: Callable[[], Line | None] = lambda: None,
        cache_bytes: int | None = None,
    ) -> None:
        self._state_dir = state_dir
        self._limits = limits
        self._scheduler = scheduler
        self._shelved = Shelved(state_dir / "fetched", cache_bytes)
        self._held: dict[str, Whole | Parts] = {}
        self._turn = asyncio.Lock()  # to begin a model's folder

    def holding(self, digest: str) -> Holding | None:
        """What other members may read of a model: nothing of one that no stage here needed."""
        return self._held.get(digest)

    async def find(self, model: wire.ModelSource) -> ModelFolder:
        """A folder with the model's configuration and headers; its weights may be fetched later.

        Raises:
            ModelNotFound, ModelBroken: it is not here, and nowhere else.
            WeightsMissing: the scheduler does not give it out.
            DiskFull: no room for it.
            ClusterError: the scheduler cannot be reached.
        """
        missing: ModelError
        try:
            folder = await in_thread(lambda: self._local(model))
            headers = await in_thread(lambda: blocks_of(folder_headers(folder.path)))
        except ModelError as error:
            missing = error
        else:
            self._held[model.digest] = Whole(folder.path, headers)
            return folder
        try:
            # One after the other: two that begin the same folder would spoil it for each other, or
            # the later one would put an empty one under what the earlier one fetches.
            async with self._turn:
                parts = await self._parts(model)
                if parts is None:
                    raise missing
                self._held[model.digest] = parts
        except ParallaxError as error:
            if not is_hub_id(model.location):
                raise
            log.warning("%s is fetched from the hub: %s", model.name, error.sentence)
            folder = await in_thread(lambda: resolve(model.location, state_dir=self._state_dir))
            _check_same(folder, model)
            headers = await in_thread(lambda: blocks_of(folder_headers(folder.path)))
            self._held[model.digest] = Whole(folder.path, headers)
            return folder
        return parts.folder

    async def fetch(
        self,
        digest: str,
        tensors: Iterable[str],
        sources: Iterable[wire.StagePlace],
        keep: Iterable[str],
        progress: Progress,
    ) -> None:
        """Sees that these tensors of a model that was found are on this disk.

        Args:
            digest: the model's.
            tensors: their names.
            sources: nodes that may have some of them; the scheduler has all.
            keep: digests of models that may not make room for this one.
            progress: told (bytes here, bytes needed) as they come.

        Raises:
            WeightsMissing: nobody gives them out.
            DiskFull, ModelBroken: the disk cannot take them.
        """
        parts = self._held.get(digest)
        if not isinstance(parts, Parts):
            return
        scheduler = self._scheduler()
        if scheduler is None:
            raise ModelNotFound("No scheduler gives out this model's weights now")
        scheduler = scheduler.to(scheduler.place)
        peers = [scheduler.to(Place(source.node_id, tuple(source.endpoints))) for source in sources]
        fetch = Fetch(parts, tensors, scheduler, peers, self._limits, progress)
        if not fetch.missing_bytes:
            return
        kept = {digest, *keep}
        self._held = {d: held for d, held in self._held.items() if d in kept}
        await asyncio.to_thread(self._shelved.make_room, fetch.missing_bytes, kept)
        await fetch.run()

    def _local(self, model: wire.ModelSource) -> ModelFolder:
        """The model as this machine has it."""
        try:
            folder = resolve(model.location, state_dir=self._state_dir, download=False)
            if folder.location != model.location:  # it is a link here
                folder = open_folder(folder.path, name=model.name, location=model.location)
            _check_same(folder, model)
        except ModelError:
            kept = self._state_dir / "models" / Path(model.location).name
            if not kept.is_dir():
                raise
            folder = open_folder(kept, name=model.name, location=model.location)
            _check_same(folder, model)
        return folder

    async def _parts(self, model: wire.ModelSource) -> Parts | None:
        """What was fetched of it before, or the beginning of it; None without a scheduler."""
        held = self._held.get(model.digest)
        if isinstance(held, Parts):
            return held
        parts = await in_thread(
            lambda: self._shelved.open(model.digest, name=model.name, location=model.location)
        )
        scheduler = self._scheduler()
        if parts is not None or scheduler is None:
            return parts
        line = scheduler.to(scheduler.place)
        try:
            return await describe(line, self._shelved, model, self._limits)
        finally:
            await line.close()


def _check_same(folder: ModelFolder, model: wire.ModelSource) -> None:
    if folder.digest != model.digest:
        raise ModelBroken(
            f"{model.location} on this node is not the scheduler's model",
            "their configurations or weight headers differ",
            "Give both machines the same files",
            path=folder.path,
        )
