"""``parallax nodes``: who is a member, who waits, and letting them in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console

from parallax.cli import flags
from parallax.cli.client import ClusterClient, cluster_status, connect
from parallax.cli.console import configure_logging, printable
from parallax.cli.tables import nodes_table, pending_table
from parallax.fabric.settings import ClientSettings, load

group = typer.Typer(invoke_without_command=True)

Node = Annotated[
    str, typer.Argument(metavar="NODE|FINGERPRINT", help="A node's id, or its fingerprint.")
]


@group.callback()
def listing(
    context: typer.Context,
    as_json: flags.Json = False,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Lists the nodes, and who waits to be let in; its verbs decide about them."""
    given = locals()
    if context.invoked_subcommand is not None:
        if any(given[name] for name in ("as_json", *flags.WHERE)):
            raise typer.BadParameter("flags stand behind the verb: parallax nodes VERB --url …")
        return
    status = cluster_status(client_of(given))
    nodes = status.get("node_list") or []
    pending = status.get("pending_nodes") or []
    if as_json:
        typer.echo(json.dumps([*nodes, *({**node, "state": "pending"} for node in pending)]))
        return
    console = Console(highlight=False)
    if nodes:
        console.print(nodes_table(nodes))
    else:
        typer.echo("No nodes yet. On another machine type:")
        typer.echo(f"  {printable(str(status.get('node_join_command', 'parallax join')))}")
    if pending:
        typer.echo("\nWaiting to be let in:")
        console.print(pending_table(pending))
        typer.echo("If a node shows the same fingerprint: parallax nodes approve FINGERPRINT")


@group.command()
def approve(
    node: Node,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Lets a node in that waits, or that was sent away."""
    client = client_of(locals())
    typer.echo(f"{decide(client, node, 'approve')} is let in")


@group.command()
def deny(
    node: Node,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Refuses a node that waits, until it is approved or brings a token."""
    client = client_of(locals())
    typer.echo(f"{decide(client, node, 'deny')} is refused from now on")


def client_of(given: Mapping[str, Any]) -> ClusterClient:
    """The cluster that a verb's flags name, which are among its local variables.

    Raises:
        BadSetting: a flag is wrong.
    """
    settings = load(ClientSettings, {name: given[name] for name in flags.WHERE})
    configure_logging(settings.log_level)
    return connect(settings)


def decide(client: ClusterClient, node: str, verb: str) -> str:
    """Does ``verb`` to a node, and says how people call it.

    Raises:
        ParallaxError: as :meth:`ClusterClient.send`; above all, there is no such node.
    """
    told = client.send("POST", f"/admin/nodes/{quote(node, safe='')}/{verb}").get("data")
    known = told if isinstance(told, dict) else {}
    return printable(f"{known.get('name') or 'Node'} ({known.get('node_id', node)})")
