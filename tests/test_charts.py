"""SVG charts are well-formed, show every point in its place, and escape text."""

import math
import xml.etree.ElementTree as ET

import pytest

from nanogsm.report import charts

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    "low, high",
    [(0, 1), (0.246, 0.613), (36.4, 59.9), (-3, 5), (0, 0), (7, 7), (1e-9, 3e-9), (0, 123456)],
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


def test_dots_lie_where_the_corners_of_a_line_would():
    panel = charts.Panel("t", [("a", [(0, 0.0), (2, 0.5), (4, math.nan), (4, 1.0)])])
    (line,) = points(charts.page([panel], ["a"]))
    page = charts.page([panel._replace(dots=True)], ["a"])
    dots = list(ET.fromstring(page).iter(f"{SVG}circle"))
    assert [(float(dot.get("cx")), float(dot.get("cy"))) for dot in dots] == line
    assert not points(page) and {dot.get("class") for dot in dots} == {"c0"}


def test_what_is_not_a_number_is_left_out_and_empty_panels_are_drawn():
    line = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    page = charts.page([charts.Panel("t", [("a", line)]), charts.Panel("empty", [])], ["a"])
    assert [len(p) for p in points(page)] == [2]


def test_lines_of_a_name_share_its_colour_and_text_is_escaped():
    name = "</text><script>"
    panel = charts.Panel(
        "<b>&", [("a", [(0, 0), (1, 1)]), (name, [(0, 1), (1, 0)]), ("a", [(0, 2), (1, 2)])]
    )
    page = charts.page([panel], ["a", name])
    assert "<script" not in page and "&lt;b&gt;&amp;" in page
    assert [line.get("class") for line in ET.fromstring(page).iter(f"{SVG}polyline")] == [
        "c0",
        "c1",
        "c0",
    ]


def test_ticks_of_ones_own_stand_at_their_places_and_end_the_axis():
    panel = charts.Panel("t", [("a", [(0.0, 1.0)])], ticks=[(-0.5, ""), (0.0, "8"), (1.5, "64")])
    page, width = charts.page([panel], ["a"]), charts.WIDTH - charts.RIGHT - charts.LEFT
    assert labels(page, "x") == pytest.approx(
        {None: charts.LEFT, "8": charts.LEFT + width / 4, "64": charts.LEFT + width}
    )
    ((dot,),) = points(page)
    assert dot[0] == pytest.approx(charts.LEFT + width / 4)


def labels(page: str, axis: str) -> dict[str, float]:
    """Label -> its x coordinate, for the "x" or the "y" axis."""
    texts = [text for text in ET.fromstring(page).iter(f"{SVG}text") if text.get("class") == axis]
    return {text.text: float(text.get("x")) for text in texts}


def test_shares_are_shown_as_percentages():
    page = charts.page([charts.Panel("t", [("a", [(0, 0.0), (1, 0.5)])], percent=True)], ["a"])
    assert list(labels(page, "y")) == ["0%", "20%", "40%", "60%"]


@pytest.mark.parametrize(
    "high, written",
    [
        (0.3, ["0", "0.1", "0.2", "0.3"]),
        (1_500, ["0", "500", "1,000", "1,500"]),
        (15_000, ["0", "5,000", "10,000", "15,000"]),
        (1_500_000, ["0", "500,000", "1,000,000", "1,500,000"]),
    ],
)
def test_labels_are_written_in_full_and_inside_the_picture(high, written):
    page = charts.page([charts.Panel("t", [("a", [(0, 0.0), (15_000, high)])])], ["a"])
    assert list(labels(page, "y")) == written
    assert list(labels(page, "x")) == ["0", "5,000", "10,000", "15,000"]
    digit = 6.7  # pixels, of the sans-serif fonts in use at 12 pixels
    assert all(x - digit * len(label) >= 0 for label, x in labels(page, "y").items())  # ends at x
    for label, x in labels(page, "x").items():  # its middle is at x
        assert digit * len(label) / 2 <= x <= charts.WIDTH - digit * len(label) / 2


@pytest.mark.parametrize(
    "value, written",
    [(15_000, "15,000"), (0.1 + 0.2, "0.3"), (2e-5, "2e-5"), (0.0002, "0.0002"), (3e12, "3e12")],
)
def test_numbers_are_written_as_one_reads_them(value, written):
    assert charts.number(value) == written


def test_the_x_axis_is_named_and_reaches_its_last_step():
    panel = charts.Panel("t", [("a", [(10, 1.0)])], x="step <1>", last=20)
    page = charts.page([panel], ["a"])
    assert list(labels(page, "axis")) == ["step <1>"]
    x = labels(page, "x")
    assert x["0"] == charts.LEFT and x["20"] == charts.WIDTH - charts.RIGHT
    [dot] = ET.fromstring(page).iter(f"{SVG}circle")  # one point makes no line
    assert float(dot.get("cx")) == pytest.approx((x["0"] + x["20"]) / 2)
    many = charts.Panel("t", [("a", [(i, 1.0) for i in range(99)])])
    assert "<circle" not in charts.page([many], ["a"])
