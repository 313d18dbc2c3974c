"""Small charts as SVG, for a report that is one file."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 240, 62, 34, 14


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span an interval."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(series: Mapping[str, Points], label: str, write: Callable[[float], str]) -> str:
    """Curves over the prune rate.

    Args:
        series: name -> (rate, value) points, each drawn in a colour of its own.
        label: of what is drawn, for those who cannot see it.
        write: a value as the axis shows it.

    Returns:
        An SVG element.
    """
    values = [y for points in series.values() for _, y in points]
    high_x = max([x for points in series.values() for x, _ in points] + [0.01])
    low, high = min([0.0, *values]), max(values)
    high = high * 1.05 if high > low else low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        inner_x, inner_y = WIDTH - LEFT - 12, HEIGHT - TOP - BOTTOM
        return LEFT + x / high_x * inner_x, TOP + (high - y) / (high - low) * inner_y

    parts = []
    for value in _ticks(low, high):
        y = place(0, value)[1]
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="soft" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{html.escape(write(value))}</text>'
        )
    for value in _ticks(0, high_x):
        x = place(value, low)[0]
        parts.append(f'<text class="soft" x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{value:g}</text>')
    for i, (name, points) in enumerate(series.items()):
        places = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dots = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="currentColor"><title>{html.escape(name)}, rate {rate:g}: '
            f"{html.escape(write(value))}</title></circle>"
            for (x, y), (rate, value) in zip(places, points, strict=True)
        )
        line = f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="2"/>'
        parts.append(f'<g class="c{i % 4}">{line}{dots}</g>')
        if len(series) > 1:
            y = HEIGHT - BOTTOM - 8 - 15 * i
            style = f'class="c{i % 4}" style="fill:currentColor"'
            parts.append(f'<text {style} x="{LEFT + 8}" y="{y}">{html.escape(name)}</text>')
    return _svg(WIDTH, HEIGHT, label, parts)


def heat_map(rows: Sequence[Sequence[tuple[float, str]]], names: Sequence[str], label: str) -> str:
    """Cells from 0 (light) to 1 (dark).

    Args:
        rows: cells of each row: how dark, and what to say of it.
        names: of the rows.
        label: of the whole, for those who cannot see it.

    Returns:
        An SVG element.
    """
    columns = max(map(len, rows))
    wide = max(6.0, min(22.0, 760 / columns))
    tall, left = 16, 48
    parts = []
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        parts.append(
            f'<text class="soft" x="{left - 6}" y="{r * tall + 12}" text-anchor="end">{html.escape(name)}</text>'
        )
        size = f'width="{wide - 1:.1f}" height="{tall - 1}" fill="currentColor"'
        for c, (value, said) in enumerate(row):
            place = f'x="{left + c * wide:.1f}" y="{r * tall}"'
            title = f"<title>{html.escape(said)}</title>"
            parts.append(f'<rect {place} {size} fill-opacity="{0.06 + 0.94 * value:.3f}">{title}</rect>')
    return _svg(left + columns * wide, len(rows) * tall, label, ['<g class="c0">', *parts, "</g>"])


def strip(order: Sequence[tuple[int, str]], layers: int, axes: Sequence[str], label: str) -> str:
    """Units in the order in which they go: across, down by layer, coloured by axis."""
    width, tall = 800.0, max(3.0, min(12.0, 360 / layers))
    step = width / max(len(order), 1)
    parts = [
        f'<rect class="c{axes.index(axis) % 4}" fill="currentColor" x="{40 + i * step:.2f}" y="{layer * tall:.1f}" '
        f'width="{max(step, 1.5):.2f}" height="{tall:.1f}"><title>cut {i + 1}: layer {layer}, {axis}</title></rect>'
        for i, (layer, axis) in enumerate(order)
    ]
    ends = ['<text class="soft" x="34" y="12" text-anchor="end">0</text>'] if layers > 1 else []
    ends += [f'<text class="soft" x="34" y="{layers * tall:.1f}" text-anchor="end">{layers - 1}</text>']
    return _svg(width + 44, layers * tall + 2, label, [*ends, *parts])


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(label)}" {size}>'
    return f"{head}{''.join(parts)}</svg>"
