"""Nodes that are killed, stop, hang or lose their compute thread, while answers run."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from parallax.fabric.channels import open_channel
from parallax.fabric.limits import Limits
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from tests.chaos.arena import Arena, arena
from tests.chaos.checker import check
from tests.chaos.history import History
from tests.chaos.kills import KINDS, MOMENTS, Expected, Kill, run_kill
from tests.chaos.stops import run_disturbed, stale_frames, until
from tests.trust import let_in

FAULTY = "tests.chaos.faulty_node"
HANG_S = 18.0


@pytest.fixture(scope="module")
def histories() -> list[History]:
    return []


@pytest.fixture(scope="module")
def wound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that says what is broken just now."""
    return tmp_path_factory.mktemp("faults") / "wound"


@pytest.fixture(scope="module")
def hurt(expected: Expected, histories: list[History], wound: Path) -> Iterator[Arena]:
    variables = {"CHAOS_HANG_S": f"{HANG_S}", "CHAOS_WOUND": str(wound)}
    with arena(expected.model, module=FAULTY, variables=variables) as made:
        yield made
        made.cluster.stop()
        verdict = check(made.journal, histories, expected.of_tokens)
        assert verdict.wrong == []
        assert verdict.compared == len(histories)
        assert verdict.moves > len(histories) / 2  # an answer may be over before it is disturbed


