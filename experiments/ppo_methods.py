"""PPO, RLOO and GRPO on the embedded model, or PPO with each term of the reward.

    python -m experiments.ppo_methods --results results/tiny/ppo-methods
    python -m experiments.ppo_methods terms --results results/tiny/ppo-terms

Every variant has a few settings to choose from: the methods the same learning rates, the terms the
same weights. First every variant is trained with every setting, with seed 0. The setting with the
best exact match on the held-out training problems is its own, the lower one if two are equal. Then
every variant is trained with its setting and three new seeds, each from a new fine-tuned start, and
evaluated on the test problems. No test problem is asked before. All runs sample the same number of
answers.

All use PPO's recipe tuned, whose other settings were chosen for PPO, and a start trained by
`original`. The methods have no KL penalty: GRPO would scale its noise up
(train_ppo.group_advantages). Runs are in --out. The same command continues a comparison that was
stopped: what is finished is not done again.

It writes three files: --results with .json (all numbers), .md (the tables) and .svg (exact match by
answers sampled).
"""

import argparse
import shlex
from pathlib import Path
from statistics import fmean

from experiments import ppo_curves, study
from nanogsm import UserError
from nanogsm.report import charts, words
from nanogsm.rewards import MOST
from nanogsm.run import console, flags
from nanogsm.store import files

