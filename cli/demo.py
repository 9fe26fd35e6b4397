"""``parallax demo``: a whole cluster on this machine alone."""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from parallax.cli import flags
from parallax.cli.chat import INTERRUPTED, Answer, show
from parallax.cli.children import END_S, Child, end_all
from parallax.cli.client import ClusterClient, cluster_status, connect
from parallax.cli.console import configure_logging
from parallax.fabric.errors import ClusterError
from parallax.fabric.settings import HTTP_PORT, ClientSettings, Settings, load

SAMPLE = "Hello! What are you?"
START_S = 60.0
READY_S = 180.0
WATCH_S = 0.5
KNOBS = {"temperature": 0, "max_tokens": 200}


def command(
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, max=16, help="How many nodes.")] = 2,
    model: Annotated[
        str, typer.Option("--model", "-m", help="A local folder, 'builtin', or a hub id.")
    ] = "builtin",
    prompt: Annotated[
        str | None,
        typer.Option(help="Answer this and end. [default: keep serving until Ctrl-C]"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Port of the page. [default: 3001 if it is free, else any]"
        ),
    ] = None,
    state_dir: flags.StateDir = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Shows a cluster at work: a scheduler and nodes, on loopback, with the built-in model."""
    settings = load(Settings, {"log_level": log_level})
    configure_logging(settings.log_level)
    signal.signal(signal.SIGTERM, _interrupt)
    children: list[Child] = []
    with ExitStack() as stack:
        folder = state_dir or Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="parallax-demo-", ignore_cleanup_errors=True)
            )
        )
        folder.mkdir(parents=True, exist_ok=True)
        stack.callback(_end, children)
        try:
            page = _start(children, folder, model, nodes, _page_port(port), settings.log_level)
            client = connect(
                ClientSettings(url=page, state_dir=folder / "scheduler")  # its own, with its key
            )
            _wait_until_ready(client, children, nodes)
            if prompt is not None:
                show(_ask(client, prompt))
                return
            typer.echo(f"> {SAMPLE}")
            show(_ask(client, SAMPLE))
            typer.echo(f"\n{nodes} nodes serve {model}. Ctrl-C ends it.\nPage: {page}")
            while True:
                for child in children:
                    child.check()
                time.sleep(WATCH_S)
        except KeyboardInterrupt:
            if prompt is not None:
                raise typer.Exit(INTERRUPTED) from None


def _start(
    children: list[Child], folder: Path, model: str, nodes: int, port: int, log_level: str
) -> str:
    """Starts the scheduler, then the nodes; returns the page's address."""
    common = ["--loopback-only", "--grpc-port", "0", "--log-level", log_level]
    run = ["run", "-m", model, "-n", str(nodes), "--host", "127.0.0.1", "--port", str(port)]
    scheduler = Child(
        "scheduler",
        [*run, *common, "--state-dir", str(folder / "scheduler")],
        folder / "scheduler.log",
    )
    children.append(scheduler)
    page = scheduler.line("Page: ", START_S)
    ports = dict(pair.split("=") for pair in scheduler.line("Listening: ", START_S).split())
    for number in range(1, nodes + 1):
        name = f"node-{number}"
        join = ["join", "-s", f"127.0.0.1:{ports['enrol']}", "--name", name]
        children.append(
            Child(name, [*join, *common, "--state-dir", str(folder / name)], folder / f"{name}.log")
        )
    return page


def _wait_until_ready(client: ClusterClient, children: list[Child], nodes: int) -> None:
    """
    Raises:
        ClusterError: a child ended, or it took too long.
    """
    columns = (TextColumn("{task.description}"), BarColumn())
    deadline = time.monotonic() + READY_S
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("Starting", total=1.0)
        while True:
            status = _status(client, children)
            if status.get("status") == "available":
                return
            for child in children:
                child.check()
            description, fraction = _stage(status, nodes)
            progress.update(bar, description=description, completed=fraction)
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"The demo was not ready within {READY_S:g} s",
                    str(status.get("problem") or description),
                    "Try fewer nodes with --nodes, or see 'parallax doctor'",
                )
            time.sleep(WATCH_S / 2)


def _status(client: ClusterClient, children: list[Child]) -> dict[str, Any]:
    """The cluster's status; where there is none, why its processes ended says more."""
    try:
        return cluster_status(client)
    except ClusterError:
        scheduler, *nodes = children
        scheduler.check(wait_s=END_S)  # HTTP goes first when it ends
        for node in nodes:
            node.check()
        raise


def _stage(status: dict[str, Any], nodes: int) -> tuple[str, float]:
    """What is going on, and how much of it is done."""
    members = status.get("node_list") or []
    if len(members) < nodes:
        return f"{len(members)} of {nodes} nodes joined", len(members) / nodes / 2
    loads = [float((member.get("load") or {}).get("fraction", 0.0)) for member in members]
    return "Loading the model", 0.5 + sum(loads) / len(loads) / 2


def _ask(client: ClusterClient, prompt: str) -> Answer:
    return Answer(client, [{"role": "user", "content": prompt}], dict(KNOBS))


def _page_port(wanted: int | None) -> int:
    """The port that was asked for, or the usual one if nobody has it, or any."""
    if wanted is not None:
        return wanted
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", HTTP_PORT))
        except OSError:
            return 0
    return HTTP_PORT


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _end(children: list[Child]) -> None:
    """Ends the children; the wait is bounded, so nothing may cut it short."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_all(children)
    sys.stdout.flush()
