"""Line charts as SVG text, for reports that open without a network and plots that lie in `docs/`."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

Points: TypeAlias = Sequence[tuple[float, float]]
Place: TypeAlias = Callable[[float, float], tuple[float, float]]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 30, 62


def line_chart(
    title: str, x_label: str, y_label: str, lines: Mapping[str, Points], *, markers: bool = True, log_x: bool = False
) -> str:
    """An SVG element: one line for each name, with axes from 0 (or, logarithmic, from the least x) and a legend."""
    scale = math.log10 if log_x else float
    points = {name: [(scale(x), y) for x, y in line if not log_x or x > 0] for name, line in lines.items()}
    xs = [x for line in points.values() for x, _ in line] or [0.0]
    ys = [y for line in points.values() for _, y in line] or [0.0]
    x_from, x_to = (min(xs) if log_x else min(0.0, *xs)), max(xs)
    x_to = x_to if x_to > x_from else x_from + 1.0
    y_to = max(ys) * 1.05 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_from) / (x_to - x_from) * (WIDTH - LEFT - RIGHT)
        return LEFT + across, HEIGHT - BOTTOM - y / y_to * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2:.0f}" y="16" text-anchor="middle" font-size="13">{html.escape(title)}</text>',
    ]
    parts += _axes(x_label, y_label, x_from, x_to, y_to, place, log_x)
    for number, (name, line) in enumerate(points.items()):
        parts += _line(number, name, [place(x, y) for x, y in line], markers)
    return "\n".join([*parts, "</svg>"])


def _axes(x_label: str, y_label: str, x_from: float, x_to: float, y_to: float, place: Place, log_x: bool) -> list[str]:
    parts = []
    for y in _ticks(0.0, y_to):
        left, height = place(x_from, y)
        parts.append(f'<line x1="{left}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 5}" y="{height + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in (_log_ticks if log_x else _ticks)(x_from, x_to):
        across, height = place(x, 0.0)
        label = 10.0**x if log_x else x
        parts.append(f'<text x="{across:.1f}" y="{height + 14:.1f}" text-anchor="middle">{label:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - BOTTOM + 29}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
    )
    parts.append(
        f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    return parts


def _line(number: int, name: str, line: Points, markers: bool) -> list[str]:
    colour = COLOURS[number % len(COLOURS)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>']
    if markers:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in line]
    left = LEFT + (number % 5) * 82
    base = HEIGHT - 14 + (number // 5) * 12
    parts.append(
        f'<line x1="{left}" x2="{left + 14}" y1="{base - 4}" y2="{base - 4}" stroke="{colour}" stroke-width="3"/>'
    )
    parts.append(f'<text x="{left + 18}" y="{base}">{html.escape(name)}</text>')
    return parts


def _ticks(start: float, stop: float, wanted: int = 5) -> list[float]:
    """Round numbers from start to stop, about `wanted` of them."""
    step = 10.0 ** math.floor(math.log10((stop - start) / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if (stop - start) / (step * factor) <= wanted + 1)
    first = math.ceil(start / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(stop / step + 1e-9) + 1)]


def _log_ticks(start: float, stop: float, wanted: int = 3) -> list[float]:
    """Logarithms of round numbers from 10**start to 10**stop: powers of ten where there are enough."""
    for factors in ((1,), (1, 2, 5)):
        powers = range(math.floor(start), math.floor(stop) + 1)
        ticks = [power + math.log10(factor) for power in powers for factor in factors]
        ticks = [x for x in ticks if start <= x <= stop]
        if len(ticks) >= wanted:
            return ticks
    return [math.log10(x) for x in _ticks(10.0**start, 10.0**stop)]


def distribution(values: Sequence[float], most: int = 200) -> Points:
    """The share of values at or under each of them: points of a cumulative distribution."""
    ordered = sorted(values)
    picks = range(0, len(ordered), max(1, len(ordered) // most))
    return [(ordered[i], (i + 1) / len(ordered)) for i in picks] + ([(ordered[-1], 1.0)] if ordered else [])
