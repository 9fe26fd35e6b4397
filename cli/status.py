"""``parallax status``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from parallax.cli import flags
from parallax.cli.client import cluster_status, connect, status_data
from parallax.cli.console import configure_logging
from parallax.cli.tables import status_view
from parallax.fabric.settings import ClientSettings, load


def command(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Keep showing it, each second, until Ctrl-C.")
    ] = False,
    as_json: flags.Json = False,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Shows the model, the nodes, the rings and the requests of a running cluster."""
    settings = load(
        ClientSettings,
        {
            "url": url,
            "host": host,
            "port": port,
            "state_dir": state_dir,
            "api_key": api_key,
            "ca_file": ca_file,
            "log_level": log_level,
        },
    )
    configure_logging(settings.log_level)
    client = connect(settings)
    console = Console(highlight=False)
    if not watch:
        status = cluster_status(client)
        if as_json:
            typer.echo(json.dumps(status))
        else:
            console.print(status_view(status))
        return
    messages = (status_data(json.loads(line)) for line in client.lines("/cluster/status") if line)
    try:
        if as_json or not console.is_terminal:
            for status in messages:
                typer.echo(json.dumps(status))
        else:
            with Live(console=console, auto_refresh=False) as live:
                for status in messages:
                    live.update(status_view(status), refresh=True)
    except KeyboardInterrupt:
        return
