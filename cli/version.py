"""``parallax version``."""

from __future__ import annotations

import json
import platform

import typer

from parallax.cli import flags
from parallax.fabric.version import PROTOCOL, VERSION, mlx_lm_version, mlx_version


def command(as_json: flags.Json = False) -> None:
    """Prints the versions."""
    versions = {
        "parallax": VERSION,
        "protocol": str(PROTOCOL),
        "mlx": mlx_version(),
        "mlx-lm": mlx_lm_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if as_json:
        typer.echo(json.dumps(versions))
    else:
        for name, version in versions.items():
            typer.echo(f"{name} {version}")
