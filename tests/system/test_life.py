"""Nodes come and go, models change, processes end: what clients see of it."""

from __future__ import annotations

import asyncio
import threading
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from parallax.fabric.channels import open_channel
from parallax.fabric.limits import Limits
from parallax.fabric.version import PROTOCOL
from parallax.proto import wire_pb2 as wire
from parallax.proto import wire_pb2_grpc as rpc
from tests.cluster import Cluster, boot
from tests.models import make_model
from tests.reference import Reference
from tests.system.test_answers import PROMPTS, SAMPLED, sampling_of
from tests.trust import let_in


def kill_stage(cluster: Cluster, stage: int) -> None:
    """Pulls the plug of the node that has this stage of the first ring."""
    cluster.holder(stage).kill()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_node_costs_a_pause_and_not_a_token(
    stage: int, model: Path, reference: Reference
) -> None:
    tokens = 600
    expected = reference.sampled(PROMPTS[1], tokens, sampling_of(SAMPLED), ends=False)
    with boot(model, nodes=2) as cluster, ThreadPoolExecutor(1) as pool:
        before = cluster.status()["rings"][0]["epoch"]
        fields = {"max_tokens": tokens, "ignore_eos": True, **SAMPLED}
        victim, begun = cluster.holder(stage), threading.Event()
        answer = pool.submit(lambda: cluster.stream(PROMPTS[1], begun.set, **fields))
        assert begun.wait(60)
        victim.kill()
        assert answer.result(timeout=120) == reference.text(expected)
        status = cluster.wait_ready()
        assert status["rings"][0]["epoch"] > before
        assert len(status["rings"][0]["stages"]) == 1


def test_a_node_that_joins_later_makes_a_second_ring(model: Path, reference: Reference) -> None:
    with boot(model, nodes=1) as cluster:
        cluster.join("late")
        status = cluster.wait_ready(rings=2)
        assert {r["stages"][0]["name"] for r in status["rings"]} == {"node0", "late"}
        expected = reference.text(reference.greedy(PROMPTS[1], 20))
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(
                lambda _: cluster.chat(PROMPTS[1], max_tokens=20, temperature=0), range(8)
            )
            for answer in answers:
                assert answer["choices"][0]["message"]["content"] == expected


def test_the_model_changes_at_run_time(model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama", layers=4, hidden=32)
    expected = Reference(other)
    with boot(model, nodes=2) as cluster:
        body = {"model_name": str(other), "init_nodes_num": 2, "is_local_network": True}
        answer = cluster.post("/scheduler/init", body)
        assert answer == {"type": "scheduler_init", "data": None}
        status = cluster.wait(lambda s: s["model_name"] == "other" and s["status"] == "available")
        assert status["model"]["layers"] == 4
        said = cluster.chat("Hi", model="other", temperature=0, max_tokens=16)
        text = expected.text(expected.greedy("Hi", 16))
        assert said["choices"][0]["message"]["content"] == text
        with pytest.raises(urllib.error.HTTPError, match="404"):
            cluster.chat("Hi", model=model.name)


def test_a_scheduler_started_again_serves_again(model: Path) -> None:
    with boot(model, nodes=1) as cluster:
        first = cluster.status()["rings"][0]["epoch"]
        assert cluster.scheduler.stop() == 0
        cluster.start_scheduler_again()
        cluster.scheduler.wait_for("Listening:")
        status = cluster.wait_ready()
        assert status["rings"][0]["epoch"] > first, "an epoch was used twice"
        assert cluster.answers_in_full("Hi", 3)


def test_everyone_ends_cleanly_when_asked(model: Path) -> None:
    with boot(model, nodes=2) as cluster:
        cluster.chat("Hi", max_tokens=3)
        for process in (*cluster.nodes, cluster.scheduler):
            assert process.stop() == 0, process.output
            assert "Traceback" not in process.output, process.output


def test_an_answer_in_flight_is_finished_before_the_scheduler_ends(
    model: Path, reference: Reference
) -> None:
    expected = reference.sampled("Hi", 300, sampling_of({"temperature": 0}), ends=False)
    slow = ["--no-speculation"]  # what repeats would be there too soon
    patient = {"PARALLAX_LIMITS__DRAIN_S": "60"}  # whatever else this machine does
    with (
        boot(model, nodes=1, flags=slow, variables=patient) as cluster,
        ThreadPoolExecutor(1) as pool,
    ):
        body = {"max_tokens": 300, "ignore_eos": True, "temperature": 0}
        begun = threading.Event()
        answer = pool.submit(lambda: cluster.stream("Hi", begun.set, **body))
        assert begun.wait(60)
        assert cluster.scheduler.stop(timeout_s=90) == 0
        assert answer.result(30) == reference.text(expected)


async def dismissal(cluster: Cluster, folder: Path) -> wire.Fault:
    """What a node that runs other versions is told when it attends."""
    credentials, endpoints = await let_in(cluster.enrol_port, "stranger", folder)
    hello = wire.Hello(protocol=PROTOCOL, mlx_version="0.0.1", mlx_lm_version="0.0.1")
    hello.facts.node_id, hello.facts.name = credentials.peer_id, "old-mac"
    channel, _ = await open_channel(
        endpoints, credentials.scheduler_id, limits=Limits(), credentials=credentials
    )
    async with channel:
        attend = rpc.MembershipStub(channel).Attend()
        await attend.write(wire.NodeReport(hello=hello))
        order = await attend.read()
        assert isinstance(order, wire.NodeOrder)
        return order.dismiss.fault


def test_a_node_of_another_version_is_told_so(two_nodes: Cluster, tmp_path: Path) -> None:
    fault = asyncio.run(dismissal(two_nodes, tmp_path))
    assert fault.kind == "VersionMismatch"
    assert "0.0.1" in fault.why
    assert two_nodes.answers_in_full("Hi", 2)


def test_an_idle_cluster_uses_next_to_nothing(two_nodes: Cluster) -> None:
    processes = [psutil.Process(p.pid) for p in (two_nodes.scheduler, *two_nodes.nodes)]
    seconds = 5.0
    used = []
    for _ in range(6):  # other work on this machine only adds, so the calmest time counts
        begin = [sum(p.cpu_times()[:2]) for p in processes]
        psutil.cpu_percent(interval=seconds)
        used.append(max(sum(p.cpu_times()[:2]) - b for p, b in zip(processes, begin, strict=True)))
        if used[-1] < 0.02 * seconds:
            break
    assert min(used) < 0.02 * seconds + 0.02, used  # the clock ticks in steps of 10 ms
