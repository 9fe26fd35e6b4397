"""Configurations made tiny: the same architecture, layer for layer, with small dimensions.

Counts of heads are divided by one number, head dimensions by another, and widths by the product, so
whatever equations a model's configuration satisfies (hidden = heads x head dimension, inner = n x
hidden, …) still hold. The pattern of layers stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Config = dict[str, Any]

_HEADS = re.compile(r"(heads|n_head|n_head_kv|num_head|n_groups|num_groups)$")
_HEAD_DIMENSION = re.compile(r"(head_dim|d_head|head_size|kv_channels|rotary_dim|rope_dim)$")
_WIDTH = re.compile(
    r"(hidden_size|intermediate_size|ffn_dim|ffn_size|hidden_dim|d_model|n_embd|n_inner|d_ssm"
    r"|d_inner|d_ff|lru_width|model_dim|block_dim|block_ff_dim|mlp_dim|per_layer_input)$|^dim$"
)
_EXPERTS = re.compile(r"(num|n)_(\w+_)?experts$")
_STATE = re.compile(r"(state_size|d_state|state_dim)$")
_WINDOW = re.compile(r"(window|window_size|attention_chunk_size)$")
_ROPE = ("rope_scaling", "rope_parameters")

_VOCABULARY = 128
_WINDOW_TOKENS = 8  # so that a short text crosses it
_RANK = 32
_STATE_SIZE = 16
_MOST_HEADS = 4
_LEAST_HEAD_DIMENSION = 8

# Weights' own formats; the twin's are float32.
_DROPPED = ("quantization", "quantization_config", "quantize_activations")


def shrunk(config: Config) -> Iterator[Config]:
    """Smaller and smaller twins' configurations are tried first: tiny, then with real head
    dimensions, then with real heads too.
    """
    heads, head_dimension = _divisors(config)
    for by_heads, by_dimension in ((heads, head_dimension), (heads, 1), (1, 1)):
        yield _shrink(config, by_heads, by_dimension)


def _divisors(config: Config) -> tuple[int, int]:
    """What head counts and head dimensions can be divided by, powers of two."""
    counts = [n for n in _numbers(config, _HEADS) if n > 1]
    heads = 1
    while counts and max(counts) // heads > _MOST_HEADS and _all_divide(counts, 2 * heads):
        heads *= 2
    sizes = _numbers(config, _HEAD_DIMENSION)
    text = config.get("text_config", config)
    hidden = text.get("hidden_size") or text.get("n_embd") or text.get("d_model")
    attention = text.get("num_attention_heads") or text.get("n_head") or text.get("n_heads")
    if not sizes and isinstance(hidden, int) and isinstance(attention, int):
        sizes = [hidden // attention]
    dimension = 1
    while sizes and min(sizes) // (2 * dimension) >= _LEAST_HEAD_DIMENSION:
        if not _all_divide(sizes, 4 * dimension):  # rotated in pairs: they stay even
            break
        dimension *= 2
    return heads, dimension


def _all_divide(numbers: list[int], divisor: int) -> bool:
    return all(number % divisor == 0 for number in numbers)


def _numbers(config: Config, name: re.Pattern[str]) -> list[int]:
    found = []
    for key, value in config.items():
        if isinstance(value, dict) and key not in _ROPE:
            found += _numbers(value, name)
        elif name.search(key):
            values = value if isinstance(value, list) else [value]
            found += [v for v in values if type(v) is int and v > 0]
    return found


def _shrink(config: Config, heads: int, dimension: int) -> Config:
    small: Config = {}
    for key, value in config.items():
        if key in _DROPPED:
            continue
        if key in _ROPE and isinstance(value, dict):
            small[key] = {k: _rope(v, dimension) for k, v in value.items()}
        elif isinstance(value, dict):
            small[key] = _shrink(value, heads, dimension)
        else:
            small[key] = _each(value, _rule(key, heads, dimension))
    _shrink_experts(small)
    return small


def _rule(key: str, heads: int, dimension: int) -> Callable[[int], int]:
    if "vocab_size" in key:
        return lambda n: min(n, _VOCABULARY)
    if _HEADS.search(key):
        return lambda n: n if n == 1 else _divide(n, heads)
    if _HEAD_DIMENSION.search(key):
        return lambda n: _divide(n, dimension)
    if _WIDTH.search(key):
        return lambda n: _divide(n, heads * dimension)
    if key.endswith("_rank"):
        return lambda n: min(n, _RANK)
    if _STATE.search(key):
        return lambda n: min(n, _STATE_SIZE)
    if _WINDOW.search(key):
        return lambda n: min(n, _WINDOW_TOKENS)
    return lambda n: n


def _each(value: Any, rule: Callable[[int], int]) -> Any:
    if isinstance(value, list):
        return [_each(v, rule) for v in value]
    return rule(value) if type(value) is int and value > 0 else value


def _divide(number: int, by: int) -> int:
    return max(1, -(-number // by))


def _rope(value: Any, dimension: int) -> Any:
    """Lists have one entry for each rotated pair, or a number of pairs in each entry."""
    if not isinstance(value, list) or dimension == 1:
        return value
    if all(type(v) is int for v in value):
        return [v // dimension for v in value]
    return value[: _divide(len(value), dimension)]


def _shrink_experts(config: Config) -> None:
    """As few experts as routing can do with: two for each group, and more than are chosen."""
    keys = [key for key in config if _EXPERTS.search(key) and "shared" not in key]
    groups = config.get("n_group") or config.get("n_expert_groups") or 1
    chosen_groups = config.get("topk_group") or groups
    chosen = max(
        (config[k] for k in config if re.search(r"(experts_per_tok|top_k|topk)$", k) and config[k]),
        default=1,
    )
    if not all(type(n) is int and n > 0 for n in (groups, chosen_groups, chosen)):
        return
    for key in keys:
        count = config[key]
        if type(count) is int and count > 0 and "per_tok" not in key:
            in_group = max(2, -(-(chosen + 1) // chosen_groups))
            config[key] = min(count, groups * in_group)
