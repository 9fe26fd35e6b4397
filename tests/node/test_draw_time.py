"""How much of decoding is drawing, from few frames that are timed."""

from __future__ import annotations

import pytest

from parallax.node.draw_time import MOST_LANES, TIMED_EVERY, DrawTime


def test_frames_between_timed_ones_cost_what_their_lane_showed_last() -> None:
    time, timed = DrawTime(), {0: 0, 1: 0}
    costs = {0: 0.002, 1: 0.1}  # for each token
    for _ in range(1 + 3 * TIMED_EVERY):
        for lane, tokens in ((0, 4), (1, 2)):
            if time.is_due(lane):
                timed[lane] += 1
                time.timed(lane, tokens, tokens * costs[lane])
            else:
                time.untimed(lane, tokens, most_s=1.0)
    assert timed == {0: 3, 1: 3}
    assert time.total_s == pytest.approx(3 * TIMED_EVERY * (4 * 0.002 + 2 * 0.1), rel=0.05)


def test_no_frame_is_taken_to_draw_for_longer_than_it_took() -> None:
    time = DrawTime()
    time.timed(0, 1, 5.0)
    time.untimed(0, 1, most_s=0.25)
    assert time.total_s == 5.25


def test_lanes_without_end_are_not_all_remembered() -> None:
    time = DrawTime()
    for lane in range(3 * MOST_LANES):
        time.untimed(lane, 1, most_s=1.0)
    assert len(time._lanes) <= MOST_LANES
