"""Loading a stage: its share and no more, and every broken model named."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from parallax.fabric.errors import CutRefused, ModelBroken, ModelNotFound, UnknownArchitecture
from parallax.fabric.safetensors import read_header
from parallax.node import mlx_lm_seam as seam
from parallax.node.stage import Stage
from parallax.node.weights import load_stage, load_steps
from tests.models import make_model
from tests.node.rings import TEXTS, Whole, load_stages, quiet

ModelOf = Callable[[str], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "qwen3")


def split_by_layer(folder: Path) -> None:
    """One file for each layer, and one for the rest."""
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    files: dict[str, dict[str, mx.array]] = {}
    for name, tensor in tensors.items():
        place = name.split(".")
        files.setdefault(place[2] if "layers" in place else "rest", {})[name] = tensor
    (folder / "model.safetensors").unlink()
    for key, held in files.items():
        mx.save_safetensors(str(folder / f"model-{key}.safetensors"), held)


def spoil(file: Path) -> None:
    """Makes a file's data nonsense (NaN, in float32) under an intact header."""
    start = min(info.begin for info in read_header(file).values())
    size = file.stat().st_size - start
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\xff" * size)


def run(stages: list[Stage]) -> mx.array:
    carry: Any = None
    for stage in stages:
        carry = stage.forward(
            mx.array([TEXTS[0][:9]], mx.uint32), carry, stage.new_cache(), head=True
        )
    logits: mx.array = carry[0]
    return logits


def test_a_stage_reads_nothing_from_the_files_of_other_layers(folder: Path, verdicts: Path) -> None:
    expected = Whole(folder).run(TEXTS[0][:9])
    split_by_layer(folder)
    first, last = load_stages(folder, [2], verdicts)
    assert mx.array_equal(run([first, last]), expected).item()
    for others in ("2", "3"):
        spoil(folder / f"model-{others}.safetensors")
    again = load_stage(folder, 0, 2, progress=quiet, verdicts=verdicts)
    assert mx.array_equal(run([again, last]), expected).item()
    middle = load_stage(folder, 1, 2, progress=quiet, verdicts=verdicts)
    spoil(folder / "model-rest.safetensors")
    blind = load_stage(folder, 1, 2, progress=quiet, verdicts=verdicts)
    assert blind.weight_bytes == middle.weight_bytes
    carry = mx.ones((1, 3, 64))
    outputs = [
        s.forward(mx.array([[1, 2, 3]], mx.uint32), carry, s.new_cache(), head=False)
        for s in (middle, blind)
    ]
    assert mx.array_equal(*outputs).item()


def test_tied_embeddings_are_read_by_the_first_and_the_last_stage_alone(
    folder: Path, verdicts: Path
) -> None:
    header = read_header(folder / "model.safetensors")

    def share(*parts: str) -> int:
        return sum(
            info.nbytes for name, info in header.items() if any(part in name for part in parts)
        )

    stages = load_stages(folder, [1, 3], verdicts)
    assert [stage.weight_bytes for stage in stages] == [
        share("embed_tokens", "layers.0."),
        share("layers.1.", "layers.2."),
        share("embed_tokens", "layers.3.", "model.norm"),
    ]


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_next", "gemma3_text"])
def test_shares_of_untied_and_mixed_models_add_up(
    kind: str, model_of: ModelOf, verdicts: Path
) -> None:
    folder = model_of(kind)
    whole = load_stages(folder, [], verdicts)[0].weight_bytes
    shares = [stage.weight_bytes for stage in load_stages(folder, [2], verdicts)]
    tied = 0 if "lm_head.weight" in read_header(folder / "model.safetensors") else 260 * 64 * 4
    assert sum(shares) == whole + tied


def test_quantised_models_are_cut_like_others(tmp_path: Path, verdicts: Path) -> None:
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    plain = make_model(tmp_path / "plain", "qwen3", hidden=128)
    model, config = load_model(plain)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    folder = tmp_path / "quantised"
    folder.mkdir()
    save_model(folder, model)
    save_config(config, folder / "config.json")
    expected = Whole(folder).run(TEXTS[0][:9])
    stages = load_stages(folder, [1], verdicts)
    assert mx.array_equal(run(stages), expected).item()
    assert (
        sum(stage.weight_bytes for stage in stages) < (plain / "model.safetensors").stat().st_size
    )


def test_shards_that_mix_layers_make_the_same_model(tmp_path: Path, verdicts: Path) -> None:
    whole = make_model(tmp_path / "whole", "qwen3_moe", seed=5)
    shards = make_model(tmp_path / "shards", "qwen3_moe", seed=5, shards=3)
    assert len(list(shards.glob("model-*.safetensors"))) == 3
    expected = Whole(whole).run(TEXTS[0][:9])
    assert mx.array_equal(run(load_stages(shards, [2], verdicts)), expected).item()


def test_experts_that_files_keep_apart_are_put_together(tmp_path: Path, verdicts: Path) -> None:
    """As Hugging Face lays them out; mlx-lm's ``sanitize`` stacks them."""
    folder = make_model(tmp_path / "model", "qwen3_moe")
    expected = Whole(folder).run(TEXTS[0][:9])
    file = folder / "model.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    for name in [name for name in tensors if "switch_mlp" in name]:
        stacked = tensors.pop(name)
        for expert in range(stacked.shape[0]):
            tensors[name.replace("switch_mlp", f"experts.{expert}")] = mx.contiguous(
                stacked[expert]
            )
    mx.save_safetensors(str(file), tensors)
    stages = load_stages(folder, [2], verdicts)
    assert mx.array_equal(run(stages), expected).item()


