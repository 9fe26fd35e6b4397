"""Nodes without a model's files get what their layers need from the scheduler and from others."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

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


def held_blocks(parts: Path) -> int:
    """Blocks that a node's list of parts names."""
    kept = json.loads(parts.read_text())
    return sum(int.from_bytes(bytes.fromhex(b), "little").bit_count() for b in kept.values())


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
