"""A scheduler that listens beyond loopback, with keys, to the official SDK and the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AuthenticationError, OpenAI, PermissionDeniedError, RateLimitError

from tests.cli.processes import parallax
from tests.cluster import Cluster, boot

USER = [{"role": "user", "content": "Hi"}]
WHOLE = {"ignore_eos": True}  # else a random model may end before it has said anything


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    """One node, and HTTP on every address; all its traffic in these tests is on loopback."""
    with boot(model, nodes=1, flags=("--host", "0.0.0.0")) as running:
        yield running


def command(cluster: Cluster, home: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit status and output of the command; on this machine, by the scheduler's state."""
    done = parallax(home, *arguments, "--port", str(cluster.http_port), **variables)
    return done.returncode, done.stdout + done.stderr


def client(cluster: Cluster, key: str) -> OpenAI:
    return OpenAI(base_url=cluster.url + "/v1", api_key=key, max_retries=0)


def test_the_official_sdk_is_let_in_by_its_key_and_held_to_its_limits(
    cluster: Cluster, tmp_path: Path
) -> None:
    state = ("--state-dir", str(cluster.folder / "scheduler"))
    status, made = command(cluster, tmp_path, "keys", "create", "--rate", "2", *state)
    assert status == 0, made
    key = made.splitlines()[0]
    with client(cluster, key) as allowed:
        answer = allowed.chat.completions.create(
            model="tiny-qwen3", messages=USER, max_tokens=4, extra_body=WHOLE
        )
        assert answer.usage
        assert answer.usage.completion_tokens == 4
        chunks = allowed.chat.completions.create(
            model="tiny-qwen3", messages=USER, max_tokens=4, stream=True
        )
        assert list(chunks)[-1].choices[0].finish_reason
        with pytest.raises(RateLimitError) as limited:
            allowed.models.list()
        assert int(limited.value.response.headers["Retry-After"]) > 0
        with pytest.raises(PermissionDeniedError):
            allowed.with_options(base_url=cluster.url).get("/admin/keys", cast_to=object)
    for wrong in ("px-wrong", "none"):
        with client(cluster, wrong) as refused, pytest.raises(AuthenticationError) as error:
            refused.models.list()
        assert error.value.code == "invalid_api_key"
    key_id = made.split("Its id is ")[1].split(".")[0]
    status, listed = command(cluster, tmp_path, "keys", "list", *state)
    (line,) = [line for line in listed.splitlines() if key_id in line]
    assert key not in listed
    assert line.split()[1:5] == ["use", "2", "-", "2"], line
    assert command(cluster, tmp_path, "keys", "revoke", key_id, *state)[0] == 0
    with client(cluster, key) as revoked, pytest.raises(AuthenticationError):
        revoked.models.list()


def test_the_command_works_on_the_scheduler_s_machine_and_elsewhere_with_a_key(
    cluster: Cluster, tmp_path: Path
) -> None:
    state = ("--state-dir", str(cluster.folder / "scheduler"))
    key_file = cluster.folder / "scheduler" / "cli.key"
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert command(cluster, tmp_path, "chat", "Hi", "--max-tokens", "3", *state)[0] == 0
    status, said = command(cluster, tmp_path, "status")  # another state directory
    assert status == 2
    assert "needs an API key" in said
    made = cluster.post("/admin/keys", {})["data"]["key"]
    assert command(cluster, tmp_path, "models", PARALLAX_API_KEY=made)[0] == 0
    status, said = command(cluster, tmp_path, "keys", "list", PARALLAX_API_KEY=made)
    assert status == 2
    assert "admin key" in said


def test_the_scheduler_says_that_keys_are_asked_for(cluster: Cluster) -> None:
    notice = str(cluster.status()["notice"])
    assert "API key" in notice
    assert "not encrypted" in notice
    cluster.scheduler.wait_for("parallax keys create")
