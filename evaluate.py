"""Exact match of a model on GSM8K's test split. Also compares two evaluations and asks a question.

    python evaluate.py --tiny                                   # the embedded model, untuned
    python evaluate.py --n 256                                  # google/gemma-2b-it, untuned
    python evaluate.py --model runs/sft-lora-main --n 1319      # a run, with its own prompt
    python evaluate.py --model runs/sft-full-main --samples 8 --temperature 0.7
    python evaluate.py --compare runs/sft-full-main runs/sft-lora-main
    python evaluate.py --model runs/sft-full-main --ask "Tom has 3 boxes of 12 eggs. How many eggs?"

An evaluation writes a summary (eval-<split>-<n>.json) and one row per completion (the same name
with .jsonl) to the run's folder. No training script opens the test split.
"""

import argparse
import json
import os
import re
import time
from pathlib import Path

import torch

from nanogsm import UserError, data, distributed, generate
from nanogsm.model import load_model
from nanogsm.report.compare import compare
from nanogsm.report.eval_files import check_place, place_of
from nanogsm.report.scores import summarise
from nanogsm.run import console, flags, machine, past
from nanogsm.run.past import answer_limit_of, held_out_by, is_tiny, prompt_of, run_of
from nanogsm.store import files, hub


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser("Exact match on GSM8K.")
    add = p.add_argument
    flags.add_tiny_flag(p)
    # fmt: off
    add("--model", help="Hub id, folder, run, or tiny (embedded). Default: google/gemma-2b-it.")
    flags.add_base_flag(p)
    add("--n", type=int, help="Number of problems, always the same sample. Default: 256 (tiny: "
        "1319; validation: all that were held out).")
    add("--split", choices=("test", "validation"), default="test",
        help="The validation split is the part of train that --val-examples held out.")
    add("--part", type=flags.part, metavar="K/N", help="Ask only this part of the validation "
        "split. 2/2 is the half that training with half of it as --val-use has not asked.")
    add("--data", help="main, socratic or a .jsonl file of your own. Default: main.")
    flags.add_data_dir_flag(p)
    # The prompt
    add("--shots", type=int, choices=(0, 1),
        help="Worked examples before the question. Default: as trained (untuned: 1).")
    add("--instruction", action=argparse.BooleanOptionalAction, default=None,
        help="Begin with the instruction. Default: as trained (untuned: yes).")
    add("--style", choices=("plain", "chat"),
        help="Style of the prompt. Default: as trained (untuned: plain).")
    # Decoding
    add("--samples", type=int, default=1, help="Completions per problem.")
    add("--temperature", type=float, default=0.0, help="Sampling temperature. 0 is greedy.")
    add("--max-new-tokens", type=int, help="Longest answer, in tokens. Default: 320 (socratic 512, "
        "tiny 128, tiny's socratic 160), or the limit of the run's own validation if larger.")
    add("--batch-size", type=int,
        help="Answers sampled per batch. More take more memory. Default: 64 (tiny: 256).")
    add("--seed", type=int, default=0, help="Seed of the sampling. The problems stay the same.")
    # Output, and the two other uses of this script
    add("--out", help="Folder for the result. Default: the run's (untuned: runs/eval-...).")
    add("--ask", metavar="QUESTION", help="Answer one question and stop.")
    add("--compare", nargs=2, metavar=("A", "B"), help="Compare two runs or eval-....jsonl files.")
    flags.add_compute_flags(p)
    # fmt: on
    args, unknown = p.parse_known_args(argv)
    if unknown:
        hint = f"; if {unknown[0]} is a run, give it as --model {unknown[0]}"
        p.error(f"unrecognized arguments: {' '.join(unknown)}{hint * (unknown[0][:1] != '-')}")
    if args.model is None:  # "" stays and is refused later: a shell variable that was never set
        args.model = "tiny" if args.tiny else "google/gemma-2b-it"
    args.model = os.path.expanduser(args.model)
    args.tiny = args.tiny or is_tiny(args.model)
    run = run_of(args.model)
    if run and args.data is None and args.split == "validation":
        args.data = run[1]["args"].get("data")
    at_least = {"n": 1, "samples": 1, "batch_size": 1, "max_new_tokens": 1, "seed": 0}
    flags.check_numbers(args, at_least)
    args.given_n = args.n
    if args.split == "test":
        args.n = args.n or (1319 if args.tiny else 256)
    args.batch_size = args.batch_size or (256 if args.tiny else 64)
    args.data, args.precision = flags.for_tiny(args)
    if args.temperature != 0 and not 0.01 <= args.temperature <= 100:
        raise UserError(f"--temperature is {args.temperature}: give 0 (greedy) or 0.01 to 100")
    if args.part and args.split == "test":
        raise UserError("--part is for --split validation")
    if args.samples > 1 and args.temperature == 0:
        raise UserError("--samples above 1 needs --temperature above 0: greedy answers are equal")
    if args.ask is not None and not args.ask.strip():
        raise UserError("--ask needs a question")
    if args.ask and re.search("[\ud800-\udfff]", args.ask):  # bytes that could not be decoded
        raise UserError("--ask: the question is not UTF-8 text")
    return args


