"""The report's whole study, and ours beside it, in one command: train, evaluate, compare, tabulate.

    python -m experiments.study --tiny         # the embedded model: a quarter of an hour on one core
    python -m experiments.study                # google/gemma-2b-it on GSM8K, one GPU
    python -m experiments.study --model PATH --sft="--max-examples 1024" --rows untuned full-main

Each row is an ordinary run of train_sft.py or train_ppo.py and an evaluation of it, in a folder of its
own; the commands are printed as they start, and --dry-run prints them all. What is finished is not
done again, so the same command goes on with a study that was stopped. A row that cannot be run (gated
weights, a data file that is not to be had) says why, and the others go on.

Writes study.md, the table, study.json, all figures, and report.html, curves and answers, to the study's
folder. No row is chosen by its score on the test split: the settings of "tuned" were found on problems
held out of train.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from nanogsm import UserError
from nanogsm.report import page
from nanogsm.report.scores import KINDS, by_problem, kind_of, paired, read_rows
from nanogsm.run import console
from nanogsm.store import files

HERE = Path(__file__).parents[1]


class Row(NamedTuple):
    name: str  # and its folder's
    title: str
    script: str | None  # that trains it; None: the untuned model
    flags: str  # of the script, or of the untuned model's evaluation
    against: str | None  # the row it is compared with, problem by problem
    report: float | None = None  # what the report found for gemma-2b-it on 256 test problems, percent


ROWS = [
    Row("untuned", "untuned, one-shot + instruction", None, "--shots 1 --instruction", None, 6.0),
    Row("untuned-one-shot", "untuned, one-shot", None, "--shots 1 --no-instruction", "untuned"),
    Row("untuned-instruction", "untuned, instruction", None, "--shots 0 --instruction", "untuned"),
    Row("untuned-plain", "untuned, the question alone", None, "--shots 0 --no-instruction", "untuned"),
    Row("full-main", "full SFT, main", "train_sft.py", "", "untuned", 31.0),
    Row("full-socratic", "full SFT, socratic", "train_sft.py", "--data socratic", "full-main", 23.0),
    Row("lora-main", "LoRA, main", "train_sft.py", "--lora", "full-main", 20.0),
    Row("lora-socratic", "LoRA, socratic", "train_sft.py", "--lora --data socratic", "lora-main", 11.0),
    Row("ppo", "PPO from full SFT, main", "train_ppo.py", "", "full-main", 28.0),
    Row("full-tuned", "full SFT, main, tuned", "train_sft.py", "--recipe tuned", "full-main"),
    Row("lora-tuned", "LoRA, main, tuned", "train_sft.py", "--lora --recipe tuned", "lora-main"),
    Row("ppo-tuned", "PPO from full SFT, main, tuned", "train_ppo.py", "--recipe tuned", "full-main"),
]
BY_NAME = {row.name: row for row in ROWS}
START = "full-main"  # of PPO
PROBED = ("untuned", "full-main", "ppo", "ppo-tuned")  # which answer five more problems, to be read


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = console.Parser("The report's study, and ours, in one command.")
    console.add_tiny_flag(p)
    p.add_argument("--model", default="google/gemma-2b-it", help="Hub id or folder; --tiny: the embedded one")
    console.add_data_dir_flag(p)
    p.add_argument("--n", type=int, help="test problems (256, as the report; tiny 1319: all)")
    p.add_argument("--seed", type=int, default=0, help="of all training")
    p.add_argument("--rows", nargs="+", choices=BY_NAME, metavar="ROW", help=f"only {', '.join(BY_NAME)}")
    p.add_argument("--sft", default="", metavar="FLAGS", help='more flags for train_sft.py, as --sft="..."')
    p.add_argument("--sft-lora", default="", metavar="FLAGS", help="... in its LoRA rows alone")
    p.add_argument("--ppo", default="", metavar="FLAGS", help="... for train_ppo.py")
    p.add_argument("--eval", default="", metavar="FLAGS", help="... for evaluate.py, where a row has "
                   "not been evaluated yet")  # fmt: skip
    p.add_argument("--out", help="the study's folder (runs/study-SEED; runs/tiny/study-SEED)")
    p.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    console.add_compute_flags(p)
    args = p.parse_args(argv)
    console.check_numbers(args, {"n": 1, "seed": 0})
    for name in ("sft", "sft_lora", "ppo", "eval"):
        try:
            setattr(args, name, shlex.split(getattr(args, name)))
        except ValueError as error:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}={getattr(args, name)!r}: {error}") from error
    if any(flag.startswith("--sa") for flag in args.eval):
        raise UserError("--eval: a study compares single answers: leave out --samples")
    args.n = args.n or (1319 if args.tiny else 256)
    args.out = Path(args.out or f"runs/{'tiny/' * args.tiny}study-{args.seed}")
    return args


def commands(row: Row, args: argparse.Namespace) -> list[list[str]]:
    """What to run for a row: the training, if any, the evaluation, and the probes where they are asked."""
    machine = [["--device", args.device], ["--precision", args.precision], ["--data-dir", args.data_dir]]
    machine = [word for pair in machine if pair[1] not in ("auto", None) for word in pair]
    tiny, model = ["--tiny"] * args.tiny, [] if args.tiny else ["--model", args.model]
    folder, flags = str(args.out / row.name), row.flags.split()
    judge = [*machine, *args.eval]
    test = ["--n", str(args.n)]
    probes = ["--data", os.path.relpath(HERE / "nanogsm" / ("tiny" if args.tiny else "") / "probes.jsonl")]
    tested = (test, probes) if row.name in PROBED else (test,)
    if row.script is None:
        asked = ["evaluate.py", *tiny, *model, *flags]
        return [[*asked, *these, *judge, "--out", folder] for these in tested]
    if row.script == "train_sft.py":
        start, more = model, args.sft + args.sft_lora * ("--lora" in flags)
    else:
        start, more = ["--init", str(args.out / START)], args.ppo
    flags += ["--seed", str(args.seed), *machine, *more]
    asked = ["evaluate.py", *tiny, "--model", folder]
    return [
        [row.script, *tiny, *start, *flags, "--out", folder],
        *[[*asked, *these, *judge] for these in tested],
    ]


def evaluation(row: Row, args: argparse.Namespace, kind: str = "test") -> Path | None:
    """The newest evaluation of a row, its .json, on args.n test problems or the probes; None if there
    is none."""
    name = f"eval-test-{args.n}" if kind == "test" else "eval-probes"
    there = (args.out / row.name).glob("eval-*.json")
    found = [file for file in there if f"{file.stem}-".startswith(f"{name}-")]  # eval-test-1319 is not of 131
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def run(command: list[str]) -> tuple[int, str]:
    """(status, last line on stderr) of one of our scripts, whose output is shown as it comes. Ctrl-C
    reaches the script by itself, which saves and stops; SIGTERM is passed on."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    script = [sys.executable, str(HERE / command[0]), *command[1:]]
    process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True)
    ways = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}
    before = {number: signal.signal(number, way) for number, way in ways.items()}
    last = ""
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        last = line.strip() or last
    status = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return status, last.removeprefix("error: ")