TERMS = {"false annotation": "false", "no answer": "no-answer", "overlong": "overlong"}
CURVES = {  # metric -> title of its panel
    "val_exact_match": "right, greedy, held-out, by answers sampled",
    "exact_match": "right, sampled, training, by answers sampled",
    "groups_without_spread": "groups whose answers all earned the same",
    "worked": "answers that show a calculation",
    "response_tokens": "length of an answer, tokens",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser(__doc__)
    add = p.add_argument
    add("what", nargs="?", choices=("methods", "terms"), default="methods", help="What to compare.")
    add("--rates", type=float, nargs="+", default=[5e-5, 1.5e-4, 4.5e-4], metavar="LR",
        help="Learning rates that every method tries. Give it after `terms`.")  # fmt: skip
    add("--weights", type=float, nargs="+", default=[0.1, 0.3, 0.9], metavar="W",
        help="Weights that every term tries.")  # fmt: skip
    add("--seeds", type=int, default=3, help="New seeds: 1, 2, ...")
    add("--steps", type=int, default=20, help="Steps of every run.")
    add("--rollouts", type=int, default=512, help="Answers sampled per step.")
    add("--group", type=int, default=8, help="Answers to a problem, for RLOO and GRPO.")
    add("--n", type=int, default=study.TEST_PROBLEMS, help="Test problems.")
    add("--sft", default="", metavar="FLAGS", help='More flags for train_sft.py, as --sft="...".')
    add("--out", type=Path, help="Folder of the runs. Default: runs/tiny/methods or .../terms.")
    add("--results", type=Path, help="Path of the results, without the ending. Default: methods or "
        "terms in --out.")  # fmt: skip
    add("--dry-run", action="store_true", help="Print the commands. Nothing is run.")
    args = p.parse_args(argv)
    flags.check_numbers(args, {"seeds": 1, "steps": 1, "rollouts": 1, "group": 2, "n": 1})
    check_settings(args)
    args.n = min(args.n, study.TEST_PROBLEMS)  # as evaluate.py names its file
    args.out = args.out or Path("runs/tiny") / args.what
    args.results = args.results or args.out / args.what
    study.words_of(args, "sft")  # refused here if its quotes are not closed
    return args


def check_settings(args) -> None:
    """UserError for what a training script would refuse after others have run."""
    if args.what == "methods" and args.rollouts % args.group:
        raise UserError(f"--rollouts {args.rollouts} is no multiple of --group {args.group}")
    for flag, values, most in (("--rates", args.rates, 1e30), ("--weights", args.weights, MOST)):
        shown = [f"{value:g}" for value in values]  # as they are named in folders and tables
        if not all(0 < value <= most for value in values):
            raise UserError(f"{flag} {' '.join(shown)}: give numbers above 0, at most {most:g}")
        if len(set(shown)) < len(shown):
            raise UserError(f"{flag} {' '.join(shown)}: two of the values are the same")


def sft(seed: int, args) -> list[str]:
    return ["train_sft.py", "--tiny", "--recipe", "original", "--seed", str(seed),
            *study.words_of(args, "sft"), "--out", str(args.out / f"sft-{seed}")]  # fmt: skip


def variants(args) -> dict[str, dict[str, list[str]]]:
    """{variant: {setting: flags of train_ppo.py}}. The others are compared with the first one."""
    if args.what == "terms":
        each = {
            term: {f"{w:g}": [f"--penalty-{flag}", f"{w:g}"] for w in sorted(args.weights)}
            for term, flag in TERMS.items()
        }
        return {"no term": {"0": []}} | each
    rates = {f"{rate:g}": ["--kl-coef", "0", "--lr", f"{rate:g}"] for rate in sorted(args.rates)}
    found = {"PPO": rates}
    for method in ("rloo", "grpo"):
        own = ["--advantage", method, "--group", str(args.group)]
        found[method.upper()] = {rate: own + same for rate, same in rates.items()}
    return found


def folder(variant: str, setting: str, seed: int, args) -> Path:
    return args.out / f"{variant.lower().replace(' ', '-')}-{setting}-{seed}"


def train(variant: str, setting: str, seed: int, args) -> list[str]:
    """The command of one run."""
    own = variants(args)[variant][setting]
    return ["train_ppo.py", *own, "--tiny", "--recipe", "tuned", "--seed", str(seed),
            "--steps", str(args.steps), "--rollouts", str(args.rollouts),
            "--val-every", "2" if seed else "0", "--init", str(args.out / f"sft-{seed}"),
            "--out", str(folder(variant, setting, seed, args))]  # fmt: skip


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


def best_setting(found: dict[str, float]) -> str:
    """Of {setting: exact match}, the best; the lower of equals."""
    return max(sorted(found, key=float), key=found.__getitem__)


def search(args) -> dict[str, dict[str, float]]:
    """{variant: {setting: exact match on held-out training problems}}."""
    do(sft(0, args), args)
    found = {}
    for variant, settings in variants(args).items():
        found[variant] = {}
        for setting in settings:
            do(train(variant, setting, 0, args), args)
            if not args.dry_run:
                summary = files.read_json(folder(variant, setting, 0, args) / "summary.json")
                found[variant][setting] = summary["val_exact_match"]
    return found


def collect(variant: str, setting: str, seed: int, args) -> dict:
    """One run's scores, paired with its start's, and its curves."""
    run, start = folder(variant, setting, seed, args), args.out / f"sft-{seed}"
    rows, steps = ppo_curves.read_metrics(run)

    def curve(key: str) -> list[tuple[int, float]]:
        return [(step * args.rollouts, value) for step, value in words.points(rows, key)]

    return {
        "variant": variant,
        "setting": setting,
        "seed": seed,
        **ppo_curves.before_and_after(start, run, f"eval-test-{args.n}.jsonl"),
        "seconds": sum(row["seconds"] for row in steps),
        # The mean of the last quarter of the steps: each term of the reward, and what it acts on.
        "last": {
            key: fmean(row[key] for row in steps[-max(1, len(steps) // 4) :])
            for key in steps[-1]
            if key in ("worked", "truncated", "response_tokens") or key.startswith("reward_")
        },
        "curves": {key: curve(key) for key in CURVES},
    }


def tables(searched: dict, results: list[dict], args) -> str:
    """The three tables, in Markdown: the search, the new seeds, what the answers are like."""
    setting = "rate" if args.what == "methods" else "weight"
    tried = sorted({name for found in searched.values() for name in found}, key=float)
    lines = [f"| held-out exact match at {setting} | {' | '.join(tried)} |"]
    lines.append("|---|" + "---|" * len(tried))
    for variant, found in searched.items():
        cells = [f"{100 * found[name]:.1f}%" if name in found else "" for name in tried]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    first = [*searched][0]
    head = (args.what[:-1], setting, "seed", "start", "exact match", "95%", f"against {first}",
            "fixed, broken", "McNemar p", "minutes")  # fmt: skip
    lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in results:
        against = "|  |  | "
        if pair := r.get("against_first"):
            points, p = 100 * (pair["after"] - pair["before"]), pair["mcnemar_p"]
            against = f"| {points:+.1f} | {pair['fixed']}, {pair['broken']} | {p:.2g}"
        lines.append(
            f"| {r['variant']} | {r['setting']} | {r['seed']} | {100 * r['before']:.1f}% "
            f"| {100 * r['after']:.1f}% | {100 * r['ci_low']:.1f} to {100 * r['ci_high']:.1f} "
            f"{against} | {r['seconds'] / 60:.1f} |"
        )
    for variant in searched:
        mine = [r for r in results if r["variant"] == variant]
        pairs = [r["against_first"] for r in mine if "against_first" in r]
        points = [100 * (pair["after"] - pair["before"]) for pair in pairs]
        change = f"{fmean(points):+.1f}" if points else ""
        before, after = (100 * fmean(r[key] for r in mine) for key in ("before", "after"))
        minutes = fmean(r["seconds"] for r in mine) / 60
        lines.append(f"| {variant}, mean | {mine[0]['setting']} | | {before:.1f}% | {after:.1f}% | "
                     f"| {change} | | | {minutes:.1f} |")  # fmt: skip
    keys = sorted({key for r in results for key in r["last"]})
    lines += ["", f"| sampled answers of the last steps | {' | '.join(keys)} |"]
    lines.append("|---|" + "---|" * len(keys))
    for variant in searched:
        last = [r["last"] for r in results if r["variant"] == variant]
        cells = [f"{fmean(row[key] for row in last):.3f}" if key in last[0] else "" for key in keys]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    study.refuse_torchrun()
    if not args.dry_run:
        ppo_curves.write_results(args.results)  # no texts yet: is there a place?
    searched = search(args)
    # A dry run cannot know the best settings: it shows the lowest.
    best = {
        variant: [*settings][0] if args.dry_run else best_setting(searched[variant])
        for variant, settings in variants(args).items()
    }
    for seed in range(1, args.seeds + 1):
        do(sft(seed, args), args)
        do(evaluate(args.out / f"sft-{seed}", args), args)
        for variant, setting in best.items():
            do(train(variant, setting, seed, args), args)
            do(evaluate(folder(variant, setting, seed, args), args), args)
    if args.dry_run:
        return 0
    results, first = [], [*best][0]
    for variant, setting in best.items():
        for seed in range(1, args.seeds + 1):
            result = collect(variant, setting, seed, args)
            if variant != first:
                runs = (folder(name, best[name], seed, args) for name in (first, variant))
                result["against_first"] = ppo_curves.before_and_after(
                    *runs, f"eval-test-{args.n}.jsonl"
                )
            results.append(result)
    names = ("what", "rates", "weights", "steps", "rollouts", "group", "n")
    settings = {name: getattr(args, name) for name in names}
    record = {"settings": settings, "search": searched, "runs": results}
    text = tables(searched, results, args)
    panels = [
        charts.Panel(title, [(r["variant"], r["curves"][key]) for r in results if r["curves"][key]],
                     percent=key != "response_tokens")
        for key, title in CURVES.items()
        if any(r["curves"][key] for r in results)
    ]  # fmt: skip
    picture, numbers = charts.page(panels, [*best]), files.to_json(record, indent=1).decode()
    ppo_curves.write_results(args.results, json=numbers, md=text, svg=picture)
    print(f"\n{text}\nwritten to {args.results}.json, .md and .svg")
    return 0


if __name__ == "__main__":
    console.entry(main)
