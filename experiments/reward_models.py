"""Choosing among 8 answers by a critic, an outcome model and a process reward model, on tiny.

    python -m experiments.reward_models --results results/tiny/reward-models

For each of three seeds: full SFT, PPO from it, labels for the PPO model's own answers to training
problems (experiments/label.py), a process reward model and an outcome model from these labels
(train_prm.py), and 8 answers to each test problem. The three judges read the same answers. The
table has pass@1, maj@8 and, for each judge, best@8 and a vote in which an answer counts by its
value, with exact paired tests. It also has what a judge by chance would choose: one that gives
every different text a random value. That is less than pass@1 where the most frequent text is right.

Then --prefixes beginnings of answers are labelled again, with --k continuations as before and with
--many, from other random numbers: how far is a label from what it estimates?

Runs are in --out. The same command continues what was stopped. What was found with other settings
is found again. It writes --results with .json (all numbers) and .md (the tables).
"""

import functools
import math
import random
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch

from experiments import label, ppo_curves, study
from nanogsm import data
from nanogsm.model import load_model
from nanogsm.report import rerank
from nanogsm.report.scores import majority, paired_tests
from nanogsm.run import console, flags, past
from nanogsm.run.critic import find_critic
from nanogsm.store import files

# A judge: (folder of its run, how it reads an answer).
JUDGES = {
    "critic": ("ppo", "last"),
    "outcome model": ("orm", "last"),
    "PRM, last": ("prm", "last"),
    "PRM, least": ("prm", "least"),
}
VOTES = [f"vote, {judge}" for judge in JUDGES]  # maj@k in which an answer counts by its value
# What is compared with what. "first" is the first of the answers: its share right is pass@1.
PAIRS = [(judge, other) for judge in JUDGES for other in ("first", "maj")] + [
    *((vote, "maj") for vote in VOTES),
    ("PRM, last", "outcome model"), ("PRM, least", "outcome model"), ("PRM, last", "critic"),
    ("outcome model", "critic"),
]  # fmt: skip


def parse_args(argv: list[str] | None = None):
    p = flags.Parser(__doc__)
    add = p.add_argument
    add("--seeds", type=int, default=3, help="Seeds: 1, 2, ...")
    add("--n", type=int, default=study.TEST_PROBLEMS, help="Test problems.")
    add("--labelled", type=int, default=7217, help="Training problems whose answers are labelled. "
        "Default: all that are not held out, 7217.")  # fmt: skip
    add("--label-samples", type=int, default=4, help="Answers to each of these problems.")
    add("--k", type=int, default=4, help="Continuations that make a label.")
    add("--samples", type=int, default=8, help="Answers to each test problem.")
    add("--prefixes", type=int, default=100, help="Prefixes that are labelled again.")
    add("--many", type=int, default=256, help="Continuations of these.")
    for name in ("sft", "ppo", "prm"):
        add(f"--{name}", default="", metavar="FLAGS", help=f"More flags for train_{name}.py.")
    add("--out", type=Path, default=Path("runs/tiny/reward-models"), help="Folder of the runs.")
    add("--results", type=Path, help="Path of the results, without the ending. Default: "
        "reward-models in --out.")  # fmt: skip
    add("--dry-run", action="store_true", help="Print the commands. Nothing is run.")
    args = p.parse_args(argv)
    at_least = {"seeds": 1, "n": 1, "labelled": 20, "label_samples": 1, "k": 1, "samples": 2,
                "prefixes": 2, "many": 2}  # fmt: skip
    flags.check_numbers(args, at_least)
    args.n = min(args.n, study.TEST_PROBLEMS)  # as evaluate.py names its file
    args.results = args.results or args.out / "reward-models"
    for name in ("sft", "ppo", "prm"):
        study.words_of(args, name)  # refused here if its quotes are not closed
    return args


def commands(seed: int, args) -> list[list[str]]:
    """What makes the runs of a seed, in order. "label" is experiments/label.py."""
    place = lambda name: str(args.out / f"{name}-{seed}")  # noqa: E731
    more = {name: study.words_of(args, name) for name in ("sft", "ppo", "prm")}
    own, labels = ["--seed", str(seed)], f"{place('labels')}.jsonl"
    prm = ["train_prm.py", "--tiny", "--model", place("ppo"), "--data", labels, *own, *more["prm"]]
    return [
        ["train_sft.py", "--tiny", "--recipe", "original", *own, *more["sft"], "--out",
         place("sft")],
        ["train_ppo.py", "--tiny", *own, *more["ppo"], "--init", place("sft"), "--out",
         place("ppo")],
        ["label", place("ppo"), "--n", str(args.labelled), "--samples", str(args.label_samples),
         "--k", str(args.k), *own, "--out", labels],
        [*prm, "--out", place("prm")],
        [*prm, "--outcome", "--out", place("orm")],
        ["evaluate.py", place("ppo"), "--n", str(args.n), "--samples", str(args.samples),
         "--temperature", "1", "--out", place("answers")],
    ]  # fmt: skip


