"""Desired rings against actual stages: pure, events in, instructions out.

A ring goes through *loading* (its nodes read their layers), *forming* (it has an
epoch and its neighbours open their streams) and *ready*. An epoch that breaks
sends its ring back to forming, under a new epoch, as long as its nodes live.
Weights that no ring wants are let go last, when every desired ring is ready, or
when their node loads something else; what the new stage shares with them stays.

A *move* puts rings in the place of others. The new are made while the old serve,
and the old go when all of the new are ready. What a node cannot hold beside the
old waits until everything else is loaded; then the old go first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from parallax.proto import wire_pb2 as wire

MOST_HELD = 1024  # stages that a node may say it has

StageKey = tuple[str, int, int]  # model digest, first layer, end layer

MOST_SOURCES = 8  # of a stage's files, beside the scheduler


class RingState(Enum):
    """How far a ring has come."""

    LOADING = "loading"
    WANTS_EPOCH = "wants epoch"
    FORMING = "forming"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Place:
    """One stage of a ring: layers ``[first, end)`` on a node."""

    node_id: str
    first: int
    end: int


@dataclass(slots=True, eq=False)
class Ring:
    """A ring that is wanted, and how far it has come."""

    model: wire.ModelSource
    places: tuple[Place, ...]
    tokens_s: float = 1.0  # what the plan expects of it
    context_tokens: int = 0  # what its memory allows; 0 until it forms
    chunk_tokens: int = 0  # of its prefill; 0 until it forms
    state: RingState = RingState.LOADING
    epoch: int = 0
    joined: set[str] = field(default_factory=set)

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(place.node_id for place in self.places)

    def seats(self, node_id: str, stage: int) -> bool:
        """Whether a node has this stage."""
        return stage < len(self.places) and self.places[stage].node_id == node_id


@dataclass(frozen=True, slots=True)
class Order:
    """Send this to that node."""

    node_id: str
    order: wire.NodeOrder


@dataclass(frozen=True, slots=True)
class NeedEpoch:
    """Write a new epoch down, then call :meth:`Reconciler.epoch_issued`."""

    ring: Ring


@dataclass(frozen=True, slots=True)
class RingUp:
    """Every stage has joined: the ring serves."""

    ring: Ring


@dataclass(frozen=True, slots=True)
class RingDown:
    """The epoch is over; its requests must go elsewhere."""

    ring: Ring
    epoch: int
    moved: bool = False  # nothing broke: another ring takes its place


Instruction = Order | NeedEpoch | RingUp | RingDown


@dataclass(slots=True)
class _Holding:
    """What one node is known to hold."""

    budget_bytes: int
    ready: dict[StageKey, wire.StageReady] = field(default_factory=dict)
    loading: dict[StageKey, wire.StageRange] = field(default_factory=dict)
    progress: dict[StageKey, wire.LoadProgress] = field(default_factory=dict)
    dropped: set[StageKey] = field(default_factory=set)  # let go while they were being loaded


@dataclass(slots=True)
class _Move:
    """Rings that take the place of others; ``old`` is empty once those are gone."""

    old: list[Ring]
    new: list[Ring]


class Reconciler:
    """Brings the cluster to the rings that are wanted.

    Args:
        form: builds the order that forms a ring, given the ring and its stages' reports.
        has_room: whether a node can hold a stage beside everything that it holds now.
    """

    def __init__(
        self,
        form: Callable[[Ring, list[wire.StageReady]], list[wire.FormRing]],
        has_room: Callable[[Ring, Place], bool] = lambda _ring, _place: True,
    ) -> None:
        self._form = form
        self._has_room = has_room
        self._nodes: dict[str, _Holding] = {}
        self._move: _Move | None = None
        self.rings: list[Ring] = []

    # ------------------------------------------------------------------ events

    def node_up(self, node_id: str, budget_bytes: int) -> list[Instruction]:
        """A node attends; what it holds it reports itself."""
        self._nodes[node_id] = _Holding(budget_bytes)
        return []

    def node_down(self, node_id: str) -> list[Instruction]:
        """A node is gone: rings it was part of are wanted no more."""
        self._nodes.pop(node_id, None)
        out: list[Instruction] = []
        for ring in [r for r in self.rings if node_id in r.nodes]:
            out += self._lose(ring)
        return [*out, *self._go_on()]

    def want(self, ring: Ring) -> list[Instruction]:
        """One more ring is wanted."""
        self.rings.append(ring)
        return self._advance()

    def move(self, old: Sequence[Ring], new: Sequence[Ring]) -> list[Instruction]:
        """These new rings are to take the place of those old ones, one move at a time."""
        self._move = _Move(list(old), list(new))
        self.rings += new
        return self._advance()

    def want_none(self) -> list[Instruction]:
        """No ring is wanted any more (another model was chosen)."""
        self._move = None
        out: list[Instruction] = []
        for ring in list(self.rings):
            out += self._retire(ring)
        return out

    def retire(self, ring: Ring) -> list[Instruction]:
        """This ring is wanted no more."""
        return [*self._lose(ring), *self._advance()]

    def release(self, node_id: str) -> list[Instruction]:
        """This node lets go of everything that no ring wants, without waiting for others."""
        return self._let_go({node_id}) if node_id in self._nodes else []

    def settle(self) -> list[Instruction]:
        """After a while without events: what no ring wants goes, if all of them serve."""
        return self._advance()

    def stage_ready(self, node_id: str, ready: wire.StageReady) -> list[Instruction]:
        """A node holds a stage."""
        holding = self._nodes.get(node_id)
        if holding is None:
            return []
        key = key_of(ready.stage)
        if key not in holding.ready and len(holding.ready) >= MOST_HELD:
            return []
        if key in holding.dropped:  # said before it read the order that takes the stage away
            holding.dropped.discard(key)
            return []
        holding.loading.pop(key, None)
        holding.progress.pop(key, None)
        holding.ready[key] = ready
        return self._advance()

    def stage_progress(self, node_id: str, progress: wire.LoadProgress) -> None:
        """How far a node has read a stage."""
        holding = self._nodes.get(node_id)
        if holding is not None and key_of(progress.stage) in holding.loading:
            holding.progress[key_of(progress.stage)] = progress

    def stage_failed(self, node_id: str, stage: wire.StageRange) -> list[Instruction]:
        """A node could not load a stage: the rings with it are wanted no more."""
        holding = self._nodes.get(node_id)
        if holding is not None:
            holding.loading.pop(key_of(stage), None)
            holding.progress.pop(key_of(stage), None)
        out: list[Instruction] = []
        place = Place(node_id, stage.first, stage.end)
        for ring in list(self.rings):
            wanted = ring.model.digest == stage.model.digest and place in ring.places
            if wanted and ring in self.rings:  # not given up with another one
                out += self._lose(ring)
        return [*out, *self._go_on()]

    def epoch_issued(self, ring: Ring, epoch: int) -> list[Instruction]:
        """The new epoch is written down: its nodes may form the ring."""
        if ring not in self.rings or ring.state is not RingState.WANTS_EPOCH:
            return []
        ring.epoch = epoch
        ring.state = RingState.FORMING
        ring.joined.clear()
        reports = [self._nodes[p.node_id].ready[_key(ring, p)] for p in ring.places]
        forms = self._form(ring, reports)
        return [
            Order(place.node_id, wire.NodeOrder(form=form))
            for place, form in zip(ring.places, forms, strict=True)
        ]

    def joined(self, node_id: str, epoch: int) -> list[Instruction]:
        """A node's place in a ring is taken."""
        ring = self.by_epoch(epoch)
        if ring is None or ring.state is not RingState.FORMING or node_id not in ring.nodes:
            return []
        ring.joined.add(node_id)
        if ring.joined != set(ring.nodes):
            return []
        ring.state = RingState.READY
        return [RingUp(ring), *self._advance()]

    def broken(self, epoch: int) -> list[Instruction]:
        """An epoch is over: its ring forms anew under the next one."""
        ring = self.by_epoch(epoch)
        if ring is None:
            return []
        out = self._end_epoch(ring)
        ring.state = RingState.LOADING
        return [*out, *self._advance()]

    # ------------------------------------------------------------------- state

    @property
    def moving(self) -> bool:
        """Whether rings are being put in the place of others."""
        return self._move is not None

    def has_old(self, ring: Ring) -> bool:
        """Whether a ring is to take the place of others that are still there."""
        return self._move is not None and ring in self._move.new and bool(self._move.old)

    def held(self, node_id: str) -> list[wire.StageReady]:
        """The stages that a node holds or loads; of the latter, only the range is known."""
        holding = self._nodes.get(node_id)
        if holding is None:
            return []
        loading = [wire.StageReady(stage=stage) for stage in holding.loading.values()]
        return [*holding.ready.values(), *loading]

    def by_epoch(self, epoch: int) -> Ring | None:
        """The ring of a living epoch."""
        for ring in self.rings:
            if ring.epoch == epoch and ring.state in (RingState.FORMING, RingState.READY):
                return ring
        return None

    def part_of(self, node_id: str, epoch: int) -> Ring | None:
        """The ring of a living epoch, for those that sit in it: others have no say."""
        ring = self.by_epoch(epoch)
        return ring if ring is not None and node_id in ring.nodes else None

    def busy_nodes(self) -> set[str]:
        """Nodes that are part of a wanted ring."""
        return {node for ring in self.rings for node in ring.nodes}

    def place_of(self, node_id: str) -> Place | None:
        """The layers a node has in a wanted ring."""
        for ring in self.rings:
            for place in ring.places:
                if place.node_id == node_id:
                    return place
        return None

    def progress_of(self, node_id: str) -> wire.LoadProgress | None:
        """What a node is loading now, if anything."""
        holding = self._nodes.get(node_id)
        if holding is None or not holding.loading:
            return None
        key, stage = next(iter(holding.loading.items()))
        return holding.progress.get(key) or wire.LoadProgress(stage=stage, phase="waiting")

    def wants(self, node_id: str, stage: wire.StageRange) -> bool:
        """Whether a wanted ring has this stage on this node."""
        place = Place(node_id, stage.first, stage.end)
        return any(r.model.digest == stage.model.digest and place in r.places for r in self.rings)

    def report_of(self, ring: Ring, place: Place) -> wire.StageReady | None:
        """What a node said of a stage it holds."""
        holding = self._nodes.get(place.node_id)
        return holding.ready.get(_key(ring, place)) if holding else None

    # ---------------------------------------------------------------- decisions

    def _advance(self) -> list[Instruction]:
        out: list[Instruction] = []
        for ring in list(self.rings):
            if ring.state is RingState.LOADING:
                out += self._load(ring)
        out += self._go_on_moving()
        if self.rings and not self.moving and all(r.state is RingState.READY for r in self.rings):
            out += self._let_go(set(self._nodes))
        return out

    def _go_on(self) -> list[Instruction]:
        """After a loss: a new plan comes first, and it may want what is held; a move goes on."""
        return self._advance() if self.moving else []

    def _go_on_moving(self) -> list[Instruction]:
        move = self._move
        if move is None:
            return []
        out: list[Instruction] = []
        done = all(ring.state is RingState.READY for ring in move.new)
        stuck = not done and not any(map(self._under_way, move.new))
        if not done and not (stuck and move.old):
            return []
        for ring in list(move.old):
            out += self._retire(ring, moved=True)
        if done:
            self._move = None
        else:  # now there is room
            for ring in move.new:
                if ring.state is RingState.LOADING:
                    out += self._load(ring)
        return out

    def _under_way(self, ring: Ring) -> bool:
        """Whether a ring will come further without the old ones' going."""
        if ring.state in (RingState.WANTS_EPOCH, RingState.FORMING):
            return True
        return any(_key(ring, p) in self._nodes[p.node_id].loading for p in ring.places)

    def _load(self, ring: Ring) -> list[Instruction]:
        out: list[Instruction] = []
        complete = True
        move = self._move
        patient = move is not None and bool(move.old) and ring in move.new
        for place in ring.places:
            holding = self._nodes.get(place.node_id)
            if holding is None:
                return []
            key = _key(ring, place)
            if key in holding.ready:
                continue
            complete = False
            if key in holding.loading or (patient and not self._has_room(ring, place)):
                continue
            out += self._order_load(ring, place, holding)
        if complete:
            ring.state = RingState.WANTS_EPOCH
            out.append(NeedEpoch(ring))
        return out

    def _order_load(self, ring: Ring, place: Place, holding: _Holding) -> list[Instruction]:
        """What no ring wants makes room first: the planner counts on the whole budget."""
        stage = wire.StageRange(model=ring.model, first=place.first, end=place.end)
        load = wire.LoadStage(stage=stage)
        wanted = {_key(r, p) for r in self.rings for p in r.places if p.node_id == place.node_id}
        for key in [k for k in holding.ready if k not in wanted and k[0] == ring.model.digest]:
            load.instead_of.append(holding.ready.pop(key).stage)
        out = self._let_go({place.node_id})
        holding.dropped.discard(_key(ring, place))
        load.sources.extend(self._sources(stage, place.node_id))
        holding.loading[_key(ring, place)] = stage
        return [*out, Order(place.node_id, wire.NodeOrder(load=load))]

    def _sources(self, stage: wire.StageRange, node_id: str) -> list[wire.StagePlace]:
        """Other nodes that hold or load layers of the model, those with most of these first."""
        found: list[tuple[int, str, wire.StageRange]] = []
        for other, holding in self._nodes.items():
            ranges = [*(ready.stage for ready in holding.ready.values()), *holding.loading.values()]
            for held in ranges if other != node_id else ():
                if held.model.digest == stage.model.digest:
                    common = min(held.end, stage.end) - max(held.first, stage.first)
                    found.append((-common, other, held))
        first: dict[str, wire.StageRange] = {}
        for _, other, held in sorted(found, key=lambda entry: entry[:2]):
            first.setdefault(other, held)
        return [
            wire.StagePlace(node_id=other, first=held.first, end=held.end)
            for other, held in list(first.items())[:MOST_SOURCES]
        ]

    def _let_go(self, nodes: set[str]) -> list[Instruction]:
        wanted = {(p.node_id, _key(r, p)) for r in self.rings for p in r.places}
        out: list[Instruction] = []
        for node_id in sorted(nodes):
            holding = self._nodes[node_id]
            for held in (holding.ready, holding.loading):
                for key in [k for k in held if (node_id, k) not in wanted]:
                    if held is holding.loading:
                        holding.dropped.add(key)
                    entry = held.pop(key)
                    stage = entry.stage if isinstance(entry, wire.StageReady) else entry
                    unload = wire.NodeOrder(unload=wire.UnloadStage(stage=stage))
                    out.append(Order(node_id, unload))
        return out

    def _lose(self, ring: Ring) -> list[Instruction]:
        """A ring cannot be: a move to it is given up, while there are old rings to stay with."""
        move = self._move
        lost_new = move is not None and ring in move.new
        out = self._retire(ring)
        if move is not None and lost_new:
            if move.old:
                for other in list(move.new):
                    out += self._retire(other, moved=True)
            if move.old or not move.new:
                self._move = None
        return out

    def _retire(self, ring: Ring, *, moved: bool = False) -> list[Instruction]:
        if ring not in self.rings:
            return []
        out = self._end_epoch(ring, moved=moved)
        self.rings.remove(ring)
        if self._move is not None:
            for rings in (self._move.old, self._move.new):
                if ring in rings:
                    rings.remove(ring)
        return out

    def _end_epoch(self, ring: Ring, *, moved: bool = False) -> list[Instruction]:
        if ring.state not in (RingState.FORMING, RingState.READY):
            return []
        out: list[Instruction] = [
            Order(node, wire.NodeOrder(leave=wire.LeaveRing(epoch=ring.epoch)))
            for node in ring.nodes
            if node in self._nodes
        ]
        if ring.state is RingState.READY:
            out.append(RingDown(ring, ring.epoch, moved))
        ring.state = RingState.LOADING
        return out


def key_of(stage: wire.StageRange) -> StageKey:
    """What makes two stages the same."""
    return stage.model.digest, stage.first, stage.end


def _key(ring: Ring, place: Place) -> StageKey:
    return ring.model.digest, place.first, place.end
