from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from parallax.fabric.errors import ModelNotFound
from parallax.scheduler import catalog
from parallax.scheduler.catalog import WELL_KNOWN, list_models, size_text
from parallax.scheduler.generation import CatalogModel, ServedModel
from tests.models import make_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def no_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Path:
        raise ModelNotFound("gone")

    monkeypatch.setattr(catalog, "builtin_path", absent)


@pytest.mark.usefixtures("no_builtin")
def test_with_nothing_on_disk_the_well_known_models_are_offered(tmp_path: Path) -> None:
    models = list_models(tmp_path / "state")
    assert models == list(WELL_KNOWN)
    assert all(m.provider == m.name.split("/")[0] and m.size.endswith("B") for m in models)


def test_the_built_in_model_comes_first(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "builtin_path", lambda: made)
    first = list_models(tmp_path)[0]
    assert first == CatalogModel("builtin", "0.16M", "Parallax")


@pytest.mark.usefixtures("no_builtin")
def test_models_on_this_disk_are_listed_once_with_what_they_are(
    made: Path, tmp_path: Path, hub_cache: Path
) -> None:
    state = tmp_path / "state"
    shutil.copytree(made, state / "models" / "kept")
    (state / "models" / "empty").mkdir()
    (state / "models" / "note.txt").write_text("not a model")
    shutil.copytree(made, hub_cache / "models--some-one--Tiny-0.5B-4bit" / "snapshots" / "c0")
    shutil.copytree(made, hub_cache / "models--someone--plain" / "snapshots" / "c0")
    shutil.copytree(made, hub_cache / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c0")
    (hub_cache / "models--someone--half" / "snapshots" / "c0").mkdir(parents=True)
    served = ServedModel("kept", state / "models" / "kept", 4096, 0)
    models = list_models(state, served)
    assert [m for m in models if m not in WELL_KNOWN] == [
        CatalogModel("kept", "0.16M", "local"),
        CatalogModel("some-one/Tiny-0.5B-4bit", "0.5B", "some-one"),
        CatalogModel("someone/plain", "0.16M", "someone"),
    ]
    names = [m.name for m in models]
    assert len(names) == len(set(names))
    assert CatalogModel("Qwen/Qwen3-0.6B", "0.6B", "Qwen") in models


@pytest.mark.usefixtures("no_builtin")
def test_a_broken_folder_is_listed_without_a_size(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "models" / "broken"))
    (folder / "model.safetensors").write_bytes(b"short")
    assert list_models(tmp_path)[0] == CatalogModel("broken", "", "local")


@pytest.mark.parametrize(
    ("parameters", "text"),
    [(2.4e6, "2.4M"), (6e8, "0.6B"), (1.35e8, "0.14B"), (1.72e9, "1.7B"), (2.35e11, "235B")],
)
def test_sizes_read_as_people_write_them(parameters: float, text: str) -> None:
    assert size_text(parameters) == text


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("org/Model-4B-4bit", "4B"),
        ("org/Model-30B-A3B", "30B"),
        ("org/model_v2-1.5b", "1.5B"),
        ("org/Mix-8x7B", "0.16M"),
        ("org/Model-4bit", "0.16M"),
    ],
)
def test_a_size_in_a_hub_name_is_believed_and_else_counted(
    name: str, size: str, made: Path, tmp_path: Path
) -> None:
    served = ServedModel(name, made, 4096, 0)
    assert [m.size for m in list_models(tmp_path, served) if m.name == name] == [size]
