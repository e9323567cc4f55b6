"""Labels for the steps of a model's own answers, by sampling: the data of train_prm.py.

    python -m experiments.label runs/ppo-full-main            # -> runs/labels-ppo-full-main.jsonl
    python -m experiments.label runs/tiny/ppo-full-main --n 500

The model answers training problems, several times each. From the end of every line it then goes on
--k times. The label of the line is the share of these continuations that end with the right number
(Wang et al. 2023, arXiv 2312.08935). After the last line nothing is left to write: its label says
whether the answer is right, 1 or 0. An answer that was cut off counts as wrong.

A label is an estimate, and its standard error is up to 1 / (2 sqrt(k)): 0.18 with k = 8.

Lines are appended to the file as they are ready, and never changed. The same command again goes on
from there, also after a kill. A larger --n adds problems. The settings are beside it, in .json.
"""

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from nanogsm import UserError, data, generate, steps
from nanogsm.model import load_model
from nanogsm.run import console, flags, machine, past
from nanogsm.run.folder import hold
from nanogsm.store import files, hub

CHUNK = 32  # problems whose answers are sampled together, and written together
# Settings that must be the same when a file is continued.
FIXED = "model_sha256 data data_sha256 prompt samples k temperature seed max_new_tokens".split()


def parse_args(argv: list[str] | None = None):
    p = flags.Parser(__doc__)
    add = p.add_argument
    add("run", metavar="MODEL", help="A run, a folder or a Hub id whose answers are labelled.")
    flags.add_base_flag(p)
    add("--data", help="Training problems. Default: as the run was trained.")
    flags.add_data_dir_flag(p)
    add("--n", type=flags.number_or_all, default=500, help="Number of problems, or all.")
    add("--samples", type=int, default=8, help="Answers to each problem.")
    add("--k", type=int, default=8, help="Continuations from the end of each line.")
    add("--temperature", type=float, default=1.0, help="Sampling temperature.")
    add("--max-new-tokens", type=int, help="Longest answer. Default: as the run was validated.")
    add("--batch-size", type=int, default=256, help="Answers sampled per batch.")
    add("--seed", type=int, default=0, help="Seed of the sampling and of the order of problems.")
    add("--out", help="File to write. Default: runs/labels-MODEL.jsonl (tiny: runs/tiny/...).")
    flags.add_compute_flags(p)
    args = p.parse_args(argv)
    args.tiny = past.is_tiny(args.run)
    run = past.run_of(args.run)
    args.data = args.data or (run[1]["args"].get("data") if run else None)
    args.data, args.precision = flags.for_tiny(args)
    args.max_new_tokens = args.max_new_tokens or past.answer_limit_of(args.run, args.data)
    at_least = {"n": 1, "samples": 1, "k": 1, "max_new_tokens": 1, "batch_size": 1, "seed": 0}
    flags.check_numbers(args, at_least)
    flags.check_temperature(args)
    name = Path(args.run).name or "model"
    args.out = Path(args.out or f"runs/{'tiny/' * args.tiny}labels-{name}.jsonl")
    if args.out.suffix != ".jsonl":
        raise UserError(f"--out {args.out}: give a file that ends in .jsonl")
    return args


# -------------------------------------------------------------------------------------- the labels


def prefixes_of(tokenizer, prompt: data.Prompt, question: str, lines: list[str]) -> list[tuple]:
    """For the end of each line but the last: (the lines so far, the ids to go on from). The ids are
    those after which the reward model is asked."""
    ids, ends = steps.encode(tokenizer, prompt, question, lines)
    return [(tuple(lines[:i]), ids[: end + 1]) for i, end in enumerate(ends[:-1], start=1)]


def label_chunk(model, tokenizer, prompt, problems: list[data.Problem], seed: int, args) -> list:
    """Rows (dicts) of some problems' answers, `args.samples` for each, in order."""
    sample = dict(batch_size=args.batch_size, temperature=args.temperature)
    answers = generate.answer_and_mark(
        model, tokenizer, problems, prompt, args.max_new_tokens, samples=args.samples,
        seed=2 * seed, **sample,
    )  # fmt: skip
    asked = [problem for problem in problems for _ in range(args.samples)]
    solutions = [steps.steps_of(answer["completion"]) for answer in answers]
    # The same beginning, in several answers to one problem, is labelled once.
    wanted = {}
    for problem, lines in zip(asked, solutions):
        for so_far, ids in prefixes_of(tokenizer, prompt, problem.question, lines) if lines else ():
            wanted[problem.index, so_far] = ids, problem
    labels = shares(
        model, tokenizer, prompt, wanted, args.k, 2 * seed + 1, args.max_new_tokens, sample
    )
    rows = []
    for problem, answer, lines in zip(asked, answers, solutions):
        right = float(answer["correct"] and not answer["truncated"])
        found = [labels[problem.index, tuple(lines[:i])] for i in range(1, len(lines))]
        rows.append({
            "index": problem.index,
            "question": problem.question,
            "steps": lines or ["(no answer)"],
            "labels": [*found, right],
        })  # fmt: skip
    return rows


