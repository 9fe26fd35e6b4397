"""Limits that contradict each other are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from parallax.fabric.limits import DEFAULT_LIMITS, Limits


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"silence_s": 1.5}, "silence_s must be at least twice"),
        ({"piece_bytes": 4 << 20}, "piece_bytes must be below"),
        ({"frame_bytes": 1000}, "frame_bytes must be at least"),
        ({"bodies_bytes": 1000}, "bodies_bytes must be at least"),
        ({"queue_wait_s": 700}, "queue_wait_s must not exceed"),
        ({"connect_s": 0}, "connect_s"),
        ({"lane_rows": -1}, "lane_rows"),
        ({"connects": 1}, "connects"),
    ],
)
def test_limits_that_cannot_hold_are_refused(values: dict[str, float], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Limits(**values)  # type: ignore[arg-type]


def test_limits_cannot_be_changed_behind_anyones_back() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        DEFAULT_LIMITS.connect_s = 1  # type: ignore[misc]
