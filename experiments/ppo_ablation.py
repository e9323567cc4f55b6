"""What each setting of PPO is worth: from --recipe report to --recipe tuned, knob by knob, both ways.

    python train_sft.py --tiny
    python -m experiments.ppo_ablation --steps 5 --seeds 3 --out results/tiny/ppo-ablation.jsonl

Every row is a short run on the embedded model: "report" and "tuned" as they are, "report, but ..." with
one setting taken from tuned, "tuned, but ..." with one put back, and what no flag changes, done by
patching a function here. Judged by the mean reward of all rollouts, which also tells how soon it
rose, and by exact match on the slice held out of train after the last step. Finished rows are in
--out and are not run again: stop and go on at will.
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
from nanogsm.run import console

KNOBS = {
    "gamma": ["gamma"],
    "lambda": ["lam"],
    "KL": ["kl_coef"],
    "learning rate": ["lr"],
    "value lr": ["value_lr"],
    "value loss weight": ["value_coef"],
    "entropy bonus": ["entropy_coef"],
    "answers an update": ["accumulation"],
    "epochs": ["epochs"],
    "value clip": ["value_clip"],
}


def flags(recipe: str, names: list[str]) -> list[str]:
    values = train_ppo.TINY_RECIPES[recipe]
    pick = lambda value: value["full"] if isinstance(value, dict) else value  # noqa: E731
    return [text for n in names for text in (f"--{n.replace('_', '-')}", str(pick(values[n])))]


def rows() -> dict[str, tuple[list[str], contextlib.AbstractContextManager]]:
    """{row: (flags, patch)}."""
    nothing = contextlib.nullcontext()
    found = {}
    for recipe, other in (("report", "tuned"), ("tuned", "report")):
        start = ["--recipe", recipe]
        found[recipe] = start, nothing
        for knob, names in KNOBS.items():
            if flags(other, names) != flags(recipe, names):
                found[f"{recipe}, but {other}'s {knob}"] = start + flags(other, names), nothing
        for change, name, replacement in (
            ("whitened update by update", "update", whitened_by_update),
            ("bfloat16 weights", "update", rounded_after_update),
            ("a random value head", "build", random_head),
        ):
            found[f"{recipe}, but {change}"] = start, patch(f"train_ppo.{name}", replacement)
        found[f"{recipe}, but two steps of critic warm-up"] = [*start, "--critic-warmup", "2"], nothing
    tuned = ["--recipe", "tuned"]
    found["tuned, but not whitened"] = tuned, patch("train_ppo.whiten", lambda x, mask: x)
    found["tuned, but a separate critic"] = [*tuned, "--critic", "separate"], nothing
    return found


real_update, real_build = train_ppo.update, train_ppo.build


def random_head(base, args):
    """The value head as PyTorch starts any linear layer, not at zero."""
    models = real_build(base, args)
    torch.manual_seed(args.seed)
    models.head.reset_parameters()
    return models


def whitened_by_update(models, rollout, *rest):
    advantages = rollout.advantages.clone()
    for update in rollout.updates:
        part = slice(update[0].start, update[-1].stop)
        advantages[part] = train_ppo.whiten(advantages[part], rollout.mask[part])
    return real_update(models, rollout._replace(advantages=advantages), *rest)


def rounded_after_update(models, rollout, optimizers, *rest):
    """Weights that are bfloat16 between any two steps of the optimizer: the small steps get lost."""
    actor, _ = optimizers
    step = actor.step

    def step_and_round():
        step()
        with torch.no_grad():
            for p in actor.params.values():
                p.copy_(p.bfloat16())

    with patch.object(actor, "step", step_and_round):
        return real_update(models, rollout, optimizers, *rest)


def run(row_flags: list[str], seed: int, args: argparse.Namespace, folder: str) -> dict:
    argv = [*row_flags, "--tiny", "--init", args.init, "--seed", str(seed), "--steps", str(args.steps),
            "--rollouts", str(args.rollouts), "--val-every", "0", "--overwrite", "--out", folder]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = train_ppo.main(argv)
    if status:
        print(said.getvalue())
        raise SystemExit(status)
    steps = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps, held_out = [s for s in steps if "reward" in s], [s for s in steps if "val_exact_match" in s]
    return {
        "exact_match": held_out[-1]["val_exact_match"],
        "mean_reward": statistics.fmean(s["reward"] for s in steps),
        "rewards": [s["reward"] for s in steps],
        "kl_sequence": steps[-1]["kl_sequence"],
        "explained_variance": steps[-1]["explained_variance"],
        "response_tokens": steps[-1]["response_tokens"],
        "seconds": sum(s["seconds"] for s in steps),
    }


def table(results: list[dict]) -> None:
    """Means over seeds, and differences from the recipe a row varies, paired by seed (which fixes the
    problems and their order), with 95% intervals. Three seeds say little about a row's own spread,
    so it is pooled over a recipe's rows, those that change nothing at all aside."""
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
        return 1.96 * math.sqrt(statistics.fmean(spreads) / len(by_row[row])) if spreads else math.nan

    def change(row: str, key: str, factor: int, digits: int) -> str:
        found = differences(row, key)
        if "," not in row or len(found) < 2:
            return ""
        if not any(found):
            return "the same"
        return (f"{factor * statistics.fmean(found):+.{digits}f} ± "
                f"{factor * half_width(row, key):.{digits}f}")  # fmt: skip

    print("| row | held-out exact match | against its recipe | mean reward | against it "
          "| KL, nats an answer | tokens |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for row, seeds in by_row.items():
        mean = lambda key: statistics.fmean(r[key] for r in seeds.values())  # noqa: E731
        print(f"| {row} | {100 * mean('exact_match'):.1f} | {change(row, 'exact_match', 100, 1)} | "
              f"{mean('mean_reward'):.3f} | {change(row, 'mean_reward', 1, 3)} | "
              f"{mean('kl_sequence'):.1f} | {mean('response_tokens'):.0f} |")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    p = console.Parser(__doc__.split("\n")[0])
    p.add_argument("--init", default="runs/tiny/sft-full-main", help="the run all rows start from")
    p.add_argument("--steps", type=int, default=8, help="of PPO a row")
    p.add_argument("--rollouts", type=int, default=512, help="answers a step")
    p.add_argument("--seeds", type=int, default=3, help="runs a row")
    p.add_argument("--only", nargs="*", default=[""], help="rows that contain one of these texts")
    p.add_argument("--out", default="runs/ppo-ablation.jsonl", help="finished rows, one a line")
    args = p.parse_args(argv)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    setting = {"init": args.init, "steps": args.steps, "rollouts": args.rollouts}
    results = [r for r in results if {k: r.get(k) for k in setting} == setting]
    done = {(r["row"], r["seed"]) for r in results}
    for seed in range(args.seeds):
        for row, (row_flags, patched) in rows().items():
            if (row, seed) in done or not any(text in row for text in args.only):
                continue
            with tempfile.TemporaryDirectory() as folder, patched:
                result = {"row": row, "seed": seed, **setting, **run(row_flags, seed, args, folder)}
            results.append(result)
            with open(out, "a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{row}, seed {seed}: exact match {result['exact_match']:.3f}, mean reward "
                  f"{result['mean_reward']:.3f}, {result['seconds']:.0f} s", flush=True)  # fmt: skip
    table(results)
    return 0


if __name__ == "__main__":
    console.entry(main)
