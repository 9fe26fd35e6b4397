"""The model that the cluster is to serve: where it is, what it costs, how it may be cut."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from parallax.fabric.models import ModelFolder
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.generation import ServedModel
from parallax.scheduler.model_facts import ModelFacts


@dataclass(slots=True)
class Chosen:
    """One choice of a model, from its acceptance to the next choice."""

    folder: ModelFolder
    facts: ModelFacts
    nodes: int  # as many should share one copy of it at first
    created: int = field(default_factory=lambda: int(time.time()))
    cuts: frozenset[int] | None = None  # where its layers may be parted; None: anywhere
    failed: dict[str, str] = field(default_factory=dict)  # nodes that cannot load it, and why
    began: bool = False  # whether a ring has been planned at all
    context_tokens: int = 0  # what the rings' memory allows; 0: the model's own

    @property
    def source(self) -> wire.ModelSource:
        """How nodes are told which model it is."""
        return wire.ModelSource(
            name=self.folder.name, location=self.folder.location, digest=self.folder.digest
        )

    def is_same(self, folder: ModelFolder) -> bool:
        """Whether this is the choice of that model."""
        ours = self.folder.name, self.folder.location, self.folder.digest
        return ours == (folder.name, folder.location, folder.digest)

    @property
    def served(self) -> ServedModel:
        """How the text side sees it."""
        return ServedModel(
            name=self.folder.name,
            folder=self.folder.path,
            context_tokens=self.context_tokens or self.facts.context_tokens,
            created=self.created,
        )
