"""The built-in demonstration model: tiny, honest about it, and part of the package."""

from __future__ import annotations

from pathlib import Path

BUILTIN_NAME = "builtin"


def model_path() -> Path:
    """Return the folder of the shipped model, in the Hugging Face layout."""
    return Path(__file__).resolve().parent / "model"
