"""Tiny random models on disk, in the Hugging Face layout, one kind per architecture.

Their weights come from mlx-lm's own Model classes with an initialisation wide enough that logits
vary with position and history; their tokenizer is byte-level (256 bytes and a few special tokens),
so any text can be asked of any of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Config = dict[str, Any]


def _llama(layers: int, hidden: int) -> Config:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCABULARY,
        "head_dim": hidden // 4,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }


def _llama_sliding(layers: int, hidden: int) -> Config:
    kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    return _llama(layers, hidden) | {"sliding_window": 8, "layer_types": kinds}


def _qwen3(layers: int, hidden: int) -> Config:
    return _llama(layers, hidden) | {"model_type": "qwen3"}


def _qwen3_moe(layers: int, hidden: int) -> Config:
    return _llama(layers, hidden) | {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": hidden,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }


def _gemma3_text(layers: int, hidden: int) -> Config:
    return {
        "model_type": "gemma3_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": hidden // 4,
        "query_pre_attn_scalar": hidden // 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCABULARY,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "max_position_embeddings": 4096,
    }


def _gpt_oss(layers: int, hidden: int) -> Config:
    kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    return {
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "head_dim": hidden // 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
        "rope_theta": 10000,
        "max_position_embeddings": 4096,
        "layer_types": kinds,
    }


def _deepseek_v3(layers: int, hidden: int) -> Config:
    return {
        "model_type": "deepseek_v3",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": hidden // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }


def _qwen3_next(layers: int, hidden: int) -> Config:
    return _qwen3_moe(layers, hidden) | {
        "model_type": "qwen3_next",
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": hidden,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
    }


def _mamba2(layers: int, hidden: int) -> Config:
    return {
        "model_type": "mamba2",
        "num_heads": 8,
        "head_dim": hidden // 4,
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "state_size": 16,
        "num_hidden_layers": layers,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": True,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": "auto",
        "max_position_embeddings": 4096,
    }


def _gemma3n(layers: int, hidden: int) -> Config:
    shared = layers // 2
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    text = {
        "model_type": "gemma3n_text",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": 4,
        "head_dim": hidden // 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCABULARY,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": shared,
        "vocab_size_per_layer_input": VOCABULARY,
        "sliding_window": 8,
        "max_position_embeddings": 4096,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": kinds,
        "activation_sparsity_pattern": [0.0] * layers,
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
    }
    return {"model_type": "gemma3n", "text_config": text}


_KINDS: dict[str, Callable[[int, int], Config]] = {
    "qwen3": _qwen3,
    "llama": _llama,
    "llama_sliding": _llama_sliding,
    "gemma3_text": _gemma3_text,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "qwen3_next": _qwen3_next,
    "mamba2": _mamba2,
    "gemma3n": _gemma3n,
}

KINDS = tuple(_KINDS)


def make_config(kind: str = "qwen3", *, layers: int = 4, hidden: int = 64) -> Config:
    """The ``config.json`` of a tiny model of this kind, as :func:`make_model` writes it."""
    config = _KINDS[kind](layers, hidden)
    end = 256 + SPECIAL_TOKENS.index("<|im_end|>")
    return config | {"eos_token_id": end, "torch_dtype": "float32"}


def make_model(
    folder: Path,
    kind: str = "qwen3",
    *,
    layers: int = 4,
    hidden: int = 64,
    seed: int = 0,
    shards: int = 1,
    **overrides: object,
) -> Path:
    """Writes a random float32 model and its tokenizer into ``folder`` and returns it.

    Args:
        kind: one of :data:`KINDS`.
        hidden: a multiple of 16.
        shards: number of safetensors files; more than one come with their index.
        overrides: entries of ``config.json`` to replace.
    """
    from parallax.node import mlx_lm_seam as seam

    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(kind, layers=layers, hidden=hidden) | overrides
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights = random_weights(seam.random_model(config), seed)
    names = sorted(weights)
    files = [names[i::shards] for i in range(shards)]
    index = {}
    for number, held in enumerate(files, 1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        if shards == 1:
            name = "model.safetensors"
        held_weights = {key: weights[key] for key in held}
        mx.save_safetensors(str(folder / name), held_weights, metadata={"format": "mlx"})
        index |= dict.fromkeys(held, name)
    if shards > 1:
        total = sum(w.nbytes for w in weights.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    make_tokenizer(folder)
    return folder


def random_weights(model: Any, seed: int) -> dict[str, mx.array]:
    """Weights of the model's shapes: wide matrices, the rest its own plus noise."""
    # More gain makes greedy text varied, but lets a recurrent state forget its history.
    gain = 1.5 if model.model_type == "mamba2" else 2.0
    mx.random.seed(seed)
    weights = {}
    for name, value in sorted(tree_flatten(model.parameters())):
        noise = mx.random.normal(value.shape)
        if "embed_tokens" in name or "embeddings" in name or "lm_head" in name:
            weights[name] = noise
        elif value.ndim >= 2:
            fan_in = value.shape[-1] * (value.shape[-2] if "conv" in name else 1)
            weights[name] = noise * (gain / fan_in**0.5)
        else:
            weights[name] = value + 0.1 * noise
    mx.eval(weights)
    return weights


def make_tokenizer(folder: Path) -> None:
    """Writes a byte-level tokenizer with a ChatML-like template into ``folder``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