def evaluate(args: argparse.Namespace) -> int:
    """Answer every problem, count the right answers, print the summary, write it and the rows."""
    # A misspelt name fails before data is downloaded.
    hub.find_model(args.model, weights=False, base=args.base)
    problems = choose_problems(args)
    args.model_sha256 = hub.fingerprint(hub.find_model(args.model, base=args.base))
    args.n, args.data_sha256 = len(problems), data.digest(problems)
    prompt, folder, name = resolve(args)
    check_place(args, folder, name)
    limit = args.max_new_tokens or answer_limit_of(args.model, args.data)
    model, tokenizer = load_for_inference(args)
    decoding = f"{args.samples} samples at {args.temperature:g}" if args.temperature else "greedy"
    whole = args.data not in data.NAMED and args.split == "test"  # own files have no test split
    source = args.data if whole else f"{args.split} split of {args.data}"
    print(f"{args.model}: {args.n} problems, {source}; {prompt}, {decoding}, "
          f"{args.device} {args.precision}")  # fmt: skip
    began = time.perf_counter()
    rate = lambda tokens: tokens / (time.perf_counter() - began)  # noqa: E731
    with console.Progress(len(problems) * args.samples, "answer") as line:
        rows = generate.answer_and_mark(
            model, tokenizer, problems, prompt, limit, args.batch_size, args.temperature,
            args.samples, args.seed,
            progress=lambda done, tokens: line.update(done, tokens_per_s=rate(tokens)),
        )  # fmt: skip
    if distributed.RANK:
        return 0  # rank 0 has all answers, too
    seconds = time.perf_counter() - began
    settings = "model model_sha256 data data_sha256 split samples temperature batch_size".split()
    settings += ["seed", "precision"]
    summary = summarise(rows, args.samples) | {key: getattr(args, key) for key in settings}
    summary |= {
        "seconds": seconds,
        "tokens_per_s": sum(row["tokens"] for row in rows) / seconds,
        "peak_memory": machine.peak_memory(args.device),
        "indices": [problem.index for problem in problems],
        "prompt": prompt._asdict(),
        "max_new_tokens": limit,
        "environment": machine.environment(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.remove(folder / f"{name}.json")  # a kill must not leave an old summary with new rows
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files.replace_file(folder / f"{name}.jsonl", lines.encode())
    files.write_json(folder / f"{name}.json", summary)
    print_summary(summary)
    print(f"written to {folder / name}.json and .jsonl")
    return 0


def resolve(args: argparse.Namespace) -> tuple[data.Prompt, Path, str]:
    """(prompt, folder, file name without ending). A run is asked with the prompt it was trained
    with, an untuned model with one worked example and the instruction."""
    usual = prompt_of(args.model) or data.Prompt("plain", 1, True)
    given = {key: getattr(args, key) for key in ("style", "shots", "instruction")}
    prompt = usual._replace(**{key: value for key, value in given.items() if value is not None})
    return prompt, *place_of(args, prompt, usual)


def choose_problems(args: argparse.Namespace) -> list[data.Problem]:
    """A fixed sample of the test split, or the training problems that were held out."""
    held_out = held_out_by(args.model, args.data)
    if args.split == "validation":
        if held_out == 0:
            raise UserError(f"{args.model} held out no problems to ask")
        if args.n and held_out not in (None, args.n):  # it was trained on some of these
            fault = f"held out {held_out} problems, not {args.n}"
            raise UserError(f"{args.model} {fault}: give --n {held_out}")
        problems = data.load_problems(args.data, "train", args.data_dir)
        n = args.n or held_out or data.usual_held_out(len(problems), args.tiny)
        if n >= len(problems):
            raise UserError(f"--n {n}: validation is a part of these {len(problems)} problems")
        return past.part_of(data.split_validation(problems, n)[1], args.part)
    problems = data.load_problems(args.data, "test", args.data_dir)
    if (args.given_n or 0) > len(problems):
        print(f"note: --n is {args.n:,}, but there are only {len(problems):,} problems")
    if held_out is not None and args.data not in data.NAMED:
        print(f"note: the run was trained on all but {held_out} of these: see --split validation")
    return data.subset(problems, args.n)


def load_for_inference(args: argparse.Namespace):
    """(model, tokenizer). In float32 an adapter is merged into its base, which is faster. In
    bfloat16 it stays separate, because rounding the sum would change the trained model."""
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    found = hub.find_model(args.model, base=args.base)
    return load_model(found, dtype, args.device, merge=dtype == torch.float32)


def print_summary(s: dict) -> None:
    interval = f"[{100 * s['ci_low']:.1f}, {100 * s['ci_high']:.1f}]"
    print(f"exact match   {s['accuracy']:6.1%}  {interval}  ({s['correct']} of {s['completions']})")
    for key, value in s.items():
        if key.startswith(("pass@", "maj@")):
            print(f"{key:<13} {value:6.1%}")
    print(f"flexible      {s['flexible_accuracy']:6.1%}  (last number right, in format or not)")
    length = f"mean length {s['mean_tokens']:.0f} tokens"
    print(f"in format     {s['formatted']:6.1%}  truncated {s['truncated']:.1%}, {length}")
    speed = f"{s['tokens_per_s']:,.0f} tokens/s, {s['seconds']:.0f} s"
    print(f"speed         {speed}, peak {s['peak_memory'] / 2**30:.1f} GiB")


def ask(args: argparse.Namespace) -> int:
    """Print the answers to one question, each with the number that would be graded."""
    prompt, _, _ = resolve(args)
    model, tokenizer = load_for_inference(args)
    if args.tiny and args.data in data.GENERATED:
        words = lambda text: re.findall("[A-Za-z]+", text)  # noqa: E731
        known = {w for p in data.load_problems("tiny", "train") for w in words(p.question)}
        if unknown := dict.fromkeys(w for w in words(args.ask) if w not in known):
            print(f"note: words this model has never seen: {console.printable(', '.join(unknown))}")
    limit = args.max_new_tokens or answer_limit_of(args.model, args.data)
    answers = generate.answer(
        model, tokenizer, [args.ask.strip()] * args.samples, prompt, limit, args.batch_size,
        args.temperature, args.seed,
    )  # fmt: skip
    for i, answer in enumerate(answers):
        if args.samples > 1:
            print(f"--- answer {i + 1} of {args.samples}")
        text = data.cut(answer.text)
        print(console.printable(text))
        number = data.extract_answer(text)
        print(f"-> {number:.15g}" if number is not None else "-> no '#### number' in it")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.compare:
        return compare(*args.compare)
    args.device, args.precision = machine.pick_compute(args.device, args.precision)
    return ask(args) if args.ask is not None else evaluate(args)


if __name__ == "__main__":
    console.entry(main)
