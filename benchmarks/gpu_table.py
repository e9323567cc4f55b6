"""The page of results/gpu: a table for each file of gpu.py's results.

    python -m benchmarks.gpu_table results/gpu        # reads *.json there, writes README.md

Every file is of one card and one commit, and gets a heading and a table of its own. Numbers of two
cards are never in one table.
"""

from pathlib import Path

from benchmarks.gpu import table
from nanogsm import UserError
from nanogsm.run import console, flags
from nanogsm.store import files

INTRODUCTION = """# On a GPU

Made by `python -m benchmarks.gpu --json FILE`, one table for each file. The model has gemma-2b's
shape and random weights. `python -m benchmarks.gpu_table results/gpu` writes this page.
"""


def section(name: str, results: dict) -> str:
    """A heading that names the card, what it ran with, and the table."""
    about = results["about"]
    code = f"commit {about['commit'] or 'unknown'}{', changed' * bool(about['dirty'])}"
    versions = [f"{x} {about[x]}" for x in ("driver", "cuda", "torch", "transformers", "peft")
                if about.get(x)]  # fmt: skip
    dry = "\n**A dry run at toy size: these numbers mean nothing.**\n" * about["dry"]
    lines = ["| " + " | ".join(escaped(cell) for cell in line) + " |" for line in table(results)]
    lines.insert(1, "|" + "---|" * 5)
    return "\n".join([
        f"## {about['gpu'] or about['cpu']}\n", f"`{name}`, {code}.", f"{', '.join(versions)}.",
        dry, *lines, "",
    ])  # fmt: skip


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def page(named: dict[str, dict]) -> str:
    """Markdown of several files' results, by card."""
    card = lambda name: (str(named[name]["about"]["gpu"]), name)  # noqa: E731
    return "\n".join([INTRODUCTION, *(section(n, named[n]) for n in sorted(named, key=card))])


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser("Write README.md from the .json files of gpu.py in a folder.")
    p.add_argument("folder", type=Path, help="Usually results/gpu.")
    folder = p.parse_args(argv).folder
    named = {path.name: files.read_json(path) for path in sorted(folder.glob("*.json"))}
    if not named:
        raise UserError(f"{folder} has no .json files")
    files.replace_file(folder / "README.md", page(named).encode())
    return 0


if __name__ == "__main__":
    console.entry(main)
