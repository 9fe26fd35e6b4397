"""A scheduler that was there a moment ago is found again."""

from __future__ import annotations

import asyncio
from itertools import accumulate

import pytest

from parallax.fabric.discovery import Target
from parallax.fabric.errors import SchedulerNotFound, SchedulerUnreachable
from parallax.node.reunion import RETRY_MOST_S, RETRY_SOON_S, SOON_S, Patience, meet_again

MET, MOVED = Target("boss", ()), Target("boss", ("elsewhere",))  # type: ignore[arg-type]


def test_tries_come_each_second_at_least_until_it_has_been_away_for_long() -> None:
    patience = Patience()
    now, pauses = 100.0, []
    while now < 100 + 2 * SOON_S:
        pauses.append((now - 100, patience.pause_s(now)))
        now += pauses[-1][1]
    assert pauses[0][1] < 0.5
    assert max(pause for at, pause in pauses if at < SOON_S) <= RETRY_SOON_S
    assert pauses[-1][1] == RETRY_MOST_S
    assert list(accumulate(pause for _, pause in pauses))[2] < 2
    patience.met()
    assert patience.pause_s(now) < 0.5


async def never() -> Target:
    await asyncio.Event().wait()
    raise AssertionError


async def test_it_is_asked_where_it_was_while_the_search_goes_on() -> None:
    tries = 0

    async def enrol(target: Target) -> str:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise SchedulerUnreachable("not yet")
        return str(target.peer_id)

    assert await meet_again(MET, enrol, never, lambda: 0.001) == "boss"
    assert tries == 4


async def test_one_that_moved_is_found_by_the_search() -> None:
    async def enrol(target: Target) -> Target:
        if target is MET:
            raise SchedulerUnreachable("gone")
        return target

    async def search() -> Target:
        await asyncio.sleep(0.01)
        return MOVED

    assert await meet_again(MET, enrol, search, lambda: 60.0) is MOVED


async def test_a_search_that_finds_nothing_is_an_error() -> None:
    async def enrol(target: Target) -> Target:
        raise SchedulerUnreachable("gone")

    async def search() -> Target:
        raise SchedulerNotFound("nobody")

    with pytest.raises(SchedulerNotFound):
        await meet_again(MET, enrol, search, lambda: 0.001)