def test_a_stage_killed_at_any_moment_costs_a_pause_and_no_token(
    hurt: Arena, expected: Expected, histories: list[History]
) -> None:
    """Each stage at each moment; a node joins after each, and is the next one's spare."""
    outcomes = []
    for number in range(2 * len(MOMENTS)):
        stage, moment = number % 2, MOMENTS[number // 2]
        kill = Kill(stage, moment, tuple(KINDS)[(number + number // 2) % 2], 64)
        outcomes.append(run_kill(hurt, expected, kill))
        hurt.join(module=FAULTY)
        hurt.wait_whole(2, 1)
    histories += [outcome.history for outcome in outcomes]
    assert [(o.kill, o.why) for o in outcomes if not o.right] == []


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stopped_node_is_replaced_and_repeats_nothing_when_it_goes_on(
    stage: int, hurt: Arena, expected: Expected, histories: list[History]
) -> None:
    before = hurt.wait_whole(2, 1)["rings"][0]["epoch"]
    victim = hurt.processes[hurt.stage(stage)]
    try:
        history, wrong = run_disturbed(
            hurt, expected, lambda: victim.child.send_signal(signal.SIGSTOP)
        )
    finally:
        victim.child.send_signal(signal.SIGCONT)
    histories.append(history)
    assert wrong == ""
    assert history.pause_s < 10, "silence shows after 3 s"
    assert hurt.wait_whole(2, 1)["rings"][0]["epoch"] > before


def test_a_short_stop_loses_nothing_either(
    hurt: Arena, expected: Expected, histories: list[History]
) -> None:
    hurt.wait_whole(2, 1)
    victim = hurt.processes[hurt.stage(1)]

    def nap() -> None:
        victim.child.send_signal(signal.SIGSTOP)
        time.sleep(1.0)  # what is tested is the stop
        victim.child.send_signal(signal.SIGCONT)

    history, wrong = run_disturbed(hurt, expected, nap)
    histories.append(history)
    assert wrong == ""


def test_a_node_that_is_removed_at_once_sees_nothing_more_and_the_answer_goes_on(
    hurt: Arena, expected: Expected, histories: list[History]
) -> None:
    hurt.wait_whole(2, 1)
    name = hurt.stage(1)
    victim = hurt.let_go(name)
    said: list[dict[str, Any]] = []
    history, wrong = run_disturbed(
        hurt,
        expected,
        lambda: said.append(hurt.cluster.post(f"/admin/nodes/{name}/remove", {"now": True})),
    )
    histories.append(history)
    assert wrong == ""
    assert history.pause_s < 5, "it was waited for"
    assert said[0]["data"]["state"] == "removed"
    victim.child.wait(30)
    victim.stop()
    assert "removed" in victim.output
    hurt.join(module=FAULTY)
    hurt.wait_whole(2, 1)


def test_a_compute_thread_that_dies_is_told_at_once_although_grpc_lives(
    hurt: Arena, expected: Expected, histories: list[History]
) -> None:
    hurt.wait_whole(2, 1)
    name = hurt.stage(0)
    victim = hurt.let_go(name)
    history, wrong = run_disturbed(hurt, expected, lambda: os.kill(victim.pid, signal.SIGUSR1))
    histories.append(history)
    assert wrong == ""
    assert history.pause_s < 5, "it took more than a health period to be noticed"
    assert victim.child.wait(30) != 0, "whoever watches over it would not start it again"
    victim.stop()
    assert "compute thread of this node died" in victim.output
    hurt.cluster.scheduler.wait_for("its compute thread died", 10)
    hurt.join(module=FAULTY)
    hurt.wait_whole(2, 1)


def test_a_compute_thread_that_hangs_is_noticed_by_its_own_measure_and_others_take_over(
    hurt: Arena, expected: Expected, histories: list[History]
) -> None:
    hurt.wait_whole(2, 1)
    name = hurt.stage(1)
    victim = hurt.processes[name]
    history, wrong = run_disturbed(hurt, expected, lambda: os.kill(victim.pid, signal.SIGUSR2))
    histories.append(history)
    assert wrong == ""
    assert 5 < history.pause_s < HANG_S - 3, "not its own deadline ended it"
    hurt.wait_whole(2, 1)  # and when it goes on, it is a spare again


@pytest.mark.parametrize("stage", [0, 1])
def test_a_node_whose_frames_all_fail_is_put_aside_and_a_spare_takes_its_layers(
    stage: int, hurt: Arena, expected: Expected, histories: list[History], wound: Path
) -> None:
    hurt.wait_whole(2, 1)
    name = hurt.stage(stage)
    victim = hurt.processes[name]
    history, wrong = run_disturbed(hurt, expected, lambda: wound.write_text(f"frames-{victim.pid}"))
    histories.append(history)
    assert wrong == ""
    assert history.pause_s < 10, "it was tried too often"
    status = hurt.cluster.status()
    states = {node["name"]: node["state"] for node in status["node_list"]}
    assert [n for n in hurt.processes if states[n] == "aside"] == [name], "the other was blamed"
    assert name not in [place["name"] for place in status["rings"][0]["stages"]]
    hurt.cluster.scheduler.wait_for(f"{name} is put aside .*every frame fails here", 10)
    hurt.kill(name)
    hurt.join(module=FAULTY)
    hurt.wait_whole(2, 1)


def test_a_node_that_dies_again_and_again_has_no_layers_for_a_while_and_a_spare_serves(
    hurt: Arena, expected: Expected, histories: list[History]
) -> None:
    """Twice while nothing serves without it, and once more when there is a spare."""
    ring = hurt.wait_whole(2, 1)["rings"][0]
    name = ring["stages"][0]["name"]
    (spare,) = set(hurt.processes) - {stage["name"] for stage in ring["stages"]}
    hurt.cluster.post(f"/admin/nodes/{spare}/drain", {})
    hurt.cluster.post(f"/admin/nodes/{name}/undrain", {})  # what was before is forgotten
    for death in range(3):
        if death == 2:
            hurt.cluster.post(f"/admin/nodes/{spare}/undrain", {})
        history, wrong = run_disturbed(
            hurt, expected, lambda: hurt.restart(name, module=FAULTY), tokens=64
        )
        histories.append(history)
        assert wrong == ""

    def aside(status: dict[str, Any]) -> bool:
        return any(n["name"] == name and n["state"] == "aside" for n in status["node_list"])

    status = hurt.cluster.wait(aside)
    (told,) = (n["aside"] for n in status["node_list"] if n["name"] == name)
    assert 0 < told["seconds"] <= 30
    assert told["why"].startswith("It was lost 3 times within 10 minutes while it had layers")
    assert spare in [stage["name"] for stage in status["rings"][0]["stages"]]
    hurt.cluster.post(f"/admin/nodes/{name}/undrain", {})
    hurt.wait_whole(2, 1)


async def replay(
    arena: Arena, node_id: str, port: int, epoch: int, folder: Path
) -> grpc.StatusCode:
    """A member opens a stream of frames for an epoch, and is refused."""
    credentials, _ = await let_in(arena.cluster.enrol_port, "late", folder)
    endpoint = wire.Endpoint(host="127.0.0.1", port=port, kind="loopback")
    channel, _ = await open_channel([endpoint], node_id, limits=Limits(), credentials=credentials)
    async with channel:
        opening = wire.FramePiece(open=wire.FlowOpen(epoch=epoch, from_stage=0, to_stage=1))
        call = rpc.RingStub(channel).Flow(iter([opening]), timeout=20)
        code: grpc.StatusCode = await call.code()
        return code


def test_frames_of_an_epoch_that_is_over_are_refused_and_counted(
    hurt: Arena, tmp_path: Path
) -> None:
    ring = hurt.wait_whole(2, 1)["rings"][0]
    before = stale_frames(hurt)
    last = ring["stages"][1]
    port = hurt.processes[last["name"]].wait_for(r"listening on (\d+)").group(1)
    code = asyncio.run(replay(hurt, last["node_id"], int(port), ring["epoch"] - 1, tmp_path))
    assert code is grpc.StatusCode.ABORTED
    until(lambda: stale_frames(hurt) > before)
