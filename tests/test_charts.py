"""SVG charts are well-formed, show every point where it belongs, and neutralise text."""

import math
import xml.etree.ElementTree as ET

import pytest

from nanogsm.report import charts

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.246, 0.613), (36.4, 59.9), (-3, 5), (0, 0), (7, 7), (1e-9, 3e-9), (0, 123456)]
)
def test_ticks_are_round_and_cover_the_range(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 8 and found[0] <= low + 1e-12 and found[-1] >= high - 1e-12
    steps = {f"{b - a:.6g}" for a, b in zip(found, found[1:])}
    assert len(steps) == 1 and f"{float(steps.pop()):e}"[0] in "125"


def points(page: str) -> list[list[tuple[float, float]]]:
    lines = ET.fromstring(page).iter(f"{SVG}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]


def test_points_lie_at_their_values():
    panel = charts.Panel("t", [("a", [(0, 0.0), (2, 0.5), (4, 1.0)])])
    ((first, middle, last),) = points(charts.page([panel], ["a"]))
    assert first[0] < middle[0] < last[0] and first[1] > middle[1] > last[1]  # y grows downwards
    assert middle == pytest.approx([(first[0] + last[0]) / 2, (first[1] + last[1]) / 2])
    assert charts.LEFT == first[0] and last[0] == charts.WIDTH - charts.RIGHT


def test_what_is_not_a_number_is_left_out_and_empty_panels_are_drawn():
    line = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    page = charts.page([charts.Panel("t", [("a", line)]), charts.Panel("empty", [])], ["a"])
    assert [len(p) for p in points(page)] == [2]


def test_lines_of_a_name_share_its_colour_and_text_is_escaped():
    name = "</text><script>"
    panel = charts.Panel("<b>&", [("a", [(0, 0), (1, 1)]), (name, [(0, 1), (1, 0)]), ("a", [(0, 2), (1, 2)])])
    page = charts.page([panel], ["a", name])
    assert "<script" not in page and "&lt;b&gt;&amp;" in page
    assert [line.get("class") for line in ET.fromstring(page).iter(f"{SVG}polyline")] == ["c0", "c1", "c0"]


def test_shares_are_shown_as_percentages():
    page = charts.page([charts.Panel("t", [("a", [(0, 0.0), (1, 0.5)])], percent=True)], ["a"])
    assert {"0%", "60%"} <= {text.text for text in ET.fromstring(page).iter(f"{SVG}text")}
