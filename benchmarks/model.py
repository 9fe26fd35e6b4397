"""The model that the speed figures are taken on."""

from __future__ import annotations

from pathlib import Path

from tests.models import make_model

LAYERS = 8
HIDDEN = 256


def make_bench_model(folder: Path) -> Path:
    """An 8-layer, 256-wide random float32 Qwen3 of about 6 million parameters."""
    return make_model(
        folder,
        "qwen3",
        layers=LAYERS,
        hidden=HIDDEN,
        seed=11,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=768,
    )
