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

from parallax.fabric.version import mlx_version
from parallax.node.measurements import Measurements, best, recall, remember
from parallax.proto import wire_pb2 as wire

log = logging.getLogger(__name__)

SHARE_OF_FREE_MEMORY = 0.75  # the rest is for the system and for what others start
SHARE_OF_FREE_GPU = 0.9
SHARE_OF_WIRED = 0.9  # the rest is for what a step holds besides weights and caches
MEASURE_S = 0.15  # for each of the two measurements
COPY_BYTES = (4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30)
MATRIX_SIZES = (128, 256, 512, 1024, 2048, 4096)
LONG_ENOUGH_S = 1.5e-3
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

DeviceInfo = Mapping[str, str | int]
Job = Callable[[], object]


def measure_facts(
    node_id: str, *, name: str, memory_bytes: int | None, kept: Path | None = None
) -> wire.NodeFacts:
    """Looks and measures, within half a second, on the calling thread.

    Args:
        node_id: the node's peer id.
        name: what people call it.
        memory_bytes: the most it may hold; None takes what the system recommends.
        kept: a file with what was measured earlier, used for a day and then bettered.
    """
    kind = backend()
    info = mx.device_info()
    whole = total_memory(info)
    chip = chip_name(kind, info)
    speeds = _speeds(kept, f"{kind} {chip} mlx {mlx_version()}")
    return wire.NodeFacts(
        node_id=node_id,
        name=name,
        chip=chip,
        platform=f"{platform.system()}-{platform.machine()}",
        memory_bytes=whole,
        budget_bytes=budget(kind, info, whole, memory_bytes),
        bandwidth_bytes_s=speeds.bandwidth_bytes_s,
        flops=speeds.flops,
        accelerators=0 if kind == "cpu" else 1,
        backend=kind,
    )


def _speeds(kept: Path | None, device: str) -> Measurements:
    known = recall(kept, device) if kept is not None else None
    if known is not None and known[1]:
        return known[0]
    found = Measurements(measure_bandwidth(MEASURE_S), measure_flops(MEASURE_S))
    if known is not None:
        found = best(found, known[0])
    if kept is not None:
        remember(kept, device, found)
    return found


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
        return int(int(recommended) * SHARE_OF_WIRED)
    if kind == "cuda":
        return int(int(info.get("free_memory") or whole) * SHARE_OF_FREE_GPU)
    free = min(psutil.virtual_memory().available, container_limit())
    return int(free * SHARE_OF_FREE_MEMORY)


def measure_bandwidth(limit_s: float) -> float:
    """Bytes per second at which memory is read: what bounds decode. Sums a large array."""

    def prepare(size_bytes: int) -> Job:
        array = mx.ones((size_bytes // 4,), dtype=mx.float32)
        mx.eval(array)
        return lambda: mx.eval(mx.sum(array))

    size_bytes, seconds = _fastest(limit_s, COPY_BYTES, prepare)
    return size_bytes / seconds


def measure_flops(limit_s: float) -> float:
    """FLOP/s of a float32 matrix product: what bounds prefill. Multiplies large squares."""

    def prepare(size: int) -> Job:
        square = mx.ones((size, size), dtype=mx.float32)
        mx.eval(square)
        return lambda: mx.eval(square @ square)

    size, seconds = _fastest(limit_s, MATRIX_SIZES, prepare)
    return 2 * size**3 / seconds


def _fastest(
    limit_s: float, sizes: tuple[int, ...], prepare: Callable[[int], Job]
) -> tuple[int, float]:
    """The first size that takes long enough to be timed, and its fastest run in seconds.

    Long enough that starting a kernel does not count, and no longer, so that
    some of many runs are not interrupted by whatever else this machine does.
    """
    begin = time.perf_counter()
    for size in sizes:
        job = prepare(size)
        job()  # compiles, and touches the memory
        fastest = _time(job)
        if fastest >= LONG_ENOUGH_S or time.perf_counter() - begin > limit_s:
            break
    while time.perf_counter() - begin < limit_s:
        fastest = min(fastest, _time(job))
    return size, fastest


def _time(job: Job) -> float:
    begin = time.perf_counter()
    job()
    return max(time.perf_counter() - begin, 1e-9)
