"""``parallax nodes``."""

from __future__ import annotations

import json

import typer
from rich.console import Console

from parallax.cli import flags
from parallax.cli.client import cluster_status, connect
from parallax.cli.console import configure_logging, printable
from parallax.cli.tables import nodes_table
from parallax.fabric.settings import ClientSettings, load


def command(
    as_json: flags.Json = False,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Lists the nodes: chip, state, layers, memory."""
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
    status = cluster_status(connect(settings))
    nodes = status.get("node_list") or []
    if as_json:
        typer.echo(json.dumps(nodes))
    elif nodes:
        Console(highlight=False).print(nodes_table(nodes))
    else:
        typer.echo("No nodes yet. On another machine type:")
        typer.echo(f"  {printable(str(status.get('node_join_command', 'parallax join')))}")
