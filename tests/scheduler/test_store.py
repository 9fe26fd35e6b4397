from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from parallax.fabric.errors import BadSetting
from parallax.scheduler import store as store_module
from parallax.scheduler.store import FILE_NAME, Choice, Store

TAKE_EPOCHS = """
import asyncio, sys
from pathlib import Path
from parallax.scheduler.store import Store

async def take() -> None:
    async with await Store.open(Path(sys.argv[1])) as store:
        for _ in range(int(sys.argv[2])):
            print(await store.next_epoch(), flush=True)

asyncio.run(take())
"""


async def test_epochs_rise_and_go_on_after_a_restart(tmp_path: Path) -> None:
    async with await Store.open(tmp_path) as store:
        first = await store.next_epoch()
        assert [await store.next_epoch() for _ in range(2)] == [first + 1, first + 2]
    async with await Store.open(tmp_path) as store:
        assert await store.next_epoch() == first + 3


async def test_epochs_of_a_lost_file_are_not_used_again(tmp_path: Path) -> None:
    """Nodes that live on refuse those that they know already."""
    async with await Store.open(tmp_path) as store:
        last = [await store.next_epoch() for _ in range(3)][-1]
        await store.run("UPDATE counter SET value = value - 60")  # it was made a minute ago
        last -= 60
    (tmp_path / FILE_NAME).rename(tmp_path / "away.db")
    async with await Store.open(tmp_path) as store:
        assert await store.next_epoch() > last


async def test_an_epoch_is_on_disk_before_it_is_handed_out(tmp_path: Path) -> None:
    async with await Store.open(tmp_path) as store:
        epoch = await store.next_epoch()
        with sqlite3.connect(tmp_path / FILE_NAME) as other:
            (value,) = other.execute("SELECT value FROM counter WHERE name = 'epoch'").fetchone()
        other.close()
    assert value == epoch


async def test_tasks_that_race_get_different_epochs(tmp_path: Path) -> None:
    async with await Store.open(tmp_path) as store:
        epochs = await asyncio.gather(*(store.next_epoch() for _ in range(50)))
    first = min(epochs)
    assert sorted(epochs) == list(range(first, first + 50))


def test_processes_that_race_get_different_epochs(tmp_path: Path) -> None:
    count = 40
    command = [sys.executable, "-c", TAKE_EPOCHS, str(tmp_path), str(count)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    racers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    taken = [[int(line) for line in racer.communicate(timeout=60)[0].split()] for racer in racers]
    assert all(len(epochs) == count and epochs == sorted(epochs) for epochs in taken)
    first = min(itertools.chain(*taken))
    assert sorted(itertools.chain(*taken)) == list(range(first, first + 3 * count))


async def test_the_choice_is_remembered_and_replaced(tmp_path: Path) -> None:
    async with await Store.open(tmp_path) as store:
        assert await store.choice() is None
        await store.choose(Choice("builtin", 2))
        await store.choose(Choice("Qwen/Qwen3-0.6B", 3))
    async with await Store.open(tmp_path) as store:
        assert await store.choice() == Choice("Qwen/Qwen3-0.6B", 3)


async def test_the_state_directory_is_made(tmp_path: Path) -> None:
    async with await Store.open(tmp_path / "a" / "b") as store:
        assert await store.next_epoch() > 0


@pytest.mark.parametrize("damage", ["text", "middle"])
async def test_a_broken_file_is_named_with_what_to_do(tmp_path: Path, damage: str) -> None:
    path = tmp_path / FILE_NAME
    if damage == "text":
        path.write_text("this is not a database " * 100)
    else:
        async with await Store.open(tmp_path) as store:
            await store.choose(Choice("builtin", 1))
        content = bytearray(path.read_bytes())
        content[100:-1] = b"\xa5" * (len(content) - 101)
        path.write_bytes(content)
    with pytest.raises(BadSetting, match="cannot be used") as caught:
        await Store.open(tmp_path)
    assert str(path) in caught.value.what
    assert "away" in caught.value.fix
    assert caught.value.fields == {"setting": "state_dir"}


async def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    async with await Store.open(tmp_path) as store:
        await store.next_epoch()
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(BadSetting, match="newer"):
        await Store.open(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


async def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadSetting, match="cannot be used"):
        await Store.open(tmp_path / "file" / "state")
    (tmp_path / "odd" / FILE_NAME).mkdir(parents=True)
    with pytest.raises(BadSetting, match="cannot be used"):
        await Store.open(tmp_path / "odd")


async def test_a_locked_file_is_an_error_after_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_BUSY_S", 0.05)
    async with await Store.open(tmp_path) as store:
        other = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
        try:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(BadSetting, match="other program"):
                await store.next_epoch()
            other.execute("ROLLBACK")
            assert await store.next_epoch() > 0
        finally:
            other.close()


async def test_notes_are_kept_and_replaced(tmp_path: Path) -> None:
    async with await Store.open(tmp_path) as store:
        assert await store.note("plan") is None
        await store.keep("plan", [1, "a"])
        await store.keep("plan", {"b": [2.5, None, True]})
    async with await Store.open(tmp_path) as store:
        assert await store.note("plan") == {"b": [2.5, None, True]}
        await store.run("UPDATE note SET value = '{'")
        assert await store.note("plan") is None, "what cannot be read was never written"


async def test_the_file_and_those_beside_it_are_its_owner_s_alone(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    async with await Store.open(folder):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / FILE_NAME).stat().st_mode & 0o777 == 0o600
    (folder / FILE_NAME).chmod(0o644)  # as an earlier version left it
    async with await Store.open(folder) as store:
        await store.run("BEGIN IMMEDIATE")
        await store.run("UPDATE counter SET value = value + 1")
        modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
        await store.run("ROLLBACK")
    assert len(modes) > 1
    assert set(modes.values()) == {0o600}, modes
