"""``parallax models``."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parallax.cli import flags
from parallax.cli.client import connect
from parallax.cli.console import configure_logging, printable
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
    """Lists the models that may be chosen, and which one is served."""
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
    served = {str(model.get("id")) for model in client.get("/v1/models").get("data") or []}
    catalog = client.get("/model/list").get("data") or []
    known = {str(model.get("name")) for model in catalog}
    # A folder that was given with -m is served without being in the catalogue.
    extra = [{"name": name, "size": "", "provider": ""} for name in sorted(served - known)]
    models = [{**model, "served": str(model.get("name")) in served} for model in extra + catalog]
    if as_json:
        typer.echo(json.dumps(models))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("MODEL", "SIZE", "PROVIDER", ""):
        table.add_column(column, no_wrap=True)
    for model in models:
        cells = [Text(printable(str(model.get(k, "")))) for k in ("name", "size", "provider")]
        table.add_row(*cells, Text("served" if model["served"] else "", style="green"))
    Console(highlight=False).print(table)
