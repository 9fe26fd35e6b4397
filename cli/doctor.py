"""``parallax doctor``: is this machine fit to be a scheduler or a node?"""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.text import Text

from parallax.cli import flags
from parallax.cli.checks import Check, Grade, all_checks
from parallax.cli.console import configure_logging, printable
from parallax.fabric.settings import SchedulerSettings, load

STYLE = {Grade.OK: "green", Grade.WARN: "yellow", Grade.FAIL: "bold red"}


def command(
    as_json: flags.Json = False,
    host: flags.Host = None,
    port: flags.Port = None,
    grpc_port: flags.GrpcPort = None,
    state_dir: flags.StateDir = None,
    log_level: flags.LogLevel = None,
    loopback_only: flags.LoopbackOnly = None,
) -> None:
    """Checks this machine, one line for each check; exits with 1 if one fails."""
    settings = load(
        SchedulerSettings,
        {
            "host": host,
            "port": port,
            "grpc_port": grpc_port,
            "state_dir": state_dir,
            "log_level": log_level or "error",  # what goes wrong is a check's to say
            "loopback_only": loopback_only,
        },
    )
    configure_logging(settings.log_level)
    checks: list[Check] = []
    console = Console(highlight=False, soft_wrap=True)
    for check in all_checks(settings):
        checks.append(check)
        if not as_json:
            _print(console, check)
    if as_json:
        rows = [
            {"name": c.name, "grade": c.grade.value, "detail": c.detail, "advice": c.advice}
            for c in checks
        ]
        typer.echo(json.dumps(rows))
    if any(check.grade is Grade.FAIL for check in checks):
        raise typer.Exit(1)


def _print(console: Console, check: Check) -> None:
    console.print(
        Text.assemble(
            (f"{check.grade.value:4}", STYLE[check.grade]),
            f"  {check.name}: {printable(check.detail)}",
        )
    )
    if check.advice:
        console.print(Text(f"      {check.advice}"))
