"""How good plans are, and how long they take: simulated clusters of Macs, fixed seeds.

python -m benchmarks.planning            prints the tables
python -m benchmarks.planning --write    puts them into docs/planning.md
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from parallax.fabric.errors import ModelTooBig
from parallax.scheduler.membership import NodeFacts
from parallax.scheduler.model_facts import ModelFacts
from parallax.scheduler.plan_models import Demand, make_plans
from parallax.scheduler.planner import StagePlan, make_plan, rate
from parallax.scheduler.stage_costs import RESERVE_TOKENS, LinkFacts

DOCUMENT = Path(__file__).parent.parent / "docs" / "planning.md"
BEGIN, END = "<!-- benchmarks/planning.py: begin -->", "<!-- benchmarks/planning.py: end -->"

GB = 10**9
CLUSTERS = 240
SHARE_OF_MEMORY = 0.75
REACHED = 0.8  # of the bandwidth that makers name
WIRES = (
    LinkFacts(0.0002, 2.5e9),  # Thunderbolt
    LinkFacts(0.0004, 110e6),  # Ethernet
    LinkFacts(0.003, 40e6),  # Wi-Fi
)

# Chip, GB/s of memory, TFLOP/s of the GPU, sizes of memory in GB.
MACS = (
    ("M1", 68, 2.6, (8, 16)),
    ("M1 Pro", 200, 5.2, (16, 32)),
    ("M1 Max", 400, 10.4, (32, 64)),
    ("M1 Ultra", 800, 21.0, (64, 128)),
    ("M2", 100, 3.6, (8, 16, 24)),
    ("M2 Pro", 200, 6.8, (16, 32)),
    ("M2 Max", 400, 13.6, (32, 64, 96)),
    ("M2 Ultra", 800, 27.0, (64, 128, 192)),
    ("M3", 100, 4.1, (8, 16, 24)),
    ("M3 Pro", 150, 7.4, (18, 36)),
    ("M3 Max", 400, 16.0, (36, 48, 64, 128)),
    ("M3 Ultra", 819, 28.0, (96, 256, 512)),
    ("M4", 120, 4.6, (16, 24, 32)),
    ("M4 Pro", 273, 9.2, (24, 48, 64)),
    ("M4 Max", 546, 18.4, (36, 64, 128)),
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A model as its card describes it."""

    name: str
    layers: int
    gigabytes: float
    active: float  # share of the weights that one token uses
    hidden: int
    kv_heads: int
    weight_bytes: float


MODELS = (
    Kind("8B, 4 bits", 36, 4.6, 1.0, 4096, 8, 0.56),
    Kind("8B, bf16", 36, 16, 1.0, 4096, 8, 2.0),
    Kind("14B, bf16", 40, 28, 1.0, 5120, 8, 2.0),
    Kind("32B, 4 bits", 64, 18, 1.0, 5120, 8, 0.56),
    Kind("70B, 4 bits", 80, 40, 1.0, 8192, 8, 0.56),
    Kind("70B, bf16", 80, 140, 1.0, 8192, 8, 2.0),
    Kind("30B, 3B active, 8 bits", 48, 32, 0.11, 2048, 4, 1.0),
    Kind("120B, 5B active, 4 bits", 36, 63, 0.045, 2880, 8, 0.56),
    Kind("235B, 22B active, 4 bits", 94, 132, 0.1, 4096, 4, 0.56),
    Kind("671B, 37B active, 4 bits", 61, 380, 0.055, 7168, 1, 0.56),
)


def facts_of(kind: Kind) -> ModelFacts:
    """The planner's view of a model; all have a vocabulary of 150,000."""
    head = int(150_000 * kind.hidden * kind.weight_bytes)
    layer = (int(kind.gigabytes * GB) - 2 * head) // kind.layers
    read = int(layer * kind.active)
    return ModelFacts(
        name=kind.name,
        model_type="",
        layers=kind.layers,
        layer_bytes=(layer,) * kind.layers,
        first_bytes=head,
        last_bytes=head,
        tied_bytes=0,
        context_tokens=32768,
        hidden_size=kind.hidden,
        kv_bytes_per_token_per_layer=2 * 2 * kind.kv_heads * 128,
        layer_read_bytes=(read,) * kind.layers,
        layer_flops=(2.0 * read / kind.weight_bytes,) * kind.layers,
        head_flops=2.0 * head / kind.weight_bytes,
        carry_bytes_per_token=2 * kind.hidden,
    )


def macs(count: int, chance: random.Random) -> list[NodeFacts]:
    """So many random Macs."""
    nodes = []
    for number in range(count):
        chip, bandwidth, flops, sizes = chance.choice(MACS)
        memory = chance.choice(sizes) * GB
        nodes.append(
            NodeFacts(
                node_id=f"n{number:04}",
                name=f"n{number}",
                chip=chip,
                platform="macOS",
                memory_bytes=memory,
                budget_bytes=int(memory * SHARE_OF_MEMORY),
                bandwidth_bytes_s=bandwidth * REACHED * 1e9,
                flops=flops * REACHED * 1e12,
                accelerators=1,
                backend="metal",
            )
        )
    return nodes


# ------------------------------------------------------------------ many models


