"""Line charts as SVG text, without a plotting library. Any browser shows the file.

    panel = charts.Panel("reward", [("a", points), ("b", points)], x="step")
    page = charts.page([panel], ["a", "b"])

Points are (x, y) pairs. Lines with the same name have the same colour, so three seeds of one recipe
are three thin lines. The colours follow the reader's light or dark theme.
"""

import html
import math
import re
from typing import NamedTuple

WIDTH, HEIGHT, COLUMNS = 380, 244, 2  # pixels of a panel; panels per row
LEFT, RIGHT, TOP, BOTTOM = 48, 24, 30, 42  # margins around a panel's plot; LEFT is the least
FEW = 12  # a line of at most this many points has a dot at each: one point makes no line
DIGIT = 7  # pixels of a digit, rounded up
LIGHT = ("#0b66c3", "#c2410c", "#15803d", "#7e22ce")  # also distinct for the colour-blind
DARK = ("#6cb6ff", "#fb923c", "#4ade80", "#d8b4fe")


class Panel(NamedTuple):
    title: str
    lines: list[tuple[str, list[tuple[float, float]]]]  # (name, points); NaN points are left out
    percent: bool = False  # y is a share
    x: str = ""  # what x counts
    last: float | None = None  # where the x axis ends; without it at the last point
    dots: bool = False  # a dot for each point, and no line
    ticks: list[tuple[float, str]] | None = None  # of x: (x, label), from end to end of the axis


def number(value: float) -> str:
    """A number as one reads it: 15,000 or 0.3 or 2e-5."""
    # Ten digits write 15,000 in full and still round 0.30000000000000004 to 0.3.
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:,.10g}")


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Evenly spaced round numbers that cover [low, high]. The step is 1, 2 or 5 times a power of
    ten."""
    span = (high - low) or abs(high) or 1.0
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def panel_svg(panel: Panel, names: list[str], x0: float, y0: float) -> str:
    lines = [(name, [p for p in line if all(map(math.isfinite, p))]) for name, line in panel.lines]
    xs, ys = zip(*([p for _, line in lines for p in line] or [(0.0, 0.0)]))
    y_ticks, first, last = ticks(min(ys), max(ys)), min(xs), max(xs)
    if panel.last is not None:
        first, last = min(first, 0), max(last, panel.last)
    if panel.ticks:
        first, last = panel.ticks[0][0], panel.ticks[-1][0]
    last = last if last > first else first + 1  # the x axis ends at the last point, y at a tick
    y_labels = [number(100 * y) + "%" if panel.percent else number(y) for y in y_ticks]
    left = x0 + max(LEFT, 10 + DIGIT * max(map(len, y_labels)))
    right, bottom = x0 + WIDTH - RIGHT, y0 + HEIGHT - BOTTOM
    at_x = lambda x: left + (x - first) / (last - first) * (right - left)  # noqa: E731
    height = bottom - y0 - TOP
    at_y = lambda y: bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * height  # noqa: E731
    parts = [f'<text class="title" x="{left}" y="{y0 + 18}">{html.escape(panel.title)}</text>']
    for y, y_label in zip(map(at_y, y_ticks), y_labels):
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text class="y" x="{left - 6}" y="{y + 4:.1f}">{y_label}</text>')
    found = [(x, number(x)) for x in ticks(first, last) if first <= x <= last]
    for x, x_label in panel.ticks or found:
        parts.append(f'<text class="x" x="{at_x(x):.1f}" y="{bottom + 16}">{x_label}</text>')
    if panel.x:
        place = f'x="{(left + right) / 2}" y="{bottom + 32}"'
        parts.append(f'<text class="axis" {place}>{html.escape(panel.x)}</text>')
    for name, line in lines:
        places = [(f"{at_x(x):.1f}", f"{at_y(y):.1f}") for x, y in line]
        colour, path = f"c{names.index(name) % len(LIGHT)}", " ".join(map(",".join, places))
        if not panel.dots:
            parts.append(f'<polyline class="{colour}" points="{path}"/>')
        if len(places) <= FEW or panel.dots:
            dot = '<circle class="{}" cx="{}" cy="{}" r="2.5"/>'
            parts += [dot.format(colour, x, y) for x, y in places]
    return "\n".join(parts)


def page(panels: list[Panel], names: list[str]) -> str:
    """An SVG file: the panels, two per row, below a legend if there are several names."""
    rows, top = math.ceil(len(panels) / COLUMNS), 34 * (len(names) > 1)
    width, height = WIDTH * min(COLUMNS, len(panels)), top + HEIGHT * rows
    colours = lambda palette: " ".join(  # noqa: E731
        f".c{i}{{stroke:{colour}}} text.c{i},circle.c{i}{{fill:{colour}}}"
        for i, colour in enumerate(palette)
    )
    style = f"""
      text {{font: 12px system-ui, sans-serif; fill: #444}} .title {{font-weight: 600; fill: #111}}
      .y {{text-anchor: end}} .x, .axis {{text-anchor: middle}} .grid {{stroke: #ddd}}
      rect {{fill: #fff}}
      polyline {{fill: none; stroke-width: 1.6; stroke-linejoin: round}} {colours(LIGHT)}
      text[class^=c] {{stroke: none; font-weight: 600}}
      @media (prefers-color-scheme: dark) {{ rect {{fill: #0d1117}} text {{fill: #b4bcc6}}
        .title {{fill: #f0f3f6}} .grid {{stroke: #30363d}} {colours(DARK)} }}"""
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
