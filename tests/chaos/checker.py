"""Proves from the scheduler's journal and from what clients saw that no answer was lost or changed.

``python -m tests.chaos.checker JOURNAL [--histories FILE] [--model FOLDER]`` prints what is wrong,
and ends with status 1 if anything is.

What is checked of every request that was accepted:

1. it has exactly one end, and nothing comes after it;
2. the tokens delivered have the indices 0..n-1, each once, and the checksum fits them;
3. attempts only grow; one begins with what was delivered before it, and no other begins while it
   runs; no attempt goes to an epoch that is over, and a scheduler's epochs are above those of the
   schedulers before it;
4. its client saw what was delivered, in one piece: text, number of tokens, one finish of that kind,
   one usage, one ``[DONE]``; and where it failed, its client was told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parallax.scheduler.journal_entries import (
    Accepted,
    Delivered,
    Ended,
    Missed,
    Moved,
    Opened,
    Record,
    Started,
    checksum_of,
    decode,
)
from tests.chaos.history import History, load

TextOf = Callable[[Sequence[int]], str]

READ_BYTES = 1 << 20


@dataclass(slots=True)
class _Request:
    """What the journal has said of one request so far."""

    accepted: Accepted
    attempt: int = 0
    epoch: int = 0
    running: bool = False
    count: int = 0
    checksum: int = 0
    tokens: list[int] = field(default_factory=list)
    told: bool = True  # every token of it is in the journal
    end: Ended | None = None


@dataclass(slots=True)
class Verdict:
    """What was found."""

    wrong: list[str] = field(default_factory=list)
    requests: int = 0
    tokens: int = 0
    moves: int = 0
    attempts: int = 0
    compared: int = 0  # answers whose text was compared with what was delivered


class Checker:
    """Reads the records of one scheduler's process, or of several one after the other.

    Args:
        text_of: what tokens say; without it only their number is compared.
        killed: runs that ended with a pulled plug may leave requests open, and lack their last
            moment.
    """

    def __init__(self, text_of: TextOf | None = None, *, killed: bool = False) -> None:
        self._text_of = text_of
        self._killed = killed
        self._run = ""
        self._open: dict[int, _Request] = {}
        self._answers: dict[tuple[str, int], _Request] = {}
        self._over: set[int] = set()  # epochs
        self._highest = 0
        self._floor = 0  # epochs of the schedulers before
        self.verdict = Verdict()

    # ----------------------------------------------------------------- journal

    def read(self, records: Iterable[Record]) -> None:
        """Takes records in."""
        for record in records:
            match record.entry:
                case Opened() as opened:
                    self._opened(opened)
                case Missed() as missed:
                    self._say(f"{missed.entries} entries are missing: nothing can be proved")
                case Accepted() as accepted:
                    self._accepted(accepted)
                case entry:
                    self._of_request(entry)

    def _opened(self, opened: Opened) -> None:
        if opened.run == self._run:
            return  # the same process began another file
        self._close_run()
        self._run = opened.run
        self._floor = self._highest

    def _accepted(self, accepted: Accepted) -> None:
        if not self._run:
            self._say("the journal does not begin with its opening")
            self._run = "?"
        if accepted.request in self._open:
            self._say(f"request {accepted.request} was accepted twice")
            return
        self.verdict.requests += 1
        request = _Request(accepted)
        self._open[accepted.request] = request
        if accepted.answer:
            self._answers[accepted.answer, accepted.choice] = request

    def _of_request(self, entry: Started | Delivered | Moved | Ended) -> None:
        request = self._open.get(entry.request)
        name = f"request {entry.request}"
        if request is None:
            self._say(f"{name} was never accepted: {entry}")
            return
        if request.end is not None:
            self._say(f"{name} goes on after its end: {entry}")
            return
        match entry:
            case Started():
                self._started(name, request, entry)
            case Delivered():
                self._delivered(name, request, entry)
            case Moved():
                self._moved(name, request, entry)
            case Ended():
                self._ended(name, request, entry)

    def _started(self, name: str, request: _Request, entry: Started) -> None:
        self.verdict.attempts += 1
        if request.running:
            self._say(f"{name} begins attempt {entry.attempt} while {request.attempt} runs")
        if entry.attempt != request.attempt + 1:
            self._say(f"{name}: attempt {entry.attempt} follows attempt {request.attempt}")
        if entry.epoch in self._over:
            self._say(f"{name}: attempt {entry.attempt} goes to epoch {entry.epoch}, which is over")
        if entry.epoch <= self._floor:
            self._say(f"{name}: epoch {entry.epoch} was used by a scheduler before")
        if entry.generated != request.count:
            self._say(
                f"{name}: attempt {entry.attempt} begins with {entry.generated} tokens, "
                f"{request.count} were delivered"
            )
        request.running, request.attempt, request.epoch = True, entry.attempt, entry.epoch
        self._highest = max(self._highest, entry.epoch)

    def _delivered(self, name: str, request: _Request, entry: Delivered) -> None:
        if not request.running or entry.attempt != request.attempt:
            self._say(f"{name}: tokens of attempt {entry.attempt}, which does not run")
        if entry.first != request.count:
            self._say(f"{name}: token {entry.first} comes where {request.count} should")
        if entry.count < 1:
            self._say(f"{name}: {entry.count} tokens were delivered")
        request.count = max(request.count, entry.first + entry.count)
        self.verdict.tokens += entry.count
        if entry.tokens and request.told:
            if len(entry.tokens) != entry.count:
                self._say(f"{name}: {entry.count} tokens, of which {len(entry.tokens)} are told")
            if checksum_of(entry.tokens, request.checksum) != entry.checksum:
                self._say(f"{name}: tokens from {entry.first} do not have their checksum")
            request.tokens += entry.tokens
        elif not entry.tokens:
            request.told = False
        request.checksum = entry.checksum

    def _moved(self, name: str, request: _Request, entry: Moved) -> None:
        self.verdict.moves += 1
        if not request.running or (entry.attempt, entry.epoch) != (request.attempt, request.epoch):
            self._say(
                f"{name} left attempt {entry.attempt} of epoch {entry.epoch}, not its present one"
            )
        request.running = False
        if entry.why != "refused":
            self._over.add(entry.epoch)

    def _ended(self, name: str, request: _Request, entry: Ended) -> None:
        if entry.tokens != request.count:
            self._say(f"{name} ended with {entry.tokens} tokens, {request.count} were delivered")
        if entry.reason in ("stop", "length") and not request.running:
            self._say(f"{name} ended well, but it ran nowhere")
        if entry.reason == "error" and not entry.error:
            self._say(f"{name} ended with an error without a name")
        if entry.tokens > request.accepted.max_tokens:
            self._say(f"{name} has {entry.tokens} tokens, over {request.accepted.max_tokens}")
        request.end = entry
        request.running = False

    def _close_run(self) -> None:
        for number, request in self._open.items():
            if request.end is None and not self._killed:
                self._say(f"request {number} has no end")
        self._open = {}

    # ----------------------------------------------------------------- clients

    def finish(self, histories: Iterable[History] = ()) -> Verdict:
        """What is wrong, if anything, once clients and journal are compared."""
        self._close_run()
        seen: set[str] = set()
        for history in histories:
            if history.answer in seen:
                self._say(f"two clients saw answer {history.answer}")
            elif history.answer:
                seen.add(history.answer)
            self._compare(history)
        return self.verdict

    def _compare(self, history: History) -> None:
        name = f"answer {history.answer or '?'} ({history.name})"
        if not history.status and not history.error:
            self._say(f"{name}: its client saw neither an answer nor an error")
        if history.late:
            self._say(f"{name}: {history.late} events came after its finish")
        if history.error:
            if history.finishes or history.done:
                self._say(f"{name} has an end and an error")
            return
        if history.status != 200:
            return
        if len(history.finishes) != 1 or len(history.usages) != 1 or history.done != 1:
            self._say(
                f"{name}: {len(history.finishes)} finishes, {len(history.usages)} usages, "
                f"{history.done} [DONE]"
            )
            return
        request = self._answers.get((history.answer, 0))
        if request is None or request.end is None:
            if self._killed:
                return  # what a scheduler noted last goes with it
            self._say(f"{name}: its client saw an end that the journal does not have")
            return
        self._compare_end(name, history, request)

    def _compare_end(self, name: str, history: History, request: _Request) -> None:
        end = request.end
        finish = history.finishes[0]
        assert end is not None
        if end.reason not in (finish, "closed") or (end.reason == "closed" and finish != "stop"):
            self._say(f"{name}: its client saw {finish}, the journal {end.reason}")
        if history.usages[0] != request.count and end.reason != "closed":
            self._say(
                f"{name}: its client was charged {history.usages[0]} tokens of {request.count}"
            )
        if self._text_of is None or not request.told:
            return
        self.verdict.compared += 1
        said = self._text_of(request.tokens)
        if end.reason == "closed":  # cut at a stop string
            if not said.startswith(history.text):
                self._say(f"{name}: its client saw what was not delivered")
        elif history.text != said:
            self._say(f"{name}: its client saw another text than was delivered")

    def _say(self, text: str) -> None:
        self.verdict.wrong.append(text)


def files_of(journal: Path) -> list[Path]:
    """A journal's files, the oldest first."""
    if journal.is_dir():
        journal = journal / "journal.msgpack"
    older = sorted(journal.parent.glob(journal.name + ".*"), key=lambda path: -int(path.suffix[1:]))
    return [*older, journal]


