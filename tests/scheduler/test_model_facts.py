from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from parallax.fabric.errors import ModelBroken, UnknownArchitecture
from parallax.fabric.models import resolve
from parallax.fabric.safetensors import TensorInfo, folder_headers
from parallax.scheduler.model_facts import ModelFacts, check_architecture, facts_from, read_facts
from tests.models import KINDS, make_model


def facts_of(folder: Path) -> ModelFacts:
    return read_facts(resolve(str(folder), state_dir=folder / "state"))


def tensor(rows: int, columns: int = 16, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(dtype, (rows, columns), 0, rows * columns * 4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_a_model_belongs_to_exactly_one_place(kind: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / kind, kind, layers=6, shards=2)
    facts = facts_of(folder)
    on_disk = sum(t.nbytes for file in folder_headers(folder).values() for t in file.values())
    assert facts.layers == 6
    assert facts.weight_bytes == on_disk
    for cut in range(1, facts.layers):
        parts = facts.stage_bytes(0, cut) + facts.stage_bytes(cut, facts.layers)
        assert parts == on_disk + facts.tied_bytes


def test_a_tied_embedding_is_counted_on_both_ends(tmp_path: Path) -> None:
    tied = facts_of(make_model(tmp_path / "tied", tie_word_embeddings=True))
    own = facts_of(make_model(tmp_path / "own", tie_word_embeddings=False))
    assert tied.tied_bytes == tied.first_bytes > 0
    assert own.tied_bytes == 0
    assert tied.last_bytes == own.last_bytes
    assert tied.head_flops == own.head_flops > 0


def test_facts_say_what_the_configuration_says(tmp_path: Path) -> None:
    facts = facts_of(make_model(tmp_path / "m", layers=3, hidden=32))
    assert (facts.name, facts.model_type) == ("m", "qwen3")
    assert (facts.context_tokens, facts.hidden_size) == (4096, 32)
    assert facts.carry_bytes_per_token == 32 * 4
    assert facts.kv_bytes_per_token_per_layer == 2 * 2 * 8 * 4  # k and v, 2 heads of 8, float32


def test_layers_that_differ_have_their_own_sizes(tmp_path: Path) -> None:
    facts = facts_of(make_model(tmp_path / "m", "deepseek_v3", layers=4))
    assert len(set(facts.layer_bytes)) > 1
    assert facts.layer_bytes[1] == facts.layer_bytes[2]


def test_a_step_reads_only_the_experts_it_uses(tmp_path: Path) -> None:
    facts = facts_of(make_model(tmp_path / "m", "qwen3_moe"))
    assert all(r < b for r, b in zip(facts.layer_read_bytes, facts.layer_bytes, strict=True))
    dense = facts_of(make_model(tmp_path / "d"))
    assert dense.layer_read_bytes == dense.layer_bytes


@pytest.mark.parametrize(
    "prefix",
    ["model.layers", "transformer.h", "backbone.layers", "language_model.model.layers", "h"],
)
def test_layers_are_found_whatever_the_prefix(prefix: str) -> None:
    tensors = {f"{prefix}.{n}.mlp.up.weight": tensor(8 + n) for n in range(12)}
    tensors |= {
        "model.embed_tokens.weight": tensor(100),
        "model.norm.weight": tensor(1),
        "lm_head.weight": tensor(90),
        "vision_tower.encoder.layers.0.mlp.weight": tensor(10_000),
        "multi_modal_projector.weight": tensor(10_000),
        "mtp.layers.0.mlp.weight": tensor(10_000),
    }
    config = {"model_type": "x", "text_config": {"n_layer": 12, "hidden_size": 16}}
    facts = facts_from("m", config, tensors, Path())
    assert facts.layer_bytes == tuple((8 + n) * 64 for n in range(12))
    assert (facts.first_bytes, facts.last_bytes, facts.tied_bytes) == (6400, 91 * 64, 0)


def test_extra_prediction_layers_behind_the_last_one_are_left_out() -> None:
    tensors = {f"model.layers.{n}.mlp.weight": tensor(8) for n in range(5)}
    facts = facts_from("m", {"model_type": "x", "num_hidden_layers": 4}, tensors, Path())
    assert facts.layer_bytes == (512,) * 4


def test_quantised_weights_count_for_what_they_stand_for() -> None:
    plain = {"model.layers.0.mlp.weight": tensor(8, 64)}
    packed = {
        "model.layers.0.mlp.weight": TensorInfo("U32", (8, 8), 0, 256),
        "model.layers.0.mlp.scales": TensorInfo("BF16", (8, 2), 0, 32),
        "model.layers.0.mlp.biases": TensorInfo("BF16", (8, 2), 0, 32),
    }
    config = {"model_type": "x", "num_hidden_layers": 1, "hidden_size": 64}
    full = facts_from("m", config, plain, Path())
    small = facts_from("m", config | {"quantization": {"bits": 4}}, packed, Path())
    assert small.layer_flops == full.layer_flops == (1024.0,)
    assert small.layer_bytes == (320,)
    assert small.carry_bytes_per_token == 128  # bfloat16, as its scales


@pytest.mark.parametrize("count", [None, 0, 7, "four"])
def test_a_layer_count_that_the_weights_do_not_bear_out_is_broken(
    count: object, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "m", layers=2)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = count
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelBroken, match="layer"):
        facts_of(folder)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for name in ("no_such_net", "../qwen3", "", "base/../qwen3"):
        (folder / "config.json").write_text(json.dumps(config | {"model_type": name}))
        with pytest.raises(UnknownArchitecture) as caught:
            facts_of(folder)
        assert caught.value.fields["model_type"] == name


def test_architectures_that_mlx_lm_maps_to_others_are_known() -> None:
    check_architecture({"model_type": "mistral"})
    check_architecture({"model_type": "falcon_mamba"})
    check_architecture({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})


def test_stage_sizes_grow_with_their_range(tmp_path: Path) -> None:
    facts = facts_of(make_model(tmp_path / "m", layers=5))
    for first, end in itertools.combinations(range(6), 2):
        if end < 5:
            assert facts.stage_bytes(first, end) < facts.stage_bytes(first, end + 1)
