"""Which lane a sequence joins."""

from __future__ import annotations

from parallax.node.sequences import MUCH_PADDING_TOKENS, least_padding
from parallax.proto import wire_pb2 as wire

SHAPE = wire.RingShape(lanes=2, lane_rows=4, spare_lanes=2)
EMPTY = (0, 0)


def test_lanes_fill_evenly_and_then_by_padding() -> None:
    assert least_padding([EMPTY, EMPTY, EMPTY, EMPTY], 100, SHAPE) == 0
    assert least_padding([(1, 100), EMPTY, EMPTY, EMPTY], 100, SHAPE) == 1
    assert least_padding([(1, 100), (1, 300), EMPTY, EMPTY], 290, SHAPE) == 1
    assert least_padding([(2, 300), (1, 100), EMPTY, EMPTY], 290, SHAPE) == 1
    assert least_padding([(4, 300), (4, 100), EMPTY, EMPTY], 290, SHAPE) in (0, 1)


def test_a_row_that_would_be_much_padding_goes_to_a_spare_lane() -> None:
    long = 100 + MUCH_PADDING_TOKENS
    assert least_padding([(4, 100), (3, 100), EMPTY, EMPTY], long, SHAPE) == 2
    assert least_padding([(4, 100), (3, 100), (1, long), EMPTY], long, SHAPE) == 2
    assert least_padding([(4, 100), (3, 100), (1, 9 * long), EMPTY], long, SHAPE) == 3
    assert least_padding([(1, long), (1, long), EMPTY, EMPTY], 10, SHAPE) in (0, 1, 2)
    assert least_padding([(1, 2 * long), (1, 2 * long), EMPTY, EMPTY], 10, SHAPE) == 2


def test_padding_that_cannot_be_avoided_is_no_reason_to_use_a_spare_lane() -> None:
    long = 100 + MUCH_PADDING_TOKENS
    few = wire.RingShape(lanes=2, lane_rows=4)
    assert least_padding([(1, 100), (1, 100)], long, few) == 0
    spread = [(1, 100), (1, 100), (1, 9 * long), (2, 9 * long)]
    assert least_padding(spread, long, SHAPE) == 0


def test_where_every_lane_means_much_padding_it_is_the_one_that_means_least() -> None:
    lanes = [(4, 300), (4, 300), (1, 10_000), (1, 30_000)]
    assert least_padding(lanes, 60_000, SHAPE) == 3
    assert least_padding([*lanes[:3], (4, 30_000)], 60_000, SHAPE) == 2
