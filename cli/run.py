"""``parallax run``: a scheduler."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from parallax.cli import flags
from parallax.cli.console import configure_logging
from parallax.cli.serving import serve
from parallax.fabric.settings import SchedulerSettings, load


def command(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A local folder, 'builtin', or a hub id. [default: chosen on the page]",
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", "-n", min=1, help="Nodes to wait for. [default: 1]"),
    ] = None,
    speculation: Annotated[
        bool | None,
        typer.Option(
            "--speculation/--no-speculation",
            help="Draft ahead of an answer that is alone, from what it repeats. [default: on]",
        ),
    ] = None,
    keys: Annotated[
        bool | None,
        typer.Option(
            "--keys/--no-keys",
            help="Ask for API keys over HTTP. [default: as soon as --host is not loopback]",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="HTTP over TLS: the certificate, a PEM file.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="The certificate's key, a PEM file without a password.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin that may use the API; may be repeated."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="One more name that HTTP answers to; may be repeated."),
    ] = None,
    open_to_all: Annotated[
        bool | None,
        typer.Option(
            "--open/--no-open",
            help="Let every node in, whoever runs it: no tokens, no approvals. [default: off]",
        ),
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="File or folder for a record of what became of every request. [default: none]"
        ),
    ] = None,
    journal_tokens: Annotated[
        bool | None,
        typer.Option(
            "--journal-tokens", help="Write the tokens of answers too, not only a checksum."
        ),
    ] = None,
    host: flags.Host = None,
    port: flags.Port = None,
    grpc_port: flags.GrpcPort = None,
    state_dir: flags.StateDir = None,
    log_level: flags.LogLevel = None,
    loopback_only: flags.LoopbackOnly = None,
    with_parent: flags.WithParent = False,
) -> None:
    """Starts a scheduler and serves until Ctrl-C."""
    settings = load(
        SchedulerSettings,
        {
            "model": model,
            "nodes": nodes,
            "speculation": speculation,
            "keys": None if keys is None else "required" if keys else "off",
            "tls_cert": tls_cert,
            "tls_key": tls_key,
            "cors_origin": cors_origin or None,
            "allowed_host": allowed_host or None,
            "open": open_to_all,
            "journal": journal,
            "journal_tokens": journal_tokens,
            "host": host,
            "port": port,
            "grpc_port": grpc_port,
            "state_dir": state_dir,
            "log_level": log_level,
            "loopback_only": loopback_only,
        },
    )
    configure_logging(settings.log_level)
    # Only now: it takes seconds to import, and a misprint should be told at once.
    from parallax.scheduler.app import serve_scheduler

    serve(partial(serve_scheduler, settings), settings, with_parent=with_parent)
