"""Exact match on GSM8K's test split; comparison of two evaluations; one question of your own.

    python evaluate.py --tiny                                   # the embedded model, untuned
    python evaluate.py --n 256                                  # google/gemma-2b-it, untuned
    python evaluate.py --model runs/sft-lora-main --n 1319      # a run, asked as it was trained
    python evaluate.py --model runs/sft-full-main --samples 8 --temperature 0.7
    python evaluate.py --compare runs/sft-full-main runs/sft-lora-main
    python evaluate.py --model runs/sft-full-main --ask "Tom has 3 boxes of 12 eggs. How many eggs?"

Writes eval-<split>-<n>.json (the figures) and .jsonl (one row a completion) to the run's folder.
A prompt other than the run's own, or sampling, is part of the file's name; a result of another model,
data or precision is never overwritten. No training script opens the test split.
"""

import argparse
import json
import os
import re
import time
from pathlib import Path

import torch

from nanogsm import UserError, data, generate
from nanogsm.model import load_model
from nanogsm.report.scores import by_problem, in_common, paired, read_rows, summarise
from nanogsm.run import console
from nanogsm.run.folder import answer_limit_of, held_out_by, is_tiny, run_of
from nanogsm.store import files, hub


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = console.Parser("Exact match on GSM8K.")
    console.add_tiny_flag(p)
    p.add_argument("--model", help="Hub id, folder or run (google/gemma-2b-it; tiny)")
    p.add_argument("--n", type=int, help="a fixed sample of that many problems (256; tiny 1319; "
                   "validation: as many as were held out)")  # fmt: skip
    p.add_argument("--split", choices=("test", "validation"), default="test",
                   help="validation: the slice of train that --val-examples N holds out")  # fmt: skip
    p.add_argument("--data", help="main, socratic or a .jsonl file of your own (main)")
    console.add_data_dir_flag(p)
    # the prompt: unset values are the run's own, or one-shot + instruction for an untuned model
    p.add_argument("--shots", type=int, choices=(0, 1),
                   help="worked examples before the question (a run: as trained; untuned: 1)")  # fmt: skip
    p.add_argument("--instruction", action=argparse.BooleanOptionalAction, default=None,
                   help="begin with the instruction (a run: as it was trained; untuned: yes)")  # fmt: skip
    p.add_argument("--style", choices=("plain", "chat"), help="(a run: as it was trained; untuned: plain)")
    # decoding
    p.add_argument("--samples", type=int, default=1, help="completions a problem")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--max-new-tokens", type=int, help="longest answer (320; socratic 512; tiny 128, its "
                   "socratic 160; a run: at least what it was validated with)")  # fmt: skip
    p.add_argument("--batch-size", type=int, help="problems at once: more take more memory (64; tiny 256)")
    p.add_argument("--seed", type=int, default=0, help="of the sampling; the problems stay the same")
    # where to and what else
    p.add_argument("--out", help="folder for the result (default: the run's; untuned: runs/eval-...)")
    p.add_argument("--ask", metavar="QUESTION", help="answer one question and stop")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two runs or eval .jsonl files")
    console.add_compute_flags(p)
    args = p.parse_args(argv)
    if args.model is None:  # but not "", which is what a variable that was never set leaves
        args.model = "tiny" if args.tiny else "google/gemma-2b-it"
    args.model = os.path.expanduser(args.model)
    args.tiny = args.tiny or is_tiny(args.model)
    run = run_of(args.model)
    if run and args.data is None and args.split == "validation":
        args.data = run[1]["args"].get("data")
    if args.n is None and args.split == "test":  # of a validation slice choose_problems knows
        args.n = 1319 if args.tiny else 256
    args.batch_size = args.batch_size if args.batch_size is not None else 256 if args.tiny else 64
    args.data, args.precision = console.for_tiny(args)
    at_least = {"n": 1, "samples": 1, "batch_size": 1, "max_new_tokens": 1, "seed": 0}
    console.check_numbers(args, at_least)
    if args.temperature != 0 and not 0.01 <= args.temperature <= 100:
        raise UserError(f"--temperature is {args.temperature}: give 0 (greedy) or, say, 0.7")
    if args.samples > 1 and args.temperature == 0:
        raise UserError("--samples above 1 needs --temperature above 0: greedy answers are all alike")
    if args.ask is not None and not args.ask.strip():
        raise UserError("--ask needs a question")
    try:
        (args.ask or "").encode()
    except UnicodeEncodeError as error:  # bytes that the terminal's encoding does not have
        raise UserError("--ask: the question is not UTF-8 text") from error
    return args


# ------------------------------------------------------------------------------------ evaluation