# ------------------------------------------------------------------------------------ the figures


def training_figures(folder: Path) -> dict:
    """Minutes, memory, speed and losses from a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [row for row in rows if "seconds" in row]
    seconds = sum(row["seconds"] for row in steps)
    end = steps[-max(1, len(steps) // 10) :]  # the last tenth
    found = {
        "steps": len(steps),
        "minutes": seconds / 60,
        "tokens_per_s": sum(row["tokens"] for row in steps) / seconds,
        "peak_memory": max(row["peak_memory"] for row in steps),
    }
    for name in ("loss", "reward", "kl_sequence", "explained_variance"):
        values = [row[name] for row in end if row.get(name) is not None]
        found |= {name: fmean(values)} if values else {}
    for name in ("val_loss", "val_exact_match"):
        values = [row[name] for row in rows if name in row]
        found |= {name: values[-1]} if values else {}
    return found


def answers(evaluation: Path) -> dict[int, dict]:
    """Problem -> row, beside the figures in `evaluation`."""
    return by_problem(*read_rows(str(evaluation.with_suffix(".jsonl"))))


def figures(args: argparse.Namespace, failed: dict[str, str]) -> list[dict]:
    """Of every row, done or not, in the study's order."""
    found = []
    for row in ROWS:
        f = {"row": row.name, "title": row.title, "seed": args.seed, "report": row.report,
             "commands": [shlex.join(["python", *c]) for c in commands(row, args)]}  # fmt: skip
        path = evaluation(row, args)
        if row.name in failed or path is None:
            found.append(f | {"not_run": failed.get(row.name, "left out")})
            continue
        judged = files.read_json(path)
        keep = ("n", "correct", "accuracy", "ci_low", "ci_high", "flexible_accuracy", "formatted",
                "truncated", "mean_tokens", "seconds")  # fmt: skip
        f |= {key: judged[key] for key in keep} | {"environment": judged["environment"]}
        kinds = [kind_of(r) for r in answers(path).values()]
        f["kinds"] = {kind: kinds.count(kind) for kind in KINDS}
        if row.script:
            f["training"] = training_figures(args.out / row.name)
        other = BY_NAME[row.against] if row.against else None
        if other and other.name not in failed and (theirs := evaluation(other, args)):
            pair = paired(answers(theirs), answers(path))
            f |= {"against": other.name, "points": pair["points"], "p": pair["p"],
                  "fixed": len(pair["fixed"]), "broken": len(pair["broken"])}  # fmt: skip
        found.append(f)
    return found


