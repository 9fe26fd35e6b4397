"""What this build is, and what it speaks."""

from __future__ import annotations

from importlib import metadata

PROTOCOL = 3  # raised when two builds can no longer talk


def _of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


VERSION = _of("parallax-cluster")


def mlx_version() -> str:
    """The installed mlx, read without importing it."""
    return _of("mlx")


def mlx_lm_version() -> str:
    """The installed mlx-lm, read without importing it."""
    return _of("mlx-lm")
