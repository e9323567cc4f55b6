"""One HTML page about runs: what happened, scores, mistakes, curves, answers side by side.

    python -m nanogsm.report runs/sft-full-main runs/ppo-full-main       # -> runs/report.html

Give the runs in order, because each is compared with the one before it. A run without an evaluation
has its curves only, and one that has not finished shows what it has so far. The folder of an
untuned model's evaluation can be given, too. The page is one file without scripts and loads
nothing. All text that a model or a data file wrote is escaped.
"""

import hashlib
import itertools
import os
import re
from collections import Counter
from pathlib import Path

from nanogsm import UserError, arithmetic, boxed, data
from nanogsm.report import coloured, scores
from nanogsm.report.curves import curves_section
from nanogsm.report.stages import Stage, read_stage
from nanogsm.report.words import escape, opening, p_value
from nanogsm.run import flags
from nanogsm.store import files

SHOWN = 8  # problems per list, each with every stage's answer
STYLE = (Path(__file__).parent / "page.css").read_text("utf-8")


def table(head: list[str], body: list[tuple[str, str, list[str]]]) -> str:
    """head: the columns' names. body: (name of the row, its meaning, cells)."""
    lines = ["<th></th>" + "".join(f"<th>{escape(cell)}</th>" for cell in head)]
    for name, meaning, row in body:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f"<td>{escape(name)}<small>{escape(meaning)}</small></td>{cells}")
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{rows}</table></div>'


def share(n: int, of: int) -> str:
    """A count with its share of a whole: 352 (26.7%)."""
    return f"{n:,} ({n / of:.1%})" if of else "none"


def scores_section(stages: list[Stage]) -> str:
    changes = [("", "")]
    for previous, stage in zip(stages, stages[1:]):
        if previous.rows.keys() & stage.rows.keys():
            pair = scores.paired(previous.rows, stage.rows)
            changes.append((f"{pair['points']:+.1f}", p_value(pair["p"])))
        else:
            changes.append(("other problems", ""))
    s = [stage.summary for stage in stages]
    of_each = lambda form: [form(summary) for summary in s]  # noqa: E731
    graders = sorted({summary.get("grader", "the number after ####") for summary in s})
    grader = " and ".join(graders)
    body = [
        ("exact match", f"right answers, by {grader}", of_each(lambda s: f"{s['accuracy']:.1%}")),
        ("95% interval", "of exact match, in percent (Wilson's)", of_each(
            lambda s: f"{100 * s['ci_low']:.1f} to {100 * s['ci_high']:.1f}")),
        ("right", "", of_each(lambda s: f"{s['correct']:,} of {s['n']:,}")),
        ("points", "difference from the run to the left, on the problems that both answered",
         [points for points, _ in changes]),
        ("p", "of that difference, by the exact McNemar test", [p for _, p in changes]),
        ("last number", "the last number of the answer is right, in the format or not",
         of_each(lambda s: f"{s['flexible_accuracy']:.1%}" if "flexible_accuracy" in s else "")),
        ("equal text", "the answer in the box is written as the right one is",
         of_each(lambda s: f"{s['text_accuracy']:.1%}" if "text_accuracy" in s else "")),
        ("in format", "a number follows ####, or an answer is in a box",
         of_each(lambda s: f"{s['formatted']:.1%}")),
        ("truncated", "the answer reached the token limit",
         of_each(lambda s: f"{s['truncated']:.1%}")),
        ("tokens", "mean length of an answer", of_each(lambda s: f"{s['mean_tokens']:.0f}")),
    ]  # fmt: skip
    body = [row for row in body if row[0] not in ("last number", "equal text") or any(row[2])]
    if len(stages) == 1:
        body = [row for row in body if row[0] not in ("points", "p")]
    asked = {(summary["n"], summary.get("precision")) for summary in s}
    differ = "The runs differ in the number of problems or in precision. " if len(asked) > 1 else ""
    return f"""<h2>Scores</h2>{table([stage.name for stage in stages], body)}
<p class="dim">{differ}Source: {escape(", ".join(stage.path for stage in stages))}.</p>"""


def shows_work(row: dict) -> bool:
    """Whether an answer shows a calculation, which GSM8K's format marks with <<."""
    return "<<" in data.cut(row["completion"])


