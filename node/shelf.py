"""The stages whose weights this node holds.

Stages of one model share what they have in common: changing a range reads the difference, and two
stages that overlap take the memory of their union.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import mlx.core as mx

from parallax.fabric.errors import ParallaxError, to_fault
from parallax.fabric.limits import DEFAULT_LIMITS
from parallax.node.compute import Compute
from parallax.node.library import Library
from parallax.node.mlx_lm_seam import Weights, read_config
from parallax.node.shortcomings import error_of
from parallax.node.stage import Stage
from parallax.node.twin import check_cut
from parallax.node.weights import Steps, load_steps
from parallax.proto import wire_pb2 as wire

log = logging.getLogger(__name__)

Key = tuple[str, int, int]  # model digest, first layer, end layer
Tell = Callable[[wire.NodeReport], None]
Fetched = Callable[[int, int], None]  # bytes here, bytes needed

PROGRESS_S = 0.1  # at most this often


def key_of(stage: wire.StageRange) -> Key:
    """What makes two stages the same."""
    return stage.model.digest, stage.first, stage.end


class Shelf:
    """Loads stages, keeps them, lets them go; tells the scheduler of each change."""

    def __init__(
        self,
        compute: Compute,
        state_dir: Path,
        budget_bytes: int,
        tell: Tell,
        library: Library | None = None,
    ) -> None:
        self._compute = compute
        self._state_dir = state_dir
        self._budget_bytes = budget_bytes
        self._tell = tell
        self._stages: dict[Key, tuple[Stage, wire.StageReady]] = {}
        self._wanted: set[Key] = set()
        self._turn = asyncio.Lock()
        self._library = library or Library(state_dir, DEFAULT_LIMITS)
        self._fetching: dict[Key, asyncio.Task[None]] = {}

    def get(self, stage: wire.StageRange) -> Stage | None:
        """The loaded stage, if it is here."""
        held = self._stages.get(key_of(stage))
        return held[0] if held else None

    def held(self) -> list[wire.NodeReport]:
        """A report of every stage held, for a scheduler that does not know yet."""
        return [wire.NodeReport(ready=ready) for _, ready in self._stages.values()]

    async def load(
        self,
        stage: wire.StageRange,
        instead_of: Iterable[wire.StageRange] = (),
        sources: Iterable[wire.StagePlace] = (),
    ) -> None:
        """Loads a stage and reports it ready, or failed. One at a time.

        The stages ``instead_of`` which it comes, of the same model, are let go first; what of
        their weights the new one needs stays. Files that are not here are fetched from the
        scheduler and from the nodes that are ``sources``.
        """
        key = key_of(stage)
        self._wanted.add(key)
        replaced = [key_of(old) for old in instead_of if old.model.digest == key[0]]
        self._want_no_more(*replaced)
        async with self._turn:
            leaving = [self._stages.pop(old)[0] for old in replaced if old in self._stages]
            if key not in self._wanted or key in self._stages:
                await self._compute.call(lambda: _take_over(leaving, []))
                if key in self._stages:
                    self._tell(wire.NodeReport(ready=self._stages[key][1]))
                return
            staying = [held for (digest, *_), (held, _) in self._stages.items() if digest == key[0]]
            try:
                held = await self._compute.call(lambda: _take_over(leaving, staying))
                loaded = await self._read(stage, held, list(sources))
            except ParallaxError as error:
                self._failed(stage, error)
            except Exception as error:
                log.exception("loading failed")
                self._failed(stage, error_of(error, "Loading failed"))
            else:
                if loaded is not None:
                    self._stages[key] = loaded
                    self._tell(wire.NodeReport(ready=loaded[1]))

    async def prepare(self, stages: Iterable[wire.StageRange]) -> None:
        """Has the self-check of stages that may be wanted soon done before they are.

        What goes wrong is left for their loading to tell. It ends when a stage is wanted here:
        answers would stand still during each check.
        """
        for stage in stages:
            try:
                folder = await self._library.find(stage.model)
                async with self._turn:
                    if self._wanted:
                        return
                    await self._compute.call(partial(self._check, folder.path, stage), loads=True)
            except ParallaxError as error:
                log.debug("layers %d to %d: %s", stage.first, stage.end - 1, error.sentence)
            except Exception:
                log.exception("layers %d to %d cannot be prepared", stage.first, stage.end - 1)

    def _check(self, folder: Path, stage: wire.StageRange) -> None:
        check_cut(read_config(folder), stage.first, stage.end, self._state_dir / "verdicts")

    async def unload(self, stage: wire.StageRange) -> None:
        """Lets a stage go, even while it is read; its memory is free when this returns."""
        key = key_of(stage)
        self._want_no_more(key)
        async with self._turn:
            if key in self._wanted:
                return  # a newer order wants it again
            held = self._stages.pop(key, None)
            if held is not None:
                await self._compute.call(held[0].close)

    def _want_no_more(self, *keys: Key) -> None:
        for key in keys:
            self._wanted.discard(key)
            if key in self._fetching:
                self._fetching[key].cancel()

    async def _read(
        self, stage: wire.StageRange, held: Weights, sources: list[wire.StagePlace]
    ) -> tuple[Stage, wire.StageReady] | None:
        """The stage, or None when it was unloaded meanwhile."""
        begin = time.monotonic()
        self._progress(stage, 0, 0, "fetching")
        folder = await self._library.find(stage.model)
        last_told = 0.0

        def due(done: int, total: int) -> bool:
            nonlocal last_told
            now = time.monotonic()
            if done < total and now - last_told <= PROGRESS_S:
                return False
            last_told = now
            return True

        def progress(done: int, total: int, phase: str) -> None:
            if due(done, total):
                self._compute.tell(self._progress, stage, done, total, phase)

        def fetched(done: int, total: int) -> None:
            if due(done, total):
                self._progress(stage, done, total, "fetching")

        steps = load_steps(
            folder.path,
            stage.first,
            stage.end,
            progress=progress,
            verdicts=self._state_dir / "verdicts",
            held=held,
            budget_bytes=self._budget_bytes,
        )
        key = key_of(stage)
        # Step by step: the frames of a ring that serves meanwhile run in between.
        while not isinstance(
            loaded := await self._compute.call(lambda: _step(steps), loads=True), Stage
        ):
            if loaded:
                await self._fetch(key, loaded, sources, fetched)
            if key not in self._wanted:
                await self._compute.call(steps.close)
                return None
        cost = await self._compute.call(loaded.cache_cost, loads=True)
        ready = wire.StageReady(
            stage=stage,
            weight_bytes=loaded.weight_bytes,
            cache=cost,
            load_s=time.monotonic() - begin,
            batches=loaded.can_batch,
            trims=loaded.can_trim,
            blocks=loaded.takes_blocks,
        )
        return loaded, ready

    async def _fetch(
        self, key: Key, tensors: Iterable[str], sources: list[wire.StagePlace], told: Fetched
    ) -> None:
        """Until they are here, or nobody wants the stage any more; who does again begins again."""
        while key in self._wanted:
            keep = {digest for digest, *_ in self._stages}
            fetch = self._library.fetch(key[0], tensors, sources, keep, told)
            self._fetching[key] = fetching = asyncio.create_task(fetch)
            try:
                await asyncio.wait({fetching})
                if not fetching.cancelled():
                    await fetching
                    return
            finally:
                self._fetching.pop(key).cancel()

    def _progress(self, stage: wire.StageRange, done: int, total: int, phase: str) -> None:
        progress = wire.LoadProgress(stage=stage, done_bytes=done, total_bytes=total, phase=phase)
        self._tell(wire.NodeReport(progress=progress))

    def _failed(self, stage: wire.StageRange, error: ParallaxError) -> None:
        self._wanted.discard(key_of(stage))
        self._compute.post(mx.clear_cache)  # what was read in vain is given back
        failed = wire.StageFailed(stage=stage, fault=to_fault(error))
        self._tell(wire.NodeReport(failed=failed))


def _step(steps: Steps) -> Stage | frozenset[str] | None:
    """One step of loading, on the MLX thread: what it yields, and the stage after the last one."""
    try:
        return next(steps)
    except StopIteration as done:
        stage: Stage = done.value
        return stage


def _take_over(leaving: list[Stage], staying: list[Stage]) -> Weights:
    """The weights of these stages, by name; those that leave are closed. On the MLX thread."""
    held: Weights = {}
    for stage in (*leaving, *staying):
        held |= stage.weights
    for stage in leaving:
        stage.close()
    return held
