"""``parallax tokens``: what nodes are let in with."""

from __future__ import annotations

import json
import re
import time
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console

from parallax.cli import flags
from parallax.cli.console import printable
from parallax.cli.nodes import client_of
from parallax.cli.tables import tokens_table
from parallax.fabric.errors import BadSetting

group = typer.Typer(no_args_is_help=True)

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


@group.command()
def create(
    expires: Annotated[
        str, typer.Option(metavar="TIME", help="How long it is good: 30m, 24h, 7d.")
    ] = "24h",
    uses: Annotated[
        int | None, typer.Option(min=1, help="How many nodes may come with it. [default: any]")
    ] = None,
    note: Annotated[str, typer.Option(help="What it is for, as the list shows it.")] = "",
    as_json: flags.Json = False,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Makes a token and prints the join command with it; it cannot be shown again."""
    body: dict[str, object] = {"expires_s": seconds(expires), "note": note}
    if uses is not None:
        body["uses"] = uses
    client = client_of(locals())
    made = client.send("POST", "/admin/tokens", body).get("data") or {}
    if as_json:
        typer.echo(json.dumps(made))
        return
    typer.echo(printable(str(made.get("join_command", ""))))
    typer.echo(
        f"Token {printable(str(made.get('id')))}, good for {expires}. It is not shown again.",
        err=True,
    )


@group.command("list")
def listing(
    as_json: flags.Json = False,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Lists the tokens: what they are for, and whether they still let nodes in."""
    tokens = client_of(locals()).get("/admin/tokens").get("data") or []
    if as_json:
        typer.echo(json.dumps(tokens))
    elif tokens:
        Console(highlight=False).print(tokens_table(tokens, time.time()))
    else:
        typer.echo("No tokens. Make one: parallax tokens create")


@group.command()
def revoke(
    token: Annotated[str, typer.Argument(metavar="ID", help="As 'parallax tokens list' shows it.")],
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Ends a token. Nodes that came with it stay; 'parallax nodes remove' sends them away."""
    client_of(locals()).send("DELETE", f"/admin/tokens/{quote(token, safe='')}")
    typer.echo(f"Token {printable(token)} lets nobody in any more")


def seconds(text: str) -> float:
    """How long "90s", "30m", "24h" or "7d" is.

    Raises:
        BadSetting: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise BadSetting(
            f"'{printable(text)}' is no length of time",
            "It is a number above 0 and its unit",
            "Write 90s, 30m, 24h or 7d",
            setting="expires",
        )
    return float(found[1]) * UNITS_S[found[2]]
