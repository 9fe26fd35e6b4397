"""The shipped files: pinned, small, readable by everybody, and in the Hugging Face layout."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

from safetensors import safe_open

from parallax.demo import BUILTIN_NAME, model_path

WEIGHTS_SHA256 = "98da6a00c2ba0c22c3d968196e329c0392d584e67064d17eee70dddbdd24d7c0"
TOKENIZER_SHA256 = "cb89e77af271ddbd813849cca138789dd6d14c53b928b600190d63e438342501"
MOST_BYTES = 10_000_000
FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def _sha256(name: str) -> str:
    return hashlib.sha256((model_path() / name).read_bytes()).hexdigest()


def test_the_weights_and_the_tokenizer_are_the_pinned_ones() -> None:
    assert _sha256("model.safetensors") == WEIGHTS_SHA256
    assert _sha256("tokenizer.json") == TOKENIZER_SHA256


def test_the_folder_holds_what_a_model_needs_and_is_small() -> None:
    paths = list(model_path().iterdir())
    assert {path.name for path in paths} == FILES
    assert sum(path.stat().st_size for path in paths) <= MOST_BYTES


def test_everybody_may_read_the_files() -> None:
    for path in model_path().iterdir():
        assert path.stat().st_mode & 0o444 == 0o444, path.name


def test_the_configuration_is_a_small_qwen3_that_splits() -> None:
    config = json.loads((model_path() / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert 8 <= config["num_hidden_layers"] <= 12
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == 10_000.0


def test_the_weights_are_float32_and_as_many_as_said() -> None:
    count = 0
    with safe_open(model_path() / "model.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            assert part.get_dtype() == "F32"
            size = 1
            for side in part.get_shape():
                size *= side
            count += size
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert 2_000_000 < count < 2_500_000


def test_the_chat_template_stands_in_both_places() -> None:
    settings = json.loads((model_path() / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = (model_path() / "chat_template.jinja").read_text(encoding="utf-8")
    assert settings["chat_template"] == template
    source = model_path().parent / "chat_template.jinja"
    assert template == source.read_text(encoding="utf-8")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, parallax.demo as demo\n"
        f"assert demo.BUILTIN_NAME == {BUILTIN_NAME!r}\n"
        "print(sorted({'torch', 'mlx', 'mlx_lm', 'transformers'} & set(sys.modules)))"
    )
    root = model_path().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(root / ".typing")},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.strip() == "[]"