def shares(
    model, tokenizer, prompt, wanted: dict, k: int, seed: int, limit: int, sample: dict
) -> dict:
    """{key: share of k continuations that end right} of {key: (ids, problem)}. A key ends with the
    lines so far. limit: of the whole answer, in tokens, the lines so far included."""
    prompts = [ids for ids, _ in wanted.values() for _ in range(k)]
    is_over = lambda ids: data.starts_new_question(tokenizer, ids)  # noqa: E731
    done = generate.generate(
        model, prompts, tokenizer.stop_ids, limit, seed=seed, is_over=is_over, **sample
    )
    found = {}
    for i, (key, (ids, problem)) in enumerate(wanted.items()):
        before = "\n".join(key[-1]) + "\n"
        left = limit - (len(ids) - len(data.encode(tokenizer, prompt, problem.question)[0]))
        right = [
            not one.truncated
            and len(one.ids) <= left
            and data.is_correct(before + tokenizer.decode(one.ids), problem)
            for one in done[i * k : (i + 1) * k]
        ]
        found[key] = sum(right) / k
    return found


# ---------------------------------------------------------------------------------------- the file


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time writes a file. UserError if another does. The lock is a file beside it,
    which stays; the system drops the lock with the process that holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = hold(path.with_suffix(".lock"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    if lock is None:
        raise UserError(f"another process writes to {path}: wait for it, or give another --out")
    try:
        yield
    finally:
        os.close(lock)


def whole_lines(path: Path) -> int:
    """How many whole lines a file has. Half a line at its end, which a kill left, is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return content.count(b"\n")


def append(path: Path, rows: list[dict], before: int) -> None:
    """Add rows after the `before` lines that must be there, and force them to disk."""
    with open(path, "ab") as file:
        if whole_lines(path) != before:
            raise UserError(f"{path} has changed meanwhile: does another process write to it?")
        file.write(b"".join(map(files.to_json, rows)))
        file.flush()
        os.fsync(file.fileno())


def settle(args, settings: dict) -> int:
    """Write the settings, or compare them with those of the file that is there. Returns how many
    rows it has."""
    beside = args.out.with_suffix(".json")
    try:
        if args.out.exists() and not beside.exists():
            raise UserError(f"{args.out} is there without its settings, {beside.name}: give "
                            "another --out")  # fmt: skip
        if beside.exists():
            old = files.read_json(beside)
            for name in FIXED:
                if old.get(name) != settings[name]:
                    raise UserError(f"{args.out} was made with another {name}: {old.get(name)!r}, "
                                    f"now {settings[name]!r}; give another --out")  # fmt: skip
        files.write_json(beside, settings)
        return whole_lines(args.out)
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror}") from error


def choose_problems(args) -> list[data.Problem]:
    """Training problems in a fixed order, so that more of them begin with the same. Without those
    that the run held out."""
    problems = data.load_problems(args.data, "train", args.data_dir)
    held_out = past.held_out_by(args.run, args.data)
    past.check_unchanged(args.run, args.data, problems)
    problems, _ = data.split_validation(problems, held_out or 0)
    return [problems[i] for i in data.permutation(len(problems), args.seed, 0)]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    args.device, args.precision = machine.pick_compute(args.device, args.precision)
    found = hub.find_model(args.run, base=args.base)
    problems = choose_problems(args)
    with alone(args.out):
        write_labels(args, found, problems)
    return 0


def write_labels(args, found: hub.ModelFiles, problems: list[data.Problem]) -> None:
    """Write the file, or go on with it, and say so."""
    prompt = past.prompt_of(args.run) or data.Prompt("plain", 1, True)
    settings = {name: getattr(args, name) for name in FIXED if hasattr(args, name)} | {
        "model": args.run,
        "model_sha256": hub.fingerprint(found),
        "data_sha256": data.digest(problems),
        "prompt": prompt.settings(),
    }
    have, n = settle(args, settings), min(args.n, len(problems))
    if have >= n * args.samples:
        print(f"{args.out} has {have:,} labelled answers already")
        return
    dtype = machine.dtype_of(args.precision)
    model, tokenizer = load_model(found, dtype, args.device, merge=args.precision == "fp32")
    if have:
        print(f"continuing {args.out} from answer {have:,}")
    with console.Progress(n * args.samples, "answer") as line:
        # A chunk is always of the same problems with the same seed, so that what follows a kill is
        # what would have followed without it.
        for first in range(have // args.samples // CHUNK * CHUNK, n, CHUNK):
            some = problems[first : first + CHUNK]
            rows = label_chunk(model, tokenizer, prompt, some, args.seed * 1_000_003 + first, args)
            rows = rows[have - first * args.samples : (n - first) * args.samples]
            append(args.out, rows, have)
            have = min(first + CHUNK, n) * args.samples
            line.update(have)
    following = shlex.join(["train_prm.py", "--model", args.run, "--data", str(args.out)])
    print(f"{have:,} labelled answers are in {args.out}; next: python {following}")


if __name__ == "__main__":
    console.entry(main)
