from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from parallax.fabric import models
from parallax.fabric.errors import ModelBroken, ModelNotFound
from parallax.fabric.models import open_folder, resolve
from tests.models import make_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", shards=2)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and a hub that cannot be reached."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def in_cache(cache: Path, name: str, folder: Path) -> Path:
    """Put a model where the hub's client keeps it."""
    repository = cache / ("models--" + name.replace("/", "--"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_found_by_its_absolute_path(folder: Path, tmp_path: Path) -> None:
    model = resolve(str(folder), state_dir=tmp_path / "state")
    assert (model.name, model.location, model.path) == ("tiny", str(folder), folder)
    assert model.config["model_type"] == "qwen3"


def test_a_folder_is_found_by_a_relative_path_and_by_the_home_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("tiny", "./tiny", "~/tiny", "../" + tmp_path.name + "/tiny"):
        model = resolve(name, state_dir=tmp_path / "state")
        assert (model.name, model.location) == ("tiny", str(folder))


def test_a_model_kept_in_the_state_directory_is_found_by_its_name(
    made: Path, tmp_path: Path
) -> None:
    kept = Path(shutil.copytree(made, tmp_path / "state" / "models" / "mine-0.1B"))
    model = resolve("mine-0.1B", state_dir=tmp_path / "state")
    assert (model.name, model.path) == ("mine-0.1B", kept)


def test_the_digest_is_the_same_on_another_machine_and_changes_with_config_and_headers(
    folder: Path, tmp_path: Path
) -> None:
    def digest_of(path: Path) -> str:
        return open_folder(path, name="m", location="/where/the/scheduler/has/it").digest

    digest = digest_of(folder)
    elsewhere = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "renamed"))
    assert digest_of(elsewhere) == digest
    change_config(elsewhere, rope_theta=5.0)
    assert digest_of(elsewhere) != digest
    shutil.copy(folder / "config.json", elsewhere)
    assert digest_of(elsewhere) == digest
    other = make_model(tmp_path / "other", shards=2, intermediate_size=96)
    shutil.copy(folder / "config.json", other)
    assert digest_of(other) != digest


def test_two_models_that_differ_in_their_weights_alone_are_told_apart(tmp_path: Path) -> None:
    models = [make_model(tmp_path / name, seed=n) for n, name in enumerate(("base", "tuned"))]
    base, tuned = (resolve(str(model), state_dir=tmp_path) for model in models)
    assert base.config == tuned.config
    assert base.digest != tuned.digest


def test_builtin_is_the_folder_in_the_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "builtin_path", lambda: folder)
    model = resolve("builtin", state_dir=tmp_path)
    assert (model.name, model.location, model.path) == ("builtin", "builtin", folder)


def test_a_package_without_the_built_in_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelNotFound, match="not in this installation"):
        resolve("builtin", state_dir=tmp_path)


def test_a_hub_id_in_the_local_cache_needs_no_network(folder: Path, hub_cache: Path) -> None:
    snapshot = in_cache(hub_cache, "someone/tiny", folder)
    model = resolve("someone/tiny", state_dir=hub_cache / "state")
    assert (model.name, model.location) == ("someone/tiny", "someone/tiny")
    assert model.path.samefile(snapshot)


def test_a_hub_id_that_is_nowhere_and_no_network_is_not_found(hub_cache: Path) -> None:
    with pytest.raises(ModelNotFound, match="could not be fetched") as caught:
        resolve("someone/absent", state_dir=hub_cache)
    assert caught.value.fields == {"model": "someone/absent"}
    assert caught.value.why
    assert "network" in caught.value.fix


def test_nothing_is_fetched_where_downloads_are_off(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = huggingface_hub.snapshot_download

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["local_files_only"])
        return real(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watched)
    with pytest.raises(ModelNotFound, match="not on this machine"):
        resolve("someone/absent", state_dir=hub_cache, download=False)
    assert asked == [True]


