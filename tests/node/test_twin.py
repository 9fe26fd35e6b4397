"""The self-check: what it proves, what it refuses, what it switches off, what it remembers."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_lm_cache

from parallax.fabric.errors import CutRefused, UnknownArchitecture
from parallax.node import mlx_lm_seam as seam
from parallax.node import twin
from parallax.node.depth import shallow
from parallax.node.lanes import Lanes
from parallax.node.shrink import shrunk
from parallax.node.splice import Splice
from parallax.node.twin import Verdict, check_cut, working_cuts
from tests.models import make_config

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
GEMMA3_27B = {
    "model_type": "gemma3",
    "vocab_size": 262208,
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "num_hidden_layers": 62,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "quantization_config": {"quant_method": "fp8"},
}
PHI3_MINI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": {"long_factor": [1.1] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
}
LLAMA4 = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "head_dim": 128,
        "hidden_size": 5120,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
}


@pytest.mark.parametrize(
    ("config", "first", "end", "verdict"),
    [
        (QWEN3_8B, 12, 24, Verdict(True, True, True, forks=True, answers=True, blocks=True)),
        (GEMMA3_27B, 20, 62, Verdict(True, True, True, forks=True, blocks=True)),
        (DEEPSEEK_V3, 2, 30, Verdict(True, True, True, forks=True)),
        (PHI3_MINI, 0, 16, Verdict(True, True, True, forks=True, answers=True, blocks=True)),
        # Its caches have no batch form.
        (LLAMA4, 16, 32, Verdict(True, False, True, forks=True, answers=True, blocks=True)),
    ],
    ids=["qwen3", "gemma3", "deepseek_v3", "phi3", "llama4"],
)
def test_real_configurations_have_twins_small_enough_to_check_at_once(
    config: dict[str, Any], first: int, end: int, verdict: Verdict
) -> None:
    begin = time.process_time()
    assert check_cut(config, first, end) == verdict
    assert time.process_time() - begin < 15  # alone on a core, one or two


def test_a_shallow_twin_keeps_the_kinds_of_layers_on_each_side() -> None:
    small = next(shrunk(DEEPSEEK_V3))
    cut = shallow(small, 2, 30)
    assert cut.config["num_hidden_layers"] < 12
    assert cut.first in {1, 2}  # among the three dense layers
    assert cut.end > 3
    whole = shallow(small, 0, 61)
    assert (whole.first, whole.end) == (0, whole.config["num_hidden_layers"])


def test_layers_that_refer_to_later_ones_keep_their_depth() -> None:
    config = make_config("gemma3n", layers=20)
    assert shallow(config, 5, 10).config["text_config"]["num_hidden_layers"] == 20


def test_a_shrunk_configuration_satisfies_the_equations_of_the_real_one() -> None:
    small = next(shrunk(QWEN3_8B))
    assert small["num_attention_heads"] == 4 * small["num_key_value_heads"]
    assert small["hidden_size"] == small["head_dim"] * small["num_attention_heads"]
    assert small["num_hidden_layers"] == 36
    experts = next(shrunk(DEEPSEEK_V3))
    assert experts["n_routed_experts"] % experts["n_group"] == 0
    assert experts["n_routed_experts"] > experts["num_experts_per_tok"]
    assert "quantization_config" not in experts


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UnknownArchitecture, match="gpt5"):
        check_cut(QWEN3_8B | {"model_type": "gpt5"}, 0, 1)


def test_cuts_across_shared_caches_are_refused_and_the_others_told() -> None:
    config = make_config("gemma3n", layers=8)
    assert working_cuts(config) == [1, 2]
    with pytest.raises(CutRefused, match="before one of the layers 1, 2") as caught:
        check_cut(config, 3, 8)
    assert caught.value.fields == {"model_type": "gemma3n", "cut": "3:8", "working_cuts": "1, 2"}
    assert check_cut(config, 2, 8).works


def test_a_layer_that_gets_another_carry_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Splice.run

    def nudged(self: Splice, tokens: mx.array, carry: Any, caches: Any, *, stop: bool) -> Any:
        return right(self, tokens, None if carry is None else carry * 1.00001, caches, stop=stop)

    monkeypatch.setattr(Splice, "run", nudged)
    with pytest.raises(CutRefused, match="cannot be cut"):
        check_cut(make_config("qwen3"), 2, 4)


def test_a_weight_that_a_stage_is_thought_not_to_need_is_poisoned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("parallax.node.stage.reached", lambda results, weights: set())
    with pytest.raises(CutRefused):  # the first stage's embedding, for one
        check_cut(make_config("qwen3"), 0, 2)


DENSE_ALONE = Verdict(True, batches=False, trims=True, forks=True, answers=True, blocks=True)


def test_batches_that_come_out_wrong_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def unpadded(self: Any, length: int, return_array: bool = False, **kwargs: Any) -> mx.array:
        return mlx_lm_cache.create_causal_mask(length, offset=self._idx, **kwargs)

    monkeypatch.setattr(mlx_lm_cache.BatchKVCache, "make_mask", unpadded)
    assert check_cut(make_config("qwen3"), 2, 4) == DENSE_ALONE


@pytest.mark.parametrize("method", ["extend", "filter", "extract"])
def test_batches_that_break_are_switched_off(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *args: Any) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(mlx_lm_cache.BatchKVCache, method, broken)
    assert check_cut(make_config("qwen3"), 2, 4) == DENSE_ALONE


def test_a_wrong_trim_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Lanes.trim
    monkeypatch.setattr(Lanes, "trim", lambda self, s, tokens: right(self, s, tokens + 1))
    assert check_cut(make_config("llama"), 2, 4) == Verdict(
        True, batches=True, trims=False, forks=True, answers=True
    )


def test_copies_that_are_not_apart_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "deepcopy", lambda caches: caches)
    assert not check_cut(make_config("qwen3"), 2, 4).forks


def test_a_verdict_is_kept_on_disk_and_not_found_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("mamba2")
    verdict = check_cut(config, 0, 2, tmp_path / "verdicts")
    assert verdict == Verdict(True, batches=True, trims=False, forks=True)
    (file,) = (tmp_path / "verdicts").iterdir()
    assert file.name.startswith("mamba2-0-2-")
    monkeypatch.setattr(twin, "_judge", lambda *args: pytest.fail("judged again"))
    assert check_cut(config, 0, 2, tmp_path / "verdicts") == verdict
    for other in (config | {"state_size": 8}, make_config("mamba2", layers=6)):
        with pytest.raises(pytest.fail.Exception, match="judged again"):
            check_cut(other, 0, 2, tmp_path / "verdicts")
    monkeypatch.setattr(seam, "VERSION", "0.0")
    with pytest.raises(pytest.fail.Exception, match="judged again"):
        check_cut(config, 0, 2, tmp_path / "verdicts")


def test_a_refusal_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("gemma3n", layers=4)
    with pytest.raises(CutRefused) as first:
        check_cut(config, 0, 2, tmp_path)
    monkeypatch.setattr(twin, "_judge", lambda *args: pytest.fail("judged again"))
    with pytest.raises(CutRefused) as second:
        check_cut(config, 0, 2, tmp_path)
    assert first.value.sentence == second.value.sentence


@pytest.mark.parametrize("text", ["", "{", "[]", '{"works": true, "odd": 1}', "null"])
def test_a_spoilt_verdict_is_found_out_again(tmp_path: Path, text: str) -> None:
    config = make_config("mamba2")
    verdict = check_cut(config, 0, 2, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    assert check_cut(config, 0, 2, tmp_path) == verdict


def test_verdicts_that_cannot_be_kept_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert check_cut(make_config("mamba2"), 0, 2, tmp_path / "file" / "verdicts").works
