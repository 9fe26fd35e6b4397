"""What nodes without layers are told to prepare."""

from __future__ import annotations

from parallax.scheduler.spares import Spares
from tests.scheduler.test_layouts import AB, C


def test_every_spare_prepares_every_stage_that_serves_and_only_once() -> None:
    spares = Spares()
    orders = spares.prepare([AB], {"c", "d"})
    assert [order.node_id for order in orders] == ["c", "d"]
    for order in orders:
        stages = order.order.prepare.stages
        assert [(stage.first, stage.end) for stage in stages] == [(0, 3), (3, 8)]
        assert {stage.model.digest for stage in stages} == {"d"}
    assert spares.prepare([AB], {"c", "d"}) == []
    assert [order.node_id for order in spares.prepare([AB], {"c", "d", "e"})] == ["e"]


def test_other_rings_and_a_node_that_comes_back_are_prepared_for_anew() -> None:
    spares = Spares()
    spares.prepare([AB], {"c"})
    assert spares.prepare([AB], set()) == []
    assert len(spares.prepare([AB], {"c"})) == 1, "it may have been started again"
    assert len(spares.prepare([AB, C], {"c"})) == 1
    assert spares.prepare([], {"c"}) == []
