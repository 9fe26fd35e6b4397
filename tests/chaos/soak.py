"""Nodes are killed, stopped, drained, sent away and joined at random, and every answer is checked.

At the end nothing may be left over: what the processes hold is compared with what they held before.
"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from tests.chaos.arena import Arena
from tests.chaos.crowd import PROMPTS, warm
from tests.chaos.history import History, ask
from tests.chaos.kills import KINDS, Expected, body_of
from tests.chaos.verdicts import wrong_with

CLIENTS = 3
TOKENS = 48
WHOLE_S = 90.0
SETTLE_S = 30.0
# Pools of gRPC and of the resolver grow once, by so much at most, and are not given back.
SPARE_HANDLES = 8
SPARE_THREADS = 8


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds."""

    handles: int
    sockets: int
    threads: int
    children: int


@dataclass(slots=True)
class Soak:
    """What came of it."""

    histories: list[History] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # what was not given back
    deeds: dict[str, int] = field(default_factory=dict)
    went_away: int = 0  # clients that did not wait for their end


def run_soak(arena: Arena, expected: Expected, *, seconds: float, seed: int) -> Soak:
    """Disturbs a ring of two nodes and their spare for so long."""
    warm(expected, TOKENS)
    soak = Soak()
    over = threading.Event()
    clients = threading.Thread(target=_serve_clients, args=(arena, expected, soak, over, seed))
    _ask_once(arena, expected, soak)
    _settle(arena)
    before = _held(arena)
    clients.start()
    try:
        _disturb(arena, soak, time.monotonic() + seconds, random.Random(seed))
    finally:
        over.set()
        clients.join(300)
    assert not clients.is_alive(), "a client hangs"
    arena.wait_whole(2, 1, WHOLE_S)
    _settle(arena)
    soak.left = _left(arena, before)
    return soak


# -------------------------------------------------------------------- clients


def _serve_clients(
    arena: Arena, expected: Expected, soak: Soak, over: threading.Event, seed: int
) -> None:
    asyncio.run(_clients(arena, expected, soak, over, seed))


async def _clients(
    arena: Arena, expected: Expected, soak: Soak, over: threading.Event, seed: int
) -> None:
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(
            *(
                _client(arena, expected, soak, over, session, random.Random(seed + number))
                for number in range(CLIENTS)
            )
        )


async def _client(
    arena: Arena,
    expected: Expected,
    soak: Soak,
    over: threading.Event,
    session: aiohttp.ClientSession,
    dice: random.Random,
) -> None:
    while not over.is_set():
        prompt, kind = dice.choice(PROMPTS), dice.choice(tuple(KINDS))
        leaves_after = dice.randrange(1, 20) if dice.random() < 0.15 else 0
        body = body_of(prompt, kind, TOKENS)
        try:
            history = await ask(
                session,
                arena.cluster.url,
                body,
                name=f"{kind} {prompt[:20]}",
                seen=_leaver(leaves_after) if leaves_after else None,
            )
        except _Leaves:
            soak.went_away += 1
            continue
        soak.histories.append(history)
        if why := wrong_with(history, expected.text(prompt, kind, TOKENS), TOKENS):
            soak.wrong.append(f"{history.name}: {why}")


class _Leaves(Exception):
    """A client goes away in the middle of its answer."""


def _leaver(after: int) -> Callable[[History], None]:
    def seen(history: History) -> None:
        if len(history.text) >= after:
            raise _Leaves

    return seen


def _ask_once(arena: Arena, expected: Expected, soak: Soak) -> None:
    async def once() -> History:
        async with aiohttp.ClientSession() as session:
            body = body_of(PROMPTS[0], "greedy", TOKENS)
            return await ask(session, arena.cluster.url, body, name="first")

    history = asyncio.run(once())
    soak.histories.append(history)
    if why := wrong_with(history, expected.text(PROMPTS[0], "greedy", TOKENS), TOKENS):
        soak.wrong.append(f"first: {why}")


# --------------------------------------------------------------------- deeds


