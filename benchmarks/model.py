"""The models that the speed figures are taken on: 8 layers, 256 wide, random."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from tests.models import SPECIAL_TOKENS, make_model

LAYERS = 8
HIDDEN = 256
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 768}
WORDS = ["river", "stone", "lamp", "seven", "cloud", "paper", "north", "ring", "quiet", "hand"]


def make_bench_model(folder: Path, dtype: str = "float32") -> Path:
    """A Qwen3 of about 6 million parameters."""
    make_model(
        folder, "qwen3", layers=LAYERS, hidden=HIDDEN, seed=11, head_dim=HIDDEN // 8, **SHAPE
    )
    return _settle(folder, dtype)


def make_qwen2_model(folder: Path, dtype: str = "float32") -> Path:
    """A Qwen2 of the same size: mlx-lm can run it as a pipeline, which it cannot do with Qwen3.

    In two files with an index, as ``mlx_lm.utils.sharded_load`` wants it.
    """
    make_model(
        folder,
        "llama",
        layers=LAYERS,
        hidden=HIDDEN,
        seed=12,
        shards=2,
        model_type="qwen2",
        **SHAPE,
    )
    return _settle(folder, dtype)


def plain_tokens() -> list[int]:
    """Ids that the model may say: single bytes of ASCII in the tokenizer of ``tests/models.py``."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [index for index, sign in enumerate(alphabet) if sign.isascii()]
    space = alphabet.index("\u0120")  # how a byte-level alphabet writes it
    return [*printable, space]


def _settle(folder: Path, dtype: str) -> Path:
    """Sets the type of all weights, and makes the model say printable signs only.

    So an answer never ends before its length, and each token is text as soon as it is there:
    what is not to be said gets an embedding, which is the head too, that is nearly zero.
    """
    said = set(plain_tokens())
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    size = 256 + len(SPECIAL_TOKENS)
    loud = mx.array([1.0 if token in said else 1e-3 for token in range(size)])[:, None]
    for path in sorted(folder.glob("*.safetensors")):
        weights = cast(dict[str, mx.array], mx.load(str(path)))
        embedding = weights.get("model.embed_tokens.weight")
        if embedding is not None:
            weights["model.embed_tokens.weight"] = embedding * loud
        weights = {name: value.astype(getattr(mx, dtype)) for name, value in weights.items()}
        mx.eval(weights)
        mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    config["torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def prompt_of(number: int, characters: int) -> str:
    """Varied text of an exact length, different from its first words on for every number.

    The tokenizer has a token for each byte.
    """
    source = random.Random(number)
    text = f"{number} "
    while len(text) < characters:
        text += source.choice(WORDS) + " "
    return text[:characters]
