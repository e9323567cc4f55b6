"""PPO, RLOO and GRPO on the embedded model, each at the best of the same three learning rates.

    python -m experiments.ppo_methods --results results/tiny/ppo-methods

First every method is trained with every rate, with seed 0. The rate with the best exact match on
the held-out training problems is its own, the lower one if two are equal. Then every method is
trained at its rate with three new seeds, each from a new fine-tuned start, and evaluated on the
test problems. No test problem is asked before. All runs sample the same number of answers.

All use the recipe tuned, whose other settings were chosen for PPO, and no KL penalty: GRPO would
scale its noise up (train_ppo.group_advantages). Runs are in --out. The same command continues a
comparison that was stopped: what is finished is not done again.

It writes three files: --results with .json (all numbers), .md (the tables) and .svg (exact match by
answers sampled).
"""

import argparse
import shlex
from pathlib import Path
from statistics import fmean

from experiments import ppo_curves, study
from nanogsm.report import charts
from nanogsm.run import console, flags
from nanogsm.store import files

METHODS = {"PPO": "gae", "RLOO": "rloo", "GRPO": "grpo"}
CURVES = {  # metric -> title of its panel
    "val_exact_match": "right, greedy, held-out, by answers sampled",
    "reward": "right, sampled, training, by answers sampled",
    "groups_without_spread": "groups whose answers all earned the same",
    "response_tokens": "length of an answer, tokens",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser(__doc__.split("\n")[0])
    add = p.add_argument
    add("--rates", type=float, nargs=3, default=[5e-5, 1.5e-4, 4.5e-4], metavar="LR",
        help="Learning rates that every method tries.")  # fmt: skip
    add("--seeds", type=int, default=3, help="New seeds: 1, 2, ...")
    add("--steps", type=int, default=20, help="Steps of every run.")
    add("--rollouts", type=int, default=512, help="Answers sampled per step.")
    add("--group", type=int, default=8, help="Answers to a problem, for RLOO and GRPO.")
    add("--n", type=int, default=1319, help="Test problems.")
    add("--sft", default="", metavar="FLAGS", help='More flags for train_sft.py, as --sft="...".')
    add("--out", type=Path, default=Path("runs/tiny/methods"), help="Folder of the runs.")
    add("--results", type=Path, help="Path of the results, without the ending. Default: methods in "
        "--out.")  # fmt: skip
    add("--dry-run", action="store_true", help="Print the commands. Nothing is run.")
    args = p.parse_args(argv)
    flags.check_numbers(args, {"seeds": 1, "steps": 1, "rollouts": 1, "group": 2, "n": 1})
    args.results = args.results or args.out / "methods"
    return args


def sft(seed: int, args) -> list[str]:
    return ["train_sft.py", "--tiny", "--recipe", "original", "--seed", str(seed),
            *shlex.split(args.sft), "--out", str(args.out / f"sft-{seed}")]  # fmt: skip


def folder(method: str, seed: int, rate: float, args) -> Path:
    return args.out / f"{METHODS[method]}-{rate:g}-{seed}"


def train(method: str, seed: int, rate: float, args) -> list[str]:
    """The command of one run. Nothing but its first line differs between the methods."""
    own = [] if method == "PPO" else ["--advantage", METHODS[method], "--group", str(args.group)]
    return ["train_ppo.py", *own, "--tiny", "--recipe", "tuned", "--kl-coef", "0",
            "--lr", f"{rate:g}", "--seed", str(seed), "--steps", str(args.steps),
            "--rollouts", str(args.rollouts), "--val-every", "2" if seed else "0",
            "--init", str(args.out / f"sft-{seed}"),
            "--out", str(folder(method, seed, rate, args))]  # fmt: skip


def evaluate(run: Path, args) -> list[str]:
    return ["evaluate.py", "--model", str(run), "--n", str(args.n)]


def do(command: list[str], args) -> None:
    """Run a command, unless what it makes is there. A training script checks that by itself."""
    if args.dry_run:
        print(f"python {shlex.join(command)}")
        return
    if command[0] == "evaluate.py" and list(Path(command[2]).glob(f"eval-test-{args.n}.json")):
        return
    study.run_or_raise(command)


def best_rate(found: dict[float, float]) -> float:
    """Of {rate: exact match}, the best; the lower of equals."""
    return max(sorted(found), key=found.__getitem__)


def search(args) -> dict[str, dict[float, float]]:
    """{method: {rate: exact match on held-out training problems}}."""
    do(sft(0, args), args)
    found = {method: {} for method in METHODS}
    for rate in args.rates:
        for method in METHODS:
            do(train(method, 0, rate, args), args)
            if not args.dry_run:
                summary = files.read_json(folder(method, 0, rate, args) / "summary.json")
                found[method][rate] = summary["val_exact_match"]
    return found


def collect(method: str, seed: int, rate: float, args) -> dict:
    """One run's scores, paired with its start's and with PPO's, and its curves."""
    run, start = folder(method, seed, rate, args), args.out / f"sft-{seed}"
    rows = ppo_curves.read(run / "metrics.jsonl")
    steps = [row for row in rows if "reward" in row]

    def curve(key: str) -> list[tuple[int, float]]:
        return [(row["step"] * args.rollouts, row[key]) for row in rows if key in row]

    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        **ppo_curves.before_and_after(ppo_curves.answers(start), ppo_curves.answers(run)),
        "seconds": sum(row["seconds"] for row in steps),
        "curves": {key: curve(key) for key in CURVES},
    }