def thousand(seeds: Sequence[int] = (1, 2, 3, 4, 5)) -> list[str]:
    """1,000 nodes and 10 models, five times."""
    lines = [
        "| seed | weights | rings | nodes used | of the bound | seconds, one core |",
        "|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        chance = random.Random(seed)
        nodes = macs(1000, chance)
        weights = [1.0 if seed == 1 else float(chance.choice((1, 1, 2, 3))) for _ in MODELS]
        demands = [Demand(facts_of(k), w) for k, w in zip(MODELS, weights, strict=True)]
        begin = time.process_time()
        plan = make_plans(demands, nodes)
        seconds = time.process_time() - begin
        rings = [ring for each in plan.plans for ring in each.rings]
        lines.append(
            f"| {seed} | {' '.join(f'{w:.0f}' for w in weights)} | {len(rings)} "
            f"| {sum(len(ring.stages) for ring in rings)} "
            f"| {plan.mean_tokens_s / plan.bound_tokens_s:.1%} | {seconds:.2f} |"
        )
    return lines


# --------------------------------------------------------------- simple splits


def even(layers: int, nodes: Sequence[NodeFacts]) -> list[int]:
    """Layers of each node when all get the same."""
    return _apportion(layers, [1.0] * len(nodes))


def by_memory(layers: int, nodes: Sequence[NodeFacts]) -> list[int]:
    """Layers of each node in proportion to its memory."""
    return _apportion(layers, [float(node.budget_bytes) for node in nodes])


def _apportion(layers: int, weights: Sequence[float]) -> list[int]:
    """Largest remainders, at least one layer each."""
    spare = layers - len(weights)
    exact = [spare * weight / sum(weights) for weight in weights]
    counts = [1 + int(share) for share in exact]
    rest = sorted(range(len(weights)), key=lambda i: int(exact[i]) - exact[i])
    for i in rest[: layers - sum(counts)]:
        counts[i] += 1
    return counts


def _one_ring(
    model: ModelFacts,
    nodes: Sequence[NodeFacts],
    links: dict[tuple[str, str], LinkFacts],
    counts: Sequence[int],
) -> float:
    """Tokens per second of one ring of all nodes in the order given; 0 where it does not fit."""
    stages, first = [], 0
    for node, count in zip(nodes, counts, strict=True):
        end = first + count
        cache = RESERVE_TOKENS * model.kv_bytes_per_token_per_layer * count
        if model.stage_bytes(first, end) + cache > node.budget_bytes:
            return 0.0
        stages.append(StagePlan(node.node_id, first, end))
        first = end
    return rate(model, nodes, links, [stages]).throughput_tokens_s


@dataclass(frozen=True, slots=True)
class Compared:
    """One random cluster: tokens per second by each way to plan."""

    nodes: int
    best: float
    one_ring: float  # all nodes asked for
    even: float
    by_memory: float


def compare(seed: int) -> Compared | None:
    """A random cluster and model; None where the nodes cannot hold the model in any way."""
    chance = random.Random(seed)
    count = chance.randint(2, 12)
    nodes = macs(count, chance)
    model = facts_of(chance.choice(MODELS))
    links = {(a.node_id, b.node_id): chance.choice(WIRES) for a in nodes for b in nodes if a != b}
    try:
        best = make_plan(model, nodes, links)
        ring = make_plan(model, nodes, links, min_nodes=count)
    except ModelTooBig:
        return None
    return Compared(
        count,
        best.throughput_tokens_s,
        ring.throughput_tokens_s if len(ring.rings[0].stages) == count else 0.0,
        _one_ring(model, nodes, links, even(model.layers, nodes)),
        _one_ring(model, nodes, links, by_memory(model.layers, nodes)),
    )


def comparison() -> list[str]:
    """The first so many random clusters that can hold their model."""
    found: list[Compared] = []
    seed = 0
    while len(found) < CLUSTERS:
        compared = compare(seed)
        seed += 1
        if compared is not None:
            found.append(compared)
    lines = [
        f"{len(found)} clusters of 2 to 12 Macs (seeds 0 to {seed - 1}, without those that "
        "cannot hold their model).",
        "",
        "| split | clusters where it fits | the planner is faster by (median) "
        "| lower and upper quarter | never slower |",
        "|---|---|---|---|---|",
    ]
    ways: list[tuple[str, list[tuple[float, float]]]] = [
        ("even, one ring of all nodes", [(c.best, c.even) for c in found]),
        ("by memory, one ring of all nodes", [(c.best, c.by_memory) for c in found]),
        ("even, against our ring of all nodes", [(c.one_ring, c.even) for c in found]),
        ("by memory, against our ring of all nodes", [(c.one_ring, c.by_memory) for c in found]),
    ]
    for name, pairs in ways:
        gains = [ours / theirs for ours, theirs in pairs if theirs > 0]
        low, _, high = quantiles(gains, n=4)
        never = "yes" if min(gains) >= 1 - 1e-9 else f"no ({min(gains):.2f})"
        lines.append(
            f"| {name} | {len(gains)} of {len(pairs)} | {median(gains):.2f}x "
            f"| {low:.2f}x to {high:.2f}x | {never} |"
        )
    return lines


def main() -> None:
    """Prints the tables, or writes them into the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/planning.md")
    tables = ["### 1,000 nodes, 10 models", "", *thousand(), ""]
    write = parser.parse_args().write
    tables += ["### Against simple splits", "", *comparison()]
    text = "\n".join(tables)
    if not write:
        print(text)
        return
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
