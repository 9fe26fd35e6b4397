"""Flags that several verbs share. None means: not given, so the settings decide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Host = Annotated[
    str | None,
    typer.Option(help="Address of HTTP. [default: 127.0.0.1; 0.0.0.0 opens it to the network]"),
]
Port = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="Port of HTTP; 0 takes a free one. [default: 3001]"),
]
GrpcPort = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Port of gRPC; 0 takes a free one. [default: 3002 for a scheduler, 0 for a node]",
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the identity, the state and the models. [default: ~/.parallax]"),
]
LogLevel = Annotated[
    str | None, typer.Option(help="debug, info, warning or error. [default: warning]")
]
LoopbackOnly = Annotated[
    bool | None,
    typer.Option("--loopback-only", help="Listen on this machine alone, not on private networks."),
]
WithParent = Annotated[
    bool,
    typer.Option("--with-parent", hidden=True, help="End when standard input ends."),
]
Url = Annotated[
    str | None,
    typer.Option(help="Where the cluster's HTTP is. [default: http://HOST:PORT]"),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        help="The cluster's API key. Others here may see a command's flags: rather set "
        "PARALLAX_API_KEY. [default: on the scheduler's own machine, none is needed]",
    ),
]
CaFile = Annotated[
    Path | None,
    typer.Option(help="PEM certificates to trust for https, besides the system's."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

# Those that say which cluster is meant and how it is reached.
WHERE = ("url", "host", "port", "state_dir", "api_key", "ca_file", "log_level")