def do(command: list[str], args) -> None:
    """Run a command, unless what it makes is there. Those that train or label check it
    themselves."""
    if args.dry_run:
        script = ["-m", "experiments.label"] if command[0] == "label" else command[:1]
        print(f"python {shlex.join([*script, *command[1:]])}")
        return
    if command[0] == "label":
        label.main(command[1:])
        return
    if command[0] == "evaluate.py" and answers_file(Path(command[-1]), args):
        return
    study.run_or_raise(command)


def answers_file(folder: Path, args) -> Path | None:
    """The rows of the evaluation of --n problems in a folder."""
    found = [*folder.glob(f"eval-test-{args.n}-{args.samples}x-*.json")]
    return found[0].with_suffix(".jsonl") if found else None


# The settings that all numbers depend on. The noise depends on two more.
SETTINGS = ("n", "labelled", "label_samples", "k", "samples", "sft", "ppo", "prm")


def cached(path: Path, args, names: tuple[str, ...], make: Callable[[], dict]) -> dict:
    """What `make` returns, kept in a file together with these settings. It is made again if they
    differ."""
    settings = {name: getattr(args, name) for name in names}
    if not path.exists() or files.read_json(path).get("settings") != settings:
        files.write_json(path, {"settings": settings, "found": make()})
    return files.read_json(path)["found"]


# ------------------------------------------------------------------------------------- the judges


def groups_of(seed: int, args) -> list[list[dict]]:
    """The answers to each test problem."""
    rows = files.json_lines(answers_file(args.out / f"answers-{seed}", args))
    return [rows[i : i + args.samples] for i in range(0, len(rows), args.samples)]


def judge(seed: int, args) -> dict:
    """{what chooses: right or wrong for each test problem} of one seed."""
    groups = groups_of(seed, args)
    rows = [row for group in groups for row in group]
    right = {
        "first": [group[0]["correct"] for group in groups],
        "maj": [majority(group) for group in groups],
        "pass": [any(row["correct"] for row in group) for group in groups],
    }
    values, how = {}, SimpleNamespace(device="cpu", precision="fp32", batch_size=256)
    for name, (run, by) in JUDGES.items():
        if run not in values:  # a process reward model gives all steps, for both ways to read it
            how.rerank_by = by
            critic = find_critic(str(args.out / f"{run}-{seed}"))
            values[run] = rerank.values_of(critic, rows, how)
        for row, found in zip(rows, values[run]):
            row["value"] = rerank.one_value(found, by)
        best = [max(group, key=lambda row: row["value"]) for group in groups]
        right[name] = [row["correct"] for row in best]
        weights = [[max(0.0, row["value"]) for row in group] for group in groups]
        right[f"vote, {name}"] = [majority(*pair) for pair in zip(groups, weights)]
    return right


def by_chance(groups: list[list[dict]]) -> float:
    """What a judge is expected to get right that gives every different text a random value."""
    texts = [{row["completion"]: row["correct"] for row in group} for group in groups]
    return fmean(fmean(group.values()) for group in texts)


def result(seed: int, args) -> dict:
    """All numbers of one seed."""
    right = judge(seed, args)
    shares = {name: fmean(hits) for name, hits in right.items()}
    path = answers_file(args.out / f"answers-{seed}", args).with_suffix(".json")
    shares["sampled"] = files.read_json(path)["accuracy"]
    shares["chance"] = by_chance(groups_of(seed, args))
    return {"seed": seed, "shares": shares, "tests": paired_tests(right, PAIRS),
            "validated": validated(seed, args)}  # fmt: skip


def validated(seed: int, args) -> dict:
    """{run: the validation at its end} of the two reward models."""
    found = {}
    for run in ("prm", "orm"):
        summary = files.read_json(args.out / f"{run}-{seed}" / "summary.json")
        found[run] = {key: x for key, x in summary.items() if key.startswith("val_")}
    return found


# -------------------------------------------------------------------------------------- the noise


def noise(args) -> dict:
    """Labels of k continuations against labels of many, on prefixes of seed 1's answers."""
    run = str(args.out / "ppo-1")
    rows = files.json_lines(args.out / "labels-1.jsonl")
    prompt = past.prompt_of(run)
    model, tokenizer = load_model(run, torch.float32, merge=True)
    problems = {p.index: p for p in data.load_problems("tiny", "train")}
    prefixes = {}
    for row in rows:
        found = label.prefixes_of(tokenizer, prompt, row["question"], row["steps"])
        for so_far, ids in found:
            prefixes[row["index"], so_far] = ids, problems[row["index"]]
    chosen = random.Random(data.SUBSET_SEED).sample([*prefixes], min(args.prefixes, len(prefixes)))
    wanted = {key: prefixes[key] for key in chosen}
    sample = {"batch_size": 256, "temperature": 1.0}
    limit = past.answer_limit_of(run, "tiny")
    few, many = (
        label.shares(model, tokenizer, prompt, wanted, k, seed, limit, sample)
        for k, seed in ((args.k, 1_000_001), (args.many, 1_000_002))
    )
    values = [few[key] for key in chosen], [many[key] for key in chosen]
    return spread(*values, args.k, args.many)