def _disturb(arena: Arena, soak: Soak, until_s: float, dice: random.Random) -> None:
    deeds: tuple[tuple[str, Callable[[Arena, random.Random], None]], ...] = (
        ("kill", _kill),
        ("kill", _kill),
        ("stop", _stop),
        ("leave", _leave),
        ("drain", _drain),
        ("join", _join),
    )
    while time.monotonic() < until_s:
        arena.wait_whole(2, 1, WHOLE_S)
        time.sleep(dice.uniform(0.2, 2.5))  # deeds come at any moment of the answers
        name, deed = dice.choice(deeds)
        deed(arena, dice)
        soak.deeds[name] = soak.deeds.get(name, 0) + 1
        while len(arena.processes) > 3:  # no more than two cores can bear
            arena.leave(dice.choice(sorted(arena.processes)))
        while len(arena.processes) < 3:
            arena.join()


def _kill(arena: Arena, dice: random.Random) -> None:
    arena.kill(dice.choice(sorted(arena.processes)))


def _stop(arena: Arena, dice: random.Random) -> None:
    process = arena.processes[dice.choice(sorted(arena.processes))]
    process.child.send_signal(signal.SIGSTOP)
    time.sleep(dice.uniform(0.5, 8.0))
    process.child.send_signal(signal.SIGCONT)


def _leave(arena: Arena, dice: random.Random) -> None:
    arena.leave(dice.choice(sorted(arena.processes)))


def _join(arena: Arena, dice: random.Random) -> None:
    arena.join()
    arena.wait_whole(2, 2, WHOLE_S)


def _drain(arena: Arena, dice: random.Random) -> None:
    name = dice.choice(sorted(arena.processes))
    try:
        arena.cluster.post(f"/admin/nodes/{name}/drain", {})
    except urllib.error.HTTPError:
        return  # it is needed just now, or has gone
    arena.cluster.wait(lambda status: _state(status, name) in ("drained", "", "gone"), WHOLE_S)
    arena.leave(name)


def _state(status: dict[str, Any], name: str) -> str:
    return next((str(n["state"]) for n in status["node_list"] if n["name"] == name), "")


# ------------------------------------------------------------------- leftovers


def _settle(arena: Arena) -> None:
    """Waits until nothing runs or waits any more, and nothing is left of rings before."""

    def quiet(status: dict[str, Any]) -> bool:
        queue, rings = status["queue"], status["rings"]
        loads = [ring["load"] for ring in rings]
        busy = sum(load["decoding"] + load["prefilling"] + load["lanes"] for load in loads)
        return bool(rings and not queue["waiting"] + queue["running"] + busy)

    arena.cluster.wait(quiet, SETTLE_S)


def _held(arena: Arena) -> dict[str, Held]:
    """By process: the scheduler's, and the most of all nodes."""
    nodes = [held_by(process.pid) for process in arena.processes.values()]
    most = Held(
        max(held.handles for held in nodes),
        max(held.sockets for held in nodes),
        max(held.threads for held in nodes),
        max(held.children for held in nodes),
    )
    return {"scheduler": held_by(arena.cluster.scheduler.pid), "node": most}


def held_by(pid: int) -> Held:
    """What a process holds now."""
    process = psutil.Process(pid)
    return Held(
        process.num_fds(),
        len(process.net_connections()),
        process.num_threads(),
        len(process.children(recursive=True)),
    )


def _left(arena: Arena, before: dict[str, Held]) -> list[str]:
    """What is there now and was not before, once the last connections have ended."""
    deadline = time.monotonic() + SETTLE_S
    while (left := _more(_held(arena), before)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for ring in arena.cluster.status()["rings"]:
        if ring["load"]["charged_bytes"]:
            left.append(f"the caches are charged {ring['load']['charged_bytes']} bytes")
    return left


def _more(now: dict[str, Held], before: dict[str, Held]) -> list[str]:
    found = []
    for name, held in now.items():
        was = before[name]
        for kind, more in (
            ("handles", held.handles - was.handles - SPARE_HANDLES),
            ("sockets", held.sockets - was.sockets - SPARE_HANDLES),
            ("threads", held.threads - was.threads - SPARE_THREADS),
            ("children", held.children - was.children),
        ):
            if more > 0:
                found.append(f"{name}: {kind}: {was} became {held}")
    return found
