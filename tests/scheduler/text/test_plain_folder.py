"""A model's tokenizer is loaded from the files of its own folder, whatever its settings name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from parallax.fabric.errors import ModelBroken
from parallax.scheduler.text.plain_folder import plain_folder
from parallax.scheduler.text.tokenizer import ChatTokenizer
from tests.models import CHAT_TEMPLATE, make_config, make_tokenizer

USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_config("qwen3")))
    make_tokenizer(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    changed = json.loads((folder / "tokenizer.json").read_text())
    changed["normalizer"] = {"type": "Prepend", "prepend": "OUTSIDE"}
    (outside / "tokenizer.4.0.0.json").write_text(json.dumps(changed))
    (outside / "vocab.json").write_text(json.dumps(changed["model"]["vocab"]))
    (outside / "merges.txt").write_text("O U\n")
    (outside / "default.jinja").write_text("OUTSIDE")
    return folder


def change(file: Path, **settings: object) -> None:
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | settings))


def other_tokenizer(folder: Path) -> None:
    change(
        folder / "tokenizer_config.json",
        fast_tokenizer_files=["../outside/tokenizer.4.0.0.json"],
    )


def absolute_tokenizer(folder: Path) -> None:
    place = str(folder.parent / "outside" / "tokenizer.4.0.0.json")
    change(folder / "tokenizer_config.json", fast_tokenizer_files=[place])


def legacy_tokenizer(folder: Path) -> None:
    """Settings of the special tokens are put in after the library has looked for files."""
    place = str(folder.parent / "outside" / "tokenizer.4.0.0.json")
    change(folder / "special_tokens_map.json", tokenizer_file=place)


def linked_templates(folder: Path) -> None:
    (folder / "additional_chat_templates").symlink_to(folder.parent / "outside")


def linked_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    link = folder / "additional_chat_templates" / "default.jinja"
    link.symlink_to(folder.parent / "outside" / "default.jinja")


@pytest.mark.parametrize(
    "lead",
    [other_tokenizer, absolute_tokenizer, legacy_tokenizer, linked_templates, linked_template],
)
def test_nothing_outside_of_the_folder_is_read(folder: Path, lead: Callable[[Path], None]) -> None:
    lead(folder)
    tokenizer = ChatTokenizer(folder)
    assert tokenizer.decode(tokenizer.prompt(USER)) == "user\nHi\nassistant\n"


def test_settings_name_no_files_and_keep_all_else(folder: Path) -> None:
    outside = folder.parent / "outside"
    named = {
        "vocab_file": str(outside / "vocab.json"),
        "merges": str(outside / "merges.txt"),
        "spm": str(outside / "vocab.json"),
        "gguf_file": "x.gguf",
        "configuration_files": ["../outside/config.4.0.0.json"],
    }
    kept = {"eos_token": "</s>", "added_tokens_decoder": {"1": {"content": "a"}}, "n": [1.5, None]}
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps(named | kept))
    with plain_folder(folder) as plain:
        for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
            assert json.loads((plain / name).read_text()) == kept
        assert (plain / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert plain.name == folder.name
    assert not plain.exists()


def test_a_tokenizer_that_is_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder.parent / "outside" / "tokenizer.4.0.0.json")
    with pytest.raises(ModelBroken, match="outside of its folder"):
        ChatTokenizer(folder)


def test_a_snapshot_of_the_hub_is_read_through_its_links(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "1a2b"
    snapshot.mkdir(parents=True)
    shutil.move(folder, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert ChatTokenizer(snapshot).prompt(USER)


SOURCES = ["chat_template.jinja", "a text", "a list"]


@pytest.mark.parametrize("source", SOURCES)
def test_templates_are_found_wherever_models_have_them(folder: Path, source: str) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if source == "a list":
        named = {"default": CHAT_TEMPLATE, "tool_use": "other"}
        settings["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    elif source == "chat_template.jinja":
        del settings["chat_template"]
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = ChatTokenizer(folder)
    assert tokenizer.decode(tokenizer.prompt(USER)) == "user\nHi\nassistant\n"


def test_a_tokenizer_whose_settings_name_code_is_read_without_it(folder):
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="SpecialTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_special.SpecialTokenizer", None]},
    )
    assert ChatTokenizer(folder).encode("Hi") == tuple(b"Hi"[i] - 33 for i in (0, 1))


def test_a_tokenizer_that_only_code_can_read_is_named_as_that(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tiktoken.model").write_bytes(b"IQ== 0\n")
    with pytest.raises(ModelBroken, match=r"never run.*has a tokenizer\.json"):
        ChatTokenizer(folder)


def test_a_log_of_a_training_beside_a_model_is_let_alone(folder):
    (folder / "trainer_state.json").write_bytes(b"[" + b"0," * (3 << 20) + b"0]")
    with plain_folder(folder) as plain:
        assert not (plain / "trainer_state.json").exists()
        assert (plain / "tokenizer.json").exists()
