"""A model that copies its context, by construction.

An 8-layer, 256-wide Qwen3 whose weights are random but for an induction circuit (Elhage et al., "A
Mathematical Framework for Transformer Circuits", 2021; Olsson et al., "In-context Learning and
Induction Heads", 2022):

- layer 0 has three heads that attend to the tokens one, two and three places back, by position
  alone, and write what they find beside each token's own code;
- layer 4 has two heads whose query is a digest of a token and the two before it, and whose key
  is the same digest one place earlier: each token attends to where its own context stood before,
  and takes the code of the token that followed there;
- the head reads that code.

A *counter* is the same model with another head: it reads a token's own code and says the next sign
of the alphabet, whatever stood there before, so a prompt can be made that misleads every draft.

All other weights are random and write to dimensions that nothing reads, so the work of a step is
that of any model of this size.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import mlx.core as mx

from benchmarks.model import HIDDEN, LAYERS, SHAPE, plain_tokens
from tests.models import VOCABULARY, make_model, random_weights

HEAD = 32  # dimensions of a head, and of a token's code
HEADS = 8
BACK = 3  # tokens in a digest
LOOK_LAYER = 0
COPY_LAYER = 4

# Where things stand in the residual stream.
CODE = 0  # a token's own code; those of the tokens before follow it
FOUND = (BACK + 1) * HEAD  # the code that the induction heads bring
ONE = FOUND + HEAD  # a constant
SPARE = ONE + 1  # what nothing reads

# So large that half the dimensions of a head hardly turn over a few thousand positions.
ROPE_BASE = 1e10
STILL = 6  # frequencies from this one on are still
SHARPNESS = 20.0  # of both norms: the logits of attention are up to its square times sqrt(32)


def make_copier(folder: Path, dtype: str = "float32") -> Path:
    """Writes a model that goes on as its context did before."""
    return _make(folder, dtype, FOUND, {token: token for token in plain_tokens()})


def make_counter(folder: Path, dtype: str = "float32") -> Path:
    """Writes a model that says the signs of :func:`alphabet` in turn."""
    said = plain_tokens()
    return _make(folder, dtype, CODE, dict(zip([*said[1:], said[0]], said, strict=True)))


def passage_of(number: int, characters: int) -> str:
    """Text in which no three signs occur twice in this order: what a copier can copy."""
    source = random.Random(number)
    text = ""
    around = "user assistant"  # what the chat template says besides
    seen = {around[place : place + BACK] for place in range(len(around))}
    while len(text) < characters:
        sign = source.choice("abcdefghijklmnopqrstuvwxyz ")
        context = (text + sign)[-BACK:]
        if context not in seen and not context.endswith("  "):
            seen.add(context)
            text += sign
    return text


def misleading(block: int) -> str:
    """A prompt in which each ``block`` signs that follow each other in the alphabet are followed
    by one that does not: every draft of a counter's answer that looks at so many is wrong."""
    signs = alphabet()
    text = ""
    for start in range(len(signs)):
        here = [signs[(start + i) % len(signs)] for i in range(block)]
        text += "".join(here) + signs[(start + len(signs) // 2) % len(signs)]
    return text


def alphabet() -> list[str]:
    """The printable signs of ASCII, the space at the end: in the order of the tokenizer's ids."""
    return [*(chr(code) for code in range(33, 127)), " "]


def _make(folder: Path, dtype: str, reads: int, meant: dict[int, int]) -> Path:
    """``reads``: where in the residual stream the head looks; ``meant``: what it says for which
    token's code."""
    from parallax.node import mlx_lm_seam as seam

    make_model(
        folder,
        "qwen3",
        layers=LAYERS,
        hidden=HIDDEN,
        seed=13,
        head_dim=HEAD,
        rope_theta=ROPE_BASE,
        tie_word_embeddings=False,
        **SHAPE,
    )
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights = random_weights(seam.random_model(config), 13)
    for name, value in list(weights.items()):
        if name.endswith("layernorm.weight") or name.endswith(".norm.weight"):
            weights[name] = mx.ones_like(value)
        elif name.endswith("o_proj.weight") or name.endswith("down_proj.weight"):
            weights[name] = _only_spare(value)
    mx.random.seed(17)
    codes = _unit(mx.random.normal((VOCABULARY, HEAD)))
    embedding = mx.zeros((VOCABULARY, HIDDEN))
    embedding[:, CODE : CODE + HEAD] = codes
    embedding[:, ONE] = 1.0
    weights["model.embed_tokens.weight"] = embedding
    weights["model.norm.weight"] = mx.ones((HIDDEN,))
    _look_back(weights)
    _copy(weights)
    head = mx.zeros((VOCABULARY, HIDDEN))
    for token, code in meant.items():
        head[token, reads : reads + HEAD] = codes[code]
    weights["lm_head.weight"] = head
    weights = {name: value.astype(getattr(mx, dtype)) for name, value in weights.items()}
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def _look_back(weights: dict[str, mx.array]) -> None:
    """Layer 0: head h attends h + 1 places back, and takes that token's code."""
    prefix = f"model.layers.{LOOK_LAYER}.self_attn"
    # All query and key heads are the same constant vector, in the dimensions that turn; a query
    # is turned back by its distance, so that it meets the key of the token that far back.
    kv = HEADS // 2
    query = mx.zeros((HEADS * HEAD, HIDDEN))
    key = mx.zeros((kv * HEAD, HIDDEN))
    value = mx.zeros((kv * HEAD, HIDDEN))
    output = _only_spare(weights[f"{prefix}.o_proj.weight"])
    half = HEAD // 2
    for head in range(kv):
        key[head * HEAD : head * HEAD + STILL, ONE] = 1.0
        value[head * HEAD : (head + 1) * HEAD, CODE : CODE + HEAD] = mx.eye(HEAD)
    for head in range(HEADS):
        for place in range(STILL):
            angle = -(head + 1) * ROPE_BASE ** (-place / half)
            query[head * HEAD + place, ONE] = mx.cos(mx.array(angle))
            query[head * HEAD + half + place, ONE] = mx.sin(mx.array(angle))
    output[:, :] = mx.where(mx.arange(HIDDEN)[:, None] >= SPARE, output, 0.0)
    rms = (2.0 / HIDDEN) ** 0.5  # of an embedding: a unit code and a one
    for head in range(BACK):
        row = CODE + (head + 1) * HEAD
        output[row : row + HEAD, head * HEAD : (head + 1) * HEAD] = mx.eye(HEAD) * rms
    weights[f"{prefix}.q_proj.weight"] = query
    weights[f"{prefix}.k_proj.weight"] = key
    weights[f"{prefix}.v_proj.weight"] = value
    weights[f"{prefix}.o_proj.weight"] = output
    _sharpen(weights, prefix)


def _copy(weights: dict[str, mx.array]) -> None:
    """Layer 4: a digest of the last three tokens looks for the same one, a place earlier."""
    prefix = f"model.layers.{COPY_LAYER}.self_attn"
    half = HEAD // 2
    still = half - STILL
    rows = [*range(STILL, half), *range(half + STILL, HEAD)]
    mixes = [mx.random.normal((2 * still, HEAD)) / HEAD**0.5 for _ in range(BACK)]
    query = weights[f"{prefix}.q_proj.weight"]
    key = weights[f"{prefix}.k_proj.weight"]
    value = weights[f"{prefix}.v_proj.weight"]
    output = weights[f"{prefix}.o_proj.weight"]
    for head in range(2):  # two query heads share the first key head
        query[head * HEAD : (head + 1) * HEAD] = 0.0
        key[:HEAD] = 0.0
        for back, mix in enumerate(mixes):
            for number, row in enumerate(rows):
                column = CODE + back * HEAD
                query[head * HEAD + row, column : column + HEAD] = mix[number]
                key[row, column + HEAD : column + 2 * HEAD] = mix[number]
        output[FOUND : FOUND + HEAD, head * HEAD : (head + 1) * HEAD] = mx.eye(HEAD)
    value[:HEAD] = 0.0
    value[:HEAD, CODE : CODE + HEAD] = mx.eye(HEAD)
    weights[f"{prefix}.q_proj.weight"] = query
    weights[f"{prefix}.k_proj.weight"] = key
    weights[f"{prefix}.v_proj.weight"] = value
    weights[f"{prefix}.o_proj.weight"] = output
    _sharpen(weights, prefix)


def _sharpen(weights: dict[str, mx.array], prefix: str) -> None:
    for norm in ("q_norm", "k_norm"):
        weights[f"{prefix}.{norm}.weight"] = mx.full((HEAD,), SHARPNESS)


def _only_spare(output: mx.array) -> mx.array:
    """An output projection that writes where nothing reads, a little."""
    return mx.where(mx.arange(output.shape[0])[:, None] >= SPARE, 0.1 * output, 0.0)


def _unit(vectors: mx.array) -> mx.array:
    return vectors / mx.linalg.norm(vectors, axis=-1, keepdims=True)
