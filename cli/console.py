"""What the command says on the terminal when something fails, and its log."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from parallax.fabric.errors import InternalError, ParallaxError

ISSUES = "Run it again with --log-level debug and report what it prints"


def configure_logging(level: str) -> None:
    """Log records of this level and above go to standard error."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    if level != "debug":
        # One line per packet, or per file, is for those who ask for everything.
        for name in ("zeroconf", "aiohttp.access", "asyncio", "grpc"):
            logging.getLogger(name).setLevel(logging.ERROR)


def show_failure(error: Exception) -> int:
    """Prints an error on standard error and returns the exit status that goes with it."""
    if logging.getLogger().isEnabledFor(logging.DEBUG) or _asked_for_debug(sys.argv):
        traceback.print_exception(error)
    if not isinstance(error, ParallaxError):
        detail = f"{type(error).__name__}: {error}".rstrip(": ")
        error = InternalError("Parallax failed", detail, ISSUES)
    show_error(error)
    return error.row.exit


def _asked_for_debug(arguments: Sequence[str]) -> bool:
    """Whether the command line says so, for what fails before settings are read."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return "--log-level=debug" in arguments or ("--log-level", "debug") in pairs


def show_error(error: ParallaxError) -> None:
    """What, why and how to fix, on standard error."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text(f"Error: {error.what}", style="bold red"))
    if error.why:
        console.print(Text(f"  Why: {error.why}"))
    if error.fix:
        console.print(Text(f"  Fix: {error.fix}"))


def printable(text: str) -> str:
    """Text that others wrote, without what could steer a terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
