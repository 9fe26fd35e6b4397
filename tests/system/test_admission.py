"""Strangers ask to be nodes of a scheduler that takes nobody for its own machine."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallax.fabric.credentials import Credentials
from parallax.fabric.discovery import Target, parse_target
from parallax.fabric.errors import JoinRefused
from parallax.fabric.identity import load_identity
from parallax.fabric.limits import DEFAULT_LIMITS
from parallax.node.enrolment import Enrolment
from tests.cli.processes import parallax
from tests.cluster import Cluster, Process, boot
from tests.models import make_model

WAITING = r"Waiting to be let in\. Fingerprint: (\S+)"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    model = make_model(tmp_path / "tiny", layers=2, hidden=32)
    with boot(model, nodes=0, wanted=1, scheduler_module="tests.strangers") as cluster:
        yield cluster


def told(tmp_path: Path, cluster: Cluster, *arguments: str) -> str:
    done = parallax(tmp_path, *arguments, "--url", cluster.url)
    assert done.returncode == 0, done.stderr
    return done.stdout


def target(cluster: Cluster) -> str:
    peer_id = cluster.status()["node_join_command"].split()[-1]
    return f"{peer_id}@127.0.0.1:{cluster.enrol_port}"


def states(cluster: Cluster) -> dict[str, str]:
    return {token["id"]: token["state"] for token in cluster.get("/admin/tokens")["data"]}


async def enrol(cluster: Cluster, folder: Path, token: str) -> None:
    """As a node does it, without the rest of a node."""
    peer_id, endpoint = parse_target(target(cluster))
    assert endpoint is not None
    enrolment = Enrolment(
        Credentials(load_identity(folder / "stranger.key")),
        folder / "stranger.pem",
        name="stranger",
        token=token,
        limits=DEFAULT_LIMITS,
        on_event=lambda event: None,
    )
    await enrolment.enrol(Target(peer_id, (endpoint,)), named=True)


def join_with(cluster: Cluster, name: str, token: str) -> Process:
    arguments = ["join", "-s", target(cluster), "--state-dir", str(cluster.folder / name)]
    environment = {**cluster.environment, "PARALLAX_TOKEN": token, "PARALLAX_NAME": name}
    node = Process(arguments, environment)
    cluster.nodes.append(node)
    return node


def test_a_node_without_a_token_waits_is_approved_serves_and_comes_back_by_itself(
    tmp_path: Path, cluster: Cluster
) -> None:
    node = cluster.join("attic")
    shown = node.wait_for(WAITING).group(1)
    cluster.scheduler.wait_for(f"Node attic at 127.0.0.1 asks to be let in.*{shown}")
    status = cluster.status()
    assert status["node_list"] == []
    (waiting,) = status["pending_nodes"]
    assert (waiting["name"], waiting["fingerprint"]) == ("attic", shown)
    assert shown in told(tmp_path, cluster, "nodes")

    assert "attic" in told(tmp_path, cluster, "nodes", "approve", shown)
    node.wait_for("Joined 12D3KooW")
    assert cluster.wait_ready()["pending_nodes"] == []
    assert cluster.answers_in_full("Hello", 4)

    assert node.stop() == 0
    cluster.join("attic").wait_for("Joined 12D3KooW")
    cluster.wait_ready()


def test_a_good_token_lets_in_at_once_and_others_do_not(tmp_path: Path, cluster: Cluster) -> None:
    def made(*flags: str) -> tuple[str, str]:
        token = json.loads(told(tmp_path, cluster, "tokens", "create", "--json", *flags))
        return token["token"], token["id"]

    once, once_id = made("--uses", "1")
    revoked, revoked_id = made()
    expired, expired_id = made("--expires", "1s")
    told(tmp_path, cluster, "tokens", "revoke", revoked_id)
    join_with(cluster, "attic", once).wait_for("Joined 12D3KooW")
    cluster.wait_ready()

    late = join_with(cluster, "cellar", once)
    late.wait_for("as many have come with it")
    assert late.ended() == 5
    while states(cluster)[expired_id] != "expired":
        time.sleep(0.05)
    refused = {
        once: (once_id, "as many have come with it"),
        revoked: (revoked_id, "It was revoked"),
        expired: (expired_id, "It has expired"),
        "pxt_guessed": ("", "misprinted"),
    }
    for token, (token_id, why) in refused.items():
        with pytest.raises(JoinRefused, match=why) as caught:
            asyncio.run(enrol(cluster, tmp_path, token))
        assert token_id in caught.value.sentence
        for shown in (caught.value.sentence, late.output, cluster.scheduler.output):
            assert token not in shown
    assert [n["name"] for n in cluster.status()["node_list"]] == ["attic"]
    assert cluster.status()["pending_nodes"] == []
    found = states(cluster)
    assert (found[once_id], found[revoked_id]) == ("used up", "revoked")
    with urllib.request.urlopen(cluster.url + "/metrics") as answer:
        counted = answer.read().decode()
    for reason, times in {"used_up": 2, "revoked": 1, "expired": 1, "unknown": 1}.items():
        assert f'parallax_joins_refused_total{{reason="{reason}"}} {times}.0' in counted


def test_who_came_in_with_the_token_of_a_removed_node_is_named(
    tmp_path: Path, cluster: Cluster
) -> None:
    token = cluster.post("/admin/tokens", {})["data"]["token"]
    ids = []
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        asyncio.run(enrol(cluster, tmp_path / name, token))
        ids.append(load_identity(tmp_path / name / "stranger.key").peer_id)
    said = told(tmp_path, cluster, "nodes", "remove", ids[0])
    hint = f"came in with the same token: stranger ({ids[1]}), stranger ({ids[2]})"
    assert hint in " ".join(said.split())
    answer = cluster.post(f"/admin/nodes/{ids[1]}/remove", {})["data"]
    assert answer["same_token"] == [{"node_id": ids[2], "name": "stranger"}]
    assert answer["same_token_count"] == 1
    assert cluster.post(f"/admin/nodes/{ids[2]}/remove", {})["data"]["same_token"] == []


def test_an_open_scheduler_lets_strangers_in() -> None:
    with boot(None, nodes=0, flags=["--open"], scheduler_module="tests.strangers") as cluster:
        assert cluster.join("attic").wait_for("Joined 12D3KooW")
