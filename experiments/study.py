"""The original study and ours in one command: train, evaluate, compare, tabulate.

    python -m experiments.study --tiny       # the embedded model: 17 minutes on one core
    python -m experiments.study              # google/gemma-2b-it on GSM8K: not run yet
    python -m experiments.study --model PATH --sft="--max-examples 1024" --rows untuned full-main

This project implements the original study (gemma-2b-it, 256 test problems, unpublished). Its rows
use the recipe `original`, ours use `tuned`. Each row is an ordinary run of train_sft.py or
train_ppo.py and its evaluation, in a folder of its own. Commands are printed as they start, and
--dry-run prints them all.

The same command continues a study that was stopped. What is finished is not done again, and a row
that has been trained with other flags than the study would use is marked. A row that was trained
before by itself, in the default folder of its script and with the row's settings, is used from
there. A row that cannot be run (gated weights, no data file) gets the reason in the table, and the
others go on.

The study's folder gets study.md (the table), study.json (all numbers) and report.html (curves and
answers). No row is chosen by its score on the test split: the settings of `tuned` were found on
problems held out of train.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import evaluate
from nanogsm import UserError
from nanogsm.report import page
from nanogsm.report.eval_files import one_answer_each, read_rows
from nanogsm.report.scores import by_problem, kind_of, kinds_in, paired
from nanogsm.run import console, flags, machine
from nanogsm.run.past import run_of
from nanogsm.run.start import MAY_DIFFER, NO_SETTINGS
from nanogsm.store import files, hub

ROOT = Path(__file__).parents[1]
TEST_PROBLEMS = 1319  # of GSM8K, and of the embedded data


class Row(NamedTuple):
    name: str  # of the row and its folder
    title: str
    script: str | None  # trains it; None for the untuned model
    flags: str  # of the script, or of the untuned model's evaluation
    against: str | None  # the row it is compared with, problem by problem
    original: float | None = None  # percent correct in the original study


SFT, PPO = "train_sft.py", "train_ppo.py"
ROWS = [
    Row("untuned", "untuned, one-shot + instruction", None, "--shots 1 --instruction", None, 6.0),
    Row("untuned-one-shot", "untuned, one-shot", None, "--shots 1 --no-instruction", "untuned"),
    Row("untuned-instruction", "untuned, instruction", None, "--shots 0 --instruction", "untuned"),
    Row("untuned-plain", "untuned, the question alone", None, "--shots 0 --no-instruction",
        "untuned"),
    Row("full-main", "full SFT, main", SFT, "--recipe original", "untuned", 31.0),
    Row("full-socratic", "full SFT, socratic", SFT, "--recipe original --data socratic",
        "full-main", 23.0),
    Row("lora-main", "LoRA, main", SFT, "--recipe original --lora", "full-main", 20.0),
    Row("lora-socratic", "LoRA, socratic", SFT, "--recipe original --lora --data socratic",
        "lora-main", 11.0),
    Row("ppo", "PPO from full SFT, main", PPO, "--recipe original", "full-main", 28.0),
    Row("full-tuned", "full SFT, main, tuned", SFT, "--recipe tuned", "full-main"),
    Row("lora-tuned", "LoRA, main, tuned", SFT, "--recipe tuned --lora", "lora-main"),
    Row("ppo-tuned", "PPO from full SFT, main, tuned", PPO, "--recipe tuned", "full-main"),
]  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
START = "full-main"  # PPO starts from this row
PROBED = ("untuned", "full-main", "ppo", "ppo-tuned")  # these answer five more problems, to be read
# Flags that the study decides: of the training scripts, and of evaluate.py.
OF_TRAINING = "--out --model --init --tiny --seed --gpu-memory --dry-run --help -h".split()
OF_ASKING = """--out --model --tiny --data --n --split --part --compare --ask --samples --rerank
    --help -h""".split()
LEFT_OUT = "left out"  # why a row that --rows does not name was not run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser("The original study, and ours, in one command.")
    add = p.add_argument
    # fmt: off
    flags.add_tiny_flag(p)
    add("--model", default="google/gemma-2b-it", help="Hub id or folder (not with --tiny).")
    flags.add_data_dir_flag(p)
    add("--n", type=int, help="Test problems. Default: 256, as in the original study (tiny: "
        f"{TEST_PROBLEMS}).")
    add("--seed", type=int, default=0, help="Seed of all training. Default: 0.")
    add("--rows", nargs="+", choices=BY_NAME, metavar="ROW",
        help=f"Run only these of {', '.join(BY_NAME)}.")
    add("--sft", default="", metavar="FLAGS", help='More flags for train_sft.py, as --sft="...".')
    add("--sft-lora", default="", metavar="FLAGS", help="The same, for its LoRA rows alone.")
    add("--ppo", default="", metavar="FLAGS", help="More flags for train_ppo.py.")
    add("--eval", default="", metavar="FLAGS", help="More flags for evaluate.py. A row that has "
        "been evaluated already is not evaluated again.")
    add("--out", help="The study's folder. Default: runs/study-SEED (tiny: runs/tiny/study-SEED).")
    add("--dry-run", action="store_true", help="Print the commands. Nothing is run.")
    flags.add_compute_flags(p)
    # fmt: on
    args = p.parse_args(argv)
    flags.check_numbers(args, {"n": 1, "seed": 0})
    for name in ("sft", "sft_lora", "ppo", "eval"):
        setattr(args, name, words_of(args, name))
    args.n = min(args.n or (TEST_PROBLEMS if args.tiny else 256), TEST_PROBLEMS)
    args.out = Path(args.out or f"runs/{'tiny/' * args.tiny}study-{args.seed}")
    args.folders = {row.name: args.out / row.name for row in ROWS}
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    """UserError for flags in --sft, --sft-lora, --ppo or --eval that the scripts do not know, or
    that the study decides."""
    for name in ("sft", "sft_lora", "ppo", "eval"):
        decided = OF_ASKING if name == "eval" else OF_TRAINING
        for word in getattr(args, name):
            if word.split("=")[0] in decided:
                raise UserError(f"{flags.flag_of(name)}: leave out {word}, which the study decides")
    parsers = {SFT: flags.sft_args, PPO: flags.ppo_args, "evaluate.py": evaluate.parse_args}
    anywhere = argparse.Namespace(**vars(args) | {"device": "cpu", "precision": "fp32"})
    for row in ROWS:
        if args.rows is None or row.name in args.rows:
            for script, *argv in commands(row, anywhere):  # --dry-run needs no GPU
                parsers[script](argv)


def words_of(args: argparse.Namespace, name: str) -> list[str]:
    """The flags in a flag such as --sft="..."."""
    try:
        return shlex.split(getattr(args, name))
    except ValueError as error:
        raise UserError(f"{flags.flag_of(name)}={getattr(args, name)!r}: {error}") from error


def commands(row: Row, args: argparse.Namespace) -> list[list[str]]:
    """The commands of a row: its training, its evaluation and its probes, as far as it has them."""
    given = {"--device": args.device, "--precision": args.precision, "--data-dir": args.data_dir}
    compute = [word for pair in given.items() if pair[1] not in ("auto", None) for word in pair]
    tiny, model = ["--tiny"] * args.tiny, [] if args.tiny else ["--model", args.model]
    folder, row_flags = str(args.folders[row.name]), row.flags.split()
    probes = ROOT / "nanogsm" / ("tiny" if args.tiny else "") / "probes.jsonl"
    questions = [["--n", str(args.n)]]
    if row.name in PROBED:
        questions.append(["--data", os.path.relpath(probes)])
    if row.script is None:
        ask = ["evaluate.py", *tiny, *model, *row_flags]
        return [[*ask, *these, *compute, *args.eval, "--out", folder] for these in questions]
    if row.script == SFT:
        start, more = model, args.sft + args.sft_lora * ("--lora" in row_flags)
    else:
        start, more = ["--init", str(args.folders[START])], args.ppo
    train = [row.script, *tiny, *start, *row_flags, "--seed", str(args.seed), *compute, *more]
    ask = ["evaluate.py", *tiny, "--model", folder]
    return [
        [*train, "--out", folder],
        *[[*ask, *these, *compute, *args.eval] for these in questions],
    ]


def differences(recorded: dict, wanted: argparse.Namespace) -> list[str]:
    """How the settings of a run differ from those it would be trained with now, such as
    "lr 0.001 instead of 2e-05"."""
    flags.set_rank(wanted)
    found = []
    for name in sorted(vars(wanted).keys() - {*MAY_DIFFER, *NO_SETTINGS, "left_open"}):
        was, now = recorded.get(name), getattr(wanted, name)
        settled_later = name == "val_examples" and now is None
        if was != now and not settled_later and (name in recorded or now):
            found.append(f"{name} {was} instead of {now}".replace("None", "unset"))
    batch = wanted.micro_batch * wanted.accumulation
    if recorded.get("batch", batch) != batch:
        found.append(f"micro-batch x accumulation {recorded['batch']} instead of {batch}")
    for name in ("data", "model"):
        was, now = recorded.get(name), getattr(wanted, name, None)
        if not files.same_place(was, now):
            found.append(f"{name} {was} instead of {now}")
    return found


def is_trained(row: Row, args: argparse.Namespace) -> bool:
    """Whether the row's run has finished."""
    return row.script is not None and (args.folders[row.name] / "summary.json").exists()


