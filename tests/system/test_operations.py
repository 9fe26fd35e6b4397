"""Nodes are drained and removed, the scheduler is killed: what clients see, and what is kept."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tests.cluster import Cluster, boot
from tests.reference import Reference
from tests.system.test_answers import PROMPTS, SAMPLED, sampling_of
from tests.system.test_moving import repeatedly, stages

PATH, JSON = "/v1/chat/completions", {"Content-Type": "application/json"}
TOKENS = 120
CLIENTS = 8
SERVICE_S = 5.0  # from the start of a new scheduler to its first answer
SLACK = 4.0  # what a machine with other work may take longer
KINDS: list[tuple[str, dict[str, Any]]] = [
    (prompt, fields) for prompt in PROMPTS[1:3] for fields in ({"temperature": 0}, SAMPLED)
]


def texts(reference: Reference) -> list[str]:
    """What each of :data:`KINDS` must say."""
    return [
        reference.text(reference.sampled(prompt, TOKENS, sampling_of(fields), ends=False))
        for prompt, fields in KINDS
    ]


def state_of(status: dict[str, Any], name: str) -> str | None:
    return next((n["state"] for n in status["node_list"] if n["name"] == name), None)


def command(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """``parallax nodes …``, as whoever runs the scheduler types it."""
    where = ["--url", cluster.url, "--state-dir", str(cluster.folder / "scheduler")]
    return subprocess.run(
        [sys.executable, "-m", "parallax.cli.main", "nodes", *words, *where],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def loads(cluster: Cluster) -> list[int]:
    """How often each node has made a stage ready."""
    return [sum(line.startswith("Ready") for line in node.lines) for node in cluster.nodes]


def test_nodes_are_drained_taken_back_and_removed_and_no_answer_shows_it(
    model: Path, reference: Reference
) -> None:
    expected = texts(reference)
    with boot(model, nodes=3) as cluster, ThreadPoolExecutor(CLIENTS) as pool:
        counts = [0] * CLIENTS
        over = threading.Event()

        def ask(number: int) -> str:
            def seen() -> None:
                counts[number] += 1

            prompt, fields = KINDS[number % len(KINDS)]
            body = {"max_tokens": TOKENS, "ignore_eos": True, **fields}
            return cluster.stream(prompt, seen, **body)

        answers = [pool.submit(repeatedly, partial(ask, n), over) for n in range(CLIENTS)]
        try:
            cluster.wait(lambda _: all(counts))
            middle = cluster.status()["rings"][0]["stages"][1]["name"]
            said = cluster.post(f"/admin/nodes/{middle}/drain", {})
            assert said["data"]["state"] == "draining"
            status = cluster.wait(lambda s: state_of(s, middle) == "drained")
            assert stages(status) == [2]
            cluster.post(f"/admin/nodes/{middle}/undrain", {})
            cluster.wait(lambda s: stages(s) == [3])
            cluster.post(f"/admin/nodes/{middle}/remove", {})
            cluster.wait(lambda s: stages(s) == [2] and state_of(s, middle) in (None, "gone"))
        finally:
            over.set()
        for number, answer in enumerate(answers):
            assert set(answer.result(timeout=300)) == {expected[number % len(KINDS)]}
        assert cluster.status()["problem"] is None
        removed = cluster.process(middle)
        removed.ended()
        assert "removed" in removed.output
        again = cluster.join(middle)
        assert again.ended() != 0
        assert "removed" in again.output
        left = [n for n in cluster.status()["node_list"] if n["state"] == "ready"]
        drained = command(cluster, "drain", left[0]["node_id"])
        assert drained.returncode == 0
        assert "is drained" in drained.stdout
        assert stages(cluster.status()) == [1]
        refused = command(cluster, "drain", left[1]["name"])
        assert refused.returncode != 0
        assert "--force" in refused.stderr
        assert "bytes are missing" in refused.stderr
        gone = command(cluster, "remove", left[1]["name"], "--now")
        assert gone.returncode == 0, "it is cut off whatever fits without it"
        assert "is removed" in gone.stdout
        assert state_of(cluster.status(), left[1]["name"]) in (None, "gone")


def test_a_killed_scheduler_serves_again_at_once_and_no_weights_are_read_again(
    model: Path, reference: Reference
) -> None:
    expected = texts(reference)
    with boot(model, nodes=2) as cluster, ThreadPoolExecutor(CLIENTS) as pool:
        cluster.join("node2")
        cluster.wait_ready(rings=2)
        cluster.post("/admin/nodes/node2/drain", {})
        cluster.wait(lambda s: state_of(s, "node2") == "drained" and stages(s) == [2])
        before, ready = cluster.status(), loads(cluster)
        counts = [0] * CLIENTS

        def ask(number: int) -> bytes:
            """Everything that one client got, until its connection ended."""
            prompt, fields = KINDS[number % len(KINDS)]
            messages = [{"role": "user", "content": prompt}]
            body = {"messages": messages, "max_tokens": 4000, "stream": True, "ignore_eos": True}
            connection = http.client.HTTPConnection("127.0.0.1", cluster.http_port, timeout=120)
            got = b""
            try:
                connection.request("POST", PATH, json.dumps(body | fields), JSON)
                answer = connection.getresponse()
                while piece := answer.read1(65536):
                    counts[number] += 1
                    got += piece
            except (ConnectionError, http.client.HTTPException) as error:
                return got + repr(error).encode()
            finally:
                connection.close()
            return got

        answers = [pool.submit(ask, number) for number in range(CLIENTS)]
        cluster.wait(lambda _: all(counts))
        cluster.scheduler.kill()
        began = time.monotonic()
        cluster.start_scheduler_again()
        for answer in answers:
            got = answer.result(timeout=30)
            assert b'"delta"' in got
            assert b"[DONE]" not in got
        text = None
        while text is None:
            assert time.monotonic() - began < SERVICE_S * SLACK, cluster.scheduler.output
            try:
                prompt, fields = KINDS[0]
                said = cluster.chat(prompt, max_tokens=TOKENS, ignore_eos=True, **fields)
                text = said["choices"][0]["message"]["content"]
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.02)  # it does not listen yet, or no ring serves
        print(f"the first answer came {time.monotonic() - began:.2f} s after the start")
        assert text == expected[0]
        after = cluster.wait_ready()
        assert after["rings"][0]["stages"] == before["rings"][0]["stages"]
        assert after["rings"][0]["epoch"] > before["rings"][0]["epoch"]
        assert loads(cluster) == ready, "weights were read again"
        cluster.wait(lambda s: state_of(s, "node2") == "drained")

        last = after["rings"][0]["stages"][1]["name"]
        cluster.process(last).kill()
        cluster.wait(lambda s: stages(s) == [1])
        cluster.join(last)
        again = cluster.wait(lambda s: stages(s) == [2])
        assert again["rings"][0]["stages"] == before["rings"][0]["stages"], "its old place"


def test_a_client_hears_comments_while_its_ring_is_mended(
    model: Path, reference: Reference
) -> None:
    prompt, fields = PROMPTS[1], {"temperature": 0}
    tokens = 400
    expected = reference.text(reference.sampled(prompt, tokens, sampling_of(fields), ends=False))
    flags = ["--no-speculation"]
    patient = {"PARALLAX_LIMITS__SILENCE_S": "6"}  # a stopped node is missed only then
    with boot(model, nodes=2, flags=flags, variables=patient) as cluster:
        last = cluster.process(cluster.status()["rings"][0]["stages"][1]["name"])
        body = {"messages": [{"role": "user", "content": prompt}], "stream": True}
        body |= {"max_tokens": tokens, "ignore_eos": True, **fields}
        connection = http.client.HTTPConnection("127.0.0.1", cluster.http_port, timeout=120)
        comments, text = 0, ""
        try:
            connection.request("POST", PATH, json.dumps(body), JSON)
            answer = connection.getresponse()
            while line := answer.readline():
                comments += line.startswith(b": keep-alive")
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    if not text:
                        last.child.send_signal(signal.SIGSTOP)
                    text += event["choices"][0]["delta"].get("content") or ""
        finally:
            connection.close()
            last.child.send_signal(signal.SIGCONT)
        assert text == expected
        assert comments >= 1
