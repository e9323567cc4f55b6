"""A search for better settings of a training script. Optuna proposes them, this file tries them.

    pip install -r requirements-optional.txt
    python -m experiments.tune sft --tiny --trials 16       # or lora, or ppo; -> runs/tiny/tune-sft
    python -m experiments.tune lora --model PATH --space lr=5e-5:5e-4 lora_r=8,16
    python -m experiments.tune ppo --init runs/sft-1024     # trained with --val-examples 1024

A trial is an ordinary run of train_sft.py or train_ppo.py in a folder of its own. It pauses after a
quarter and after half of its steps. There Optuna's pruner compares it with all n trials that got so
far, itself included. It is kept if it is among the best floor(n / 2) of them, or the best of all. A
kept trial goes on from its checkpoint. So nothing is trained twice, and its learning rate follows
the schedule of the whole run from the first step on.

Trials are judged on training problems that are held out, never on the test split. The best of many
trials was also lucky on these problems. So half of what is held out is kept from the search, and
the winner is scored on it once.

The same command continues a search that was stopped or killed. Give it several times, on one
machine or on several that share the folder, and the processes work on one search. What they know
is in journal.log, and file locks show which trials are being worked on.
"""

import argparse
import math
import os
import re
import time
from pathlib import Path

import train_ppo
import train_sft
from experiments import tune_page
from experiments.study import refuse_torchrun, run
from experiments.tune_space import command_of, flags_of, prepare, schedule, space_of
from experiments.tune_study import alone, open_study, optuna, take
from nanogsm import UserError
from nanogsm.run import console, flags

# What is searched. A list has the values to choose from. A pair is a range on a logarithmic scale,
# in multiples of the recipe's value. "batch" is micro-batch x accumulation.
SFT = {"lr": (0.2, 5.0), "epochs": [1, 2, 3], "warmup": [0.0, 0.03, 0.1], "batch": [8, 16, 32, 64]}
SPACE = {
    "sft": SFT,
    "lora": SFT | {"lora_r": [8, 16, 64]},
    "ppo": {"lr": (0.2, 5.0), "value_lr": (0.1, 10.0), "kl_coef": (0.1, 50.0), "lam": [0.95, 1.0],
            "clip": [0.1, 0.2, 0.3], "batch": [32, 64, 128, 256], "epochs": [1, 2]},
}  # fmt: skip
DIVERGED = re.compile(r" at step \d+; problems \[")  # as loop.check_finite says it
OURS = {"--out", "--pause-at", "--val-use", "--overwrite", "--dry-run"}  # flags that we set


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser("Search for better settings. All other flags go to the training script.")
    add = p.add_argument
    # fmt: off
    add("method", choices=SPACE, help="sft and lora run train_sft.py, ppo runs train_ppo.py.")
    add("--trials", type=int, default=16, help="Trials in all. More of them continue a search.")
    add("--space", nargs="+", action="extend", metavar="NAME=VALUES",
        help="Search this range (lr=1e-6:1e-4) or these values (epochs=1,2) instead of the usual.")
    add("--out", help="The search's folder. Default: runs/tune-METHOD (tiny: runs/tiny/...).")
    add("--dry-run", action="store_true", help="Say what will be searched. Nothing is run.")
    # fmt: on
    args, args.flags = p.parse_known_args(argv)
    flags.check_numbers(args, {"trials": 1})
    if args.method == "sft" and "--lora" in args.flags:
        args.method = "lora"
    elif args.method == "lora":
        args.flags = ["--lora", *args.flags]
    args.named = {flag.split("=")[0] for flag in args.flags if flag.startswith("--")}
    if ours := sorted(args.named & OURS):
        raise UserError(f"{ours[0]} is set by the search itself: leave it out")
    script = train_ppo if args.method == "ppo" else train_sft
    args.usual = SPACE[args.method]
    args.script, args.run = f"{script.__name__}.py", script.parse_args(args.flags)
    args.out = Path(args.out or f"runs/{'tiny/' * args.run.tiny}tune-{args.method}")
    args.run.out, args.run.dry_run = str(args.out / "trial-000"), True
    args.space = space_of(args)
    for name, values in args.space.items():  # the script refuses what it cannot take
        for value in values:
            tried = flags_of(args, {name: value})
            try:
                script.parse_args([*args.flags, *tried])
            except UserError as error:
                raise UserError(f"--space must leave out {' '.join(tried)}: {error}") from error
    args.metric = "val_exact_match"
    if args.run.unscored:  # no answer is right or wrong
        args.metric = "val_reward" if args.method == "ppo" else "val_loss"
    return args