def test_progress_goes_from_nothing_to_all_bytes(folder: Path, verdicts: Path) -> None:
    told: list[tuple[int, int, str]] = []
    stage = load_stage(folder, 0, 2, progress=lambda *now: told.append(now), verdicts=verdicts)
    assert told[0] == (0, 0, "checking")
    assert told[-1] == (stage.weight_bytes, stage.weight_bytes, "compiling")
    reading = [done for done, total, phase in told if phase == "reading"]
    assert reading[0] == 0
    assert reading[-1] == stage.weight_bytes
    assert reading == sorted(reading)


def test_importing_mlx_lm_leaves_the_limit_on_open_files_alone() -> None:
    """In a process of its own: here, another test may have imported mlx-lm first."""
    program = (
        "import resource as r\n"
        "before = r.getrlimit(r.RLIMIT_NOFILE)\n"
        "import parallax.node.mlx_lm_seam, mlx_lm.utils\n"
        "print(before == r.getrlimit(r.RLIMIT_NOFILE), r.setrlimit.__module__)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["True", "resource"]


def test_a_missing_folder_and_missing_files_are_named(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model folder"):
        load_stage(folder / "nowhere", 0, 1, progress=quiet)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ModelBroken, match="no weights"):
        load_stage(folder, 0, 1, progress=quiet)
    (folder / "config.json").unlink()
    with pytest.raises(ModelBroken, match="no config.json"):
        load_stage(folder, 0, 1, progress=quiet)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}', "\xff", "[" * 100_000])
def test_a_configuration_that_is_none_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelBroken, match=r"config\.json"):
        load_stage(folder, 0, 1, progress=quiet)


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    for kind in ("gpt5", "base", "cache", "../os", "os.path", ""):
        change_config(folder, model_type=kind)
        with pytest.raises(UnknownArchitecture) as caught:
            load_stage(folder, 0, 1, progress=quiet)
        assert caught.value.fields["model_type"] == kind


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": None},
        {"hidden_size": "big"},
        {"hidden_size": 48},
        {"num_hidden_layers": 5},
        {"num_hidden_layers": 3},
        {"tie_word_embeddings": False},
        {"model_file": "evil.py"},
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_named(
    folder: Path, changes: dict[str, Any]
) -> None:
    (folder / "evil.py").write_text("raise SystemExit('run')")
    change_config(folder, **changes)
    with pytest.raises(ModelBroken, match="do not make a model"):
        load_stage(folder, 0, 1, progress=quiet)


def test_a_truncated_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelBroken, match="cut short") as caught:
        load_stage(folder, 0, 1, progress=quiet)
    assert caught.value.fields["path"] == str(file)


def test_a_file_that_fails_in_the_middle_is_named(folder: Path, verdicts: Path) -> None:
    steps = load_steps(folder, 0, 1, progress=quiet, verdicts=verdicts)
    while next(steps) is None:
        pass
    next(steps)  # it has been opened, and none of its tensors is read yet
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(ModelBroken, match="disk of this machine"):
        for _ in steps:
            pass


def test_a_missing_tensor_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(ModelBroken, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        load_stage(folder, 0, 1, progress=quiet)


def test_a_type_that_mlx_does_not_read_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["odd"] = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ModelBroken, match="F6_E2M3"):
        load_stage(folder, 0, 1, progress=quiet)


@pytest.mark.parametrize(("first", "end"), [(0, 5), (2, 2), (3, 1), (-1, 2)])
def test_layers_that_there_are_not_are_refused(folder: Path, first: int, end: int) -> None:
    with pytest.raises(CutRefused, match="no layers"):
        load_stage(folder, first, end, progress=quiet)


def test_a_closed_stage_lets_its_weights_go(folder: Path, verdicts: Path) -> None:
    stage = load_stage(folder, 0, 4, progress=quiet, verdicts=verdicts)
    before = mx.get_active_memory()
    stage.close()
    assert mx.get_active_memory() <= before - stage.weight_bytes


def test_the_cost_of_caches_is_that_of_real_ones(model_of: ModelOf, verdicts: Path) -> None:
    for kind in ("qwen3", "llama_sliding", "deepseek_v3", "qwen3_next", "mamba2"):
        for stage in load_stages(model_of(kind), [2], verdicts):
            cost = stage.cache_cost()
            cache = stage.new_cache()
            carry = None if stage.is_first else mx.zeros((1, 256, 64))
            mx.eval(stage.forward(mx.zeros((1, 256), mx.uint32), carry, cache, head=False))
            parts = [part for slot in cache for part in seam.parts(slot)]
            states = [a for part in parts for a in seam.arrays(part)]
            mx.eval(states)
            per_token = cost.bytes_per_token + cost.window_bytes_per_token
            assert sum(a.nbytes for a in states) == cost.fixed_bytes + 256 * per_token
            windows = {seam.window_tokens(part) for part in parts}
            assert cost.window_tokens == max(windows)