def mistakes_section(stages: list[Stage]) -> str:
    names = [stage.name for stage in stages]
    kinds = scores.kinds_in(row for stage in stages for row in stage.rows.values())
    listed = [[(scores.kind_of(row), shows_work(row)) for row in s.rows.values()] for s in stages]
    every = [Counter(kind for kind, _ in answers) for answers in listed]
    worked = [Counter(kind for kind, work in answers if work) for answers in listed]
    guessed = [count - shown for count, shown in zip(every, worked)]
    body = [
        (kind, what, [share(count[kind], count.total()) for count in every])
        for kind, what in kinds.items()
    ]
    parts = [f"<h2>Kinds of answers</h2>{table(names, body)}",
             '<p class="dim">An answer is counted once, as the first kind that applies.</p>']
    if any(worked):
        totals = lambda counts: [  # noqa: E731
            share(count.total(), whole.total()) for count, whole in zip(counts, every)
        ]
        of_them = lambda counts, kind: [  # noqa: E731
            share(count[kind], count.total()) for count in counts
        ]
        body = [
            ("with a calculation", "share of all answers", totals(worked)),
            ("of these right", "", of_them(worked, "right")),
            ("of these with an arithmetic mistake", "", of_them(worked, "arithmetic")),
            ("of these set up wrongly", "", of_them(worked, "set-up")),
            ("without a calculation", "share of all answers", totals(guessed)),
            ("of these right", "", of_them(guessed, "right")),
        ]
        parts.append(f"<h3>With and without a calculation</h3>{table(names, body)}")
        parts.append(
            '<p class="dim">A model that starts to show calculations guesses less often. So the '
            "number of its arithmetic and set-up mistakes grows, even if it calculates as well as "
            "before. Compare their shares of the answers with a calculation.</p>"
        )
        parts += [no_longer_guessed(*pair) for pair in zip(stages, stages[1:])]
    return "\n".join(parts)


def no_longer_guessed(previous: Stage, stage: Stage) -> str:
    """A sentence about problems that were guessed at before and are worked out now."""
    before = [i for i in previous.rows.keys() & stage.rows if not shows_work(previous.rows[i])]
    now = [stage.rows[i] for i in before if shows_work(stage.rows[i])]
    if not now:
        return ""
    was_right = sum(previous.rows[i]["correct"] for i in before if shows_work(stage.rows[i]))
    right = sum(row["correct"] for row in now)
    return (f"<p>Of {len(before):,} problems that {escape(previous.name)} answered without a "
            f"calculation, {escape(stage.name)} shows one for {len(now):,}. Of these {was_right:,} "
            f"were right before, and {right:,} are right now.</p>")  # fmt: skip


def verdict(row: dict) -> str:
    kind = scores.kind_of(row)
    wrong = arithmetic.false_annotations(row["completion"]) if kind == "arithmetic" else []
    said = escape(f"{kind}: {wrong[0]}" if wrong else kind)
    return f'<span class="{"right" if row["correct"] else "wrong"}">{said}</span>'


def problem(rows: list[tuple[str, dict]]) -> str:
    """One problem with every stage's answer, folded until it is clicked. rows: (stage, row)."""
    first = rows[0][1]
    question = first["question"]
    short = question if len(question) <= 90 else question[:88] + " …"
    marks = " ".join(f"{escape(name)}: {verdict(row)}" for name, row in rows)
    answers = [
        f"<h4>{escape(name)}: {verdict(row)}</h4><pre>{coloured.answer(row, escape)}</pre>"
        for name, row in rows
    ]
    gold = escape(boxed.shown(first["gold"]))
    return f"""<details><summary>{escape(short)} <b>{gold}</b>
<span class="dim">{marks}</span></summary><p>{escape(question)}</p>
<div class="answers"><div>{"</div><div>".join(answers)}</div></div></details>"""


