"""Puts the tables of results/*.json into the READMEs, between <!-- NAME --> and <!-- end -->.

    python -m benchmarks.tables

A test checks that the committed pages are what this makes of the committed figures.
"""

import json
import re
from pathlib import Path
from statistics import fmean

from experiments import study
from nanogsm import UserError
from nanogsm.run import console
from nanogsm.store import files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "results/tiny/README.md")


def studies() -> list[list[dict]]:
    """The rows of every committed study of the embedded model, seeds in order."""
    found = sorted((ROOT / "results" / "tiny").glob("study-*.json"))
    return [json.loads(path.read_text("utf-8"))["rows"] for path in found]


def by_row(name: str) -> list[dict]:
    """A row of all studies that ran it."""
    rows = [next(row for row in rows if row["row"] == name) for rows in studies()]
    return [row for row in rows if "not_run" not in row]


def embedded() -> str:
    """The study of the embedded model, a line a row, means over seeds."""
    lines = [
        "| | the report, gemma-2b-it | embedded model | each seed | against | points | in format "
        "| tokens | minutes |",
        "|" + "---|" * 9,
    ]
    for row in study.ROWS:
        found = by_row(row.name)
        report = f"{row.report:.0f}%" if row.report is not None else ""
        if not found:
            lines.append(f"| {row.title} | {report} | not run |" + " |" * 6)
            continue
        accuracy, formatted, tokens = (
            fmean(f[key] for f in found) for key in ("accuracy", "formatted", "mean_tokens")
        )
        each = ", ".join(f"{100 * f['accuracy']:.1f}" for f in found)
        points = f"{fmean(f['points'] for f in found):+.1f}" if row.against else ""
        minutes = f"{fmean(f['training']['minutes'] for f in found):.1f}" if row.script else ""
        against = study.BY_NAME[row.against].title if row.against else ""
        lines.append(f"| {row.title} | {report} | {100 * accuracy:.1f}% | {each} | {against} | {points} "
                     f"| {100 * formatted:.0f}% | {tokens:.0f} | {minutes} |")  # fmt: skip
    return "\n".join(lines)


def seeds() -> str:
    """Every study's own table."""
    return "\n\n".join(f"Seed {rows[0]['seed']}:\n\n{study.table(rows).strip()}" for rows in studies())


def mistakes() -> str:
    """Kinds of answers, means over seeds."""
    names = [row.name for row in study.ROWS if row.script and by_row(row.name)]
    heads = "".join(f" {study.BY_NAME[name].title} |" for name in names)
    lines = [f"| |{heads}", "|" + "---|" * (1 + len(names))]
    for kind, what in study.KINDS.items():
        cells = "".join(f" {fmean(f['kinds'][kind] for f in by_row(name)):.0f} |" for name in names)
        lines.append(f"| {kind}: {what} |{cells}")
    return "\n".join(lines)


TABLES = {"embedded": embedded, "seeds": seeds, "mistakes": mistakes}


def filled(page: str) -> str:
    """The page with every marked table made anew."""

    def put(found: re.Match) -> str:
        if found[1] not in TABLES:
            raise UserError(f"there is no table called {found[1]}")
        return f"<!-- {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- ([a-z-]+) -->\n.*?<!-- end -->", put, page, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    console.Parser(f"Write the tables of {', '.join(PAGES)} anew from results/.").parse_args(argv)
    for name in PAGES:
        path = ROOT / name
        files.replace_file(path, filled(path.read_text("utf-8")).encode())
    return 0


if __name__ == "__main__":
    console.entry(main)