def trained_before(row: Row, args: argparse.Namespace) -> Path | None:
    """The default folder of a row's script, if it has a finished run with the row's settings."""
    if row.script != SFT or (args.out / row.name).exists():
        return None
    wanted = flags.sft_args(commands(row, args)[0][1:-2])  # without --out
    run = run_of(wanted.out)
    finished = run and (run[0] / "summary.json").exists()
    return Path(wanted.out) if finished and not differences(run[1]["args"], wanted) else None


def other_flags(row: Row, args: argparse.Namespace) -> list[str]:
    """How a trained row differs from what the study would train."""
    run = run_of(str(args.folders[row.name]))
    if run is None:
        return ["settings that cannot be read"]
    recorded, parse = run[1]["args"], flags.sft_args if row.script == SFT else flags.ppo_args
    found = differences(recorded, parse(commands(row, args)[0][1:]))
    if row.script == PPO:
        with contextlib.suppress(UserError):  # its start has been deleted, for example
            start = hub.fingerprint(hub.find_model(str(args.folders[START])))
            if recorded.get("init_sha256") != start:
                found.append(f"it started from other weights than those in {args.folders[START]}")
    return found


def evaluation(row: Row, args: argparse.Namespace, kind: str = "test") -> Path | None:
    """The .json of a row's newest evaluation on args.n test problems, or on the probes. None if
    there is none."""
    name = f"eval-test-{args.n}" if kind == "test" else "eval-probes"
    existing = one_answer_each(args.folders[row.name], ".json")
    # With the dash, eval-test-1319 is not taken for eval-test-131.
    found = [file for file in existing if f"{file.stem}-".startswith(f"{name}-")]
    return max(found, key=lambda file: file.stat().st_mtime, default=None)