# -------------------------------------------------------------------------------------- the search


def attempt(study, trial, lock: int, args) -> int:
    """Run a trial to its end, or until it is pruned. Returns the status of a script that was
    stopped, else 0."""
    command, began = command_of(args, trial.number, trial.params), time.time()
    folder, why = Path(command[-1]), None
    seen = study.trials[trial.number].intermediate_values
    for i, rung in enumerate([*schedule(args, trial.params)[1], None]):
        if 2 ** (i + 1) in seen:
            continue  # it was kept here
        # The script inherits the lock and still holds it if this process is killed.
        pause = ["--pause-at", str(rung)] if rung else []
        status, said = run([*command, *pause], () if os.name == "nt" else (lock,))
        if status in (129, 130, 143):
            return status
        elsewhere = any(t.intermediate_values for t in study.trials)
        if DIVERGED.search(said) or elsewhere and said.startswith("out of memory"):
            why = said  # a result, and not a mistake in the command
            break
        if status:
            raise UserError(f"trial {trial.number} ended with status {status}: {said}")
        value = tune_page.score_of(folder, args.metric)
        if (folder / "summary.json").exists():
            break  # also before a rung, by --patience
        if 2**i not in seen:
            trial.report(value, 2**i)
        # (The pruner notes that it was asked. A trial whose process is killed just after that is
        # not judged here again, so it is kept.)
        if trial.should_prune():
            why = f"pruned at step {rung}"
            break
    with alone(args):
        if why or math.isnan(value):
            trial.set_user_attr("why", why or f"no {args.metric}")
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, value)
        tune_page.delete_losers(study, args)
        tune_page.write(study, args)
    end = why or f"{args.metric} {value:.4g}"
    print(f"trial {trial.number}: {end}, after {time.time() - began:.0f} seconds", flush=True)
    return 0


def score_winner(study, args) -> int:
    """Ask the winner the half of the held-out problems that the search has not looked at."""
    best = tune_page.best_of(study, args)
    if best is None:
        raise UserError(f"no trial came to its end: {args.out / 'tune.md'} says why")
    with alone(args, "winner"):
        status, said = 0, ""
        if args.metric == "val_exact_match" and not tune_page.last_score(best, args):
            same = ["--device", args.run.device, "--precision", args.run.precision]
            same += ["--max-new-tokens", str(args.run.max_new_tokens)]
            same += ["--data-dir", args.run.data_dir] * bool(args.run.data_dir)
            winner = ["--model", str(tune_page.folder_of(best, args)), "--split", "validation"]
            status, said = run(["evaluate.py", *winner, "--part", "2/2", *same])
    if status not in (0, 129, 130, 143):
        raise UserError(f"the winner cannot be scored: {said}")
    with alone(args):
        print(tune_page.write(study, args))
    return status


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if optuna is None and not args.dry_run:
        raise UserError("a search needs a package: pip install -r requirements-optional.txt")
    refuse_torchrun()
    prepare(args)
    if args.dry_run:
        return 0
    study, waiting = open_study(args), False
    while True:
        if found := take(study, args):
            try:
                status = attempt(study, *found, args)
            finally:
                os.close(found[1])
            if status:
                return status
        elif any(trial.state.name == "RUNNING" for trial in study.trials):
            if not waiting:
                print("waiting for trials of other processes, which Ctrl-C here does not stop")
            waiting = True
            time.sleep(1)
        else:
            return score_winner(study, args)


if __name__ == "__main__":
    console.entry(main)
