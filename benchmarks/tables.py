"""Puts the tables of results/*.json into the READMEs, between <!-- NAME --> and <!-- end -->.

    python -m benchmarks.tables

A test checks that the committed pages hold what this makes of the committed results.
"""

import json
import re
from pathlib import Path
from statistics import fmean

from experiments import study
from nanogsm import UserError
from nanogsm.report.scores import KINDS
from nanogsm.run import console, flags
from nanogsm.store import files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "results/tiny/README.md")


def studies() -> list[list[dict]]:
    """The rows of every committed study of the embedded model, in the order of their seeds."""
    found = sorted((ROOT / "results" / "tiny").glob("study-*.json"))
    return [json.loads(path.read_text("utf-8"))["rows"] for path in found]


def by_row(name: str) -> list[dict]:
    """One row, from every study that ran it."""
    found = [next(row for row in rows if row["row"] == name) for rows in studies()]
    return [row for row in found if "not_run" not in row]


def embedded() -> str:
    """The study of the embedded model: means over the seeds."""
    lines = [
        "| | original study, gemma-2b-it | embedded model | each seed | against | points "
        "| in format | tokens | minutes |",
        "|" + "---|" * 9,
    ]
    for row in study.ROWS:
        found = by_row(row.name)
        original = f"{row.original:.0f}%" if row.original is not None else ""
        if not found:
            lines.append(f"| {row.title} | {original} | not run |" + " |" * 6)
            continue
        accuracy, formatted, tokens = (
            fmean(f[key] for f in found) for key in ("accuracy", "formatted", "mean_tokens")
        )
        each = ", ".join(f"{100 * f['accuracy']:.1f}" for f in found)
        points = f"{fmean(f['points'] for f in found):+.1f}" if row.against else ""
        minutes = f"{fmean(f['training']['minutes'] for f in found):.1f}" if row.script else ""
        against = study.BY_NAME[row.against].title if row.against else ""
        lines.append(
            f"| {row.title} | {original} | {accuracy:.1%} | {each} | {against} | {points} "
            f"| {formatted:.0%} | {tokens:.0f} | {minutes} |"
        )
    return "\n".join(lines)


def short() -> str:
    """The same for the main README: scores alone, of the first prompt and the trained rows."""
    lines = ["| | recipe | original study, gemma-2b-it | embedded model |", "|---|---|---|---|"]
    for row in study.ROWS:
        found = by_row(row.name)
        if found and (row.script or row.original is not None):
            original = f"{row.original:.0f}%" if row.original is not None else ""
            accuracy = fmean(f["accuracy"] for f in found)
            words = row.flags.split()
            recipe = f"`{words[words.index('--recipe') + 1]}`" if row.script else ""
            title = row.title.removesuffix(", tuned")
            lines.append(f"| {title} | {recipe} | {original} | {accuracy:.1%} |")
    return "\n".join(lines)


def seeds() -> str:
    """The whole table of every study."""
    tables = [f"Seed {rows[0]['seed']}:\n\n{study.table(rows).strip()}" for rows in studies()]
    return "\n\n".join(tables)


def mistakes() -> str:
    """Kinds of answers: means over the seeds."""
    names = [row.name for row in study.ROWS if row.script and by_row(row.name)]
    heads = "".join(f" {study.BY_NAME[name].title} |" for name in names)
    lines = [f"| |{heads}", "|" + "---|" * (1 + len(names))]
    for kind, what in KINDS.items():
        counts = [fmean(f["kinds"][kind] for f in by_row(name)) for name in names]
        cells = "".join(f" {count:.0f} |" for count in counts)
        lines.append(f"| {kind}: {what} |{cells}")
    return "\n".join(lines)


TABLES = {"embedded": embedded, "short": short, "seeds": seeds, "mistakes": mistakes}


def filled(page: str) -> str:
    """The page with every marked table replaced by the current one."""

    def table(found: re.Match) -> str:
        if found[1] not in TABLES:
            raise UserError(f"there is no table called {found[1]}")
        return f"<!-- {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- ([a-z-]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    flags.Parser(f"Renew the tables of {', '.join(PAGES)} from results/.").parse_args(argv)
    for name in PAGES:
        path = ROOT / name
        files.replace_file(path, filled(path.read_text("utf-8")).encode())
    return 0


if __name__ == "__main__":
    console.entry(main)
