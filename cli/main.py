"""The ``parallax`` command: which verbs there are, and how their errors are shown.

A verb's module is imported only when that verb runs, so ``--help`` is quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

VERBS = {
    "run": "Start a scheduler: the page, the chat API, and the place that nodes join.",
    "join": "Start a node: lend this machine's memory and compute to a scheduler.",
    "demo": "Start a scheduler and nodes on this machine alone, with the built-in model.",
    "chat": "Chat with the model of a running cluster.",
    "status": "Show how a running cluster is.",
    "nodes": "List the nodes of a running cluster; let them in, drain them, remove them.",
    "tokens": "Make, list and revoke the tokens that nodes join with.",
    "keys": "Make, list and revoke the API keys of a running cluster.",
    "models": "List the models that a running cluster can serve.",
    "doctor": "Check this machine: ports, mDNS, memory, versions, interfaces.",
    "version": "Show the versions of Parallax and of what it stands on.",
}


def main() -> int:
    """Runs the command line; the exit status is the error's own."""
    # gRPC would write its own lines beside our errors.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        build(sys.argv[1:])()
    except Exception as error:
        from parallax.cli.console import show_failure

        return show_failure(error)
    return 0


def build(arguments: Sequence[str]) -> typer.Typer:
    """The command with the one verb loaded that is about to run."""
    app = typer.Typer(
        name="parallax",
        help="Every Mac in the room becomes one computer that serves models too big for any of "
        "them.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_common)
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    completing = "_PARALLAX_COMPLETE" in os.environ
    for verb, summary in VERBS.items():
        if not completing and verb != wanted:
            app.command(verb, help=summary)(_elsewhere)
            continue
        module = importlib.import_module(f"parallax.cli.{verb}")
        if hasattr(module, "group"):  # a verb with verbs of its own
            app.add_typer(module.group, name=verb, help=summary)
        else:
            app.command(verb, help=summary)(module.command)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from parallax.fabric.version import VERSION

        typer.echo(f"parallax {VERSION}")
        raise typer.Exit


def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """What stands before the verb."""


def _elsewhere() -> None:
    """Stands for a verb that does not run this time."""


if __name__ == "__main__":
    sys.exit(main())
