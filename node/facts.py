"""What this machine is and how fast: chip, memory, measured bandwidth and FLOP/s."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import psutil

from parallax.proto import wire_pb2 as wire

log = logging.getLogger(__name__)

SHARE_OF_FREE_MEMORY = 0.75  # the rest is for the system and for what others start
SHARE_OF_FREE_GPU = 0.9
MEASURE_S = 0.15  # for each of the two measurements
COPY_BYTES = (4 << 20, 32 << 20, 256 << 20)  # the largest that fits the time counts
MATRIX_SIZES = (128, 256, 512, 1024, 2048, 4096)
REPEATS = 3
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

DeviceInfo = Mapping[str, str | int]


def measure_facts(node_id: str, *, name: str, memory_bytes: int | None) -> wire.NodeFacts:
    """Looks and measures, within half a second, on the calling thread.

    Args:
        node_id: the node's peer id.
        name: what people call it.
        memory_bytes: the most it may hold; None takes what the system recommends.
    """
    kind = backend()
    info = mx.device_info()
    whole = total_memory(info)
    return wire.NodeFacts(
        node_id=node_id,
        name=name,
        chip=chip_name(kind, info),
        platform=f"{platform.system()}-{platform.machine()}",
        memory_bytes=whole,
        budget_bytes=budget(kind, info, whole, memory_bytes),
        bandwidth_bytes_s=measure_bandwidth(MEASURE_S),
        flops=measure_flops(MEASURE_S),
        accelerators=0 if kind == "cpu" else 1,
        backend=kind,
    )


def backend() -> str:
    """``metal``, ``cuda`` or ``cpu``: what MLX computes on."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def chip_name(kind: str, info: DeviceInfo) -> str:
    """The GPU's name on a GPU, otherwise the processor's."""
    name = str(info.get("device_name", ""))
    if kind != "cpu" and name:
        return name
    if sys.platform == "darwin":
        try:
            brand = subprocess.run(
                ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
                capture_output=True,
                text=True,
                timeout=2,
                check=True,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            brand = ""
    else:
        brand = cpu_model("/proc/cpuinfo")
    return brand or name or platform.processor() or platform.machine()


def cpu_model(path: str) -> str:
    """The processor's name in Linux's ``/proc/cpuinfo``; "" if it is not told (as on ARM)."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, "")


def total_memory(info: DeviceInfo) -> int:
    """Bytes that models could live in: the GPU's where it has its own, else the machine's."""
    told = info.get("memory_size") or info.get("total_memory")
    return int(told) if told else min(psutil.virtual_memory().total, container_limit())


def container_limit(path: Path = CGROUP_LIMIT) -> int:
    """What a container may use (cgroup v2); without a limit, more than anything."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return sys.maxsize


def budget(kind: str, info: DeviceInfo, whole: int, memory_bytes: int | None) -> int:
    """Bytes that this node may hold: weights and caches."""
    if memory_bytes is not None:
        if memory_bytes > whole:
            log.warning("This machine has %d bytes, fewer than --memory %d", whole, memory_bytes)
        return min(memory_bytes, whole)
    recommended = info.get("max_recommended_working_set_size")
    if kind == "metal" and recommended:
        return int(recommended)
    if kind == "cuda":
        return int(int(info.get("free_memory") or whole) * SHARE_OF_FREE_GPU)
    free = min(psutil.virtual_memory().available, container_limit())
    return int(free * SHARE_OF_FREE_MEMORY)


def measure_bandwidth(limit_s: float) -> float:
    """Bytes per second at which memory is read: what bounds decode. Sums ever larger arrays."""

    def rate(size_bytes: int) -> float:
        array = mx.ones((size_bytes // 4,), dtype=mx.float32)
        mx.eval(array)
        return size_bytes / _fastest(lambda: mx.eval(mx.sum(array)))

    return _last_within(limit_s, COPY_BYTES, rate)


def measure_flops(limit_s: float) -> float:
    """FLOP/s of a float32 matrix product: what bounds prefill. Multiplies ever larger squares."""

    def rate(size: int) -> float:
        square = mx.ones((size, size), dtype=mx.float32)
        mx.eval(square)
        return 2 * size**3 / _fastest(lambda: mx.eval(square @ square))

    return _last_within(limit_s, MATRIX_SIZES, rate)


def _last_within(limit_s: float, sizes: tuple[int, ...], rate: Callable[[int], float]) -> float:
    """The rate at the largest size for which there is time: sizes grow eightfold at most."""
    begin = time.perf_counter()
    result = 0.0
    for size in sizes:
        before = time.perf_counter()
        result = rate(size)
        now = time.perf_counter()
        if now - begin + 8 * (now - before) > limit_s:
            break
    return result


def _fastest(job: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs: the others were disturbed, or compiled."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        job()
        times.append(time.perf_counter() - begin)
    return max(min(times), 1e-9)
