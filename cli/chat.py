"""``parallax chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from parallax.cli import flags
from parallax.cli.client import ClusterClient, connect
from parallax.cli.console import configure_logging, printable, show_error
from parallax.fabric.errors import ROWS, ClusterError, InvalidRequest, ParallaxError
from parallax.fabric.settings import ClientSettings, load

Message = dict[str, str]

HELP = "Ctrl-C stops an answer, /new forgets the conversation, Ctrl-D ends."
INTERRUPTED = 130


def command(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask. [default: a conversation, or standard input]"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told beforehand.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 always gives the same answer.")
    ] = None,
    url: flags.Url = None,
    host: flags.Host = None,
    port: flags.Port = None,
    state_dir: flags.StateDir = None,
    api_key: flags.ApiKey = None,
    ca_file: flags.CaFile = None,
    log_level: flags.LogLevel = None,
) -> None:
    """Answers one prompt, or holds a conversation."""
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
    knobs: dict[str, Any] = {"max_tokens": max_tokens}
    if temperature is not None:
        knobs["temperature"] = temperature
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    if prompt is None and sys.stdin.isatty():
        _converse(client, before, knobs)
        return
    if prompt is None:
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise InvalidRequest("The prompt is empty", "", "Write something to ask", field="prompt")
    try:
        show(Answer(client, [*before, {"role": "user", "content": prompt}], knobs))
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        raise typer.Exit(INTERRUPTED) from None


class Answer:
    """One answer: iterate over its text as it comes."""

    def __init__(
        self, client: ClusterClient, messages: list[Message], knobs: dict[str, Any]
    ) -> None:
        self._client = client
        self._body = {
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **knobs,
        }
        self.text = ""
        self.speed = ""  # for people, once the answer is whole

    def __iter__(self) -> Iterator[str]:
        """
        Raises:
            ParallaxError: the cluster cannot answer, or stopped in the middle.
        """
        for line in self._client.lines("/v1/chat/completions", self._body):
            event = line.removeprefix(b"data:").strip()
            if event == b"[DONE]":
                return
            if not line.startswith(b"data:"):
                continue
            piece = self._take(event)
            if piece:
                self.text += piece
                yield printable(piece)
        raise ClusterError("The answer broke off", "The scheduler closed the connection")

    def _take(self, event: bytes) -> str:
        try:
            chunk = json.loads(event)
            if "error" in chunk:
                told = chunk["error"]
                kind = next((c for c, r in ROWS.items() if r.code == told["code"]), ParallaxError)
                raise kind(printable(str(told["message"])))
            metrics = chunk.get("metrics")
            if metrics:
                tps = f", {metrics['tps']:.1f} tokens/s" if metrics.get("tps") else ""
                self.speed = (
                    f"{metrics.get('tokens', 0)} tokens{tps}, "
                    f"first after {metrics.get('ttft_ms', 0):.0f} ms"
                )
            return "".join(str(c["delta"].get("content") or "") for c in chunk["choices"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ClusterError(
                "The cluster's answer cannot be understood",
                "",
                "Install the same version of Parallax here and on the scheduler",
            ) from None


def show(answer: Answer) -> None:
    """Writes an answer as it comes, and ends the line."""
    for piece in answer:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _converse(client: ClusterClient, messages: list[Message], knobs: dict[str, Any]) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    forgotten = list(messages)
    client.get("/health")  # nobody should type before they learn that nobody listens
    typer.secho(HELP, dim=True, err=True)
    while True:
        try:
            prompt = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        if prompt in ("/quit", "/exit"):
            return
        if prompt == "/new":
            messages = list(forgotten)
        elif prompt:
            messages = _turn(client, messages, prompt, knobs)


def _turn(
    client: ClusterClient, messages: list[Message], prompt: str, knobs: dict[str, Any]
) -> list[Message]:
    """Asks, shows the answer, and returns the conversation with both."""
    asked = [*messages, {"role": "user", "content": prompt}]
    answer = Answer(client, asked, knobs)
    try:
        show(answer)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
    except ParallaxError as error:
        show_error(error)
        return messages
    if answer.speed:
        typer.secho(answer.speed, dim=True, err=True)
    return [*asked, {"role": "assistant", "content": answer.text}]
