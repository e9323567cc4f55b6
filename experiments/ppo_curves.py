"""What PPO changed, run by run: a table of test scores before and after, and the curves.

    python -m experiments.ppo_curves runs/tiny/study-{1,2,3}/ppo{,-tuned} --out runs/tiny/ppo

Give it run folders of train_ppo.py. The test problems must have been answered once by each run and
by the run it started from: evaluate.py does that, and experiments/study.py calls it. All runs with
the same recipe, or with --by method the same method, share a colour.

It writes --out with .json (scores before and after, their exact paired test, the curves) and .svg
(the curves), and prints the table.
"""

import json
from pathlib import Path
from statistics import median

from nanogsm import UserError
from nanogsm.report import charts, eval_files, scores, stages, words
from nanogsm.run import console, flags, past
from nanogsm.store import files

CURVES = {  # metric -> title of its panel
    "val_exact_match": "right, greedy, held-out problems",
    "exact_match": "right, sampled, training problems",
    "worked": "answers that show a calculation",
    "response_tokens": "length of an answer, tokens",
    "reward": "mean reward of sampled answers",
    "kl_sequence": "KL from the start, nats an answer",
    "entropy": "entropy of a token, nats",
    "explained_variance": "explained variance of the critic",
}
SHARES = ("val_exact_match", "exact_match", "worked")  # shown in percent
USUAL = ("val_exact_match", "exact_match", "worked", "response_tokens")
ALIKE = ("temperature", "samples", "max_new_tokens", "prompt", "data", "split", "precision")


def before_and_after(start: Path, run: Path, name: str | None = None) -> dict:
    """Exact match of two run folders on the same problems, and the exact test of the difference.
    name: of the evaluation's file; without it the last that both have, as eval_files sorts them.
    UserError if they were not asked the same in the same way."""
    theirs = [path.name for path in eval_files.one_answer_each(start)]
    both = [path.name for path in eval_files.one_answer_each(run) if path.name in theirs]
    name = name or (both[-1] if both else None)
    if name not in both:
        raise UserError(f"{start} and {run} have no evaluation in common: ask both the same with "
                        "evaluate.py")  # fmt: skip
    before, after = (stages.read_stage(str(folder / name)) for folder in (start, run))
    scores.in_common(before.path, before.rows, after.path, after.rows)
    differ = [key for key in ALIKE if before.summary.get(key) != after.summary.get(key)]
    if before.rows.keys() != after.rows.keys() or differ:
        what = f"in different ways ({', '.join(differ)})" if differ else "different problems"
        raise UserError(f"{before.path} and {after.path} were asked {what}: evaluate both alike")
    pair, n = scores.paired(before.rows, after.rows), len(after.rows)
    right = [sum(row["correct"] for row in stage.rows.values()) for stage in (before, after)]
    low, high = scores.wilson(right[1], n)
    return {
        "n": n, "before": right[0] / n, "after": right[1] / n, "ci_low": low, "ci_high": high,
        "fixed": len(pair["fixed"]), "broken": len(pair["broken"]), "mcnemar_p": pair["p"],
    }  # fmt: skip


def read_metrics(run: Path) -> tuple[list[dict], list[dict]]:
    """(all rows of metrics.jsonl, those of steps)."""
    rows = stages.read_metrics(run / "metrics.jsonl")
    steps = [row for row in rows if "reward" in row]
    if not steps:
        raise UserError(f"{run} has no step yet")
    return rows, steps


def collect(run: Path, curves: tuple[str, ...], by: str = "recipe") -> dict:
    """Scores, cost and curves of a run. Its name is its recipe or its method."""
    record = past.run_of(str(run))
    settings = record[1]["args"] if record else {}
    if not settings.get("init"):
        raise UserError(f"{run} is no run of train_ppo.py")
    start = past.run_of(settings["init"])
    if start is None:
        raise UserError(f"{run} started from {settings['init']}, which is no run folder: there is "
                        "no score before")  # fmt: skip
    metrics, steps = read_metrics(record[0])
    seconds = sum(row["seconds"] for row in steps)
    return {
        "name": words.method(settings) if by == "method" else settings["recipe"],
        "seed": settings["seed"],
        "commit": record[1]["info"].get("commit"),
        **before_and_after(start[0], record[0]),
        "steps": len(steps),
        "seconds": seconds,
        "step_seconds": median(row["seconds"] for row in steps),
        "tokens_per_s": sum(row.get("tokens", 0) for row in steps) / seconds,
        "peak_memory": max(row["peak_memory"] for row in steps),
        "curves": {key: words.points(metrics, key) for key in curves},
    }


def write_results(path: str | Path, **texts: str) -> None:
    """Write each text to the path with its name as the ending. UserError if that cannot be. Without
    a text it only makes the folder: call it so before long work."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        for ending, text in texts.items():
            files.replace_file(Path(f"{path}.{ending}"), text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error


def table(results: list[dict], by: str) -> str:
    lines = [f"| {by} | seed | before | after | points | fixed, broken | McNemar p | s a step "
             "| peak |", "|" + "---|" * 9]  # fmt: skip
    for r in results:
        lines.append(
            f"| {r['name']} | {r['seed']} | {100 * r['before']:.1f}% | {100 * r['after']:.1f}% "
            f"[{100 * r['ci_low']:.1f}, {100 * r['ci_high']:.1f}] "
            f"| {100 * (r['after'] - r['before']):+.1f} | {r['fixed']}, {r['broken']} "
            f"| {r['mcnemar_p']:.2g} | {r['step_seconds']:.1f} "
            f"| {r['peak_memory'] / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(__doc__)
    add = p.add_argument
    add("runs", nargs="+", type=Path, help="Run folders of train_ppo.py, evaluated.")
    add("--by", choices=("recipe", "method"), default="recipe", help="What names a run.")
    text = f"Panels of the picture, of {', '.join(CURVES)}. Default: {' '.join(USUAL)}."
    add("--curves", nargs="+", choices=CURVES, default=USUAL, metavar="METRIC", help=text)
    add("--out", default="runs/ppo", help="Path of the .json and the .svg, without the ending.")
    args = p.parse_args(argv)
    results = [collect(run, args.curves, args.by) for run in args.runs]
    print(table(results, args.by))
    panels = []
    for key in args.curves:
        lines = [(r["name"], r["curves"][key]) for r in results if r["curves"][key]]
        panels.append(charts.Panel(CURVES[key], lines, percent=key in SHARES, x="step"))
    names = [*dict.fromkeys(r["name"] for r in results)]
    text = "[\n" + ",\n".join(json.dumps(r) for r in results) + "\n]\n"
    write_results(args.out, json=text, svg=charts.page(panels, names))
    return 0


if __name__ == "__main__":
    console.entry(main)