def records_of(journal: Path) -> Iterable[Record]:
    """Every record of a journal.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    for path in files_of(journal):
        with path.open("rb") as file:
            yield from decode(iter(lambda: file.read(READ_BYTES), b""))


def check(
    journal: Path,
    histories: Iterable[History] = (),
    text_of: TextOf | None = None,
    *,
    killed: bool = False,
) -> Verdict:
    """Reads a journal and compares it with what clients saw."""
    checker = Checker(text_of, killed=killed)
    checker.read(records_of(journal))
    return checker.finish(histories)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Check a scheduler's journal.")
    parser.add_argument("journal", type=Path)
    parser.add_argument("--histories", type=Path, help="what clients saw, one JSON object a line")
    parser.add_argument("--model", type=Path, help="whose tokenizer says what tokens mean")
    parser.add_argument("--killed", action="store_true", help="a scheduler was killed meanwhile")
    given = parser.parse_args()
    text_of: TextOf | None = None
    if given.model is not None:
        from tests.reference import Reference

        reference = Reference(given.model)
        text_of = lambda ids: reference.text(list(ids))  # noqa: E731
    histories = load(given.histories) if given.histories is not None else []
    verdict = check(given.journal, histories, text_of, killed=given.killed)
    print(
        f"{verdict.requests} requests, {verdict.attempts} attempts, {verdict.moves} moves, "
        f"{verdict.tokens} tokens, {verdict.compared} texts compared"
    )
    for line in verdict.wrong:
        print(line)
    print("wrong" if verdict.wrong else "all is well")
    return int(bool(verdict.wrong))


if __name__ == "__main__":
    sys.exit(main())