def refuse_torchrun() -> None:
    """UserError under torchrun, where every rank would start every script."""
    if "WORLD_SIZE" in os.environ:
        raise UserError("this command starts the training scripts itself: run it without torchrun, "
                        "and without WORLD_SIZE in the environment")  # fmt: skip


def run(command: list[str], keep: tuple[int, ...] = ()) -> tuple[int, str]:
    """Run one of our scripts and show its output as it comes. Returns its status and its last line
    on stderr. The script gets Ctrl-C directly, saves and stops; SIGTERM is passed on to it. keep:
    file descriptors that stay open in the script."""
    print(f"\n$ python {shlex.join(command)}", flush=True)
    script = [sys.executable, str(ROOT / command[0]), *command[1:]]
    process = subprocess.Popen(
        script, stderr=subprocess.PIPE, text=True, errors="replace", pass_fds=keep
    )
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    last = ""
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            last = line.strip() or last
    finally:
        process.stderr.close()  # or a script that still writes there would wait for ever
        status = process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status, last.removeprefix("error: ")


def run_or_raise(command: list[str]) -> None:
    """`run`, which ends this program, too, if the script was stopped. UserError if it failed."""
    status, said = run(command)
    if status in (129, 130, 143):
        raise SystemExit(status)
    if status:
        raise UserError(f"python {shlex.join(command)}: {said}")