def spread(few: list[float], many: list[float], k: int, m: int) -> dict:
    """How far labels of k continuations lie from those of m. `expected`: what chance alone would
    make of it, if each continuation were the throw of a coin of the prefix's own."""
    # p (1 - p) m / (m - 1) estimates the variance of a throw without bias.
    throws = fmean(p * (1 - p) for p in many) * m / (m - 1)
    gaps = [a - b for a, b in zip(few, many)]
    return {
        "k": k,
        "many": m,
        "prefixes": len(few),
        "mean_label": fmean(many),
        "root_mean_square": math.sqrt(fmean(gap**2 for gap in gaps)),
        "expected": math.sqrt(throws * (1 / k + 1 / m)),
        "bias": fmean(gaps),
        "other_side": fmean((a >= 0.5) != (b >= 0.5) for a, b in zip(few, many)),
        "labels": [few, many],
    }


# ------------------------------------------------------------------------------------- the tables


def tables(results: list[dict], found: dict, args) -> str:
    """The tables, in Markdown."""
    k, percent = args.samples, lambda x: f"{100 * x:.1f}%"  # noqa: E731
    head = ["seed", "pass@1", f"pass@{k}", f"maj@{k}",
            *(f"best@{k}, {name}" for name in ("chance", *JUDGES))]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    columns = ("sampled", "pass", "maj", "chance", *JUDGES)
    for r in results:
        cells = [percent(r["shares"][name]) for name in columns]
        lines.append(f"| {r['seed']} | {' | '.join(cells)} |")
    means = [percent(fmean(r["shares"][name] for r in results)) for name in columns]
    lines += [f"| mean | {' | '.join(means)} |", ""]
    lines += ["| | against | " + " | ".join(f"seed {r['seed']}" for r in results) + " | mean |",
              "|---|---|" + "---|" * (len(results) + 1)]  # fmt: skip
    for i, (of, against) in enumerate(PAIRS):
        tests = [r["tests"][i] for r in results]
        cells = [f"{t['points']:+.1f} ({t['fixed']}, {t['broken']}; p {t['p']:.2g})" for t in tests]
        name = {"first": "the first answer", "maj": f"maj@{k}"}.get(against, against)
        mean = fmean(t["points"] for t in tests)
        lines.append(f"| {of} | {name} | {' | '.join(cells)} | {mean:+.1f} |")
    keys = [*results[0]["validated"]["prm"]]
    lines += ["", f"| on held-out problems | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for run, name in (("prm", "PRM"), ("orm", "outcome model")):
        for r in results:
            cells = [r["validated"][run][key] for key in keys]
            shown = " | ".join("" if x is None else f"{x:.3f}" for x in cells)
            lines.append(f"| {name}, seed {r['seed']} | {shown} |")
    noise = (f"Labels of {found['k']} continuations against labels of {found['many']}, on "
             f"{found['prefixes']} prefixes: root mean square difference "
             f"{found['root_mean_square']:.3f} ({found['expected']:.3f} expected from chance "
             f"alone), mean difference {found['bias']:+.3f}, on the other side of 0.5: "
             f"{percent(found['other_side'])}.")  # fmt: skip
    lines += ["", *textwrap.wrap(noise, 100)]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    study.refuse_torchrun()
    if not args.dry_run:
        ppo_curves.write_results(args.results)  # no texts yet: is there a place?
    results = []
    for seed in range(1, args.seeds + 1):
        for command in commands(seed, args):
            do(command, args)
        if args.dry_run:
            continue
        known = args.out / f"result-{seed}-{args.n}.json"
        results.append(cached(known, args, SETTINGS, functools.partial(result, seed, args)))
    if args.dry_run:
        return 0
    more = (*SETTINGS, "prefixes", "many")
    found = cached(args.out / "noise.json", args, more, functools.partial(noise, args))
    text = tables(results, found, args)
    settings = {key: getattr(args, key) for key in ("seeds", *more)}
    record = {"settings": settings, "runs": results, "noise": found}
    numbers = files.to_json(record, indent=1).decode()
    ppo_curves.write_results(args.results, json=numbers, md=text)
    print(f"\n{text}\nwritten to {args.results}.json and .md")
    return 0


if __name__ == "__main__":
    console.entry(main)
