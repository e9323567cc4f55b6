"""One HTML page about runs: scores, mistakes, curves, answers side by side.

    python -m nanogsm.report runs/sft-full-main runs/ppo-full-main       # -> runs/report.html

Give the stages in order: each is compared with the one before it. A stage is a folder of a run, or of
an untuned model's evaluation, and has been evaluated. The page is one file without scripts, which
opens anywhere and loads nothing; all text in it that a model or a data file wrote is escaped.
"""

import html
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from nanogsm import UserError
from nanogsm.report import charts, scores
from nanogsm.run import console
from nanogsm.run.folder import run_of
from nanogsm.store import files

SIDE_BY_SIDE = 8  # problems of which all stages' answers are shown; of each kind of change as many
CURVES = {  # what a metrics.jsonl may have, and what it is called here
    "reward": "reward of sampled answers",
    "val_exact_match": "exact match, held-out problems",
    "loss": "training loss, nats a token",
    "val_loss": "loss, held-out problems",
    "kl_sequence": "KL from the start, nats an answer",
    "entropy": "entropy, nats a token",
    "value_loss": "value loss",
    "explained_variance": "explained variance of the critic",
    "clipped": "policy ratios clipped",
    "value_clipped": "values clipped",
    "grad_norm": "gradient norm",
    "value_grad_norm": "gradient norm of the critic's own weights",
    "response_tokens": "length of an answer, tokens",
    "worked": "answers that show a calculation",
    "lr": "learning rate",
    "tokens_per_s": "tokens a second",
}
SHARES = ("reward", "val_exact_match", "clipped", "value_clipped", "worked")
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #57606a; --line: #d8dee4; --page: #fff;
        --good: #15803d; --bad: #b42318; --box: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9aa4af; --line: #30363d;
        --page: #0d1117; --good: #4ade80; --bad: #ff8f85; --box: #161b22 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 1180px; margin: 0 auto; padding: 1rem }
h2 { margin-top: 2.2rem } p, li, figcaption { max-width: 75ch } .dim, figcaption { color: var(--dim) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600 }
.mistakes th:last-child, .mistakes td:last-child { text-align: left; white-space: normal }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 8px }
.curves svg { width: 100%; height: auto }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem }
summary { cursor: pointer } .answers { display: grid; gap: .8rem;
       grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box); padding: .6rem;
      border-radius: 6px; font-size: 13px; margin: .2rem 0 }
