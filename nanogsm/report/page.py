"""One HTML page about runs: scores, mistakes, curves, answers side by side.

    python -m nanogsm.report runs/sft-full-main runs/ppo-full-main       # -> runs/report.html

Give the stages in order, because each is compared with the one before it. A stage is the folder of
a run that has been evaluated, or of an untuned model's evaluation. The page is one file without
scripts and loads nothing. All text that a model or a data file wrote is escaped.
"""

import html
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from nanogsm import UserError, arithmetic
from nanogsm.report import charts, coloured, eval_files, scores
from nanogsm.run import console, flags
from nanogsm.run.past import run_of
from nanogsm.store import files

SHOWN = 8  # problems per list, each with every stage's answer
CURVES = {  # key in metrics.jsonl: title of its panel
    "reward": "mean reward of sampled answers",
    "val_exact_match": "exact match on validation problems",
    "loss": "training loss, nats per token",
    "val_loss": "validation loss, nats per token",
    "kl_sequence": "KL from the reference, nats per answer",
    "entropy": "entropy, nats per token",
    "value_loss": "value loss",
    "explained_variance": "explained variance of the critic",
    "groups_without_spread": "groups whose answers all earned the same",
    "clipped": "policy ratios that were clipped",
    "value_clipped": "values that were clipped",
    "grad_norm": "gradient norm",
    "value_grad_norm": "gradient norm of the critic's own weights",
    "response_tokens": "length of an answer, tokens",
    "worked": "answers that show a calculation",
    "lr": "learning rate",
    "tokens_per_s": "tokens per second",
}
SHARES = ("reward", "val_exact_match", "groups_without_spread", "clipped", "value_clipped",
          "worked")  # fmt: skip
STYLE = (Path(__file__).parent / "page.css").read_text("utf-8")


class Stage(NamedTuple):
    name: str
    path: str  # of the evaluation's eval-*.jsonl
    summary: dict  # eval-*.json
    rows: dict[int, dict]  # problem -> row of eval-*.jsonl
    probes: list[dict]  # rows of eval-probes-*.jsonl, empty without that file
    metrics: list[dict]
    args: dict  # the run's arguments; {} for an untuned model


NEEDED = """accuracy ci_low ci_high flexible_accuracy formatted truncated mean_tokens n
            correct""".split()


def read_stage(folder: str) -> Stage:
    """Raises UserError if the folder has no evaluation, or one that is not complete."""
    path, rows = eval_files.read_rows(folder)
    parent = Path(path).absolute().parent
    run = run_of(str(parent))  # None for an untuned model
    try:
        summary = json.loads(Path(path).with_suffix(".json").read_text("utf-8"))
        lines = (parent / "metrics.jsonl").read_text("utf-8").splitlines() if run else []
        metrics = [json.loads(line) for line in lines]
        [float(summary[key]) for key in NEEDED], rows[0], [scores.kind_of(row) for row in rows]
        [row["step"] for row in metrics]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"cannot show {folder} ({error!r}): evaluate it again") from error
    probes = sorted(parent.glob("eval-probes*.jsonl"))
    probe_rows = eval_files.read_rows(str(probes[-1]))[1] if probes else []
    by_problem = scores.by_problem(path, rows)
    run_args = run[1]["args"] if run else {}
    return Stage(parent.name, path, summary, by_problem, probe_rows, metrics, run_args)


def escape(value: object) -> str:
    """HTML that shows the value as text, whatever is in it."""
    return html.escape(console.printable(str(value)))


