"""Whether a node can hold one more stage beside what it holds. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from parallax.proto import wire_pb2 as wire
from parallax.scheduler.model_facts import ModelFacts
from parallax.scheduler.stage_costs import RESERVE_TOKENS

GROWTH = 2  # caches in use may grow by this while the new stage is read


def has_room(
    model: ModelFacts,
    stage: wire.StageRange,
    held: Iterable[wire.StageReady],
    *,
    budget_bytes: int,
    cache_bytes: int,
) -> bool:
    """Whether ``stage`` fits into a budget beside what is held; common layers are held once.

    Args:
        model: the facts of the stage's model.
        held: stages on the node, with their bytes where they are of another model.
        cache_bytes: of the caches on the node at present.
    """
    layers = set(range(stage.first, stage.end))
    opens, closes = stage.first == 0, stage.end == model.layers
    others = 0
    for ready in held:
        here = ready.stage
        if here.model.digest != stage.model.digest:
            others += ready.weight_bytes
            continue
        layers.update(range(here.first, here.end))
        opens, closes = opens or here.first == 0, closes or here.end == model.layers
    weights = sum(model.layer_bytes[layer] for layer in layers)
    weights += model.first_bytes * opens + model.last_bytes * closes
    weights -= model.tied_bytes * (opens and closes)
    tokens = min(RESERVE_TOKENS, model.context_tokens)
    reserve = tokens * model.kv_bytes_per_token_per_layer * (stage.end - stage.first)
    return weights + others + GROWTH * cache_bytes + reserve <= budget_bytes
