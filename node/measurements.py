"""What a machine measured of itself, kept on disk for a day: who starts again starts at once."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

log = logging.getLogger(__name__)

GOOD_FOR_S = 24 * 3600.0
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Measurements:
    """Speeds of one kind of device under one version of MLX."""

    bandwidth_bytes_s: float
    flops: float


def recall(file: Path, device: str) -> tuple[Measurements, bool] | None:
    """What was measured of this device, and whether it still counts; None if nothing was."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["format"] != _FORMAT or kept["device"] != device:
            return None
        found = Measurements(float(kept["bandwidth_bytes_s"]), float(kept["flops"]))
        age_s = time.time() - float(kept["at"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if not all(
        math.isfinite(speed) and speed > 0 for speed in (found.bandwidth_bytes_s, found.flops)
    ):
        return None
    return found, 0 <= age_s < GOOD_FOR_S


def remember(file: Path, device: str, found: Measurements) -> None:
    """Keeps measurements; they are worth keeping, not worth failing for."""
    kept = {"format": _FORMAT, "device": device, "at": time.time(), **asdict(found)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(kept), encoding="utf-8")
        fresh.replace(file)
    except OSError as error:
        log.warning("measurements could not be kept: %s", error)


def best(one: Measurements, other: Measurements) -> Measurements:
    """The higher speeds of two: whatever else a machine does, a measurement errs downwards."""
    return Measurements(
        max(one.bandwidth_bytes_s, other.bandwidth_bytes_s), max(one.flops, other.flops)
    )
