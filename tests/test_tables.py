"""The tables in the READMEs are what benchmarks/tables.py makes of the committed results."""

import pytest

from benchmarks import tables
from nanogsm import UserError


@pytest.mark.parametrize("name", tables.PAGES)
def test_the_pages_agree_with_the_results(name):
    page = (tables.ROOT / name).read_text("utf-8")
    assert "<!-- end -->" in page
    assert tables.filled(page) == page, "run: python -m benchmarks.tables"


def test_a_marked_table_is_replaced_and_nothing_else(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "NEW"})
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb <!-- end -->\n"
    assert tables.filled(page) == "a\n<!-- one -->\n\nNEW\n\n<!-- end -->\nb <!-- end -->\n"
    with pytest.raises(UserError, match="no table called two"):
        tables.filled("<!-- two -->\n<!-- end -->")