# ------------------------------------------------------------------------------------ the results


def training_metrics(folder: Path) -> dict:
    """Minutes, memory, speed and losses from a run's metrics.jsonl."""
    rows = files.json_lines(folder / "metrics.jsonl")
    steps = [row for row in rows if "seconds" in row]
    seconds = sum(row["seconds"] for row in steps)
    last_tenth = steps[-max(1, len(steps) // 10) :]
    found = {
        "steps": len(steps),
        "minutes": seconds / 60,
        "tokens_per_s": sum(row["tokens"] for row in steps) / seconds,
        "peak_memory": max(row["peak_memory"] for row in steps),
    }
    for name in ("loss", "reward", "kl_sequence", "explained_variance"):
        values = [row[name] for row in last_tenth if row.get(name) is not None]
        found |= {name: fmean(values)} if values else {}
    for name in ("val_loss", "val_exact_match"):
        values = [row[name] for row in rows if name in row]
        found |= {name: values[-1]} if values else {}
    return found


def answers(summary: Path) -> dict[int, dict]:
    """Problem -> row of the evaluation whose .json is `summary`."""
    return by_problem(*read_rows(str(summary.with_suffix(".jsonl"))))


def results(args: argparse.Namespace, failed: dict[str, str]) -> list[dict]:
    """One entry per row, run or not, in the study's order. failed: row -> why it was not run."""
    found = []
    for row in ROWS:
        entry = {
            "row": row.name,
            "title": row.title,
            "seed": args.seed,
            "original": row.original,
            "commands": [shlex.join(["python", *command]) for command in commands(row, args)],
        }
        found.append(entry)
        path = evaluation(row, args)
        if row.name in failed or path is None:
            entry["not_run"] = failed.get(row.name, LEFT_OUT)
            continue
        summary, rows = files.read_json(path), answers(path)
        keep = ("n", "correct", "accuracy", "ci_low", "ci_high", "flexible_accuracy", "formatted",
                "truncated", "mean_tokens", "seconds", "environment")  # fmt: skip
        entry |= {key: summary[key] for key in keep if key in summary}
        kinds = [kind_of(answer) for answer in rows.values()]
        entry["kinds"] = {kind: kinds.count(kind) for kind in kinds_in(rows.values())}
        if row.script:
            entry["training"] = training_metrics(args.folders[row.name])
            entry["other_flags"] = other_flags(row, args) if is_trained(row, args) else []
        other = BY_NAME[row.against] if row.against else None
        if other and other.name not in failed and (other_path := evaluation(other, args)):
            pair = paired(answers(other_path), rows)
            entry |= {"against": other.name, "points": pair["points"], "p": pair["p"]}
            entry |= {change: len(pair[change]) for change in ("fixed", "broken")}
    return found


def table(entries: list[dict], theirs="original study", ours="exact match") -> str:
    """The study as a Markdown table. theirs, ours: the heads of the two columns of scores."""
    lines = [
        f"| | {theirs} | {ours} | 95% | against | points | p | in format | truncated "
        "| tokens | training loss | minutes | tokens/s | peak memory |",
        "|" + "---|" * 14,
    ]
    for e in entries:
        if e.get("other_flags"):
            e = e | {"title": f"{e['title']} (other flags: see below)"}
        original = f"{e['original']:.1f}%" if e["original"] is not None else ""
        if "not_run" in e:
            lines.append(f"| {e['title']} | {original} | not run: {e['not_run']} |" + " |" * 11)
            continue
        against, trained = " |  | ", " |  |  | "
        if "points" in e:
            against = f"{BY_NAME[e['against']].title} | {e['points']:+.1f} | {e['p']:.2g}"
        if t := e.get("training"):
            loss = f"{t['loss']:.3f}" if "loss" in t else f"reward {t['reward']:.3f}"
            trained = (f"{loss} | {t['minutes']:.1f} | {t['tokens_per_s']:,.0f} "
                       f"| {t['peak_memory'] / 2**30:.2f} GiB")  # fmt: skip
        lines.append(
            f"| {e['title']} | {original} | {e['accuracy']:.1%} "
            f"| {100 * e['ci_low']:.1f} to {100 * e['ci_high']:.1f} | {against} "
            f"| {e['formatted']:.0%} | {e['truncated']:.0%} | {e['mean_tokens']:.0f} | {trained} |"
        )
    return "\n".join(lines) + "\n"


def table_of(entries: list[dict], args: argparse.Namespace) -> str:
    """The table, with whose figures these are, and which rows were trained with other flags."""
    model = "the embedded model" if args.tiny else args.model
    lines = [
        table(entries, "original study, gemma-2b-it", "exact match here"),
        "The first column has the original study's own figures: gemma-2b-it, 256 problems. All "
        f"others are of the runs here: {model}, {args.n:,} problems.",
    ]
    for e in entries:
        if e.get("other_flags"):
            folder, differ = args.folders[e["row"]], "; ".join(e["other_flags"])
            lines.append(
                f"\n{e['title']}: this run was trained with other flags than this command would "
                f"use ({differ}). To train it anew, delete {folder} or give another --out."
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    refuse_torchrun()
    chosen = [row for row in ROWS if args.rows is None or row.name in args.rows]
    if args.dry_run:
        for command in [command for row in chosen for command in commands(row, args)]:
            print(f"python {shlex.join(command)}")
        return 0
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out} cannot be the study's folder: {error.strerror}") from error
    for row in ROWS:
        if before := trained_before(row, args):
            args.folders[row.name] = before
    failed: dict[str, str] = {}
    for row in chosen:
        trained = is_trained(row, args)
        if row.script == PPO and not trained and not is_trained(BY_NAME[START], args):
            failed[row.name] = f"needs {START}"
            continue
        if trained:
            print(f"row {row.name} is trained already: {args.folders[row.name]}")
        for command in commands(row, args)[trained:]:
            kind = "probes" if "--data" in command else "test"
            if command[0] == "evaluate.py" and evaluation(row, args, kind):
                continue
            status, said = run(command)
            if status in (129, 130, 143):
                return status
            if status == 2:
                failed[row.name] = said
                break
            if status:
                raise UserError(f"row {row.name} ended with status {status}: {said}")
    entries = results(args, failed)
    record = {"environment": machine.environment(), "rows": entries}
    files.write_json(args.out / "study.json", record)
    there = [entry for entry in entries if entry.get("not_run") != LEFT_OUT]
    files.replace_file(args.out / "study.md", table_of(there, args).encode())
    names = [row.name for row in chosen]
    shown = [entry for entry in entries if entry["row"] in names]
    print(f"\n{table_of(shown, args)}")
    print(f"written to {args.out / 'study.md'}, study.json")
    probed = [args.folders[e["row"]] for e in there if "not_run" not in e and e["row"] in PROBED]
    if probed:
        page.main([*map(str, probed), "--out", str(args.out / "report.html")])
    for name, why in failed.items():
        print(f"row {name} was not run: {why}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    console.entry(main)
