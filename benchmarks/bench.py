"""What the parts of a run share: models on disk, clusters, mlx-lm beside them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import load as load_tokenizer

from benchmarks.model import make_bench_model, make_qwen2_model
from benchmarks.worker import Worker
from parallax.fabric import settings
from tests.cluster import Cluster, boot

OFF = {"PARALLAX_SPECULATION": "false"}


class Bench:
    """One run of the benchmark.

    Args:
        rounds: how often the sides take turns.
        nodes: how many nodes clusters have where a part does not say.
        dtype: of the models' weights.
        folder: where models are made.
    """

    def __init__(self, rounds: int, nodes: int, dtype: str, folder: Path) -> None:
        self.rounds = rounds
        self.nodes = nodes
        self.dtype = dtype
        self.folder = folder
        self._prompts = 0

    @cached_property
    def model(self) -> Path:
        """The Qwen3 that most figures are taken on."""
        return make_bench_model(self.folder / "bench-qwen3", self.dtype)

    @cached_property
    def qwen2(self) -> Path:
        """A Qwen2 of the same size."""
        return make_qwen2_model(self.folder / "bench-qwen2", self.dtype)

    @cached_property
    def overhead_tokens(self) -> int:
        """What the chat template adds to a message."""
        return len(self.ids(""))

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    def ids(self, prompt: str) -> list[int]:
        """The token ids of a chat with one user message; all models share the tokenizer."""
        messages = [{"role": "user", "content": prompt}]
        found: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return found

    def fresh(self) -> int:
        """A number that no prompt of this run has had: what is kept of others does not help."""
        self._prompts += 1
        return self._prompts

    def whole(self, model: Path) -> Worker:
        """mlx-lm with this model, in one process."""
        worker = Worker("benchmarks.baseline", str(model))
        worker.answer()
        return worker

    @contextmanager
    def cluster(
        self, model: Path, nodes: int | None = None, *, speculation: bool = True
    ) -> Iterator[Cluster]:
        """A cluster that serves this model."""
        variables = {} if speculation else OFF
        with boot(model, nodes=nodes or self.nodes, variables=variables) as cluster:
            yield cluster


def knows_speculation() -> bool:
    """Whether this build has the setting that turns speculation off."""
    return "speculation" in settings.KNOWN


def machine(dtype: str) -> dict[str, Any]:
    """What figures were taken on."""
    info = mx.device_info()
    return {
        "when": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "device": str(info.get("device_name") or mx.default_device()),
        "backend": "cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu",
        "dtype": dtype,
        "python": platform.python_version(),
        "mlx": version("mlx"),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


@contextmanager
def bench_of(rounds: int, nodes: int, dtype: str) -> Iterator[Bench]:
    """A run in a folder of its own, which goes with it."""
    with tempfile.TemporaryDirectory(prefix="parallax-bench-") as name:
        yield Bench(rounds, nodes, dtype, Path(name))


def read_results(path: Path) -> dict[str, Any]:
    """What earlier runs wrote; empty where there is nothing."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found if "parts" in found else {"parts": {}}
