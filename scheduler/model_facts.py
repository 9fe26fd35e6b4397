"""What the planner needs to know of a model, read from its configuration and headers.

Nothing here knows a model family: layers are found by the numbered part of
tensor names (``model.layers.7.mlp…``, ``transformer.h.7.…``, ``backbone.layers.7.…``),
embeddings by name, and a missing head means that it is tied to the embedding.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from parallax.fabric.errors import ModelBroken, UnknownArchitecture
from parallax.fabric.model_files import MOST_LAYERS
from parallax.fabric.models import ModelFolder
from parallax.fabric.safetensors import TensorInfo, folder_headers

_LAYER_COUNT = (
    "num_hidden_layers",
    "n_layers",
    "n_layer",
    "num_layers",
    "num_transformer_layers",
)
_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "max_context_length",
    "seq_length",
    "model_max_length",
)
_HIDDEN = ("hidden_size", "n_embd", "d_model", "model_dim", "dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "kv_heads")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_USED = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
_NESTED = ("text_config", "language_config", "llm_config")
_NO_CONTEXT_LIMIT = 32_768  # state-space models name no context length
_MOST_CONTEXT = 1 << 20  # a prompt travels as one message, of a few bytes for each token

_LAYER = re.compile(r"^(.*?\b(?:layers|h|blocks|block))\.(\d{1,6})\.")
_ASIDE = re.compile(r"(?:^|\.)(?:vision|visual|audio|speech|image|multi_modal|mm_|mtp|nextn)")
_EMBEDDING = re.compile(r"(?:^|\.)(?:\w*embed(?!_out)\w*|wte|wpe|embd|word_emb\w*)\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|head|output_layer|lm_proj)\.")
_EXPERT = re.compile(r"\.(?:experts|switch_mlp|switch_glu)\.")
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes and costs of a model, layer by layer. Lengths of tuples equal ``layers``."""

    name: str
    model_type: str
    layers: int
    layer_bytes: tuple[int, ...]  # weights
    first_bytes: int  # embedding, held by the first stage
    last_bytes: int  # norm and head, held by the last stage
    tied_bytes: int  # part of last_bytes that is the embedding again
    context_tokens: int
    hidden_size: int
    kv_bytes_per_token_per_layer: int
    layer_read_bytes: tuple[int, ...]  # weights that one decode step of one row reads
    layer_flops: tuple[float, ...]  # per token
    head_flops: float  # per token
    carry_bytes_per_token: int  # what one stage hands to the next
    draw_bytes: float = 0.0  # that could be read while the last stage draws one row's token

    @property
    def weight_bytes(self) -> int:
        """All weights, each counted once."""
        return self.stage_bytes(0, self.layers)

    def stage_bytes(self, first: int, end: int) -> int:
        """Weights of the stage that holds layers ``[first, end)``, in bytes."""
        total = sum(self.layer_bytes[first:end])
        if first == 0:
            total += self.first_bytes
        if end == self.layers:
            total += self.last_bytes
            if first == 0:
                total -= self.tied_bytes
        return total


def read_facts(folder: ModelFolder) -> ModelFacts:
    """Read a model's facts; opens headers only.

    Raises:
        ModelBroken: the headers do not fit the configuration.
        UnknownArchitecture: mlx-lm has no such model type.
    """
    check_architecture(folder.config)
    files = folder_headers(folder.path)
    tensors = {key: info for file in files.values() for key, info in file.items()}
    return facts_from(folder.name, folder.config, tensors, folder.path)