def resolve(args: argparse.Namespace) -> tuple[data.Prompt, Path, str]:
    """(prompt, folder, file name without ending) of this evaluation."""
    run = run_of(args.model)
    usual = data.Prompt(**run[1]["info"]["prompt"]) if run else data.Prompt("plain", 1, True)
    given = {k: getattr(args, k) for k in ("style", "shots", "instruction")}
    prompt = usual._replace(**{k: v for k, v in given.items() if v is not None})
    tag = str(prompt).replace(", ", "-")
    own_data = "" if args.data in data.NAMED else Path(args.data).stem
    if own_data in ("test", "validation"):
        own_data = f"own-{own_data}"
    parts = ["eval", own_data or args.split, *["validation"] * bool(own_data and args.split != "test")]
    parts += [str(args.n), *["socratic"] * args.data.endswith("socratic")]
    parts += ["tiny"] * (args.data in data.GENERATED and not is_tiny(args.model))
    if prompt != usual or (args.out and not run):
        parts.append(tag)
    if args.temperature:
        parts.append(f"{args.samples}x-t{args.temperature:g}-seed{args.seed}")
    if args.max_new_tokens:
        parts.append(f"max{args.max_new_tokens}")
    place = "runs/tiny" if args.tiny else "runs"
    untuned = f"{place}/eval-{args.model.strip('/').replace('/', '--')}-{tag}"
    return prompt, Path(args.out or (run[0] if run else untuned)), "-".join(parts)


def choose_problems(args: argparse.Namespace) -> list[data.Problem]:
    if args.split == "validation":
        held_out = held_out_by(args.model, args.data)
        if held_out == 0:
            raise UserError(f"{args.model} held out no problems to ask")
        if args.n and held_out not in (None, args.n):
            raise UserError(f"{args.model} held out {held_out} problems, not {args.n}: give --n "
                            f"{held_out}; another slice holds problems it was trained on")  # fmt: skip
        problems = data.load_problems(args.data, "train", args.data_dir)
        n = args.n or held_out or data.usual_held_out(len(problems), args.tiny)
        return data.split_validation(problems, n)[1]
    return data.subset(data.load_problems(args.data, "test", args.data_dir), args.n)


def refuse_early(args: argparse.Namespace, folder: Path, name: str) -> None:
    """UserError now, not when the work is done, if its result could not be written or would replace
    another's."""
    try:
        folder.stat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long, say
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    there = next(f for f in (folder, *folder.absolute().parents) if os.path.exists(f))
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        raise UserError(f"cannot write to {folder}: {there} is no folder, or a read-only one")
    if os.path.exists(folder / f"{name}.json"):
        run = run_of(args.model)
        own = run and run[0] == folder  # a run's results stand in it, wherever it has been moved to
        was = files.read_json(folder / f"{name}.json")
        data_by = "data_sha256" if "data_sha256" in was else "data"
        for what in (data_by, "precision", *["model"] * (not own)):
            if what in was and not files.same_place(was[what], getattr(args, what)):
                change = f"{what} {was[what]}, this is {getattr(args, what)}"
                if what == "data_sha256":
                    change = f"other problems than those of {args.data}"
                raise UserError(f"{folder / name}.json is of {change}: choose another --out")