def tables(searched: dict, results: list[dict], args) -> str:
    """The two tables, in Markdown."""
    rates = [f"{rate:g}" for rate in args.rates]
    lines = [f"| held-out exact match at rate | {' | '.join(rates)} |", "|---|" + "---|" * 3]
    for method, found in searched.items():
        cells = [f"{100 * found[rate]:.1f}%" for rate in args.rates]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    head = ("method", "rate", "seed", "start", "exact match", "95%", "against PPO",
            "fixed, broken", "McNemar p", "minutes")  # fmt: skip
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in results:
        against = "|  |  | "
        if pair := r.get("against_ppo"):
            points, p = 100 * (pair["after"] - pair["before"]), pair["mcnemar_p"]
            against = f"| {points:+.1f} | {pair['fixed']}, {pair['broken']} | {p:.2g}"
        lines.append(
            f"| {r['method']} | {r['rate']:g} | {r['seed']} | {100 * r['before']:.1f}% "
            f"| {100 * r['after']:.1f}% | {100 * r['ci_low']:.1f} to {100 * r['ci_high']:.1f} "
            f"{against} | {r['seconds'] / 60:.1f} |"
        )
    for method in METHODS:
        mine = [r for r in results if r["method"] == method]
        pairs = [r["against_ppo"] for r in mine if "against_ppo" in r]
        points = [100 * (pair["after"] - pair["before"]) for pair in pairs]
        change = f"{fmean(points):+.1f}" if points else ""
        before, after = (100 * fmean(r[key] for r in mine) for key in ("before", "after"))
        minutes = fmean(r["seconds"] for r in mine) / 60
        lines.append(f"| {method}, mean | {mine[0]['rate']:g} | | {before:.1f}% | {after:.1f}% | "
                     f"| {change} | | | {minutes:.1f} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    searched = search(args)
    # A dry run cannot know the rates: it shows the first.
    rates = {m: args.rates[0] if args.dry_run else best_rate(searched[m]) for m in METHODS}
    for seed in range(1, args.seeds + 1):
        do(sft(seed, args), args)
        do(evaluate(args.out / f"sft-{seed}", args), args)
        for method, rate in rates.items():
            do(train(method, seed, rate, args), args)
            do(evaluate(folder(method, seed, rate, args), args), args)
    if args.dry_run:
        return 0
    results = []
    for method, rate in rates.items():
        for seed in range(1, args.seeds + 1):
            result = collect(method, seed, rate, args)
            if method != "PPO":
                runs = (folder(m, seed, rates[m], args) for m in ("PPO", method))
                result["against_ppo"] = ppo_curves.before_and_after(*map(ppo_curves.answers, runs))
            results.append(result)
    settings = {key: getattr(args, key) for key in ("rates", "steps", "rollouts", "group", "n")}
    named = {m: {f"{rate:g}": x for rate, x in found.items()} for m, found in searched.items()}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "search": named, "runs": results}
    files.write_json(Path(f"{args.results}.json"), record)
    text = tables(searched, results, args)
    files.replace_file(Path(f"{args.results}.md"), text.encode())
    panels = [
        charts.Panel(title, [(r["method"], r["curves"][key]) for r in results if r["curves"][key]],
                     percent=key != "response_tokens")
        for key, title in CURVES.items()
    ]  # fmt: skip
    files.replace_file(Path(f"{args.results}.svg"), charts.page(panels, [*METHODS]).encode())
    print(f"\n{text}\nwritten to {args.results}.json, .md and .svg")
    return 0


if __name__ == "__main__":
    console.entry(main)