def answers_section(stages: list[Stage]) -> str:
    parts = []
    probed = [stage for stage in stages if stage.probes]
    if probed:
        parts.append('<h2>Probes</h2><p class="dim">A few problems to read in full, each with its '
                     "right number. A click opens the answers.</p>")  # fmt: skip
        for rows in zip(*(stage.probes for stage in probed)):
            parts.append(problem([(stage.name, row) for stage, row in zip(probed, rows)]))
    for previous, stage in zip(stages, stages[1:]):
        if not previous.rows.keys() & stage.rows.keys():
            continue
        pair = scores.paired(previous.rows, stage.rows)
        for change, mistaken in (("fixed", previous), ("broken", stage)):
            names = f"from {escape(previous.name)} to {escape(stage.name)}"
            parts.append(f"<h2>{change.capitalize()} {names}: {len(pair[change])}</h2>")
            kinds = Counter(scores.kind_of(mistaken.rows[i]) for i in pair[change]).most_common()
            counts = ", ".join(f"{kind} {n}" for kind, n in kinds)
            note = escape(f"Mistakes of {mistaken.name}: {counts}. The first {SHOWN}:")
            parts.append(f'<p class="dim">{note}</p>' if counts else "")
            for i in pair[change][:SHOWN]:
                parts.append(problem([(s.name, s.rows[i]) for s in (previous, stage)]))
    common = sorted(set.intersection(*(set(stage.rows) for stage in stages)))[:SHOWN]
    if common:
        parts.append(f'<h2>The first {len(common)} problems</h2><p class="dim">Each with its right '
                     "number. A click opens the answers.</p>")  # fmt: skip
        parts += [problem([(stage.name, stage.rows[i]) for stage in stages]) for i in common]
    return "\n".join(parts)


def page(stages: list[Stage], about: str = "") -> str:
    """The page as HTML. about: of `fingerprint`, so that a later call knows whose page this is."""
    title = escape("nanogsm: " + ", ".join(stage.name for stage in stages))
    evaluated = [stage for stage in stages if stage.rows]
    parts = [opening(stages)]
    if evaluated:
        parts += [scores_section(evaluated), mistakes_section(evaluated)]
    parts.append(curves_section(stages))
    if evaluated:
        parts.append(answers_section(evaluated))
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="runs" content="{about}">
<title>{title}</title><style>{STYLE}</style>
<meta name="viewport" content="width=device-width, initial-scale=1"></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def fingerprint(stages: list[Stage]) -> str:
    """Which runs a page is about, in 16 hexadecimal digits."""
    folders = "\n".join(str(stage.folder) for stage in stages)
    return hashlib.sha256(os.fsencode(folders)).hexdigest()[:16]


def fingerprint_in(path: Path) -> str | None:
    """The fingerprint in a page that is there; None if it has none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            found = re.search('<meta name="runs" content="([0-9a-f]{16})">', file.read(1000))
    except OSError:
        return None
    return found and found[1]


def place(stages: list[Stage]) -> Path:
    """Where the page goes by default: report.html next to the last run. A page about other runs
    that is there stays, and the new one has the runs' names in its own."""
    folder, names = stages[-1].folder.parent, "-".join(stage.folder.name for stage in stages)
    usual, named = folder / "report.html", folder / f"report-{names[:150]}.html"
    for path in (usual, named):
        if not path.exists() or fingerprint_in(path) == fingerprint(stages):
            if path == named:
                print(f"{usual} is about other runs and stays as it is")
            return path
    raise UserError(f"{usual} and {named} are about other runs: give --out a file name")


def read_stages(runs: list[str]) -> list[Stage]:
    """The stages of the page. Those that have the same folder name are called by their path."""
    if twice := [run for run, n in Counter(runs).items() if n > 1]:
        raise UserError(f"{twice[0]} is given twice")
    stages = [read_stage(run) for run in runs]
    names = Counter(stage.name for stage in stages)
    stages = [s._replace(name=run) if names[s.name] > 1 else s for run, s in zip(runs, stages)]
    for a, b in itertools.combinations([stage for stage in stages if stage.rows], 2):
        scores.in_common(a.path, a.rows, b.path, b.rows)  # raises if they are about other problems
    return stages


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser("One HTML page about runs: curves, and scores if they have been evaluated.")
    p.add_argument("runs", nargs="+", help="Folders of runs or evaluations, in order.")
    p.add_argument("--out", help="File to write. Default: report.html next to the last run. If "
                   "that is about other runs, the new name has the runs' names in it.")  # fmt: skip
    p.add_argument("--steps", metavar="PRM_RUN", help="Colour the steps of all answers by this run "
                   "of train_prm.py.")  # fmt: skip
    args = p.parse_args(argv)
    stages = read_stages(args.runs)
    if args.steps:
        coloured.add_values(args.steps, stages)
    out = Path(args.out) if args.out else place(stages)
    if not out.name:
        raise UserError(f"cannot write {out}: give --out a file name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = page(stages, fingerprint(stages))
        files.replace_file(out, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    print(f"written to {out}")
    return 0