def facts_from(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: Path
) -> ModelFacts:
    """Compute facts from what has been read; ``path`` is for error messages."""
    layers = _integer(config, _LAYER_COUNT)
    if not layers or not 1 <= layers <= MOST_LAYERS:
        raise ModelBroken(f"config.json of {name} does not say how many layers it has", path=path)
    wanted = {key: info for key, info in tensors.items() if not _ASIDE.search(key)}
    groups = _layer_groups(wanted)
    stack = _stack(groups, layers, name, path)
    outside = {
        key: info
        for key, info in wanted.items()
        if (match := _LAYER.match(key)) is None or match.group(1) not in groups
    }
    embedding = {k: v for k, v in outside.items() if _EMBEDDING.search(k)}
    rest = {k: v for k, v in outside.items() if k not in embedding}
    first_bytes = _bytes(embedding.values())
    tied = not any(_HEAD.search(key) for key in rest)
    tied_bytes = _bytes(v for k, v in embedding.items() if "pos" not in k and "wpe" not in k)
    tied_bytes = tied_bytes if tied else 0
    item = _float_bytes(wanted.values())
    hidden = max(0, _integer(config, _HIDDEN) or 0)
    experts, used = _integer(config, _EXPERTS), _integer(config, _EXPERTS_USED)
    active = min(1.0, used / experts) if experts and used and min(experts, used) > 0 else 1.0
    head = embedding if tied else {k: v for k, v in rest.items() if _HEAD.search(k)}
    bits = _bits(config)
    return ModelFacts(
        name=name,
        model_type=str(config["model_type"]),
        layers=layers,
        layer_bytes=tuple(_bytes(layer.values()) for layer in stack),
        first_bytes=first_bytes,
        last_bytes=_bytes(rest.values()) + tied_bytes,
        tied_bytes=tied_bytes,
        context_tokens=_context(config),
        hidden_size=hidden,
        kv_bytes_per_token_per_layer=item * max(_kv_width(config, layer) for layer in stack),
        layer_read_bytes=tuple(
            round(sum(v.nbytes * _share(k, active) for k, v in layer.items())) for layer in stack
        ),
        layer_flops=tuple(
            2.0 * sum(_parameters(k, v, bits) * _share(k, active) for k, v in layer.items())
            for layer in stack
        ),
        head_flops=2.0 * sum(_parameters(k, v, bits) for k, v in head.items()),
        carry_bytes_per_token=item * hidden,
    )