def evaluate(args: argparse.Namespace) -> int:
    hub.find_model(args.model, weights=False)  # a misspelt name is said before any data are fetched
    problems = choose_problems(args)
    args.n, args.data_sha256 = len(problems), data.digest(problems)
    prompt, folder, name = resolve(args)
    refuse_early(args, folder, name)
    limit = args.max_new_tokens or answer_limit_of(args.model, args.data)
    run = run_of(args.model)
    trained_on = run and files.same_place(run[1]["args"].get("data"), args.data)
    if trained_on and args.data not in data.NAMED and args.split == "test":
        held_out = run[1]["args"]["val_examples"]
        print(f"note: the run was trained on these, but for {held_out} (--split validation asks those)")
    model, tokenizer = load_for_inference(args)
    whole = args.data not in data.NAMED and args.split == "test"  # a file of one's own has no splits
    asked = args.data if whole else f"{args.split} of {args.data}"
    print(f"{args.model}: {len(problems)} problems, {asked}; {prompt}, "
          f"{'greedy' if not args.temperature else f'{args.samples} samples at {args.temperature:g}'}, "
          f"{args.device} {args.precision}")  # fmt: skip
    began = time.perf_counter()
    with console.Progress(len(problems) * args.samples, "answer") as line:
        rows = generate.answer_and_mark(
            model, tokenizer, problems, prompt, limit, args.batch_size, args.temperature,
            args.samples, args.seed,
            progress=lambda finished, tokens: line.update(
                finished, tokens_per_s=tokens / (time.perf_counter() - began)
            ),
        )  # fmt: skip
    seconds = time.perf_counter() - began
    figures = summarise(rows, args.samples) | {
        "seconds": seconds,
        "tokens_per_s": sum(r["tokens"] for r in rows) / seconds,
        "peak_memory": console.peak_memory(args.device),
        "model": args.model,
        "data": args.data,
        "data_sha256": args.data_sha256,
        "split": args.split,
        "indices": [p.index for p in problems],
        "prompt": prompt._asdict(),
        "samples": args.samples,
        "temperature": args.temperature,
        "max_new_tokens": limit,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "precision": args.precision,
        "environment": console.environment(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files.remove(folder / f"{name}.json")  # no kill may leave old figures beside new answers
    files.replace_file(folder / f"{name}.jsonl", lines.encode())
    files.write_json(folder / f"{name}.json", figures)
    print_figures(figures)
    print(f"written to {folder / name}.json and .jsonl")
    return 0


def load_for_inference(args: argparse.Namespace):
    """In float32 an adapter is folded into its base, which is faster and as good as exact; in
    bfloat16 it stays beside it, since rounding the sum would change the model that was trained."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    return load_model(args.model, dtype, args.device, merge=dtype == torch.float32)


def print_figures(f: dict) -> None:
    print(f"exact match   {100 * f['accuracy']:5.1f}%  [{100 * f['ci_low']:.1f}, {100 * f['ci_high']:.1f}]"
          f"  ({f['correct']} of {f['completions']})")  # fmt: skip
    for key, value in f.items():
        if key.startswith(("pass@", "maj@")):
            print(f"{key:<13} {100 * value:5.1f}%")
    print(f"flexible      {100 * f['flexible_accuracy']:5.1f}%  (last number, wherever it stands)")
    print(f"in format     {100 * f['formatted']:5.1f}%  truncated {100 * f['truncated']:.1f}%, "
          f"mean length {f['mean_tokens']:.0f} tokens")  # fmt: skip
    print(f"speed         {f['tokens_per_s']:,.0f} tokens/s, {f['seconds']:.0f} s, "
          f"peak {f['peak_memory'] / 2**30:.1f} GiB")  # fmt: skip


def ask(args: argparse.Namespace) -> int:
    prompt, _, _ = resolve(args)
    model, tokenizer = load_for_inference(args)
    if args.tiny and args.data in data.GENERATED:
        words = lambda text: re.findall("[A-Za-z]+", text)  # noqa: E731
        known = {w for p in data.load_problems("tiny", "train") for w in words(p.question)}
        if unknown := dict.fromkeys(w for w in words(args.ask) if w not in known):
            print(f"note: words this small model has never seen: {console.printable(', '.join(unknown))}")
    limit = args.max_new_tokens or answer_limit_of(args.model, args.data)
    (answer,) = generate.answer(model, tokenizer, [args.ask.strip()], prompt, limit,
                                temperature=args.temperature, seed=args.seed)  # fmt: skip
    text = data.cut(answer.text)
    print(console.printable(text))
    number = data.extract_answer(text)
    print(f"-> {number:.15g}" if number is not None else "-> no '#### number' in it")
    return 0


# ------------------------------------------------------------------------------------ comparison


def compare(args: argparse.Namespace) -> int:
    """Paired comparison on the problems both evaluations have: the table, the exact test, and every
    problem that went from right to wrong or back, in full."""
    (path_a, rows_a), (path_b, rows_b) = map(read_rows, args.compare)
    a, b = by_problem(path_a, rows_a), by_problem(path_b, rows_b)
    common = in_common(path_a, a, path_b, b)
    if not common:
        raise UserError(f"{path_a} and {path_b} have no problem in common")
    pair = paired(a, b)
    for title, indices in (("fixed: B right where A was wrong", pair["fixed"]),
                           ("regressed: A right where B is wrong", pair["broken"])):  # fmt: skip
        print(f"\n=== {title}: {len(indices)} ===")
        for i in indices:
            print(f"\n--- problem {i}, answer {a[i]['gold']:.15g}\n{console.printable(a[i]['question'])}")
            print(f"[A] {console.printable(a[i]['completion'].strip())}")
            print(f"[B] {console.printable(b[i]['completion'].strip())}")
    print(f"\nA  {path_a}\nB  {path_b}\n{len(common)} problems in common")
    both = sum(a[i]["correct"] and b[i]["correct"] for i in common)
    only_a, only_b = len(pair["broken"]), len(pair["fixed"])
    print(f"{'':>12}{'B right':>9}{'B wrong':>9}")
    print(f"{'A right':>12}{both:>9}{only_a:>9}")
    print(f"{'A wrong':>12}{only_b:>9}{len(common) - both - only_a - only_b:>9}")
    print(f"A {100 * (both + only_a) / len(common):.1f}%, B {100 * (both + only_b) / len(common):.1f}%: "
          f"{pair['points']:+.1f} points, exact McNemar p = {pair['p']:.4g}")  # fmt: skip
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.compare:
        return compare(args)
    args.device, args.precision = console.pick_compute(args.device, args.precision)
    return ask(args) if args.ask is not None else evaluate(args)


if __name__ == "__main__":
    console.entry(main)
