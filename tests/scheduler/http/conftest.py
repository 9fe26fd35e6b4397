"""A tokenizer on disk for servers over a scripted cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parallax.scheduler.text.tokenizer import ChatTokenizer
from tests.models import make_config, make_tokenizer
from tests.scheduler.http.scripted import Scripted


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_config("qwen3")))
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer(folder)


@pytest.fixture
def says(folder: Path, tokenizer: ChatTokenizer):
    """A scripted cluster that answers with this text."""

    def scripted(text: str, **fields: object) -> Scripted:
        return Scripted(folder, script=list(tokenizer.encode(text)), **fields)

    return scripted
