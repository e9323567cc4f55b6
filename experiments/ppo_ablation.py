"""What each setting of PPO is worth: the recipes original and tuned, one setting changed at a time.

    python train_sft.py --tiny --recipe original
    python -m experiments.ppo_ablation --steps 5 --seeds 3 --out results/tiny/ppo-ablation.jsonl

Every row is a short run of PPO on the embedded model. All rows start from the same fine-tuned
model, which must be trained with the recipe original, as above. "original" and "tuned" are the
recipes as they are. "original, but ..." has one setting from tuned, and "tuned, but ..." has one
from original. Some rows change what no flag changes: they replace a function of train_ppo.py.

A row is judged by two numbers. The mean reward of all its rollouts also tells how soon the reward
rose. Exact match is measured after the last step, on problems held out of the training set.
Finished rows are in --out and are not run again, so the same command continues an ablation that was
stopped.
"""

import argparse
import contextlib
import io
import json
import math
import statistics
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

import train_ppo
from nanogsm.run import console, flags
from nanogsm.store import files

KNOBS = {  # the name of a row's setting -> its flags
    "gamma": ["gamma"],
    "lambda": ["lam"],
    "KL": ["kl_coef"],
    "learning rate": ["lr"],
    "value lr": ["value_lr"],
    "value loss weight": ["value_coef"],
    "entropy bonus": ["entropy_coef"],
    "answers an update": ["micro_batch", "accumulation"],
    "epochs": ["epochs"],
    "value clip": ["value_clip"],
}


def flags_of(recipe: str, names: list[str]) -> list[str]:
    """The flags that set `names` to their values in a recipe of the embedded model."""
    values, found = flags.recipe(flags.PPO, recipe, flags.PPO_TINY), []
    for name in names:
        value = values[name]
        full = value[0] if isinstance(value, tuple) else value  # a pair is (full, with --lora)
        found += [flags.flag_of(name), str(full)]
    return found


def rows() -> dict[str, tuple[list[str], contextlib.AbstractContextManager]]:
    """{row: (flags, patch of train_ppo)}."""
    nothing = contextlib.nullcontext()
    found = {}
    for recipe, other in (("original", "tuned"), ("tuned", "original")):
        start = ["--recipe", recipe]
        found[recipe] = start, nothing
        for knob, names in KNOBS.items():
            if flags_of(other, names) != flags_of(recipe, names):
                found[f"{recipe}, but {other}'s {knob}"] = start + flags_of(other, names), nothing
        for change, name, replacement in (
            ("whitened update by update", "update", whitened_by_update),
            ("bfloat16 weights", "update", rounded_after_update),
            ("a random value head", "build", random_value_head),
        ):
            found[f"{recipe}, but {change}"] = start, patch(f"train_ppo.{name}", replacement)
        warm_up = [*start, "--critic-warmup", "2"]
        found[f"{recipe}, but two steps of critic warm-up"] = warm_up, nothing
    tuned = ["--recipe", "tuned"]
    found["tuned, but not whitened"] = tuned, patch("train_ppo.whiten", lambda x, mask: x)
    found["tuned, but a separate critic"] = [*tuned, "--critic", "separate"], nothing
    return found


# ------------------------------------------------------------------------------- the replacements

real_update, real_build = train_ppo.update, train_ppo.build


def random_value_head(base, args):
    """The value head starts as PyTorch starts any linear layer, and not at zero."""
    models = real_build(base, args)
    torch.manual_seed(args.seed)
    models.value_head.reset_parameters()
    return models


def whitened_by_update(setup, rollout, advantages, returns, step):
    """Advantages have mean 0 and variance 1 in each update, and not in the whole rollout."""
    args, advantages = setup.args, advantages.clone()
    n = len(rollout.indices)
    for update in train_ppo.micro_batches_of(n, args.micro_batch, args.accumulation):
        rows = slice(update[0].start, update[-1].stop)
        advantages[rows] = train_ppo.whiten(advantages[rows], rollout.mask[rows])
    return real_update(setup, rollout, advantages, returns, step)


def rounded_after_update(setup, *rest):
    """Weights are rounded to bfloat16 after each step of the optimizer, so small steps are lost."""
    optimizer = setup.policy_optimizer
    step = optimizer.step

    def step_and_round(*given):
        step(*given)
        with torch.no_grad():
            for p in optimizer.params.values():
                p.copy_(p.bfloat16())

    with patch.object(optimizer, "step", step_and_round):
        return real_update(setup, *rest)


# ------------------------------------------------------------------------------ runs and the table