def test_a_half_fetched_hub_model_is_completed_or_reported(folder: Path, hub_cache: Path) -> None:
    snapshot = in_cache(hub_cache, "someone/tiny", folder)
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelBroken, match="incomplete"):
        resolve("someone/tiny", state_dir=hub_cache, download=False)
    with pytest.raises((ModelNotFound, ModelBroken)):
        resolve("someone/tiny", state_dir=hub_cache)  # the hub cannot be reached


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        "nothing-here",
        "/no/such/folder",
        "../../no/such",
        "a/b/c",
        "org/..",
        "../no-such-folder",
        "~nobody-of-this-name/model",
        "bad\0name",
        "x" * 5000,
        "org/na me",
    ],
)
def test_a_name_that_means_nothing_is_not_found(name: str, tmp_path: Path, hub_cache: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve(name, state_dir=tmp_path)
    assert caught.value.fix


def test_a_name_cannot_leave_the_models_folder(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "models").mkdir(parents=True)
    for name in ("..", "...", "../../tiny/.."):
        with pytest.raises((ModelNotFound, ModelBroken)):
            resolve(name, state_dir=state)


def test_an_empty_folder_that_looks_like_a_hub_id_does_not_hide_the_hub(
    folder: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_cache(hub_cache, "someone/tiny", folder)
    (hub_cache / "someone" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(hub_cache)
    assert resolve("someone/tiny", state_dir=hub_cache).location == "someone/tiny"


def test_a_file_is_not_a_model_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="is a file"):
        resolve(str(folder / "config.json"), state_dir=tmp_path)


def cut_short(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def cut_in_header(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def point_outside(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../../secret.safetensors"
    path.write_text(json.dumps(index))


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "no model_type"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 99999), "not valid JSON"),
    "no model type": (lambda f: change_config(f, model_type=None), "no model_type"),
    "own code": (lambda f: change_config(f, model_file="evil.py"), "own code"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("*.safetensors")], "no weights"),
    "a shard missing": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        "is incomplete.*model-00002-of-00002",
    ),
    "cut short": (cut_short, "model-00002-of-00002.*cut short"),
    "cut in header": (cut_in_header, "model-00001-of-00002.*cut short"),
    "index is text": (
        lambda f: (f / "model.safetensors.index.json").write_text("oops"),
        "index of tiny is unreadable",
    ),
    "index points outside": (point_outside, "points out of its folder"),
    "weights are a link out": (
        lambda f: link_out(f, "model-00001-of-00002.safetensors"),
        "outside",
    ),
    "tokenizer is a link out": (lambda f: link_out(f, "tokenizer.json"), "outside of its folder"),
    "a link to nowhere": (lambda f: (f / "extra.json").symlink_to(f / "gone"), "cannot be read"),
    "a link to itself": (lambda f: (f / "extra.json").symlink_to("extra.json"), "cannot be read"),
    "weights are a pipe": (lambda f: os.mkfifo(f / "model-3.safetensors"), "no plain file"),
    "config is a folder": (lambda f: as_folder(f / "config.json"), "no plain file"),
    "config is huge": (lambda f: os.truncate(f / "config.json", 1 << 30), "1073741824 bytes"),
    "config is large": (lambda f: sparse(f / "generation_config.json", 5 << 20), "absurdly large"),
    "many values in few bytes": (
        lambda f: (f / "tokenizer_config.json").write_text("[" + "[]," * 700_000 + "[]]"),
        "too many values",
    ),
    "many values in a header": (
        lambda f: write_header(f / "model-9.safetensors", b"[" + b"[]," * 3_000_000 + b"[]]"),
        "too many values",
    ),
    "many values in the config": (
        lambda f: (f / "config.json").write_text("[" + "[]," * 700_000 + "[]]"),
        "too many values",
    ),
    "many values in the tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("[" + "0," * 6_000_001 + "0]"),
        "too many values",
    ),
    "a vocabulary of empty lines": (
        lambda f: (f / "vocab.txt").write_text("\n" * 3_000_001),
        "too many values",
    ),
    "template is huge": (lambda f: sparse(f / "chat_template.jinja", 1 << 30), "absurdly large"),
    "a billion layers": (lambda f: change_config(f, num_hidden_layers=10**9), "makes no sense"),
    "a billion experts": (lambda f: change_config(f, n_routed_experts=10**9), "makes no sense"),
    "minus one heads": (lambda f: change_config(f, num_attention_heads=-4), "makes no sense"),
    "an astronomic number": (lambda f: change_config(f, vocab_size=10**30), "makes no sense"),
    "nested a hundred times": (
        lambda f: (f / "config.json").write_text('{"model_type":' + "[" * 100 + "]" * 100 + "}"),
        "nested too deeply",
    ),
    "a million values": (lambda f: change_config(f, x=[0] * 10**6), "too many values"),
}


def link_out(folder: Path, name: str) -> None:
    """The file lies beside the folder, and a link to it in the folder."""
    (folder / name).touch()
    outside = folder.parent / f"outside-{name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


