"""What PPO does to the embedded model: a table of test scores before and after, and the curves.

    for s in 0 1 2; do
        d=runs/tiny/curves-$s
        python train_sft.py --tiny --seed $s --recipe original --out $d/sft
        python evaluate.py --model $d/sft
        for r in original tuned; do
            python train_ppo.py --tiny --seed $s --recipe $r --init $d/sft --val-every 2 --out $d/$r
            python evaluate.py --model $d/$r
        done
    done
    python -m experiments.ppo_curves runs/tiny/curves-{0,1,2} --out results/tiny/ppo

The last command writes results/tiny/ppo.json (scores before and after, their exact paired test, the
curves) and results/tiny/ppo.svg (the curves).
"""

import json
from pathlib import Path

from nanogsm import UserError
from nanogsm.report import charts, eval_files, scores
from nanogsm.run import console, flags, past
from nanogsm.store import files

RECIPES = ("original", "tuned")
CURVES = {  # metric -> title of its panel
    "val_exact_match": "right, greedy, held-out problems",
    "reward": "right, sampled, training problems",
    "worked": "answers that show a calculation",
    "response_tokens": "length of an answer, tokens",
}


def read(path: Path) -> list[dict]:
    """The rows of a .jsonl file."""
    try:
        return files.json_lines(path)
    except UserError as error:
        commands = "the commands at the top of experiments/ppo_curves.py make it"
        raise UserError(f"{error}; {commands}") from error


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


def collect(folder: Path, recipe: str) -> dict:
    """Scores and curves of the run of a recipe in `folder`."""
    run = folder / recipe
    record = past.run_of(str(run))
    settings = record[1]["args"] if record else {}
    started = Path(str(settings.get("init"))).resolve() == (folder / "sft").resolve()
    if settings.get("recipe") != recipe or not started:
        raise UserError(f"{run} is not a run of --recipe {recipe} --init {folder / 'sft'}")
    rows = read(run / "metrics.jsonl")
    steps = [row for row in rows if "reward" in row]
    return {
        "recipe": recipe,
        "seed": settings["seed"],
        "commit": record[1]["info"].get("commit"),
        **before_and_after(answers(folder / "sft"), answers(run)),
        "seconds": sum(row["seconds"] for row in steps),
        "peak_memory": max(row["peak_memory"] for row in steps),
        "curves": {k: [(row["step"], row[k]) for row in rows if k in row] for k in CURVES},
    }


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("folders", nargs="+", type=Path, help="Folders with the runs sft, original and tuned.")
    add("--out", default="runs/ppo", help="Path of the .json and the .svg, without the ending.")
    args = p.parse_args(argv)
    results = [collect(folder, recipe) for recipe in RECIPES for folder in args.folders]
    print("| recipe | seed | before | after | points | fixed, broken | McNemar p | time | peak |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in results:
        print(
            f"| {r['recipe']} | {r['seed']} | {100 * r['before']:.1f}% | {100 * r['after']:.1f}% "
            f"[{100 * r['ci_low']:.1f}, {100 * r['ci_high']:.1f}] "
            f"| {100 * (r['after'] - r['before']):+.1f} | {r['fixed']}, {r['broken']} "
            f"| {r['mcnemar_p']:.2g} | {r['seconds'] / 60:.1f} min "
            f"| {r['peak_memory'] / 2**30:.2f} GiB |"
        )
    panels = []
    for key, title in CURVES.items():
        lines = [(r["recipe"], r["curves"][key]) for r in results]
        panels.append(charts.Panel(title, lines, percent=key != "response_tokens", x="step"))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(r) for r in results) + "\n]\n"
    files.replace_file(Path(f"{out}.json"), text.encode())
    files.replace_file(Path(f"{out}.svg"), charts.page(panels, ["tuned", "original"]).encode())
    return 0


if __name__ == "__main__":
    console.entry(main)
