"""``parallax nodes``: who is a member and who waits; let in, drained, removed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console

from parallax.cli import flags
from parallax.cli.client import ClusterClient, cluster_status, connect
from parallax.cli.console import configure_logging, printable
from parallax.cli.tables import absent_table, aside_lines, nodes_table, pending_table
from parallax.fabric.settings import ClientSettings, load

group = typer.Typer(invoke_without_command=True)

LOOK_S = 0.5  # between two looks at how far a node is
PATIENCE_S = 600.0  # then it is told that it goes on without being watched

Node = Annotated[
    str, typer.Argument(metavar="NODE|FINGERPRINT", help="A node's id, or its fingerprint.")
]

Member = Annotated[
    str,
    typer.Argument(metavar="NODE", help="A node's name or id, or how one of them begins."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Even where nothing can be served without this node.")
]
Now = Annotated[
    bool,
    typer.Option("--now", help="Cut it off first, whatever it does and whatever fits without it."),
]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Whether to return only when it is done.")
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
    """Lists the nodes, here or away, and who waits to be let in; its verbs decide about them."""
    given = locals()
    if context.invoked_subcommand is not None:
        if any(given[name] for name in ("as_json", *flags.WHERE)):
            raise typer.BadParameter("flags stand behind the verb: parallax nodes VERB --url …")
        return
    status = cluster_status(client_of(given))
    nodes = status.get("node_list") or []
    absent = status.get("absent_nodes") or []
    pending = status.get("pending_nodes") or []
    if as_json:
        others = [*(("absent", node) for node in absent), *(("pending", node) for node in pending)]
        typer.echo(json.dumps([*nodes, *({**node, "state": state} for state, node in others)]))
        return
    console = Console(highlight=False)
    if nodes:
        console.print(nodes_table(nodes))
        for line in aside_lines(nodes):
            console.print(line)
    else:
        typer.echo("No nodes yet. On another machine type:")
        typer.echo(f"  {printable(str(status.get('node_join_command', 'parallax join')))}")
    if absent:
        typer.echo("\nLet in, and not here ('parallax nodes remove ID' sends one away for good):")
        console.print(absent_table(absent, time.time()))
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
    """Refuses a node that waits, until it is approved or brings a token.

    One that --open let in is cut off.
    """
    client = client_of(locals())
    typer.echo(f"{decide(client, node, 'deny')} is refused from now on")


@group.command()
def drain(
    node: Member,
    force: Force = False,
    wait: Wait = True,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Takes every layer off a node; its requests move on, and it stays a member."""
    client = client_of(locals())
    node_id, name = leave(client, node, "drain", force=force)
    if wait and not gone_or(client, node_id, "drained"):
        typer.echo(f"{name} still has layers; 'parallax nodes' shows how it goes on")
        return
    typer.echo(f"{name} {'is drained' if wait else 'gives its layers up'}")


@group.command()
def undrain(
    node: Member,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Lets a node have layers again that was drained, or put aside (also: resume)."""
    client = client_of(locals())
    _, name = leave(client, node, "undrain", force=False)
    typer.echo(f"{name} may have layers again")


group.command("resume", hidden=True)(undrain)


@group.command()
def remove(
    node: Member,
    force: Force = False,
    now: Now = False,
    wait: Wait = True,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Drains a node, for a minute at most, then cuts it off and refuses it from then on.

    With --now it is cut off first: for a machine that must not see another word. The token that
    it came with is revoked, and that of the join command replaced.
    """
    client = client_of(locals())
    told = ask_to_leave(client, node, "remove", force=force, now=now)
    node_id, name = str(told.get("node_id", node)), called(told, node)
    if wait:
        gone_or(client, node_id)
    typer.echo(f"{name} {'is removed' if wait or now else 'will be removed'}")
    typer.echo("The token that it came with is revoked, and the join command has a new one")
    if told.get("same_token"):
        typer.echo(came_with(told))


def leave(client: ClusterClient, node: str, verb: str, *, force: bool) -> tuple[str, str]:
    """Does ``verb`` to a node; returns its id, and how people call it.

    Raises:
        ParallaxError: there is no such node, or the model does not fit without it.
    """
    told = ask_to_leave(client, node, verb, force=force)
    return str(told.get("node_id", node)), called(told, node)


def ask_to_leave(
    client: ClusterClient, node: str, verb: str, *, force: bool, now: bool = False
) -> dict[str, Any]:
    """Does ``verb`` to a node; returns what is told of it.

    Raises:
        ParallaxError: as :func:`leave`.
    """
    path = f"/admin/nodes/{quote(node, safe='')}/{verb}"
    asked = {name: True for name, wanted in (("force", force), ("now", now)) if wanted}
    told = client.send("POST", path, asked).get("data")
    return told if isinstance(told, dict) else {}


def called(known: Mapping[str, Any], node: str = "") -> str:
    """How people call a node."""
    return printable(f"{known.get('name') or 'Node'} ({known.get('node_id', node)})")


def came_with(told: Mapping[str, Any]) -> str:
    """Who else came in with the token of a node that is removed, for people."""
    others = [called(other) for other in told["same_token"]]
    more = int(told.get("same_token_count", 0)) - len(others)
    others += [f"and {more} more"] if more > 0 else []
    return "Members that came in with the same token: " + ", ".join(others)


def gone_or(client: ClusterClient, node_id: str, state: str = "gone") -> bool:
    """Waits until a node is in this state or gone; False when it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        nodes = cluster_status(client).get("node_list") or []
        states = [each.get("state") for each in nodes if each.get("node_id") == node_id]
        if not states or states[0] in (state, "gone"):
            return True
        time.sleep(LOOK_S)
    return False


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
    return called(told if isinstance(told, dict) else {}, node)