def write_header(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_files_as_large_as_those_of_large_models_are_taken(folder: Path, tmp_path: Path) -> None:
    tokens = {str(i): {"content": f"<|{i}|>", "special": True} for i in range(20_000)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    words = {f"word{i}, and": i for i in range(300_000)}
    merges = [[f"w{i}", f"o{i}"] for i in range(300_000)]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"v": words, "m": merges}}))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    some = next(iter(index["weight_map"].values()))
    index["weight_map"] |= {f"model.layers.1.mlp.experts.{i}.weight": some for i in range(250_000)}
    path.write_text(json.dumps(index))
    header = json.dumps({"__metadata__": {"names": "x" * (40 << 20)}}).encode()
    write_header(folder / "model-9.safetensors", header)
    sparse(folder / "trainer_state.json", 50 << 20)  # which nothing reads
    assert resolve(str(folder), state_dir=tmp_path)


def test_a_link_to_another_file_of_the_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "also.json").symlink_to("config.json")
    assert resolve(str(folder), state_dir=tmp_path).path == folder.resolve()


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_is_refused_by_name(name: str, folder: Path, tmp_path: Path) -> None:
    damage, message = BREAKS[name]
    resolve(str(folder), state_dir=tmp_path)
    damage(folder)
    with pytest.raises(ModelBroken, match=message) as caught:
        resolve(str(folder), state_dir=tmp_path)
    assert caught.value.fields["path"].startswith(str(tmp_path)) or name == "no weights"


def test_code_in_a_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')")
    change_config(folder, model_file="evil.py")
    with pytest.raises(ModelBroken):
        resolve(str(folder), state_dir=tmp_path)
    change_config(folder, model_file=None, auto_map={"AutoModel": "evil.Model"})
    resolve(str(folder), state_dir=tmp_path)
    assert not trace.exists()


RESOLVE = """
import sys
from pathlib import Path
from parallax.fabric.errors import ParallaxError
from parallax.fabric.models import resolve
try:
    model = resolve("someone/tiny", state_dir=Path(sys.argv[1]))
    print(model.name, model.digest, *sorted(path.name for path in model.path.iterdir()))
except ParallaxError as error:
    print(type(error).__name__, error.sentence)
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download needs: the commit, the list of files, the files."""

    folder: Path
    refusal: tuple[int, str] | None = None

    def do_GET(self) -> None:
        if self.refusal is not None:
            self.answer(b"{}", status=self.refusal[0], headers={"X-Error-Code": self.refusal[1]})
            return
        name = self.path.split("?")[0].rsplit("/", 1)[1]
        files = sorted(self.folder.iterdir())
        if "/resolve/" in self.path:
            body = (self.folder / name).read_bytes()
            tag = hashlib.sha1(body, usedforsecurity=False).hexdigest()
            self.answer(body, headers={"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
        elif "/tree/" in self.path:
            listed = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in files
            ]
            self.answer(json.dumps(listed).encode())
        else:
            siblings = [{"rfilename": file.name} for file in files]
            facts = {"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}
            self.answer(json.dumps(facts).encode())

    do_HEAD = do_GET

    def answer(
        self, body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


@contextmanager
def hub(folder: Path, refusal: tuple[int, str] | None = None) -> Iterator[str]:
    handler = type("ThisHub", (Hub,), {"folder": folder, "refusal": refusal})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def resolve_from(endpoint: str, tmp_path: Path) -> str:
    """What a process of its own makes of ``someone/tiny`` with this hub and an empty cache."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, str(tmp_path / "state")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_a_hub_id_is_fetched_without_its_code(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit(7)")
    (folder / "pytorch_model.bin").write_bytes(b"unwanted")
    with hub(folder) as endpoint:
        name, digest, *files = resolve_from(endpoint, tmp_path).split()
    assert name == "someone/tiny"
    assert digest == open_folder(folder, name=name, location=name).digest
    assert {"config.json", "tokenizer.json", "model-00002-of-00002.safetensors"} <= set(files)
    assert not {"evil.py", "pytorch_model.bin"} & set(files)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "The hub has no model someone/tiny"),
        (403, "GatedRepo", "The hub does not give out someone/tiny"),
        (500, "Broken", "could not be fetched"),
    ],
)
def test_a_hub_that_refuses_is_quoted(
    status: int, code: str, message: str, folder: Path, tmp_path: Path
) -> None:
    with hub(folder, (status, code)) as endpoint:
        said = resolve_from(endpoint, tmp_path)
    assert said.startswith("ModelNotFound")
    assert message in said
