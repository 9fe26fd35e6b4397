"""Nodes that stop, hang, starve or lose their compute thread, while answers run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import grpc
import psutil
import pytest

from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from tests.chaos.arena import Arena, arena
from tests.chaos.checker import check
from tests.chaos.history import History
from tests.chaos.kills import Expected
from tests.chaos.stops import run_disturbed, stale_frames, until

FAULTY = "tests.chaos.faulty_node"
HANG_S = 18.0


@pytest.fixture(scope="module")
def histories() -> list[History]:
    return []


@pytest.fixture(scope="module")
def hurt(expected: Expected, histories: list[History]) -> Iterator[Arena]:
    variables = {"CHAOS_HANG_S": f"{HANG_S}"}
    with arena(expected.model, module=FAULTY, variables=variables) as made:
        yield made
        made.cluster.stop()
        verdict = check(made.journal, histories, expected.of_tokens)
        assert verdict.wrong == []
        assert verdict.compared == len(histories)


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


def test_a_compute_thread_that_dies_is_told_at_once_although_grpc_lives(
    hurt: Arena, expected: Expected, histories: list[History]
) -> None:
    hurt.wait_whole(2, 1)
    name = hurt.stage(0)
    victim = hurt.processes.pop(name)
    hurt.cluster.nodes.remove(victim)
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


def test_frames_of_an_epoch_that_is_over_are_refused_and_counted(hurt: Arena) -> None:
    status = hurt.wait_whole(2, 1)
    epoch = status["rings"][0]["epoch"]
    before = stale_frames(hurt)
    ports = {
        connection.laddr.port
        for connection in psutil.Process(hurt.processes[hurt.stage(1)].pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    refused = 0
    for port in ports:
        opening = wire.FramePiece(open=wire.FlowOpen(epoch=epoch - 1, from_stage=0, to_stage=1))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                replies = rpc.RingStub(channel).Flow(iter([opening]), timeout=5)
                pytest.fail(f"it was let in: {next(iter(replies))}")
            except grpc.RpcError as error:
                code: Any = error
                refused += code.code() is grpc.StatusCode.ABORTED
    assert refused == 1
    until(lambda: stale_frames(hurt) > before)
