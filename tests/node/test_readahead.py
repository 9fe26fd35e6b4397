"""Reading ahead: bounded, in order, and no one's trouble when files are not there."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from parallax.node import readahead
from parallax.node.readahead import BLOCK_BYTES, Extent, ReadAhead


def test_every_block_is_read_once_and_no_further_than_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data"
    blocks = 12
    file.write_bytes(os.urandom(16) * (blocks * BLOCK_BYTES // 16))
    read: list[int] = []
    lock = threading.Condition()

    def fill(_: int, block: Extent) -> None:
        with lock:
            read.append(block.begin // BLOCK_BYTES)
            lock.notify_all()

    def wait_for(count: int) -> None:
        with lock:
            assert lock.wait_for(lambda: len(read) == count, timeout=60), read

    monkeypatch.setattr(readahead, "_fill", fill)
    monkeypatch.setattr(readahead, "WINDOW_BYTES", 4 * BLOCK_BYTES)
    with ReadAhead([Extent(file, 0, 5 * BLOCK_BYTES), Extent(file, 5 * BLOCK_BYTES, 12 * BLOCK_BYTES)]) as ahead:  # fmt: skip  # noqa: E501
        wait_for(4)
        ahead.read(3 * BLOCK_BYTES)
        wait_for(7)
        assert sorted(read) == list(range(7))
        ahead.read(5 * BLOCK_BYTES)
        wait_for(blocks)
    assert sorted(read) == list(range(blocks))
    assert not any(t.name == "readahead" for t in threading.enumerate())


def test_a_file_that_is_gone_is_left_to_who_needs_it(tmp_path: Path) -> None:
    with ReadAhead([Extent(tmp_path / "gone", 0, 10)]) as ahead:
        ahead.read(10)
    assert not any(t.name == "readahead" for t in threading.enumerate())


def test_what_the_system_has_is_not_read_again(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"x" * 10_000)
    number = os.open(file, os.O_RDONLY)
    try:
        os.pread(number, 10_000, 0)
        readahead._fill(number, Extent(file, 0, 10_000))
        assert readahead._cached(number, 0) in (True, False), "told, never raised"
        assert readahead._cached(number, 20_000) is False, "there is nothing"
    finally:
        os.close(number)