def table(head: list[str], body: list[list]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{rows}</table></div>'


def scores_section(stages: list[Stage]) -> str:
    body = []
    for previous, stage in zip([None, *stages], stages):
        s, change, p = stage.summary, "", ""
        if previous and previous.rows.keys() & stage.rows.keys():
            pair = scores.paired(previous.rows, stage.rows)
            change, p = f"{pair['points']:+.1f}", f"{pair['p']:.2g}"
        elif previous:
            change = "other problems"
        interval = f"{100 * s['ci_low']:.1f} to {100 * s['ci_high']:.1f}"
        shares = [f"{s[key]:.1%}" for key in ("flexible_accuracy", "formatted", "truncated")]
        body.append([stage.name, f"{s['accuracy']:.1%}", interval, f"{s['correct']} of {s['n']}",
                     change, p, *shares, f"{s['mean_tokens']:.0f}"])  # fmt: skip
    head = "|exact match|95%|correct|points|p|last number|in format|truncated|tokens".split("|")
    asked = {(stage.summary["n"], stage.summary.get("precision")) for stage in stages}
    differ = "The rows differ in the number of problems or in precision. " if len(asked) > 1 else ""
    return f"""<h2>Scores</h2>{table(head, body)}
<p class="dim">{differ}Source: {escape(", ".join(stage.path for stage in stages))}.</p>
<p class="dim">95%: Wilson's interval. Points and p compare a row with the row above on the problems
that both have (exact McNemar test). Last number: the last number of the answer is right, in the
format or not. In format: a number follows ####. Truncated: the answer reached the token limit.
Tokens: mean length of an answer.</p>"""


def mistakes_section(stages: list[Stage]) -> str:
    counts = [Counter(map(scores.kind_of, stage.rows.values())) for stage in stages]
    body = [[kind, *[count[kind] for count in counts], what] for kind, what in scores.KINDS.items()]
    head = ["", *[stage.name for stage in stages], "meaning"]
    return f"""<h2>Mistakes</h2><div class="mistakes">{table(head, body)}</div>
<p class="dim">An answer is counted once, as the first kind that applies. A model that starts to
calculate guesses less often, so it has more arithmetic and set-up mistakes.</p>"""


def curves_section(stages: list[Stage]) -> str:
    """One panel per metric. All SFT runs share their panels, and all PPO runs theirs."""
    parts = []
    for kind in ("SFT", "PPO"):
        runs = [s for s in stages if s.metrics and ("kl_coef" in s.args) == (kind == "PPO")]
        names = [stage.name for stage in runs]
        panels = []
        for key, title in CURVES.items():
            lines = [(stage.name, points(stage.metrics, key)) for stage in runs]
            if any(len(line) > 1 for _, line in lines):
                panels.append(charts.page([charts.Panel(title, lines, key in SHARES)], names))
        if panels:
            items = [f"<li>{escape(s.name)}: {escape(settings(s.args))}</li>" for s in runs]
            parts.append(f'<h2>{kind}: metrics by step</h2><ul class="dim">{"".join(items)}</ul>')
            parts.append(f'<div class="curves">{"".join(panels)}</div>')
    return "\n".join(parts)


def points(metrics: list[dict], key: str) -> list[tuple[float, float]]:
    if key == "tokens_per_s":
        timed = [r for r in metrics if r.get("seconds") and r.get("tokens")]
        return [(r["step"], r["tokens"] / r["seconds"]) for r in timed]
    return [(r["step"], r[key]) for r in metrics if isinstance(r.get(key), (int, float))]


def settings(args: dict) -> str:
    shown = """recipe model init data lora advantage group lr value_lr epochs micro_batch
               accumulation kl_coef gamma lam clip_high rollouts seed precision""".split()
    return ", ".join(f"{key} {args[key]}" for key in shown if args.get(key) is not None)


def verdict(row: dict) -> str:
    kind = scores.kind_of(row)
    wrong = arithmetic.false_annotations(row["completion"]) if kind == "arithmetic" else []
    said = escape(f"{kind}: {wrong[0]}" if wrong else kind)
    return f'<span class="{"right" if row["correct"] else "wrong"}">{said}</span>'


def problem(rows: list[tuple[str, dict]]) -> str:
    """One problem with every stage's answer, folded until it is clicked. rows: (stage, row)."""
    first = rows[0][1]
    marks = " ".join(f"{escape(name)}: {verdict(row)}" for name, row in rows)
    answers = [
        f"<h4>{escape(name)}: {verdict(row)}</h4><pre>{coloured.answer(row, escape)}</pre>"
        for name, row in rows
    ]
    return f"""<details><summary>{escape(first["question"][:90])} … <b>{first["gold"]:.15g}</b>
<span class="dim">{marks}</span></summary><p>{escape(first["question"])}</p>
<div class="answers"><div>{"</div><div>".join(answers)}</div></div></details>"""


def answers_section(stages: list[Stage]) -> str:
    parts = []
    probed = [stage for stage in stages if stage.probes]
    if probed:
        parts.append("<h2>Probes</h2>")
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
        parts.append(f"<h2>The first {len(common)} problems</h2>")
        parts += [problem([(stage.name, stage.rows[i]) for stage in stages]) for i in common]
    return "\n".join(parts)


def page(stages: list[Stage]) -> str:
    title = escape("nanogsm: " + ", ".join(stage.name for stage in stages))
    sections = (scores_section, mistakes_section, curves_section, answers_section)
    body = "\n".join(section(stages) for section in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>
<meta name="viewport" content="width=device-width, initial-scale=1"></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser("One HTML page about runs that have been evaluated.")
    p.add_argument("runs", nargs="+", help="Folders of runs or evaluations, in order.")
    p.add_argument("--out", help="File to write. Default: report.html next to the last run.")
    p.add_argument("--steps", metavar="PRM_RUN", help="Colour the steps of all answers by this run "
                   "of train_prm.py.")  # fmt: skip
    args = p.parse_args(argv)
    stages = [read_stage(folder) for folder in args.runs]
    for a, b in itertools.combinations(stages, 2):
        scores.in_common(a.path, a.rows, b.path, b.rows)  # raises if they are about other problems
    if args.steps:
        coloured.add_values(args.steps, stages)
    out = Path(args.out) if args.out else Path(args.runs[-1]).resolve().parent / "report.html"
    if not out.name:
        raise UserError(f"cannot write {out}: give --out a file name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(out, page(stages).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    print(f"written to {out}")
    return 0
