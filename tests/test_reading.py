"""docs/reading.md says what the code does: the page made anew has the same words and, but for rounding,
the same numbers."""

import re

import pytest

from docs import make_reading

NUMBER = re.compile(r"(?<![\w.])[+-]?\d+\.\d+")  # with a decimal point: what is computed


def test_the_reading_page_is_as_the_code_makes_it():
    written, made = make_reading.PAGE.read_text("utf-8"), "\n".join(make_reading.sections())
    words = lambda text: re.sub(r"[ -]+", " ", NUMBER.sub("0.0", text))  # noqa: E731  (columns may shift)
    assert words(written) == words(made), "run: python -m docs.make_reading"
    was, now = (list(map(float, NUMBER.findall(text))) for text in (written, made))
    assert was == pytest.approx(now, rel=0.02, abs=0.01)


def test_every_file_the_page_and_the_readme_link_to_exists():
    for page in (make_reading.PAGE, make_reading.PAGE.parents[1] / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
