"""``parallax join``: a node."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from parallax.cli import flags
from parallax.cli.console import configure_logging
from parallax.cli.serving import serve
from parallax.fabric.discovery import parse_target
from parallax.fabric.settings import NodeSettings, load


def command(
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler",
            "-s",
            metavar="TARGET",
            help="PEER_ID, host:port or PEER_ID@host:port. [default: the network's only one]",
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Lets this node in; the join command has it. Other users of this machine can see "
            "it among the arguments of its processes, which the variable PARALLAX_TOKEN avoids. "
            "[default: wait for approval]",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The most this node may hold, as 8GB, 512MB or bytes. "
            "[default: what the system recommends]",
        ),
    ] = None,
    cache_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The most disk that fetched models may take under --state-dir; those used longest "
            "ago go first. [default: all that is free]",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What this node is called. [default: the host's name]")
    ] = None,
    grpc_port: flags.GrpcPort = None,
    state_dir: flags.StateDir = None,
    log_level: flags.LogLevel = None,
    loopback_only: flags.LoopbackOnly = None,
    with_parent: flags.WithParent = False,
) -> None:
    """Starts a node, which serves its scheduler until Ctrl-C."""
    settings = load(
        NodeSettings,
        {
            "scheduler": scheduler,
            "token": token or None,
            "memory": memory,
            "cache_bytes": cache_bytes,
            "name": name,
            "grpc_port": grpc_port,
            "state_dir": state_dir,
            "log_level": log_level,
            "loopback_only": loopback_only,
        },
    )
    configure_logging(settings.log_level)
    if settings.scheduler is not None:
        parse_target(settings.scheduler)  # a misprint is said before anything is measured
    # Only now: it takes seconds to import, and a misprint should be told at once.
    from parallax.node.service import serve_node

    serve(partial(serve_node, settings), settings, with_parent=with_parent)
