"""Where a setting's value comes from, and what a wrong one is answered with."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from parallax.fabric import settings
from parallax.fabric.errors import BadSetting
from parallax.fabric.settings import (
    ClientSettings,
    NodeSettings,
    SchedulerSettings,
    load,
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty working directory and home, and no PARALLAX_* variables."""
    for name in settings.unknown_variables(dict.fromkeys(settings.os.environ, "")):
        monkeypatch.delenv(name)
    for name in list(settings.os.environ):
        if name.startswith("PARALLAX_"):
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")


def home_config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "home/.config/parallax/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_manual() -> None:
    scheduler = load(SchedulerSettings, {})
    assert (scheduler.host, scheduler.port, scheduler.grpc_port) == ("127.0.0.1", 3001, 3002)
    assert (scheduler.model, scheduler.nodes) == (None, 1)
    node = load(NodeSettings, {})
    assert (node.grpc_port, node.scheduler, node.memory) == (0, None, None)
    assert node.name == settings.host_name()


def test_the_state_directory_is_in_the_home_folder(tmp_path: Path) -> None:
    assert load(NodeSettings, {"state_dir": "~/there"}).state_dir == tmp_path / "home/there"


def test_flags_beat_variables_beat_the_file_beat_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("parallax.toml").write_text('port = 1001\ngrpc_port = 1002\nhost = "0.0.0.0"\n')
    monkeypatch.setenv("PARALLAX_PORT", "2001")
    monkeypatch.setenv("PARALLAX_GRPC_PORT", "2002")
    found = load(SchedulerSettings, {"port": 3333, "host": None})
    assert (found.port, found.grpc_port, found.host, found.nodes) == (3333, 2002, "0.0.0.0", 1)


def test_lists_are_written_with_commas_in_variables_and_as_lists_in_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PARALLAX_CORS_ORIGIN", "https://A.example, http://b.example:8080")
    Path("parallax.toml").write_text('allowed_host = ["Studio.example"]\n')
    found = load(SchedulerSettings, {})
    assert found.cors_origin == ("https://a.example", "http://b.example:8080")
    assert found.allowed_host == ("studio.example",)


def test_a_file_here_replaces_the_one_in_the_home_folder(tmp_path: Path) -> None:
    home_config(tmp_path, "port = 1001\nnodes = 4\n")
    assert load(SchedulerSettings, {}).nodes == 4
    Path("parallax.toml").write_text("port = 1111\n")
    found = load(SchedulerSettings, {})
    assert (found.port, found.nodes) == (1111, 1)


def test_one_file_serves_schedulers_nodes_and_clients() -> None:
    Path("parallax.toml").write_text(
        'nodes = 2\nmemory = "4GB"\nurl = "http://studio:3001/"\n[limits]\nconnect_s = 2.5\n'
    )
    assert load(SchedulerSettings, {}).nodes == 2
    node = load(NodeSettings, {})
    assert node.memory == 4_000_000_000
    assert node.limits.connect_s == 2.5
    assert load(ClientSettings, {}).base_url == "http://studio:3001"


def test_an_unknown_key_in_the_file_is_an_error_that_names_both() -> None:
    Path("parallax.toml").write_text("prot = 3001\n")
    with pytest.raises(BadSetting, match="parallax.toml has an unknown key 'prot'") as caught:
        load(NodeSettings, {})
    assert caught.value.fields == {"setting": "prot"}


def test_an_unknown_limit_is_an_error() -> None:
    Path("parallax.toml").write_text("[limits]\nheartbeat = 1\n")
    with pytest.raises(BadSetting, match=r"limits\.heartbeat.*parallax\.toml"):
        load(NodeSettings, {})


def test_a_damaged_file_is_an_error() -> None:
    Path("parallax.toml").write_text("port = \n")
    with pytest.raises(BadSetting, match="cannot be read"):
        load(NodeSettings, {})


