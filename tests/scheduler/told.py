"""Nodes that are only told of: hellos and reports in, orders out, and no process behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallax.fabric.errors import to_fault
from parallax.fabric.events import Event
from parallax.fabric.settings import SchedulerSettings
from parallax.fabric.version import PROTOCOL, mlx_lm_version, mlx_version
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.cluster import ClusterService
from parallax.scheduler.control import NodeLink
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.store import Store
from tests.trust import member


@dataclass
class Node:
    """One stream of one node."""

    cluster: ClusterService
    id: str
    incarnation: int = 1
    link: NodeLink = field(default_factory=NodeLink)
    seen: list[wire.NodeOrder] = field(default_factory=list)
    budget_bytes: int = 1 << 30

    def attend(self, *held: wire.StageReady) -> Node:
        self.hello()
        for ready in held:
            self.report(ready=ready)
        self.report(heartbeat=wire.Heartbeat())
        return self

    def hello(self) -> None:
        facts = wire.NodeFacts(
            node_id=self.id,
            name=self.id,
            memory_bytes=1 << 30,
            budget_bytes=self.budget_bytes,
            bandwidth_bytes_s=1e10,
            flops=1e10,
            backend="cpu",
        )
        hello = wire.Hello(
            protocol=PROTOCOL,
            mlx_version=mlx_version(),
            mlx_lm_version=mlx_lm_version(),
            facts=facts,
            incarnation=self.incarnation,
        )
        self.cluster.node_hello(hello, self.link)

    def report(self, **report: Any) -> None:
        self.cluster.node_report(self.id, self.link, wire.NodeReport(**report))

    def orders(self, kind: str) -> list[Any]:
        """Every order of this kind so far."""
        outbox = self.link._outbox
        while not outbox.empty():
            order = outbox.get_nowait()
            if order is not None:
                self.seen.append(order)
        return [getattr(o, kind) for o in self.seen if o.WhichOneof("order") == kind]

    def load_all(self) -> None:
        for load in self.orders("load"):
            self.report(ready=wire.StageReady(stage=load.stage, weight_bytes=1000, batches=True))

    async def join(self, count: int = 1) -> int:
        """Takes its seat in the ring that is formed for the ``count``-th time."""
        await until(lambda: len(self.orders("form")) >= count)
        epoch: int = self.orders("form")[count - 1].epoch
        self.report(joined=wire.RingJoined(epoch=epoch))
        return epoch

    def fail(self, error: Exception, which: int = -1) -> None:
        stage = self.orders("load")[which].stage
        self.report(failed=wire.StageFailed(stage=stage, fault=to_fault(error)))  # type: ignore[arg-type]


def share(cluster: ClusterService, name: str, incarnation: int = 1, *, part: float = 0.75) -> Node:
    """A node that attends and holds only this part of the chosen model."""
    assert cluster.chosen is not None
    facts = cluster.chosen.facts
    whole = facts.weight_bytes + 4 * 4096 * facts.kv_bytes_per_token_per_layer
    return Node(cluster, name, incarnation, budget_bytes=int(whole * part)).attend()


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@asynccontextmanager
async def running(tmp_path: Path, **limits: float) -> AsyncIterator[ClusterService]:
    settings = SchedulerSettings(state_dir=tmp_path, limits={"drain_s": 0.1, **limits})
    events: list[Event] = []
    async with await Store.open(tmp_path) as store:
        cluster = ClusterService(settings, member("boss"), store, Metrics(), events.append)
        await cluster.gate.start()
        await cluster.start()
        try:
            yield cluster
        finally:
            await cluster.stop()


async def serving(cluster: ClusterService) -> tuple[Node, Node, int]:
    a, b = Node(cluster, "a").attend(), Node(cluster, "b").attend()
    a.load_all()
    b.load_all()
    await a.join()
    epoch = await b.join()
    assert cluster.status()["status"] == "available"
    return a, b, epoch