def parameter_count(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> int:
    """Parameters in the matrices of a model, quantised ones counted as what they stand for."""
    bits = _bits(config)
    return round(sum(_parameters(key, info, bits) for key, info in tensors.items()))


def check_architecture(config: Mapping[str, Any]) -> None:
    """See that mlx-lm has a module for this model type, without importing MLX.

    Raises:
        UnknownArchitecture: it has none.
    """
    model_type = str(config.get("model_type", ""))
    by_type, by_architecture = _remapping()
    given = config.get("architectures")
    architectures = given if isinstance(given, list) else [given]
    module = by_type.get(model_type, model_type)
    for architecture in (a for a in architectures if isinstance(a, str)):
        module = by_architecture.get((model_type, architecture), module)
    if not re.fullmatch(r"[\w-]+", module) or not (_mlx_lm() / "models" / f"{module}.py").is_file():
        raise UnknownArchitecture(
            f"The architecture {model_type or '(none)'} is not known here",
            "The installed mlx-lm has no model of this type.",
            "Choose a model of another architecture.",
            model_type=model_type,
        )


@cache
def _mlx_lm() -> Path:
    spec = importlib.util.find_spec("mlx_lm")  # a top-level name: finds it, imports nothing
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else Path("/nonexistent")


@cache
def _remapping() -> tuple[Mapping[str, str], Mapping[tuple[str, str], str]]:
    """``MODEL_REMAPPING`` and ``MODEL_ARCHITECTURE_REMAPPING`` of mlx_lm/utils.py, parsed."""
    found: dict[str, Any] = {}
    try:
        tree = ast.parse((_mlx_lm() / "utils.py").read_bytes())
    except OSError:
        return {}, {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            key = node.targets[0].id
            if key in {"MODEL_REMAPPING", "MODEL_ARCHITECTURE_REMAPPING"}:
                found[key] = ast.literal_eval(node.value)
    return found.get("MODEL_REMAPPING", {}), found.get("MODEL_ARCHITECTURE_REMAPPING", {})


def _integer(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """The first of these settings that is a number; nested text settings win."""
    names = tuple(names)
    inner = [config[key] for key in _NESTED if isinstance(config.get(key), Mapping)]
    for scope in (*inner, config):
        for name in names:
            value = scope.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _context(config: Mapping[str, Any]) -> int:
    found = _integer(config, _CONTEXT) or 0
    return min(found, _MOST_CONTEXT) if found > 0 else _NO_CONTEXT_LIMIT


def _layer_groups(
    tensors: Mapping[str, TensorInfo],
) -> dict[str, dict[int, dict[str, TensorInfo]]]:
    """Tensors by the name before the layer's number, then by that number."""
    groups: dict[str, dict[int, dict[str, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
    for key, info in tensors.items():
        if match := _LAYER.match(key):
            groups[match.group(1)][int(match.group(2))][key] = info
    return groups


def _stack(
    groups: Mapping[str, Mapping[int, dict[str, TensorInfo]]], layers: int, name: str, path: Path
) -> list[dict[str, TensorInfo]]:
    """The decoder's layers: of all numbered groups, the heaviest one that is complete.

    Numbers from ``layers`` on are extra prediction layers, which mlx-lm leaves out.
    """
    if not groups:
        raise ModelBroken(f"The weights of {name} hold no layers", path=path)

    def order(prefix: str) -> tuple[int, int, str]:
        group = groups[prefix]
        held = sum(number in group for number in range(layers))
        return held, sum(_bytes(layer.values()) for layer in group.values()), prefix

    group = groups[max(groups, key=order)]
    absent = [number for number in range(layers) if number not in group]
    if absent:
        raise ModelBroken(
            f"The model {name} is incomplete",
            f"config.json says {layers} layers, and layer {absent[0]} has no weights.",
            "Fetch the model again.",
            path=path,
        )
    return [group[number] for number in range(layers)]


def _bytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in tensors)


def _share(key: str, active: float) -> float:
    """How much of a tensor one token uses: routed experts in part, everything else whole."""
    return active if _EXPERT.search(key) else 1.0


def _float_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Size of an activation: that of the float type that most tensors have."""
    counts = Counter(info.dtype for info in tensors if info.dtype in _FLOAT_BYTES)
    return _FLOAT_BYTES[counts.most_common(1)[0][0]] if counts else 2


def _bits(config: Mapping[str, Any]) -> int:
    quantization = config.get("quantization") or config.get("quantization_config")
    bits = quantization.get("bits") if isinstance(quantization, Mapping) else None
    return bits if isinstance(bits, int) and 0 < bits <= 32 else 32


def _parameters(key: str, info: TensorInfo, bits: int) -> float:
    """Parameters of a matrix that a token is multiplied with; 0 for scales, biases and norms."""
    if len(info.shape) < 2 or key.endswith((".scales", ".biases")):
        return 0.0
    count = 1
    for side in info.shape:
        count *= side
    return count * 32 / bits if info.dtype == "U32" else float(count)


def _kv_width(config: Mapping[str, Any], layer: Mapping[str, TensorInfo]) -> int:
    """Numbers that one layer caches for one token (recurrent state does not grow)."""
    lora, rope = _integer(config, ("kv_lora_rank",)), _integer(config, ("qk_rope_head_dim",))
    if lora and rope:  # multi-head latent attention keeps the compressed form
        return max(0, lora + rope)
    rows = [
        info.shape[0]
        for key, info in layer.items()
        if key.endswith((".k_proj.weight", ".v_proj.weight")) and len(info.shape) == 2
    ]
    if rows:
        return sum(rows)
    heads, hidden = _integer(config, _HEADS), _integer(config, _HIDDEN)
    attends = any("att" in key or "qkv" in key.lower() for key in layer)
    if not heads or not hidden or not attends:
        return 0
    width = _integer(config, ("head_dim",)) or hidden // heads
    return max(0, 2 * (_integer(config, _KV_HEADS) or heads) * width)
