"""Memory of a stage: how much a process grows when it loads one half of a model of over 1 GB.

Makes the model (random bfloat16, Qwen3's architecture), loads each half in a fresh process, prints
share, growth and their ratio, and deletes the model. Exits with 1 if the growth is more than 15%
away from the share.

    python benchmarks/memory.py
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

LAYERS = 12
HIDDEN = 2048
INNER = 6144
HEADS = 16
KV_HEADS = 8
VOCABULARY = 32000
TOLERANCE = 0.15

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def make(folder: Path) -> None:
    """Writes the model, one file for each layer and one for the rest."""
    import mlx.core as mx

    def random(*shape: int) -> mx.array:
        return (mx.random.uniform(-0.02, 0.02, shape)).astype(mx.bfloat16)

    def save(name: str, tensors: dict[str, mx.array]) -> None:
        mx.save_safetensors(str(folder / f"model-{name}.safetensors"), tensors, {"format": "mlx"})
        mx.clear_cache()

    (folder / "config.json").write_text(json.dumps(CONFIG))
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "self_attn.q_norm": (HIDDEN // HEADS,),
            "self_attn.k_norm": (HIDDEN // HEADS,),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        save(f"{layer:02}", {f"{prefix}.{n}.weight": random(*s) for n, s in shapes.items()})
    rest = {"embed_tokens": (VOCABULARY, HIDDEN), "norm": (HIDDEN,)}
    save("rest", {f"model.{name}.weight": random(*shape) for name, shape in rest.items()})


def measure(folder: Path, first: int, end: int) -> None:
    """In a fresh process: loads layers [first, end) and prints share and growth in bytes."""
    import psutil

    from parallax.fabric.safetensors import folder_headers
    from parallax.node.weights import load_stage

    def ours(name: str) -> bool:
        place = name.split(".")
        return place[1] != "layers" or first <= int(place[2]) < end

    headers = folder_headers(folder)
    infos = (item for tensors in headers.values() for item in tensors.items())
    share = sum(info.nbytes for name, info in infos if ours(name))
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    stage = load_stage(folder, first, end, progress=lambda done, total, phase: None)
    gc.collect()
    growth = process.memory_info().rss - before
    print(json.dumps({"share": share, "growth": growth, "weights": stage.weight_bytes}))


def main() -> int:
    """Makes, measures, prints, deletes."""
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
        return 0
    mib = 1 << 20
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="parallax-memory-") as name:
        folder = Path(name)
        make(folder)
        total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"model: {total / 1e9:.2f} GB, {LAYERS} layers, bfloat16")
        for first, end in ((0, LAYERS // 2), (LAYERS // 2, LAYERS)):
            command = [sys.executable, __file__, name, str(first), str(end)]
            run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            found = json.loads(run.stdout)
            ratio = found["growth"] / found["share"]
            worst = max(worst, abs(ratio - 1))
            print(
                f"layers {first:2} to {end - 1:2}: share {found['share'] / mib:6.0f} MiB, "
                f"growth {found['growth'] / mib:6.0f} MiB, ratio {ratio:.3f}"
            )
    print("within 15%" if worst <= TOLERANCE else "NOT within 15%")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
