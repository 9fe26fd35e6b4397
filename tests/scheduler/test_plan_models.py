"""Several models over the same nodes: against trying everything, and against the bound."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence

import pytest

from parallax.fabric.errors import ModelTooBig
from parallax.scheduler.membership import NodeFacts
from parallax.scheduler.plan_models import Demand, ModelsPlan, make_plans
from parallax.scheduler.planner import make_plan
from parallax.scheduler.stage_costs import LinkFacts
from tests.scheduler.test_planner import GB, Case, check_honest, model, node


def random_demands(chance: random.Random, count: int, budget: float) -> list[Demand]:
    demands = []
    for _ in range(count):
        layers = chance.randint(2, 5)
        size = int(budget * chance.uniform(0.05, 0.6) / layers)
        made = model(
            layers,
            layer_bytes=size,
            first=size // 2,
            last=size // 2,
            flops=chance.choice([0.0, size / 100]),
        )
        demands.append(Demand(made, chance.choice([0.5, 1.0, 3.0])))
    return demands


def divisions(
    nodes: Sequence[NodeFacts], count: int
) -> Iterator[tuple[tuple[NodeFacts, ...], ...]]:
    """Every way to give each node to one of so many models."""
    for choice in itertools.product(range(count), repeat=len(nodes)):
        yield tuple(
            tuple(n for n, given in zip(nodes, choice, strict=True) if given == at)
            for at in range(count)
        )


def best_mean(demands: Sequence[Demand], nodes: Sequence[NodeFacts]) -> float | None:
    """The best weighted mean over all divisions; a part's own plan is exact (test_planner)."""
    total = sum(d.weight for d in demands)
    best: float | None = None
    known: dict[tuple[int, tuple[NodeFacts, ...]], float] = {}
    for parts in divisions(nodes, len(demands)):
        value = 0.0
        for at, (demand, part) in enumerate(zip(demands, parts, strict=True)):
            if (at, part) not in known:
                try:
                    known[at, part] = make_plan(demand.model, part).throughput_tokens_s
                except ModelTooBig:
                    known[at, part] = 0.0
            if not known[at, part]:
                break
            value += demand.weight / total * math.log(known[at, part])
        else:
            best = max(value, best if best is not None else -math.inf)
    return math.exp(best) if best is not None else None


def check(demands: Sequence[Demand], nodes: list[NodeFacts], plan: ModelsPlan) -> None:
    used = [s.node_id for p in plan.plans for ring in p.rings for s in ring.stages]
    assert len(used) == len(set(used))
    for demand, each in zip(demands, plan.plans, strict=True):
        check_honest(Case(demand.model, nodes, {}, None), each)
    assert plan.mean_tokens_s <= plan.bound_tokens_s * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(25))
def test_a_small_cluster_is_divided_as_well_as_by_trying_everything(seed: int) -> None:
    chance = random.Random(seed)
    nodes = [
        node(f"n{i}", chance.uniform(2, 20) * GB, chance.choice([50e9, 100e9, 400e9]))
        for i in range(chance.randint(2, 4))
    ]
    demands = random_demands(chance, chance.randint(2, 3), 20 * GB)
    best = best_mean(demands, nodes)
    if best is None:
        with pytest.raises(ModelTooBig):
            make_plans(demands, nodes)
        return
    plan = make_plans(demands, nodes)
    check(demands, nodes, plan)
    assert plan.mean_tokens_s == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_a_larger_cluster_is_divided_near_its_bound(seed: int) -> None:
    chance = random.Random(seed)
    nodes = [
        node(f"n{i:03}", chance.choice([8, 16, 32, 64]) * GB, chance.choice([1e11, 2e11, 4e11]))
        for i in range(chance.choice([40, 80]))
    ]
    demands = [
        Demand(model(layers, layer_bytes=size, first=GB // 2, last=GB // 2), weight)
        for layers, size, weight in (
            (24, GB // 4, 1.0),
            (32, GB // 2, 2.0),
            (48, GB, chance.choice([1.0, 4.0])),
        )
    ]
    plan = make_plans(demands, nodes)
    check(demands, nodes, plan)
    assert plan.mean_tokens_s >= 0.85 * plan.bound_tokens_s
    chance.shuffle(nodes)
    assert make_plans(demands, nodes) == plan, "the order of the nodes is no matter"


def test_the_bound_holds_for_the_best_division_of_small_clusters() -> None:
    from parallax.scheduler import plan_models

    for seed in range(20):
        chance = random.Random(seed)
        nodes = [node(f"n{i}", chance.uniform(5, 20) * GB, 1e11) for i in range(4)]
        demands = random_demands(chance, 2, 15 * GB)
        best = best_mean(demands, nodes)
        if best is None:
            continue
        division = plan_models._Division(demands, nodes, {}, LinkFacts(2e-3, 100e6))
        plans, bound = division.by_prices()
        assert best <= bound * (1 + 1e-9)
        assert division.mean(plans) <= best * (1 + 1e-9)


def test_a_model_of_more_weight_gets_more_nodes() -> None:
    nodes = [node(f"n{i:02}", 10 * GB) for i in range(40)]
    small = model(8)
    even = make_plans([Demand(small), Demand(small)], nodes)
    odd = make_plans([Demand(small, 3.0), Demand(small, 1.0)], nodes)
    counts = [[len(p.rings) for p in plan.plans] for plan in (even, odd)]
    assert counts == [[20, 20], [30, 10]]


def test_a_large_model_of_little_weight_still_gets_enough_nodes() -> None:
    nodes = [node(f"n{i:02}", 10 * GB) for i in range(30)]
    demands = [Demand(model(8), 100.0), Demand(model(100), 1.0)]
    plan = make_plans(demands, nodes)
    check(demands, nodes, plan)
    assert len(plan.plans[1].rings) == 1


def test_models_that_do_not_fit_together_are_refused_with_what_they_need() -> None:
    nodes = [node(f"n{i}", 5 * GB) for i in range(2)]
    with pytest.raises(ModelTooBig, match="2 models"):
        make_plans([Demand(model(8)), Demand(model(8))], nodes)
    many = [node(f"n{i}", 5 * GB) for i in range(10)]
    with pytest.raises(ModelTooBig, match="2 models"):
        make_plans([Demand(model(40)), Demand(model(40))], many)
    with pytest.raises(ModelTooBig, match="a model does not fit"):
        make_plans([Demand(model(8)), Demand(model(80))], many)


def test_one_model_is_planned_as_ever() -> None:
    nodes = [node(f"n{i}", 5 * GB) for i in range(4)]
    (plan,) = make_plans([Demand(model(8))], nodes).plans
    assert plan == make_plan(model(8), nodes)


def test_a_thousand_nodes_are_divided_among_ten_models_in_a_moment() -> None:
    """0.4 s on one core of a 2020s server; the limit leaves room for a busy one."""
    chance = random.Random(1)
    nodes = [
        node(
            f"n{i:04}", chance.choice([8, 16, 32, 64, 128]) * GB, chance.choice([1e11, 2e11, 4e11])
        )
        for i in range(1000)
    ]
    demands = [
        Demand(model(layers, layer_bytes=size, first=GB, last=GB))
        for layers, size in itertools.product((32, 64), (GB // 8, GB // 4, GB // 2, GB, 2 * GB))
    ]
    begin = time.process_time()
    plan = make_plans(demands, nodes)
    assert time.process_time() - begin < 4.0
    check(demands, nodes, plan)
    assert plan.mean_tokens_s >= 0.95 * plan.bound_tokens_s
