"""Qwen3's network in plain PyTorch, small enough to read, and its export to safetensors.

The equations are those of ``mlx_lm/models/qwen3.py``: RMS norms before attention and
feed-forward, norms on queries and keys, rotary positions in halves, grouped keys and values,
SwiGLU, and the embedding as the output head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the network."""

    layers: int = 8
    width: int = 160
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 32
    hidden: int = 384
    vocabulary: int = 2_048
    context_tokens: int = 4_096
    rope_theta: float = 10_000.0
    epsilon: float = 1e-6


def rotary(length: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of every position, each (length, head_width)."""
    half = torch.arange(0, shape.head_width, 2, dtype=torch.float32) / shape.head_width
    angles = torch.outer(torch.arange(length, dtype=torch.float32), shape.rope_theta**-half)
    return torch.cat((angles, angles), 1).cos(), torch.cat((angles, angles), 1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of (batch, heads, length, head_width) by position."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Layer(nn.Module):
    """One transformer layer, with queries, keys and values in one matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        inner = shape.heads * shape.head_width
        both = 2 * shape.kv_heads * shape.head_width
        self.norm_in = nn.RMSNorm(shape.width, shape.epsilon)
        self.norm_mid = nn.RMSNorm(shape.width, shape.epsilon)
        self.norm_q = nn.RMSNorm(shape.head_width, shape.epsilon)
        self.norm_k = nn.RMSNorm(shape.head_width, shape.epsilon)
        self.qkv = nn.Linear(shape.width, inner + both, bias=False)
        self.out = nn.Linear(inner, shape.width, bias=False)
        self.gate_up = nn.Linear(shape.width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Run the layer on (batch, length, width)."""
        s = self.shape
        batch, length, _ = x.shape
        heads = self.qkv(self.norm_in(x)).view(batch, length, -1, s.head_width).transpose(1, 2)
        q, k, v = heads.split((s.heads, s.kv_heads, s.kv_heads), 1)
        q, k = rotate(self.norm_q(q), cos, sin), rotate(self.norm_k(k), cos, sin)
        groups = s.heads // s.kv_heads
        mixed = F.scaled_dot_product_attention(
            q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.norm_mid(x)).chunk(2, -1)
        changed: Tensor = x + self.down(F.silu(gate) * up)
        return changed


class Network(nn.Module):
    """The whole model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, shape.epsilon)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                adds = name.endswith(("out.weight", "down.weight"))
                depth = (2 * shape.layers) ** 0.5 if adds else 1.0
                nn.init.normal_(parameter, std=0.04 / depth)

    def forward(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Return the logits of the positions in ``wanted``, a mask of (batch, length)."""
        cos, sin = rotary(tokens.shape[1], self.shape)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x[wanted]), self.embedding.weight)


def config(shape: Shape, eos: int) -> dict[str, object]:
    """Return ``config.json`` in the Hugging Face form."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "torch_dtype": "float32",
        "eos_token_id": eos,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "initializer_range": 0.04,
        "intermediate_size": shape.hidden,
        "max_position_embeddings": shape.context_tokens,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.epsilon,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


def export(state: dict[str, Tensor], shape: Shape, folder: Path, *, eos: int, pad: int) -> None:
    """Write weights and configuration, with the names that Hugging Face gives to Qwen3."""
    inner, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    tensors = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["norm.weight"],
    }
    for index in range(shape.layers):
        own, name = f"layers.{index}.", f"model.layers.{index}."
        q, k, v = torch.tensor_split(state[own + "qkv.weight"], (inner, inner + kv))
        gate, up = state[own + "gate_up.weight"].chunk(2)
        tensors |= {
            name + "self_attn.q_proj.weight": q,
            name + "self_attn.k_proj.weight": k,
            name + "self_attn.v_proj.weight": v,
            name + "self_attn.o_proj.weight": state[own + "out.weight"],
            name + "self_attn.q_norm.weight": state[own + "norm_q.weight"],
            name + "self_attn.k_norm.weight": state[own + "norm_k.weight"],
            name + "mlp.gate_proj.weight": gate,
            name + "mlp.up_proj.weight": up,
            name + "mlp.down_proj.weight": state[own + "down.weight"],
            name + "input_layernorm.weight": state[own + "norm_in.weight"],
            name + "post_attention_layernorm.weight": state[own + "norm_mid.weight"],
        }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {"eos_token_id": eos, "pad_token_id": pad, "do_sample": False}
    for file, content in (
        ("config.json", config(shape, eos)),
        ("generation_config.json", generation),
    ):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def imported(path: Path, shape: Shape) -> dict[str, Tensor]:
    """Return the state of a network whose weights ``export`` wrote."""
    tensors = load_file(path)
    state = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
    }
    for index in range(shape.layers):
        own, name = f"layers.{index}.", f"model.layers.{index}."
        heads = [tensors[f"{name}self_attn.{part}_proj.weight"] for part in "qkv"]
        gates = [tensors[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        state |= {
            own + "qkv.weight": torch.cat(heads),
            own + "out.weight": tensors[name + "self_attn.o_proj.weight"],
            own + "norm_q.weight": tensors[name + "self_attn.q_norm.weight"],
            own + "norm_k.weight": tensors[name + "self_attn.k_norm.weight"],
            own + "gate_up.weight": torch.cat(gates),
            own + "down.weight": tensors[name + "mlp.down_proj.weight"],
            own + "norm_in.weight": tensors[name + "input_layernorm.weight"],
            own + "norm_mid.weight": tensors[name + "post_attention_layernorm.weight"],
        }
    return state
