"""Nodes without a model's files get what their layers need from the scheduler and from others."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
import urllib.request
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlx.core as mx

from parallax.fabric.blocks import Marks, blocks_of
from parallax.fabric.safetensors import folder_headers
from tests.cluster import Cluster, boot
from tests.fabric.test_models import Hub
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
    go_on = tmp_path / "go on"
    half = {"GIVEN_BYTES": str(size // 2), "GO_ON": str(go_on)}
    with boot(
        model,
        nodes=0,
        variables=nothing,
        scheduler_variables=full | half,
        scheduler_module="tests.reluctant",
    ) as cluster:
        fetched = cluster.folder / "node" / "fetched"
        node = cluster.join("node")
        deadline = time.monotonic() + 60
        while not (parts := list(fetched.glob("*/parts"))) or not held_bytes(parts[0]):
            assert time.monotonic() < deadline, node.output
            time.sleep(0.01)
        node.kill()
        node.stop()
        before = held_bytes(parts[0])
        assert before <= size // 2
        cluster.nodes.clear()
        sent = sent_bytes(cluster)
        go_on.touch()
        cluster.join("node")
        phases: set[tuple[str, bool]] = set()

        def ready(status: dict[str, Any]) -> bool:
            for entry in status["node_list"]:
                if entry["load"]:
                    phases.add((entry["load"]["phase"], entry["load"]["done_bytes"] >= before))
            return status["status"] == "available"

        cluster.wait(ready)
        again = sent_bytes(cluster) - sent - (size - before)
        assert 0 <= again <= 4 << 20, "beside what was on its way to the dead node"
        assert ("fetching", True) in phases
        said = cluster.chat(PROMPT, temperature=0, max_tokens=8)
        assert said["choices"][0]["message"]["content"] == text


class RangedHub(Hub):
    """A hub that gives out parts of files, and remembers which weights it gave out whole."""

    whole: list[str]

    def do_GET(self) -> None:
        name = self.path.split("?")[0].rsplit("/", 1)[1]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        weights = "/resolve/" in self.path and name.endswith(".safetensors")
        if weights and self.command == "GET" and asked and self.is_header(name, asked):
            body = (self.folder / name).read_bytes()
            begin, end = int(asked[1]), min(int(asked[2]) + 1, len(body))
            range_is = f"bytes {begin}-{end - 1}/{len(body)}"
            self.answer(body[begin:end], status=206, headers={"Content-Range": range_is})
            return
        if weights and self.command == "GET":
            self.whole.append(name)
        super().do_GET()

    def is_header(self, name: str, asked: re.Match[str]) -> bool:
        return int(asked[2]) < (self.folder / name).stat().st_size // 2

    do_HEAD = do_GET


def split_by_layers(folder: Path) -> None:
    """One file for the embedding and layers 0 to 2, another for the others and the head."""
    whole = folder / "model.safetensors"
    weights: Any = mx.load(str(whole))
    first = {n: a for n, a in weights.items() if re.search(r"embed|layers\.[012]\.", n)}
    rest = {n: a for n, a in weights.items() if n not in first}
    for number, part in enumerate((first, rest), 1):
        mx.save_safetensors(str(folder / f"model-{number}-of-2.safetensors"), part)
    whole.unlink()


def test_of_a_hub_model_only_the_files_that_a_node_lacks_are_fetched(
    tmp_path: Path,
) -> None:
    made = make_model(tmp_path / "made", layers=6, hidden=64, tie_word_embeddings=False)
    split_by_layers(made)
    text = (expected := Reference(made)).text(expected.greedy(PROMPT, 16))
    cache = tmp_path / "cache"
    shutil.copytree(made, tmp_path / "copy")
    model = in_hub_cache(cache, tmp_path / "copy")
    given: list[str] = []
    handler = type("ThisHub", (RangedHub,), {"folder": made, "whole": given})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            online = {
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(tmp_path / "scheduler"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
            }
            with boot(model, nodes=0, wanted=2, scheduler_variables=online) as cluster:
                cluster.environment["HF_HUB_CACHE"] = str(cache)
                cluster.join("has")
                cluster.wait(lambda s: len(s["node_list"]) == 1)
                assert given == [], "weights were fetched that nobody lacks"
                cluster.environment["HF_HUB_CACHE"] = str(tmp_path / "empty")
                cluster.join("lacks")
                status = cluster.wait_ready()
                stages = [s["name"] for s in status["rings"][0]["stages"]]
                assert given == [f"model-{stages.index('lacks') + 1}-of-2.safetensors"]
                said = cluster.chat(PROMPT, temperature=0, max_tokens=16)
                assert said["choices"][0]["message"]["content"] == text
        finally:
            server.shutdown()
            thread.join()
