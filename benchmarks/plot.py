"""Small plots as SVG, the same bytes for the same values; readable in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.figures import plain

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 616, 56, 296
COLOURS = ("#3b7dd8", "#d9822b", "#3d9970", "#9b59b6")
INK = "#888"  # readable on white and on black


@dataclass(frozen=True, slots=True)
class Line:
    """A curve: points of x, median, smallest and largest."""

    name: str
    points: Sequence[Sequence[float]]


def lines(title: str, curves: Sequence[Line], *, logarithmic: bool = False) -> str:
    """Curves over x with the spread of each point; x in powers of two if ``logarithmic``."""
    xs = sorted({point[0] for curve in curves for point in curve.points})
    top = _ceiling(max(point[3] for curve in curves for point in curve.points))
    scale: Callable[[float], float] = math.log2 if logarithmic else float
    low, high = scale(xs[0]), scale(xs[-1])

    def across(x: float) -> float:
        return LEFT + (scale(x) - low) / ((high - low) or 1) * (RIGHT - LEFT)

    def up(y: float) -> float:
        return BOTTOM - y / top * (BOTTOM - TOP)

    parts = [_text(LEFT, 22, title, size=15)]
    for step in range(5):
        value = top * step / 4
        parts.append(_rule(LEFT, up(value), RIGHT, up(value), faint=step > 0))
        parts.append(_text(LEFT - 8, up(value) + 4, plain(value) if value else "0", anchor="end"))
    parts += [_text(across(x), BOTTOM + 20, f"{x:g}", anchor="middle") for x in xs]
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        place = " ".join(f"{across(p[0]):.1f},{up(p[1]):.1f}" for p in curve.points)
        parts.append(f'<polyline points="{place}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, middle, least, most in curve.points:
            parts.append(
                f'<line x1="{across(x):.1f}" y1="{up(least):.1f}" x2="{across(x):.1f}"'
                f' y2="{up(most):.1f}" stroke="{colour}"/>'
                f'<circle cx="{across(x):.1f}" cy="{up(middle):.1f}" r="3.5" fill="{colour}"/>'
            )
        at = LEFT + 130 * number
        parts.append(f'<rect x="{at}" y="33" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(at + 16, 42, curve.name))
    return _page(HEIGHT, parts)


def bars(title: str, seconds: dict[str, float]) -> str:
    """One bar for each part, from the top down, each beginning where the one above ends."""
    whole = sum(seconds.values()) or 1.0
    left, right, row = 290, 576, 26
    parts = [_text(16, 22, title, size=15)]
    begin = 0.0
    for number, (name, value) in enumerate(seconds.items()):
        y = 40 + row * number
        x = left + begin / whole * (right - left)
        width = max(1.0, value / whole * (right - left))
        colour = COLOURS[0] if "compute" in name else COLOURS[1]
        parts.append(_text(left - 10, y + 14, name, anchor="end"))
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="18" fill="{colour}"/>')
        parts.append(_text(right + 12, y + 14, f"{value * 1e3:.2f}"))
        begin += value
    return _page(52 + row * len(seconds), parts)


def _ceiling(value: float) -> float:
    """The next round number."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(
        step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * power >= value
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
        f' fill="{INK}">{escape(text)}</text>'
    )


def _rule(x1: float, y1: float, x2: float, y2: float, *, faint: bool) -> str:
    opacity = 0.25 if faint else 0.8
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        f' stroke="{INK}" stroke-opacity="{opacity}"/>'
    )


def _page(height: int, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        f' font-family="system-ui, sans-serif">\n{body}\n</svg>\n'
    )
