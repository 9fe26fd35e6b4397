"""Results as people read them: a table on the terminal, a table and plots in a document."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.figures import plain
from benchmarks.plot import Line, bars, lines

DOCUMENT = Path("docs/performance.md")
PLOTS = Path("docs/plots")
BEGIN, END = "<!-- figures: {} -->", "<!-- end of figures -->"


def table(parts: dict[str, Any]) -> str:
    """All rows, aligned."""
    head = ("", "cluster", "other", "judged", "min", "max", "goal", "")
    rows = [head, *(_cells(row) for row in _rows(parts))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 6, 7) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def notes(parts: dict[str, Any]) -> list[str]:
    """Remarks and reasons of what is missing, a line each."""
    found = []
    for row in _rows(parts):
        remarks = [*row.get("notes", [])]
        if row.get("disturbed"):
            remarks.append(f"{row['disturbed']} rounds left out, disturbed by other processes")
        if "missing" in row:
            remarks.append(f"not measured: {row['missing']}")
        found += [f"{row['name']}: {remark}" for remark in remarks]
    return found


def _rows(parts: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return (row for part in parts.values() for row in part["rows"])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    judged = row.get("ratio") or row.get("value")
    verdict = {True: "met", False: "NOT MET", None: ""}[row["met"]]
    if judged is None:
        return (row["name"], "", "", "not measured", "", "", row.get("goal", ""), "")
    sides = ("", "")
    if "ratio" in row:
        sides = (plain(row["cluster"]["median"]), plain(row["other"]["median"]))
    return (
        f"{row['name']}" + (f" ({row['unit']})" if row["unit"] else ""),
        *sides,
        plain(judged["median"]),
        plain(judged["min"]),
        plain(judged["max"]),
        row.get("goal", ""),
        verdict,
    )


# --------------------------------------------------------------------- document


def write_document(parts: dict[str, Any]) -> None:
    """Draws the plots and puts the tables into the document, between their marks.

    Raises:
        ValueError: a mark is missing.
    """
    PLOTS.mkdir(exist_ok=True)
    for path, text in plots(parts).items():
        (PLOTS / path).write_text(text)
    text = DOCUMENT.read_text()
    for name, filling in {"table": markdown(parts), "step": step_table(parts)}.items():
        begin = BEGIN.format(name)
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(END)
        if not found or not ended:
            raise ValueError(f"{DOCUMENT} has no place for the figures: {begin} … {END}")
        text = f"{before}{begin}\n\n{filling}\n\n{END}{after}"
    DOCUMENT.write_text(text)


def markdown(parts: dict[str, Any]) -> str:
    """The table of the document, with what each part was taken on."""
    text = [
        "| what | cluster | compared with | median | spread | goal | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _rows(parts):
        _, cluster, other, judged, low, high, goal, verdict = _cells(row)
        against = f"{row['against']}: {other} {row['unit']}" if other else ""
        if cluster:
            cluster += f" {row['unit']}"
        elif "value" in row:
            judged += f" {row['unit']}"
        verdict = {"met": "met", "NOT MET": "**not met**"}.get(verdict, verdict)
        span = f"{low} to {high}" if low else ""
        cells = (row["name"], cluster, against, judged.strip(), span, goal, verdict)
        text.append("| " + " | ".join(cells) + " |")
    text += ["", *(f"- {note}" for note in notes(parts))]
    machines: dict[str, dict[str, list[str]]] = {}
    for name, part in parts.items():
        facts = part["machine"]
        taken = f"commit {facts['commit']}, {facts['when']}, {part['rounds']} rounds"
        by_commit = machines.setdefault(machine_line(facts), {})
        by_commit.setdefault(taken, []).append(name)
    for line, by_commit in machines.items():
        text += ["", f"Taken on {line}:", ""]
        text += [f"- {taken}: {', '.join(names)}" for taken, names in by_commit.items()]
    return "\n".join(text)


def machine_line(machine: dict[str, Any]) -> str:
    """What a part was taken on, in one line."""
    return (
        f"{machine['processor']} ({machine['system']}), {machine['cores']} cores,"
        f" MLX {machine['mlx']} on {machine['backend']}, {machine['dtype']},"
        f" Python {machine['python']}"
    )


def step_table(parts: dict[str, Any]) -> str:
    """Where the time of a step goes."""
    found = parts.get("step", {}).get("bars", {})
    whole = sum(found.values())
    text = ["| part of a step | ms | share |", "|---|---|---|"]
    text += [
        f"| {name} | {seconds * 1e3:.3f} | {seconds / whole:.1%} |"
        for name, seconds in found.items()
    ]
    if found:
        text.append(f"| the whole step | {whole * 1e3:.3f} | |")
    return "\n".join(text)


def plots(parts: dict[str, Any]) -> dict[str, str]:
    """File name to SVG, for all that was measured."""
    found: dict[str, str] = {}
    for part in parts.values():
        for title, by_line in part.get("curves", {}).items():
            drawn = [Line(name, points) for name, points in by_line.items()]
            last = max(point[0] for line in drawn for point in line.points)
            found[_file(title)] = lines(title, drawn, logarithmic=last > 16)
        if part.get("bars"):
            found["step.svg"] = bars("Where the time of a decode step goes, ms", part["bars"])
    return found


def _file(title: str) -> str:
    """The file of a plot, from its title."""
    short = title.partition(",")[0].replace("tokens/s", "speed").replace(" of 512 tokens", "")
    return short.replace(" ", "-") + ".svg"
