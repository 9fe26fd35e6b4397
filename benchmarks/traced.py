"""The ``parallax`` command with a stop-watch: when each decode frame is where.

    TRACE_FOLDER=FOLDER python -m benchmarks.traced join ...

Functions of ``node/`` are wrapped, none is changed; at its end the process writes what it saw
into the folder. Times are ``time.perf_counter()``, which all processes of a machine share.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallax.cli.main import main
from parallax.fabric import data_channel
from parallax.node import arrays, head, ring, runner, stage
from parallax.proto import wire_pb2 as wire

FOLDER = "TRACE_FOLDER"  # not a setting of Parallax


class Trace:
    """When each decode frame was where, and how long parts of its computing took."""

    def __init__(self) -> None:
        self.frames: dict[str, dict[str, float]] = {}
        self._running: dict[str, float] | None = None  # of the frame on the MLX thread
        self._received = 0.0  # when the reader got the message that it now hands on

    def of(self, frame: wire.Frame) -> dict[str, float]:
        """The record of one frame."""
        return self.frames.setdefault(f"{frame.epoch}.{frame.number}", {})

    def at(self, place: str) -> Callable[[Any], Any]:
        """Wraps a method that takes a frame: notes when it is called."""

        def wrap(method: Any) -> Any:
            @functools.wraps(method)
            def wrapped(self_: Any, frame: wire.Frame, *more: Any) -> Any:
                if frame.kind == wire.DECODE:
                    record = self.of(frame)
                    record[place] = time.perf_counter()
                    if place in {"taken", "posted"} and self._received:
                        record["received"] = self._received
                        self._received = 0.0
                return method(self_, frame, *more)

            return wrapped

        return wrap

    def received(self, method: Any) -> Any:
        """Wraps what takes a message: notes when it came."""

        @functools.wraps(method)
        def wrapped(self_: Any, message: bytes) -> Any:
            self._received = time.perf_counter()
            return method(self_, message)

        return wrapped

    def running(self, method: Any) -> Any:
        """Wraps ``Runner.run``: notes when it begins and ends."""

        @functools.wraps(method)
        def wrapped(self_: Any, frame: wire.Frame) -> Any:
            if frame.kind != wire.DECODE:
                return method(self_, frame)
            self._running = record = self.of(frame)
            record["begun"] = time.perf_counter()
            try:
                return method(self_, frame)
            finally:
                record["ended"] = time.perf_counter()

        return wrapped

    def sending(self, method: Any) -> Any:
        """Wraps the sender, which is called on the MLX thread right after ``run``."""

        @functools.wraps(method)
        def wrapped(*given: Any) -> Any:
            if self._running is not None:
                self._running["sent"] = time.perf_counter()
                self._running = None
            return method(*given)

        return wrapped

    def lasting(self, part: str) -> Callable[[Any], Any]:
        """Wraps a function of the MLX thread: adds up how long it takes within a frame."""

        def wrap(function: Any) -> Any:
            @functools.wraps(function)
            def wrapped(*given: Any, **named: Any) -> Any:
                if self._running is None:
                    return function(*given, **named)
                begin = time.perf_counter()
                try:
                    return function(*given, **named)
                finally:
                    spent = time.perf_counter() - begin
                    if self._running is not None:
                        self._running[part] = self._running.get(part, 0.0) + spent

            return wrapped

        return wrap

    def write(self, folder: Path) -> None:
        """One file for this process."""
        (folder / f"{os.getpid()}.json").write_text(json.dumps(self.frames))


def wrappers(trace: Trace) -> tuple[tuple[Any, str, Callable[[Any], Any]], ...]:
    """What a decode frame passes: owner, name, and what wraps it."""
    return (
        (ring.RingMember, "_received", trace.received),
        (ring.RingMember, "process", trace.at("posted")),
        (head.Head, "returned", trace.at("taken")),
        (runner.Runner, "run", trace.running),
        (runner, "_settle", trace.lasting("evaluating")),
        (stage.Stage, "forward", trace.lasting("building")),
        (arrays, "pack", trace.lasting("packing")),
        (arrays, "unpack", trace.lasting("unpacking")),
        (data_channel.DataSender, "send", trace.sending),
    )


if __name__ == "__main__":
    watch = Trace()
    for owner, name, wrap in wrappers(watch):
        setattr(owner, name, wrap(getattr(owner, name)))
    atexit.register(watch.write, Path(os.environ[FOLDER]))
    main()
