"""What a node tells of its machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import mlx.core as mx
import psutil
import pytest

from parallax.node import facts, measurements


def test_a_machine_is_measured_within_half_a_second() -> None:
    mx.eval(mx.ones((4,)) + 1)  # MLX's own start is not ours to answer for
    times = []
    for _ in range(3):  # other work on this machine only adds
        begin, begin_cpu = time.monotonic(), time.process_time()
        found = facts.measure_facts("id", name="studio", memory_bytes=None)
        # The clock of a busy machine runs on meanwhile, and that of many cores is fast.
        times.append(min(time.monotonic() - begin, time.process_time() - begin_cpu))
    assert min(times) < 0.5, times
    assert found.node_id == "id"
    assert found.name == "studio"
    assert found.chip
    assert found.backend == facts.backend()
    assert found.accelerators == (0 if found.backend == "cpu" else 1)
    assert 0 < found.budget_bytes <= found.memory_bytes
    assert found.bandwidth_bytes_s > 1e8
    assert found.flops > 1e8


def test_the_budget_is_what_was_asked_for_and_never_more_than_there_is() -> None:
    assert facts.budget("cpu", {}, 1000, 300) == 300
    assert facts.budget("cpu", {}, 1000, 3000) == 1000


def test_without_a_wish_a_mac_holds_most_of_what_metal_recommends() -> None:
    info: facts.DeviceInfo = {"max_recommended_working_set_size": 700, "memory_size": 1000}
    assert facts.total_memory(info) == 1000
    assert facts.budget("metal", info, 1000, None) == 630


def test_without_a_wish_a_gpu_holds_most_of_its_free_memory() -> None:
    info: facts.DeviceInfo = {"total_memory": 2000, "free_memory": 1000}
    assert facts.total_memory(info) == 2000
    assert facts.budget("cuda", info, 2000, None) == 900


def test_without_a_wish_a_processor_leaves_room_for_others() -> None:
    held = facts.budget("cpu", {}, psutil.virtual_memory().total, None)
    assert 0 < held < psutil.virtual_memory().total * 0.8


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("4096\n")
    assert facts.container_limit(limit) == 4096
    limit.write_text("max\n")
    assert facts.container_limit(limit) == sys.maxsize
    assert facts.container_limit(tmp_path / "none") == sys.maxsize


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC: the 2nd\nmodel name\t: x\n", "AMD EPYC: the 2nd"),
        ("processor\t: 0\nBogoMIPS\t: 48.00\n", ""),
    ],
)
def test_the_processors_name_is_read(tmp_path: Path, text: str, name: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert facts.cpu_model(str(path)) == name


def test_what_was_measured_is_kept_for_a_day_and_then_only_bettered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter([(50.0, 7.0), (40.0, 9.0), (1.0, 1.0)])
    measured: list[tuple[float, float]] = []

    def bandwidth(_: float) -> float:
        measured.append(next(speeds))
        return measured[-1][0]

    monkeypatch.setattr(facts, "measure_bandwidth", bandwidth)
    monkeypatch.setattr(facts, "measure_flops", lambda _: measured[-1][1])
    file = tmp_path / "state" / "measurements.json"

    def look() -> tuple[float, float]:
        found = facts.measure_facts("id", name="studio", memory_bytes=None, kept=file)
        return found.bandwidth_bytes_s, found.flops

    assert look() == look() == (50.0, 7.0)
    assert len(measured) == 1
    monkeypatch.setattr(measurements, "GOOD_FOR_S", 0.0)
    assert look() == (50.0, 9.0)
    assert len(measured) == 2
    file.write_text(file.read_text().replace("9.0", "-9.0"))
    assert look() == (1.0, 1.0), "nonsense is measured anew"
    file.write_text('{"format": 1}')
    assert measurements.recall(file, "any") is None
    assert measurements.recall(tmp_path / "none", "any") is None
