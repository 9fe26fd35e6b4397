"""Traces of decode steps, and the workers of the benchmarks."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.echo import round_trips
from benchmarks.step import parts_of
from benchmarks.traced import Trace, wrappers
from benchmarks.worker import Worker

HEAD = {
    "posted": 0.0,
    "begun": 1.0,
    "building": 2.0,
    "evaluating": 3.0,
    "packing": 0.5,
    "ended": 8.0,
    "sent": 8.5,
    "received": 20.0,
    "taken": 20.5,
}
LAST = {"received": 10.0, "posted": 10.5, "begun": 11.0, "ended": 17.0, "sent": 18.0}


def test_the_parts_of_a_step_add_up_to_the_way_from_one_to_the_next() -> None:
    parts = parts_of([(HEAD, LAST), ({"posted": 22.0}, {})])
    assert sum(parts.values()) == pytest.approx(22.0)
    assert parts["compute, first stage: the rest"] == pytest.approx(1.5)
    assert parts["socket and waking up, after the last stage"] == pytest.approx(2.0)
    assert parts["conductor"] == pytest.approx(1.5)


def test_steps_that_were_not_seen_from_end_to_end_do_not_count() -> None:
    with pytest.raises(ValueError, match="no step"):
        parts_of([(HEAD, {"posted": 1.0}), ({"posted": 22.0}, {})])


def test_what_is_traced_is_there() -> None:
    for owner, name, _ in wrappers(Trace()):
        assert callable(getattr(owner, name))


def test_the_echo_sends_every_message_back() -> None:
    with Worker("benchmarks.echo") as echo:
        port = int(echo.answer()["port"])
        assert len(asyncio.run(round_trips(port, 8192, 5))) == 5


def test_a_worker_that_ends_says_what_it_said_last() -> None:
    with (
        Worker("benchmarks.nothing") as worker,
        pytest.raises(RuntimeError, match=r"benchmarks.nothing ended:\n.*No module named"),
    ):
        worker.answer()
