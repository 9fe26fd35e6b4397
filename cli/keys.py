"""``parallax keys``: who may use the HTTP API of a running cluster."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parallax.cli import flags
from parallax.cli.console import printable
from parallax.cli.nodes import client_of

group = typer.Typer(no_args_is_help=True)


@group.command("create")
def create(
    name: Annotated[str, typer.Option(help="Whom or what it is for.")] = "",
    admin: Annotated[
        bool, typer.Option("--admin", help="It may also change the cluster and its keys.")
    ] = False,
    rate: Annotated[
        int | None, typer.Option(min=1, help="Most requests in any minute. [default: any number]")
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option(min=1, help="Most requests at a time. [default: any number]")
    ] = None,
    as_json: flags.Json = False,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Makes a key and shows it, this once."""
    client = client_of(locals())
    wanted: dict[str, Any] = {"name": name, "admin": admin}
    wanted |= {} if rate is None else {"rate": rate}
    wanted |= {} if concurrent is None else {"concurrent": concurrent}
    made = client.send("POST", "/admin/keys", wanted)["data"]
    if as_json:
        typer.echo(json.dumps(made))
        return
    typer.echo(str(made["key"]))
    typer.echo(
        f"Its id is {made['id']}. The key is shown this once: only a digest is kept.", err=True
    )


@group.command("list")
def listed(
    as_json: flags.Json = False,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Lists the keys: their limits, and what was done with them."""
    keys = client_of(locals()).get("/admin/keys").get("data") or []
    if as_json:
        typer.echo(json.dumps(keys))
    elif keys:
        Console(highlight=False).print(_table(keys))
    else:
        typer.echo("No keys yet: 'parallax keys create' makes one")


@group.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="Its id, as 'parallax keys list' shows it.")],
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Ends a key: what runs with it ends, and requests with it are refused from now on."""
    client_of(locals()).send("DELETE", f"/admin/keys/{quote(key_id, safe='')}")
    typer.echo(f"{key_id} is revoked")


def _table(keys: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "ID",
        "NAME",
        "KIND",
        "RATE/MIN",
        "AT ONCE",
        "REQUESTS",
        "PROMPT",
        "COMPLETION",
        "LAST USED",
    ):
        table.add_column(column, no_wrap=True, min_width=12 if column == "ID" else None)
    for key in keys:
        table.add_row(
            str(key["id"]),
            Text(printable(str(key["name"]))),
            "admin" if key["admin"] else "use",
            _limit(key["rate"]),
            _limit(key["concurrent"]),
            *(f"{key[part]:,}" for part in ("requests", "prompt_tokens", "completion_tokens")),
            _when(key["last_used"]),
        )
    return table


def _limit(value: int | None) -> str:
    return "-" if value is None else str(value)


def _when(at_s: int | None) -> str:
    return "never" if at_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))
