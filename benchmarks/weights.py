"""How fast a node without a model's files fetches them, from one source and from two.

    python -m benchmarks.weights [--hidden 1024] [--layers 12]

A real cluster on loopback: the scheduler has the model, the nodes have nothing. The first node
fetches all of it from the scheduler; a second one, which makes a ring of its own, fetches all of it
from the scheduler and the first node. The rate is bytes over the time that the status shows the
phase "fetching" with bytes: sums, checks, writing and syncing the disk included, and all processes
share this machine's processors.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from tests.cluster import Cluster, boot
from tests.models import make_model


def fetching_s(cluster: Cluster, name: str) -> tuple[float, int]:
    """Seconds that a node fetches, and how many bytes; it must not have begun yet."""
    begin = end = 0.0
    total = 0
    while True:
        (node,) = [n for n in cluster.status()["node_list"] if n["name"] == name] or [{}]
        load = node.get("load") or {}
        if load.get("phase") == "fetching" and load["total_bytes"]:
            begin = begin or time.perf_counter()
            end = time.perf_counter()
            total = load["total_bytes"]
        elif begin:
            return end - begin, total
        time.sleep(0.01)


def main() -> None:
    """Makes a model, measures twice, prints two lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="parallax-weights-") as place:
        hidden = Path(place) / "hidden"
        model = make_model(
            hidden / "model", layers=arguments.layers, hidden=arguments.hidden, shards=2
        )
        variables = {"HIDDEN_FOLDER": str(hidden)}
        with boot(model, nodes=0, wanted=1, variables=variables) as cluster:
            for name, sources in (("first", "the scheduler"), ("second", "scheduler and node")):
                cluster.join(name, module="tests.elsewhere")
                seconds, size = fetching_s(cluster, name)
                rate = size / seconds / 1e6
                print(
                    f"{size / 1e6:.0f} MB from {sources}: {seconds:.2f} s, {rate:.0f} MB/s"
                    f" ({os.cpu_count()} processors)",
                    flush=True,
                )
                cluster.wait_ready(1 if name == "first" else 2)


if __name__ == "__main__":
    main()