.right { color: var(--good) } .wrong { color: var(--bad) } h4 { margin: .4rem 0 0 }
"""


class Stage(NamedTuple):
    name: str
    path: str  # of the evaluation, eval-*.jsonl
    figures: dict  # eval-*.json
    rows: dict[int, dict]  # problem -> row of eval-*.jsonl
    probes: list[dict]  # rows of eval-probes-*.jsonl, if there are any
    metrics: list[dict]
    args: dict  # the run's, {} of an untuned model


def read_stage(folder: str) -> Stage:
    path, rows = scores.read_rows(folder)
    at = Path(path).absolute().parent
    run = run_of(str(at))  # an untuned model's evaluation has none
    try:
        figures = json.loads(Path(path).with_suffix(".json").read_text("utf-8"))
        lines = (at / "metrics.jsonl").read_text("utf-8").splitlines() if run else []
        metrics = [json.loads(line) for line in lines]
        figures["accuracy"], figures["ci_low"], figures["ci_high"], figures["mean_tokens"]
        scores.kind_of(rows[0])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"cannot report on {folder}: {error!r}; evaluate it again") from error
    probes = sorted(at.glob("eval-probes*.jsonl"))
    probes = scores.read_rows(str(probes[-1]))[1] if probes else []
    by_problem = scores.by_problem(path, rows)
    return Stage(at.name, path, figures, by_problem, probes, metrics, run[1]["args"] if run else {})


def text(value: object) -> str:
    """Safe in HTML, whatever it is."""
    return html.escape(console.printable(str(value)))


def rows_of(head: list[str], body: list[list]) -> str:
    """A table; cells are text, but for those that are HTML already (Html)."""
    cell = lambda x: x if isinstance(x, Html) else text(x)  # noqa: E731
    lines = ["<tr>" + "".join(f"<th>{cell(x)}</th>" for x in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell(x)}</td>" for x in row) + "</tr>" for row in body]
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


class Html(str):
    """Text that is markup."""


# ------------------------------------------------------------------------------------ the sections


def scores_section(stages: list[Stage]) -> str:
    body = []
    for before, stage in zip([None, *stages], stages):
        f, change, p = stage.figures, "", ""
        if before:
            pair = scores.paired(before.rows, stage.rows) if before.rows.keys() & stage.rows.keys() else None
            change, p = (f"{pair['points']:+.1f}", f"{pair['p']:.2g}") if pair else ("other problems", "")
        body.append([
            stage.name, f"{100 * f['accuracy']:.1f}%", f"{100 * f['ci_low']:.1f} to {100 * f['ci_high']:.1f}",
            f"{f['correct']} of {f['n']}", change, p, f"{100 * f['flexible_accuracy']:.1f}%",
            f"{100 * f['formatted']:.1f}%", f"{100 * f['truncated']:.1f}%", f"{f['mean_tokens']:.0f}",
        ])  # fmt: skip
    head = ["", "exact match", "95%", "right", "points", "p", "last number", "in format", "cut", "tokens"]
    asked = {(stage.figures["n"], stage.figures.get("precision")) for stage in stages}
    unlike = "These differ in the number of problems or in precision. " if len(asked) > 1 else ""
    return "<h2>Scores</h2>" + rows_of(head, body) + (
        f'<p class="dim">{unlike}From {text(", ".join(stage.path for stage in stages))}.</p>'
        '<p class="dim">95%: Wilson interval. Points and p: against the row above, problem by problem (exact '
        "McNemar test). Last number: the answer's last number is right, in the format or not. Cut: at "
        "the longest answer allowed.</p>"
    )  # fmt: skip


def mistakes_section(stages: list[Stage]) -> str:
    counts = [Counter(scores.kind_of(row) for row in stage.rows.values()) for stage in stages]
    body = [[kind, *[count[kind] for count in counts], what] for kind, what in scores.KINDS.items()]
    head = ["", *[stage.name for stage in stages], "what it means"]
    return (
        '<h2>Mistakes</h2><div class="mistakes">' + rows_of(head, body) + "</div>"
        + '<p class="dim">A completion is of the first kind that holds, from the top. Calculator annotations '
        "are worked out again; set-up means that all of them are right and the answer is not.</p>"
    )  # fmt: skip


def curves_section(stages: list[Stage]) -> str:
    """A panel a metric; runs of one kind, SFT or PPO, share its panels."""
    parts = []
    for kind in ("SFT", "PPO"):
        runs = [s for s in stages if s.metrics and kind == ("PPO" if "kl_coef" in s.args else "SFT")]
        names = [stage.name for stage in runs]
        panels = []
        for key, title in CURVES.items():
            lines = [(stage.name, points(stage.metrics, key)) for stage in runs]
            if any(len(line) > 1 for _, line in lines):
                panels.append(charts.page([charts.Panel(title, lines, key in SHARES)], names))
        if panels:
            said = "".join(f"<li>{text(stage.name)}: {text(settings(stage.args))}</li>" for stage in runs)
            parts.append(f'<h2>{kind}, by step</h2><ul class="dim">{said}</ul>'
                         f'<div class="curves">{"".join(panels)}</div>')  # fmt: skip
    return "\n".join(parts)


def points(metrics: list[dict], key: str) -> list[tuple[float, float]]:
    if key == "tokens_per_s":
        return [(r["step"], r["tokens"] / r["seconds"]) for r in metrics if r.get("seconds")]
    return [(r["step"], r[key]) for r in metrics if isinstance(r.get(key), (int, float))]


def settings(args: dict) -> str:
    shown = ("recipe", "model", "init", "data", "lora", "lr", "value_lr", "epochs", "micro_batch",
             "accumulation", "kl_coef", "gamma", "lam", "rollouts", "seed", "precision")  # fmt: skip
    return ", ".join(f"{k} {args[k]}" for k in shown if k in args)


def verdict(row: dict) -> Html:
    kind = scores.kind_of(row)
    false = scores.false_annotations(row["completion"]) if kind == "arithmetic" else []
    said = kind + (f": {false[0]}" if false else "")
    return Html(f'<span class="{"right" if row["correct"] else "wrong"}">{text(said)}</span>')


def problem(rows: list[tuple[str, dict]]) -> str:
    """A problem and every stage's answer to it, folded up."""
    first = rows[0][1]
    marks = " ".join(f"{text(name)}: {verdict(row)}" for name, row in rows)
    answers = "".join(
        f"<div><h4>{text(name)}</h4><pre>{text(row['completion'].strip())}</pre>{verdict(row)}</div>"
        for name, row in rows
    )
    return (
        f"<details><summary>{text(first['question'][:90])} … <b>{first['gold']:.15g}</b> "
        f'<span class="dim">{marks}</span></summary><p>{text(first["question"])}</p>'
        f'<div class="answers">{answers}</div></details>'
    )


