"""What a scheduler or node tells while it runs, as lines and progress bars.

Standard output carries the lines that programs may read (``Page:``, ``Join:``,
``Listening:``, ``Node … listening on …``), standard error everything else.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from parallax.cli.console import printable
from parallax.fabric.events import (
    AwaitsApproval,
    Event,
    Joined,
    Loading,
    NodeAsks,
    NodeJoined,
    NodeLeft,
    NodeStarted,
    Problem,
    Ready,
    Started,
    Stopped,
)


class Reporter:
    """Shows events as they come."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._said: str | None = None

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        match event:
            case Started():
                say(f"Page: {event.page}")
                say(f"Join: {event.join_command}")
                say(
                    f"Listening: http={event.http_port} enrol={event.enrol_port} "
                    f"cluster={event.cluster_port}"
                )
                self._note(event.notice, "yellow")
            case NodeStarted():
                say(f"Node {event.node_id} {printable(event.name)} listening on {event.port}")
                self._note(event.notice, "yellow")
            case AwaitsApproval():
                self._note(f"Waiting to be let in. Fingerprint: {event.fingerprint}", "yellow")
                self._note(
                    "Compare it with the one that the scheduler's page shows, and let this node in "
                    f"there; or, on the scheduler: parallax nodes approve {event.fingerprint}"
                )
            case Joined():
                self._note(f"Joined {event.scheduler_id} at {event.address}")
            case NodeAsks():
                self._note(
                    f"Node {event.name} at {event.address} asks to be let in. If it shows the "
                    f"same fingerprint: parallax nodes approve {event.fingerprint}",
                    "yellow",
                )
            case NodeJoined():
                self._note(f"Node {event.name} joined")
            case NodeLeft():
                self._note(f"Node {event.name} left: {event.why}")
            case Loading():
                self._load(event)
            case Ready():
                self.close()
                rings = {0: "", 1: ", on 1 ring"}.get(event.rings, f", on {event.rings} rings")
                self._note(f"Ready: {event.model}{rings}", "green")
            case Problem():
                self.close()  # what failed does not come to its end; what goes on comes back
                self._problem(event.error.sentence)
            case Stopped():
                self.close()

    def close(self) -> None:
        """Ends the progress bars."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._bars.clear()

    def _problem(self, sentence: str) -> None:
        # A node that keeps trying has the same problem again and again.
        if sentence != self._said:
            self._note(f"Problem: {sentence}", "yellow")
        self._said = sentence

    def _load(self, event: Loading) -> None:
        if not self._console.is_terminal:
            return
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
            )
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.start()
        # One bar for a stage, whatever phase it is in: "NAME layers 0 to 3: reading".
        stage = event.stage.rpartition(": ")[0] or event.stage
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(event.stage, total=1.0)
        self._progress.update(
            self._bars[stage], description=printable(event.stage), completed=event.fraction
        )

    def _note(self, text: str, style: str = "") -> None:
        if text:
            self._said = None
            self._console.print(Text(printable(text), style=style))


def say(line: str) -> None:
    """One line on standard output, at once and unbroken."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
