"""What fuzzing found, and what it began with, again: without the fuzzer."""

from __future__ import annotations

import time

import pytest

from tests.fuzz.__main__ import CORPUS
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

MOST_FILES, MOST_BYTES = 600, 1 << 20
SLOW_S = 10.0


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_of_the_corpus_ends_in_anything_but_an_error_of_ours(target: str) -> None:
    files = sorted((CORPUS / target).iterdir())
    assert files
    with TARGETS[target]() as run:
        for data in [*seeds(target), *(file.read_bytes() for file in files)]:
            began = time.process_time()
            run(data)
            assert time.process_time() - began < SLOW_S


def test_the_corpus_is_small() -> None:
    files = [file for file in CORPUS.rglob("*") if file.is_file()]
    assert len(files) <= MOST_FILES
    assert sum(file.stat().st_size for file in files) < MOST_BYTES


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_notices_what_is_no_error_of_ours(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {
        "frames": "parallax.node.runner.Runner.run",
        "tensors": "parallax.fabric.tensors.unpack",
        "orders": "parallax.fabric.bounds.check",
        "joins": "parallax.fabric.bounds.check_hello",
        "enrolments": "parallax.fabric.bounds.check",
        "headers": "parallax.fabric.safetensors.read_header",
        "chats": "parallax.scheduler.http.requests.parse_chat",
        "templates": "parallax.scheduler.text.template.ChatTemplate.render",
    }[target]

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(broken, fail)
    data = next(iter(seeds(target)))
    with TARGETS[target]() as run, pytest.raises(MemoryError):
        run(data)