def table(rows: list[dict]) -> str:
    """The study as a Markdown table."""
    lines = [
        "| | report | exact match | 95% | against | points | p | in format | cut | tokens "
        "| training loss | minutes | tokens/s | peak |",
        "|" + "---|" * 14,
    ]
    for f in rows:
        report = f"{f['report']:.1f}%" if f["report"] is not None else ""
        if "not_run" in f:
            lines.append(f"| {f['title']} | {report} | not run: {f['not_run']} |" + " |" * 11)
            continue
        against = ["", "", ""]
        if "points" in f:
            against = [BY_NAME[f["against"]].title, f"{f['points']:+.1f}", f"{f['p']:.2g}"]
        t = f.get("training")
        trained = ["", "", "", ""]
        if t:
            loss = f"{t['loss']:.3f}" if "loss" in t else f"reward {t['reward']:.3f}"
            trained = [loss, f"{t['minutes']:.1f}", f"{t['tokens_per_s']:,.0f}",
                       f"{t['peak_memory'] / 2**30:.2f} GiB"]  # fmt: skip
        cells = [
            f["title"], report, f"{100 * f['accuracy']:.1f}%",
            f"{100 * f['ci_low']:.1f} to {100 * f['ci_high']:.1f}", *against, f"{100 * f['formatted']:.0f}%",
            f"{100 * f['truncated']:.0f}%", f"{f['mean_tokens']:.0f}", *trained,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    chosen = [row for row in ROWS if args.rows is None or row.name in args.rows]
    failed: dict[str, str] = {}
    if not args.dry_run:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{args.out} cannot be the study's folder: {error.strerror}") from error
    for row in chosen:
        needs_start = row.script == "train_ppo.py" and not args.dry_run
        if needs_start and not (args.out / START / "summary.json").exists():
            failed[row.name] = f"needs {START}"
            continue
        for command in commands(row, args):
            if args.dry_run:
                print(f"python {shlex.join(command)}")
                continue
            kind = "probes" if "--data" in command else "test"
            if command[0] == "evaluate.py" and evaluation(row, args, kind):
                continue
            status, said = run(command)
            if status in (130, 143):
                return status
            if status == 2:
                failed[row.name] = said
                break
            if status:
                raise UserError(f"row {row.name} ended with status {status}: {said}")
    if args.dry_run:
        return 0
    rows = figures(args, failed)
    files.write_json(args.out / "study.json", {"environment": console.environment(), "rows": rows})
    files.replace_file(args.out / "study.md", table(rows).encode())
    print(f"\n{table(rows)}\nwritten to {args.out / 'study.md'}, study.json")
    stages = [args.out / f["row"] for f in rows if "not_run" not in f and f["row"] in PROBED]
    if stages:
        page.main([*map(str, stages), "--out", str(args.out / "report.html")])
    for name, why in failed.items():
        print(f"row {name} was not run: {why}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    console.entry(main)
