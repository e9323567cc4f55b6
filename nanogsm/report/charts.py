"""Line charts as SVG text, for curves of runs: no library, one file that any browser shows.

    page = charts.page([charts.Panel("reward", [("tuned", points), ("report", points)])], ["tuned", "report"])

Points are (x, y) pairs; lines of one name share its colour, so three seeds are three thin lines. The
colours follow the reader's light or dark theme.
"""

import html
import math
from typing import NamedTuple

WIDTH, HEIGHT, COLUMNS = 380, 230, 2  # of a panel, pixels; panels a row
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 30, 28  # of a panel, around its plot
LIGHT = ("#0b66c3", "#c2410c", "#15803d", "#7e22ce")  # a colour a name, told apart by the colour-blind
DARK = ("#6cb6ff", "#fb923c", "#4ade80", "#d8b4fe")


class Panel(NamedTuple):
    title: str
    lines: list[tuple[str, list[tuple[float, float]]]]  # (name, points); NaN points are left out
    percent: bool = False  # y is a share


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, 1, 2 or 5 times a power of ten apart."""
    span = (high - low) or abs(high) or 1.0
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def panel_svg(panel: Panel, names: list[str], x0: float, y0: float) -> str:
    lines = [(name, [p for p in points if all(map(math.isfinite, p))]) for name, points in panel.lines]
    points = [p for _, line in lines for p in line] or [(0.0, 0.0)]
    ys, (first, last) = ticks(*_range([y for _, y in points])), _range([x for x, _ in points])
    last = last if last > first else first + 1  # x ends where the points do, y at a tick
    xs = [x for x in ticks(first, last) if first <= x <= last]
    right, bottom = x0 + WIDTH - RIGHT, y0 + HEIGHT - BOTTOM
    at_x = lambda x: x0 + LEFT + (x - first) / (last - first) * (right - x0 - LEFT)  # noqa: E731
    at_y = lambda y: bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (bottom - y0 - TOP)  # noqa: E731
    label = lambda y: f"{100 * y:.3g}%" if panel.percent else f"{y:,.4g}"  # noqa: E731
    parts = [f'<text class="title" x="{x0 + LEFT}" y="{y0 + 18}">{html.escape(panel.title)}</text>']
    for y in ys:
        level, left = at_y(y), x0 + LEFT
        parts.append(f'<path class="grid" d="M{left} {level:.1f}H{right}"/>')
        parts.append(f'<text class="y" x="{left - 6}" y="{level + 4:.1f}">{label(y)}</text>')
    for x in xs:
        parts.append(f'<text class="x" x="{at_x(x):.1f}" y="{bottom + 16}">{x:,.4g}</text>')
    for name, line in lines:
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line)
        parts.append(f'<polyline class="c{names.index(name) % len(LIGHT)}" points="{path}"/>')
    return "\n".join(parts)


def _range(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def page(panels: list[Panel], names: list[str]) -> str:
    """An SVG file: a legend of `names`, if there are several, then the panels, two a row."""
    rows, top = math.ceil(len(panels) / COLUMNS), 34 * (len(names) > 1)
    width, height = WIDTH * min(COLUMNS, len(panels)), top + HEIGHT * rows
    colours = lambda palette: " ".join(  # noqa: E731
        f".c{i}{{stroke:{colour}}} text.c{i}{{fill:{colour}}}" for i, colour in enumerate(palette)
    )
    style = f"""
        text {{font: 12px system-ui, sans-serif; fill: #444}}
        .title {{font-weight: 600; fill: #111}}
        .y {{text-anchor: end}} .x {{text-anchor: middle}}
        .grid {{stroke: #ddd}} rect {{fill: #fff}}
        polyline {{fill: none; stroke-width: 1.6; stroke-linejoin: round}}
        {colours(LIGHT)}
        text[class^=c] {{stroke: none; font-weight: 600}}
        @media (prefers-color-scheme: dark) {{
            rect {{fill: #0d1117}} text {{fill: #b4bcc6}} .title {{fill: #f0f3f6}}
            .grid {{stroke: #30363d}} {colours(DARK)}
        }}"""
    legend, x = [], LEFT
    for i, name in enumerate(names if top else []):
        legend.append(f'<text class="c{i % len(LIGHT)}" x="{x}" y="22">{html.escape(name)}</text>')
        x += 24 + 8 * len(name)
    drawn = [
        panel_svg(panel, names, WIDTH * (i % COLUMNS), top + HEIGHT * (i // COLUMNS))
        for i, panel in enumerate(panels)
    ]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
        f"<style>{style}</style>",
        f'<rect width="{width}" height="{height}"/>', *legend, *drawn, "</svg>", "",
    ])  # fmt: skip