def answers_section(stages: list[Stage]) -> str:
    parts = []
    probed = [stage for stage in stages if stage.probes]
    if probed:
        parts.append("<h2>Probes</h2>")
        for rows in zip(*(stage.probes for stage in probed)):
            parts.append(problem([(stage.name, row) for stage, row in zip(probed, rows)]))
    for before, stage in zip(stages, stages[1:]):
        if not before.rows.keys() & stage.rows.keys():
            continue
        pair = scores.paired(before.rows, stage.rows)
        for what in ("fixed", "broken"):
            parts.append(f"<h2>{what.capitalize()} from {text(before.name)} to {text(stage.name)}: "
                         f"{len(pair[what])}</h2>")  # fmt: skip
            was, of = ("They were", before) if what == "fixed" else ("They became", stage)
            kinds = Counter(scores.kind_of(of.rows[i]) for i in pair[what])
            said = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
            parts.append(f'<p class="dim">{was}: {text(said)}. The first {SIDE_BY_SIDE}:</p>' if said else "")
            for i in pair[what][:SIDE_BY_SIDE]:
                parts.append(problem([(before.name, before.rows[i]), (stage.name, stage.rows[i])]))
    common = sorted(set.intersection(*(set(stage.rows) for stage in stages)))[:SIDE_BY_SIDE]
    if common:
        parts.append(f"<h2>The first {len(common)} problems</h2>")
        parts += [problem([(stage.name, stage.rows[i]) for stage in stages]) for i in common]
    return "\n".join(parts)


def page(stages: list[Stage]) -> str:
    title = "nanogsm: " + ", ".join(stage.name for stage in stages)
    sections = (scores_section, mistakes_section, curves_section, answers_section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><h1>{text(title)}</h1>\n"
        + "\n".join(section(stages) for section in sections) + "\n</body></html>\n"
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    p = console.Parser("One HTML page about runs that have been evaluated.")
    p.add_argument("runs", nargs="+", help="folders of runs or evaluations, in order")
    p.add_argument("--out", help="the page (default: report.html beside the last of them)")
    args = p.parse_args(argv)
    stages = [read_stage(folder) for folder in args.runs]
    for a, b in itertools.combinations(stages, 2):
        scores.in_common(a.path, a.rows, b.path, b.rows)  # refuses stages about different problems
    out = Path(args.out) if args.out else Path(args.runs[-1]).resolve().parent / "report.html"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(out, page(stages).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    console.entry(main)
