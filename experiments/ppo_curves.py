"""What PPO changed, run by run: a table of test scores before and after, and the curves.

    python -m experiments.ppo_curves runs/tiny/study-{1,2,3}/ppo{,-tuned} --out results/tiny/ppo

Give it run folders of train_ppo.py. The test problems must have been answered once by each run and
by the run it started from: evaluate.py does that, and experiments/study.py calls it. All runs with
the same recipe, or with --by method the same method, share a colour.

It writes --out with .json (scores before and after, their exact paired test, the curves) and .svg
(the curves), and prints the table.
"""

import json
from pathlib import Path

from nanogsm import UserError
from nanogsm.report import charts, eval_files, scores
from nanogsm.run import console, flags, past
from nanogsm.store import files

CURVES = {  # metric -> title of its panel
    "val_exact_match": "right, greedy, held-out problems",
    "reward": "right, sampled, training problems",
    "worked": "answers that show a calculation",
    "response_tokens": "length of an answer, tokens",
    "kl_sequence": "KL from the start, nats an answer",
    "entropy": "entropy of a token, nats",
    "explained_variance": "explained variance of the critic",
}
SHARES = ("val_exact_match", "reward", "worked")  # shown in percent
USUAL = ("val_exact_match", "reward", "worked", "response_tokens")


def read(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    try:
        return files.json_lines(path)
    except UserError as error:
        raise UserError(f"{error}; give a run folder of train_ppo.py") from error


def answers(run: Path) -> dict[int, dict]:
    """{problem: row} of a run's evaluation on the test split. It must have exactly one."""
    found = sorted(run.glob("eval-test-*.jsonl"))
    if len(found) != 1:
        raise UserError(
            f"{run} has {len(found)} evaluations, not 1: python evaluate.py --model {run}"
        )
    return scores.by_problem(*eval_files.read_rows(str(found[0])))


def before_and_after(before: dict[int, dict], after: dict[int, dict]) -> dict:
    """Exact match of both on the same problems, and the exact test of the difference."""
    if before.keys() != after.keys():
        raise UserError("the two evaluations are about different problems")
    pair, n = scores.paired(before, after), len(after)
    right = [sum(row["correct"] for row in rows.values()) for rows in (before, after)]
    low, high = scores.wilson(right[1], n)
    return {
        "n": n, "before": right[0] / n, "after": right[1] / n, "ci_low": low, "ci_high": high,
        "fixed": len(pair["fixed"]), "broken": len(pair["broken"]), "mcnemar_p": pair["p"],
    }  # fmt: skip


def collect(run: Path, curves: tuple[str, ...], by: str = "recipe") -> dict:
    """Scores, cost and curves of a run. Its name is its recipe or its method."""
    record = past.run_of(str(run))
    settings = record[1]["args"] if record else {}
    if "init" not in settings:
        raise UserError(f"{run} is no run of train_ppo.py")
    method = (settings.get("advantage") or "PPO").upper()
    rows = read(run / "metrics.jsonl")
    steps = [row for row in rows if "reward" in row]
    seconds = sum(row["seconds"] for row in steps)
    return {
        "name": method if by == "method" else settings["recipe"],
        "seed": settings["seed"],
        "commit": record[1]["info"].get("commit"),
        **before_and_after(answers(Path(settings["init"])), answers(run)),
        "steps": len(steps),
        "seconds": seconds,
        "tokens_per_s": sum(row.get("tokens", 0) for row in steps) / seconds,
        "peak_memory": max(row["peak_memory"] for row in steps),
        "curves": {key: [(row["step"], row[key]) for row in rows if key in row] for key in curves},
    }


def table(results: list[dict], by: str) -> str:
    lines = [f"| {by} | seed | before | after | points | fixed, broken | McNemar p | s a step "
             "| peak |", "|" + "---|" * 9]  # fmt: skip
    for r in results:
        lines.append(
            f"| {r['name']} | {r['seed']} | {100 * r['before']:.1f}% | {100 * r['after']:.1f}% "
            f"[{100 * r['ci_low']:.1f}, {100 * r['ci_high']:.1f}] "
            f"| {100 * (r['after'] - r['before']):+.1f} | {r['fixed']}, {r['broken']} "
            f"| {r['mcnemar_p']:.2g} | {r['seconds'] / r['steps']:.1f} "
            f"| {r['peak_memory'] / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(__doc__.split("\n")[0])
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
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(r) for r in results) + "\n]\n"
    files.replace_file(Path(f"{out}.json"), text.encode())
    names = [*dict.fromkeys(r["name"] for r in results)]
    files.replace_file(Path(f"{out}.svg"), charts.page(panels, names).encode())
    return 0


if __name__ == "__main__":
    console.entry(main)
