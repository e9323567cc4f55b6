"""The pages say what the code does, their links lead somewhere, and their lines are short.

docs/reading.md is made by docs/make_reading.py: the page made again has the same words and, except
for rounding, the same numbers.
"""

import re
from pathlib import Path

import pytest
from conftest import slow

from docs import make_reading

ROOT = Path(__file__).parents[1]
PATTERNS = ("README.md", "docs/*.md", "results/**/*.md", "benchmarks/README.md")
PAGES = sorted(path.relative_to(ROOT).as_posix() for p in PATTERNS for path in ROOT.glob(p))
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+\.\d+")  # with a decimal point: what is computed
LINK = re.compile(r"\]\(([^)\s]+)\)")
WIDTH = 100


@slow
def test_the_reading_page_is_as_the_code_makes_it():
    written, made = make_reading.PAGE.read_text("utf-8"), "\n".join(make_reading.sections())
    # Columns and line ends may shift with the width of a number.
    words = lambda text: re.sub(r"[\s-]+", " ", NUMBER.sub("0.0", text))  # noqa: E731
    assert words(written) == words(made), "run: python -m docs.make_reading"
    was, now = (list(map(float, NUMBER.findall(text))) for text in (written, made))
    assert was == pytest.approx(now, rel=0.02, abs=0.01)


def read(page: Path) -> str:
    return page.read_text("utf-8")


def outside_code(text: str) -> list[str]:
    """The lines of a page that are in no fenced block."""
    lines, fenced = [], False
    for line in text.split("\n"):
        fence = line.lstrip().startswith("```")
        if not (fence or fenced):
            lines.append(line)
        fenced ^= fence
    return lines


def anchors(page: Path) -> list[str]:
    """The names that GitHub gives to a page's headings, for links to them."""
    found, names = [], []
    for line in outside_code(read(page)):
        if heading := re.match(r"#{1,6} +(.*)", line):
            text = LINK.sub("", heading[1].replace("[", "")).strip().lower()
            name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            repeats = names.count(name)
            names.append(name)
            found.append(f"{name}-{repeats}" if repeats else name)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(page):
    path = ROOT / page
    for target in LINK.findall("\n".join(outside_code(read(path)))):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), f"{page}: there is no {target}"
        if anchor:
            assert anchor in anchors(there), f"{page}: there is no heading for {target}"


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_at_most_100_characters_wide(page):
    for line in outside_code(read(ROOT / page)):
        is_one_link = re.fullmatch(r"[-!(\s]*\[[^]]*\]\(\S+\)\S*", line)
        assert len(line) <= WIDTH or line.startswith("|") or is_one_link, f"{page}: {line}"


def test_wrapping_keeps_code_tables_and_headings_and_starts_no_list():
    long = "| " + "x " * 80 + "|"
    text = f"# A title\n\n{long}\n\n```\na  b\n\n{'c ' * 80}\n```\n\n" + "`t + 1` is 1. x + y " * 20
    wrapped = make_reading.wrapped(text)
    assert wrapped.startswith(f"# A title\n\n{long}\n\n```\na  b\n\n{'c ' * 80}\n```\n\n`t + 1` is")
    prose = wrapped.rpartition("```\n\n")[2].split("\n")
    assert all(len(line) <= WIDTH and not re.match(r"[+*-] |\d+\. ", line) for line in prose)
    assert " ".join(prose) == text.rpartition("```\n\n")[2].strip()
    item = "- " + "word " * 30
    assert make_reading.wrapped(f"{item}\n{item}").split("\n")[1].startswith("  word")
