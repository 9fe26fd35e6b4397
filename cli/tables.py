"""A cluster's status as text and tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from parallax.cli.console import printable

STATE_STYLE = {
    "ready": "green",
    "joining": "yellow",
    "suspect": "yellow",
    "draining": "yellow",
    "removing": "yellow",
    "drained": "cyan",
    "aside": "yellow",
    "gone": "red",
}


def status_view(status: Mapping[str, Any]) -> RenderableType:
    """Everything about a cluster, from the ``data`` of its status."""
    model = status.get("model") or {}
    name = str(status.get("model_name") or "")
    parts: list[RenderableType] = []
    if not name:
        parts.append(
            Text("No model is chosen yet: choose one on the page, or with parallax run -m")
        )
    else:
        head = Text.assemble((printable(name), "bold"), "  ", _word(status.get("status")))
        if model:
            head.append(
                f"  {model.get('layers', '?')} layers, {size(model.get('weight_bytes', 0))}, "
                f"context of {model.get('context_tokens', '?')} tokens"
            )
        parts.append(head)
    nodes = status.get("node_list") or []
    parts.append(nodes_table(nodes) if nodes else Text("No nodes yet"))
    parts += aside_lines(nodes)
    pending = status.get("pending_nodes") or []
    if pending:
        parts.append(Text(f"{len(pending)} waiting to be let in:", style="yellow"))
        parts.append(pending_table(pending))
    if status.get("open"):
        parts.append(Text("ADMISSION IS OFF: every node is let in", style="bold red"))
    for ring in status.get("rings") or []:
        parts.append(Text(ring_line(ring)))
    queue = status.get("queue") or {}
    parts.append(
        Text(f"Requests: {queue.get('running', 0)} running, {queue.get('waiting', 0)} waiting")
    )
    if status.get("missing_bytes"):
        parts.append(Text(f"Missing memory: {size(status['missing_bytes'])}", style="yellow"))
    if status.get("problem"):
        parts.append(Text(f"Problem: {printable(str(status['problem']))}", style="red"))
    if status.get("need_more_nodes") or not nodes:
        parts.append(Text(f"Join: {printable(str(status.get('node_join_command', '')))}"))
    return Group(*parts)


def nodes_table(nodes: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each node."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NODE", "CHIP", "STATE", "LAYERS", "MEMORY", "OFFERS", "LOADING", "ID"):
        table.add_column(column, no_wrap=column != "CHIP", overflow="ellipsis")
    for node in nodes:
        state = str(node.get("state", node.get("status", "?")))
        table.add_row(
            Text(printable(str(node.get("name", "?")))),
            Text(printable(str(node.get("chip", node.get("gpu_name", "?"))))),
            Text(state, style=STATE_STYLE.get(state, "")),
            layers(node.get("layers")),
            size(node.get("memory_bytes", 0)),
            size(node.get("budget_bytes", 0)),
            _loading(node.get("load")),
            Text(short_id(str(node.get("node_id", "")))),
        )
    return table


def aside_lines(nodes: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Why nodes are put aside, and for how long."""
    return [
        Text(
            f"{printable(str(node.get('name', '?')))} is put aside for "
            f"{aside.get('seconds', '?')} s more. {printable(str(aside.get('why', '')))}",
            style="yellow",
        )
        for node in nodes
        if isinstance(aside := node.get("aside"), Mapping)
    ]


def pending_table(nodes: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each node that waits to be let in."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NODE", "ADDRESS", "FINGERPRINT", "ID"):
        table.add_column(column, no_wrap=True)
    for node in nodes:
        cells = [Text(printable(str(node.get(k, "?")))) for k in ("name", "address", "fingerprint")]
        table.add_row(*cells, Text(short_id(str(node.get("node_id", "")))))
    return table


def absent_table(nodes: Sequence[Mapping[str, Any]], now: float) -> Table:
    """One row for each node that is let in and not here; ``now`` is seconds since 1970.

    With its whole id: names may be the same, and 'remove' has to be told which one.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NODE", "LET IN", "ID"):
        table.add_column(column, no_wrap=column != "ID", overflow="fold")
    for node in nodes:
        table.add_row(
            Text(printable(str(node.get("name", "?")))),
            span(float(node.get("since", now)) - now),
            Text(printable(str(node.get("node_id", "")))),
        )
    return table


def tokens_table(tokens: Sequence[Mapping[str, Any]], now: float) -> Table:
    """One row for each token; ``now`` is seconds since 1970."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("ID", "STATE", "USES", "EXPIRES", "NOTE"):
        table.add_column(column, no_wrap=column != "NOTE")
    for token in tokens:
        state = str(token.get("state", "?"))
        limit = token.get("uses_limit")
        table.add_row(
            Text(printable(str(token.get("id", "?")))),
            Text(printable(state), style="green" if state == "good" else "yellow"),
            f"{token.get('uses', 0)}" + ("" if limit is None else f" of {limit}"),
            span(float(token.get("expires", now)) - now),
            Text(printable(str(token.get("note", "")))),
        )
    return table


def span(seconds: float) -> str:
    """A length of time in its two largest units: "in 3 h 12 min", "2 d 4 h ago"."""
    minutes = round(abs(seconds) / 60)
    days, rest = divmod(minutes, 1440)
    parts: list[str] = []
    for number, unit in ((days, "d"), (rest // 60, "h"), (rest % 60, "min")):
        if number or parts:
            parts.append(f"{number} {unit}")
    text = " ".join(parts[:2]) or "0 min"
    return f"in {text}" if seconds >= 0 else f"{text} ago"


def ring_line(ring: Mapping[str, Any]) -> str:
    """One ring: its stages in order, and what it is doing."""
    stages = " -> ".join(
        f"{printable(str(stage.get('name', '?')))} {layers(stage.get('layers'))}"
        for stage in ring.get("stages") or []
    )
    load = ring.get("load") or {}
    return (
        f"Ring {ring.get('epoch', '?')} {ring.get('status', '?')}: {stages}  "
        f"({load.get('decoding', 0)} decoding, {load.get('prefilling', 0)} prefilling, "
        f"{load.get('free_rows', 0)} rows free)"
    )


def layers(first_end: object) -> str:
    """A half-open range [first, end) as people count: "0-3"."""
    if not isinstance(first_end, list | tuple) or len(first_end) != 2:
        return "-"
    first, end = first_end
    return f"{first}-{end - 1}" if end - 1 > first else f"{first}"


def size(size_bytes: float) -> str:
    """Bytes in the unit that fits: "4.9 GB" is 4.9e9 bytes, as in --memory."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def short_id(peer_id: str) -> str:
    """The end of a peer id, which is what tells it from others."""
    return f"…{peer_id[-8:]}" if len(peer_id) > 12 else peer_id


def _loading(load: Mapping[str, Any] | None) -> str:
    if not load:
        return "-"
    return f"{load.get('phase', '')} {100 * float(load.get('fraction', 0)):.0f}%".strip()


def _word(status: object) -> tuple[str, str]:
    return str(status), "green" if status == "available" else "yellow"
