"""Nodes without a model's files get what their layers need from the scheduler and from others."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

from parallax.fabric.blocks import Marks, blocks_of
from parallax.fabric.safetensors import folder_headers
from tests.cluster import Cluster, boot
from tests.models import make_model
from tests.reference import Reference

PROMPT = "What travels?"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sent_bytes(cluster: Cluster) -> int:
    """Weights that the scheduler has given out."""
    with urllib.request.urlopen(cluster.url + "/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("parallax_weights_sent_bytes_total"):
                return int(float(line.split()[1]))
    raise AssertionError("no such metric")


def held_bytes(parts: Path) -> int:
    """Bytes of the blocks that a node's list of parts names."""
    blocks = blocks_of(folder_headers(parts.parent))
    kept = {file: Marks(len(blocks[file]), bytes.fromhex(bits))
            for file, bits in json.loads(parts.read_text()).items()}  # fmt: skip
    return sum(
        end - begin
        for file, marks in kept.items()
        for begin, end in (blocks[file].place(b) for b in range(marks.count) if b in marks)
    )


def disk_bytes(folder: Path) -> int:
    """What a node's fetched files take on the disk."""
    return sum(file.stat().st_blocks * 512 for file in folder.glob("*/*.safetensors"))


def test_a_folder_on_the_schedulers_disk_is_enough(tmp_path: Path) -> None:
    model = make_model(tmp_path / "hidden" / "tiny", layers=6, hidden=64, shards=2)
    expected = Reference(model)
    size = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    hidden = {"HIDDEN_FOLDER": str(tmp_path / "hidden")}
    with boot(model, nodes=2, variables=hidden, module="tests.elsewhere") as cluster:
        said = cluster.chat(PROMPT, temperature=0, max_tokens=16)
        text = expected.text(expected.greedy(PROMPT, 16))
        assert said["choices"][0]["message"]["content"] == text
        digests = [list((cluster.folder / f"node{n}" / "fetched").iterdir()) for n in range(2)]
        assert [len(found) for found in digests] == [1, 1]
        # Tied embeddings are needed at both ends, and nothing else twice.
        embedding = expected.model.model.embed_tokens.weight.nbytes
        assert size * 0.9 < sent_bytes(cluster) < size + embedding


def in_hub_cache(cache: Path, folder: Path) -> str:
    """Puts a model where the hub's client keeps what it has fetched; its id."""
    repository = cache / "models--tests--wide"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / COMMIT)
    return "tests/wide"


def test_a_node_killed_while_it_fetches_fetches_only_the_rest(tmp_path: Path) -> None:
    made = make_model(tmp_path / "wide", layers=10, hidden=512)
    expected = Reference(made)
    text = expected.text(expected.greedy(PROMPT, 8))
    cache = tmp_path / "cache"
    model = in_hub_cache(cache, made)
    (snapshot,) = (cache / "models--tests--wide" / "snapshots").iterdir()
    tensors = folder_headers(snapshot)["model.safetensors"].values()
    size = sum(tensor.nbytes for tensor in tensors)
    nothing = {"HF_HUB_CACHE": str(tmp_path / "empty")}
    full = {"HF_HUB_CACHE": str(cache)}
    with boot(model, nodes=0, variables=nothing, scheduler_variables=full) as cluster:
        fetched = cluster.folder / "node" / "fetched"
        node = cluster.join("node")
        deadline = time.monotonic() + 60
        while disk_bytes(fetched) < size // 10:
            assert time.monotonic() < deadline, node.output
            time.sleep(0.001)
        cluster.scheduler.child.send_signal(signal.SIGSTOP)
        try:
            while not (parts := list(fetched.glob("*/parts"))) or not held_bytes(parts[0]):
                assert time.monotonic() < deadline, node.output
                time.sleep(0.01)
            node.kill()
            node.stop()
        finally:
            cluster.scheduler.child.send_signal(signal.SIGCONT)
        before = held_bytes(parts[0])
        assert before < 0.9 * size, "it had everything already"
        cluster.nodes.clear()
        sent = sent_bytes(cluster)
        cluster.join("node")
        phases: set[tuple[str, bool]] = set()

        def ready(status: dict[str, Any]) -> bool:
            for entry in status["node_list"]:
                if entry["load"]:
                    phases.add((entry["load"]["phase"], entry["load"]["done_bytes"] >= before))
            return status["status"] == "available"

        cluster.wait(ready)
        assert sent_bytes(cluster) - sent == size - before
        assert ("fetching", True) in phases
        said = cluster.chat(PROMPT, temperature=0, max_tokens=8)
        assert said["choices"][0]["message"]["content"] == text
