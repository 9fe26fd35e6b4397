"""The checker finds every kind of lie, in a history that is otherwise true."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from parallax.fabric.errors import BadSetting
from parallax.scheduler.journal import BoundedFiles, Journal
from parallax.scheduler.journal_entries import (
    Accepted,
    Delivered,
    Ended,
    Entry,
    Missed,
    Moved,
    Opened,
    Record,
    Started,
    checksum_of,
)
from tests.chaos.checker import Checker, check, files_of
from tests.chaos.history import History

ANSWER = [101, 102, 103, 104, 105]


def text_of(tokens: Sequence[int]) -> str:
    return "".join(map(chr, tokens))


def true_entries() -> list[Entry]:
    """Two requests; the first is moved once."""
    early, late = tuple(ANSWER[:2]), tuple(ANSWER[2:])
    return [
        Opened("a"),
        Accepted(1, "one", 0, 7, 5),
        Started(1, 1, 4, 0),
        Accepted(2, "two", 0, 7, 9),
        Started(2, 1, 4, 0),
        Delivered(1, 1, 0, 2, checksum_of(early), early),
        Moved(1, 1, 4, "broke"),
        Moved(2, 1, 4, "broke"),
        Started(1, 2, 5, 2),
        Delivered(1, 2, 2, 3, checksum_of(ANSWER), late),
        Ended(1, "length", 5),
        Ended(2, "error", 0, "RingLost"),
    ]


def true_histories() -> list[History]:
    answered = History("greedy", 200, "one", text_of(ANSWER), ["length"], [5], 1)
    return [answered, History("failed", 503, error="ring_lost")]


def wrong(entries: Sequence[Entry], histories: Sequence[History]) -> list[str]:
    checker = Checker(text_of)
    checker.read([Record(entry, 0.0, 0.0) for entry in entries])
    return checker.finish(histories).wrong


def test_a_true_history_is_found_true() -> None:
    assert wrong(true_entries(), true_histories()) == []


def drop(at: int) -> Callable[[list[Entry]], None]:
    return lambda entries: entries.__delitem__(at)


def swap(at: int, **fields: object) -> Callable[[list[Entry]], None]:
    def change(entries: list[Entry]) -> None:
        entries[at] = replace(entries[at], **fields)  # type: ignore[arg-type]

    return change


def add(at: int, entry: Entry) -> Callable[[list[Entry]], None]:
    return lambda entries: entries.insert(at, entry)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop(0), "does not begin with its opening"),
        (drop(10), "request 1 has no end"),
        (add(12, Ended(1, "length", 5)), "goes on after its end"),
        (add(12, Delivered(1, 2, 5, 1, 0, (1,))), "goes on after its end"),
        (add(3, Accepted(1, "again", 0, 7, 5)), "accepted twice"),
        (drop(1), "never accepted"),
        (drop(5), "token 2 comes where 0 should"),
        (drop(9), "ended with 5 tokens, 2 were delivered"),
        (swap(9, first=1), "token 1 comes where 2 should"),
        (swap(9, tokens=(103, 104, 106)), "do not have their checksum"),
        (swap(9, attempt=1), "tokens of attempt 1, which does not run"),
        (swap(8, attempt=3), "attempt 3 follows attempt 1"),
        (swap(8, epoch=4), "which is over"),
        (swap(8, generated=1), "begins with 1 tokens, 2 were delivered"),
        (drop(6), "while 1 runs"),
        (swap(6, epoch=3), "not its present one"),
        (swap(10, reason="stop"), "saw length, the journal stop"),
        (swap(10, reason="closed"), "saw length, the journal closed"),
        (swap(11, error=""), "without a name"),
        (swap(1, max_tokens=4), "over 4"),
        (add(5, Missed(3)), "nothing can be proved"),
    ],
)
def test_a_journal_with_one_lie_is_found_out(
    change: Callable[[list[Entry]], None], said: str
) -> None:
    entries = true_entries()
    change(entries)
    assert any(said in line for line in wrong(entries, true_histories())), said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": "efgh"}, "another text"),
        ({"text": "efghj"}, "another text"),
        ({"text": "efghii"}, "another text"),
        ({"usages": [4]}, "charged 4 tokens of 5"),
        ({"usages": []}, "0 usages"),
        ({"finishes": ["length", "length"]}, "2 finishes"),
        ({"finishes": ["stop"]}, "saw stop, the journal length"),
        ({"done": 2}, "2 [DONE]"),
        ({"late": 1}, "after its finish"),
        ({"error": "ring_lost"}, "an end and an error"),
        ({"answer": "three"}, "that the journal does not have"),
        ({"status": 0}, "neither an answer nor an error"),
    ],
)
def test_a_client_that_saw_something_else_is_believed(fields: dict[str, object], said: str) -> None:
    histories = true_histories()
    for name, value in fields.items():
        setattr(histories[0], name, value)
    assert any(said in line for line in wrong(true_entries(), histories)), said


def test_two_clients_cannot_have_seen_the_same_answer() -> None:
    histories = true_histories()
    assert any(
        "two clients" in line
        for line in wrong(true_entries(), [*histories, deepcopy(histories[0])])
    )


def test_a_killed_scheduler_leaves_requests_open_and_its_epochs_are_not_used_again() -> None:
    entries = [*true_entries()[:9], Opened("b"), Accepted(1, "three", 0, 7, 5)]
    checker = Checker(text_of, killed=True)
    again = [*entries, Started(1, 1, 5, 0), Ended(1, "closed", 0)]
    checker.read([Record(entry, 0.0, 0.0) for entry in again])
    assert any("by a scheduler before" in line for line in checker.finish().wrong)
    checker = Checker(text_of, killed=True)
    again = [*entries, Started(1, 1, 6, 0), Ended(1, "closed", 0)]
    checker.read([Record(entry, 0.0, 0.0) for entry in again])
    assert checker.finish(true_histories()).wrong == [], "its last words went with it"


def test_a_journal_on_disk_says_what_was_noted(tmp_path: Path) -> None:
    for tokens in (True, False):
        folder = tmp_path / f"{tokens}"
        folder.mkdir()
        journal = Journal(folder, tokens=tokens)
        for entry in true_entries()[1:]:
            if isinstance(entry, Delivered):
                for place, token in enumerate(entry.tokens):
                    journal.token(entry.request, entry.attempt, entry.first + place, token)
            else:
                journal.note(entry)
        journal.close()
        verdict = check(folder, true_histories(), text_of)
        assert verdict.wrong == []
        assert (verdict.requests, verdict.tokens, verdict.moves) == (2, 5, 2)
        assert verdict.compared == (1 if tokens else 0)
        assert (folder / "journal.msgpack").stat().st_mode & 0o077 == 0


def test_a_journal_goes_on_in_further_files_and_keeps_the_last_ones(tmp_path: Path) -> None:
    path = tmp_path / "j"
    files = BoundedFiles(path, lambda: b"begin ", file_bytes=40)
    for number in range(100):
        files.write(b"%10d" % number)
    files.close()
    assert [file.name for file in files_of(path)] == [*(f"j.{n}" for n in range(7, 0, -1)), "j"]
    assert all(file.stat().st_size <= 46 for file in files_of(path))
    assert b"".join(file.read_bytes()[6:] for file in files_of(path)) == b"".join(
        b"%10d" % number for number in range(68, 100)
    )


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Meanwhile a file takes so many bytes, as if the disk were full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_took_half_of_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "j"
    files = BoundedFiles(path, lambda: b"begin ")
    files.write(b"one ")
    with room_for(12), pytest.raises(OSError, match="too large"):
        files.write(b"two two ")
    files.write(b"three")
    files.close()
    assert path.read_bytes() == b"begin one three"


def test_a_full_disk_costs_no_older_file(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b"before")
    with room_for(3):
        for _ in range(3):
            with pytest.raises(OSError, match="too large"):
                BoundedFiles(path, lambda: b"begin ")
    BoundedFiles(path, lambda: b"begin ").close()
    assert [file.read_bytes() for file in files_of(path)] == [b"before", b"begin "]


def test_a_journal_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadSetting, match="journal"):
        Journal(tmp_path / "file" / "j")


def test_a_record_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    journal.note(Accepted(1, "one", 0, 1, 1))
    journal.note(Ended(1, "closed", 0))
    journal.close()
    path.write_bytes(path.read_bytes()[:-3])
    verdict = check(path)
    assert verdict.requests == 1
    assert verdict.wrong == ["request 1 has no end"]