def test_an_unknown_variable_is_only_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PARALLAX_PROT", "1")
    with caplog.at_level(logging.WARNING):
        load(NodeSettings, {})
    assert "PARALLAX_PROT" in caplog.text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": 65536}, "port"),
        ({"port": -1}, "port"),
        ({"grpc_port": "many"}, "grpc_port"),
        ({"nodes": 0}, "nodes"),
        ({"log_level": "loud"}, "log_level"),
    ],
)
def test_a_wrong_flag_is_an_error_that_names_it(flags: dict[str, object], named: str) -> None:
    with pytest.raises(BadSetting) as caught:
        load(SchedulerSettings, flags)
    assert caught.value.fields == {"setting": named}
    assert f"--{named.replace('_', '-')}" in caught.value.what


def test_a_wrong_variable_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_PORT", "http")
    with pytest.raises(BadSetting, match="PARALLAX_PORT"):
        load(SchedulerSettings, {})


def test_a_limit_can_be_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_LIMITS__CONNECT_S", "1.5")
    assert load(NodeSettings, {}).limits.connect_s == 1.5
    monkeypatch.setenv("PARALLAX_LIMITS__CONNECT_S", "-1")
    with pytest.raises(BadSetting, match="PARALLAX_LIMITS__CONNECT_S"):
        load(NodeSettings, {})


def test_limits_that_contradict_each_other_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARALLAX_LIMITS__SILENCE_S", "1")
    with pytest.raises(BadSetting, match="silence_s must be at least twice"):
        load(NodeSettings, {})


def test_both_listeners_cannot_have_one_port_but_both_may_take_free_ones() -> None:
    with pytest.raises(BadSetting, match="must differ"):
        load(SchedulerSettings, {"port": 4000, "grpc_port": 4000})
    assert load(SchedulerSettings, {"port": 0, "grpc_port": 0}).port == 0


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("8GB", 8 * 10**9), ("512MB", 512 * 10**6), ("2GiB", 2 * 2**30), ("1000", 1000), (7, 7)],
)
def test_memory_is_understood(text: object, size_bytes: int) -> None:
    assert load(NodeSettings, {"memory": text}).memory == size_bytes


@pytest.mark.parametrize("text", ["lots", "-1", "0", "8 parsecs"])
def test_a_wrong_memory_is_an_error(text: str) -> None:
    with pytest.raises(BadSetting, match="(8GB, 512MB|greater than 0)") as caught:
        load(NodeSettings, {"memory": text})
    assert caught.value.fields == {"setting": "memory"}


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ({}, "http://127.0.0.1:3001"),
        ({"port": 4001}, "http://127.0.0.1:4001"),
        ({"host": "0.0.0.0", "port": 4001}, "http://127.0.0.1:4001"),
        ({"host": "::1"}, "http://[::1]:3001"),
        ({"url": "http://studio/"}, "http://studio"),
    ],
)
def test_clients_know_where_the_cluster_is(flags: dict[str, object], url: str) -> None:
    assert load(ClientSettings, flags).base_url == url


def test_a_token_is_taken_from_flag_variable_or_file_and_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("parallax.toml").write_text('token = "pxt_file"\n')
    found = [load(NodeSettings, {})]
    monkeypatch.setenv("PARALLAX_TOKEN", "pxt_variable")
    found.append(load(NodeSettings, {}))
    found.append(load(NodeSettings, {"token": "pxt_flag"}))
    plain = [settings.token.get_secret_value() for settings in found if settings.token]
    assert plain == ["pxt_file", "pxt_variable", "pxt_flag"]
    assert all("pxt_" not in f"{settings} {settings!r}" for settings in found)


def test_a_wrong_token_is_not_repeated_in_the_error() -> None:
    Path("parallax.toml").write_text("token = 12345678\n")
    with pytest.raises(BadSetting, match="token") as caught:
        load(NodeSettings, {})
    assert "12345678" not in caught.value.sentence


def test_a_name_that_others_would_refuse_is_refused_at_once() -> None:
    assert load(NodeSettings, {"name": "Jörgs Stüdio"}).name == "Jörgs Stüdio"
    with pytest.raises(BadSetting, match="cannot be seen"):
        load(NodeSettings, {"name": "stu\u202edio"})