def run(row_flags: list[str], seed: int, args: argparse.Namespace, folder: str) -> dict:
    """Run one row with one seed. Returns what is kept of it."""
    argv = [
        *row_flags, "--tiny", "--init", args.init, "--seed", str(seed), "--steps", str(args.steps),
        "--rollouts", str(args.rollouts), "--val-every", "0", "--overwrite", "--out", folder,
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = train_ppo.main(argv)
    if status:
        print(printed.getvalue())
        raise SystemExit(status)
    metrics = files.json_lines(Path(folder) / "metrics.jsonl")
    steps = [row for row in metrics if "reward" in row]
    validations = [row for row in metrics if "val_exact_match" in row]
    return {
        "exact_match": validations[-1]["val_exact_match"],
        "mean_reward": statistics.fmean(row["reward"] for row in steps),
        "rewards": [row["reward"] for row in steps],
        "kl_sequence": steps[-1]["kl_sequence"],
        "explained_variance": steps[-1]["explained_variance"],
        "response_tokens": steps[-1]["response_tokens"],
        "seconds": sum(row["seconds"] for row in steps),
    }


def table(results: list[dict]) -> None:
    """Print means over seeds and differences from the row's recipe, with 95% intervals.

    A row and its recipe are paired by seed, which fixes the problems and their order. Three seeds
    say little about the spread of one row, so the spread is pooled over all rows of a recipe. Rows
    that change nothing at all are left out of it.
    """
    by_row = {}
    for r in results:
        by_row.setdefault(r["row"], {})[r["seed"]] = r

    def differences(row: str, key: str) -> list[float]:
        base = by_row.get(row.split(",")[0], {})
        return [r[key] - base[seed][key] for seed, r in by_row[row].items() if seed in base]

    def half_width(row: str, key: str) -> float:
        recipe = row.split(",")[0]
        alike = [differences(r, key) for r in by_row if r.startswith(f"{recipe}, ")]
        spreads = [statistics.variance(d) for d in alike if len(d) > 1 and any(d)]
        if not spreads:
            return math.nan
        return 1.96 * math.sqrt(statistics.fmean(spreads) / len(by_row[row]))

    def change(row: str, key: str, factor: int, digits: int) -> str:
        found = differences(row, key)
        if "," not in row or len(found) < 2:
            return ""
        if not any(found):
            return "the same"
        mean, half = factor * statistics.fmean(found), factor * half_width(row, key)
        return f"{mean:+.{digits}f} ± {half:.{digits}f}"

    print(
        "| row | held-out exact match | against its recipe | mean reward | against its recipe "
        "| KL, nats per answer | tokens |"
    )
    print("|---|---|---|---|---|---|---|")
    for row, seeds in by_row.items():
        mean = lambda key: statistics.fmean(r[key] for r in seeds.values())  # noqa: E731
        print(
            f"| {row} | {100 * mean('exact_match'):.1f} | {change(row, 'exact_match', 100, 1)} | "
            f"{mean('mean_reward'):.3f} | {change(row, 'mean_reward', 1, 3)} | "
            f"{mean('kl_sequence'):.1f} | {mean('response_tokens'):.0f} |"
        )


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(__doc__)
    add = p.add_argument
    add("--init", default="runs/tiny/sft-full-main", help="Run that all rows start from.")
    add("--steps", type=int, default=8, help="Steps of PPO in each row.")
    add("--rollouts", type=int, default=512, help="Answers sampled per step.")
    add("--seeds", type=int, default=3, help="Runs of each row, with seeds 0, 1, ...")
    add("--only", nargs="*", help="Run only the rows that contain one of these texts.")
    add("--out", default="runs/ppo-ablation.jsonl", help="File of finished rows, one per line.")
    args = p.parse_args(argv)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = files.json_lines(out) if out.exists() else []
    setting = {"init": args.init, "steps": args.steps, "rollouts": args.rollouts}
    results = [r for r in results if {k: r.get(k) for k in setting} == setting]
    done = {(r["row"], r["seed"]) for r in results}
    for seed in range(args.seeds):
        for row, (row_flags, patched) in rows().items():
            if (row, seed) in done or not any(text in row for text in args.only or [""]):
                continue
            with tempfile.TemporaryDirectory() as folder, patched:
                result = {"row": row, "seed": seed, **setting, **run(row_flags, seed, args, folder)}
            results.append(result)
            with open(out, "a") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{row}, seed {seed}: exact match {result['exact_match']:.3f}, mean reward "
                f"{result['mean_reward']:.3f}, {result['seconds']:.0f} s",
                flush=True,
            )
    table(results)
    return 0


if __name__ == "__main__":
    console.entry(main)
