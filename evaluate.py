"""Exact match of a model on GSM8K's test split. Also compares two evaluations and asks a question.

    python evaluate.py --tiny                                   # the embedded model, untuned
    python evaluate.py --n 256                                  # google/gemma-2b-it, untuned
    python evaluate.py runs/sft-lora-main --n all               # a run, with its own prompt
    python evaluate.py runs/sft-full-main --samples 8 --temperature 0.7
    python evaluate.py --compare runs/sft-full-main runs/sft-lora-main
    python evaluate.py runs/sft-full-main --ask "Tom has 3 boxes of 12 eggs. How many eggs?"

An evaluation writes a summary (eval-<split>-<n>.json) and one row per completion (the same name
with .jsonl) to the run's folder. No training script opens the test split.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from nanogsm import UserError, boxed, data, distributed, generate
from nanogsm.model import load_model
from nanogsm.report import rerank
from nanogsm.report.compare import compare
from nanogsm.report.eval_files import check_place, place_of
from nanogsm.report.scores import summarise
from nanogsm.run import ask, console, eval_data, flags, machine, past
from nanogsm.store import files, hub


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser("Exact match on GSM8K.")
    add = p.add_argument
    flags.add_tiny_flag(p)
    # fmt: off
    add("run", nargs="?", metavar="MODEL", help="A run, a folder, a Hub id, or tiny (embedded). "
        "Default: google/gemma-2b-it.")
    add("--model", help="The same.")
    flags.add_base_flag(p)
    add("--n", type=flags.number_or_all, help="Number of problems, always the same sample, or "
        "all. Default: 256 (tiny and math500: all; validation: all that were held out).")
    add("--split", choices=("test", "validation"),
        help="The validation split is the part of train that --val-examples held out. Default: "
        "test, or validation of a run on a file of your own.")
    add("--part", type=flags.part, metavar="K/N", help="Ask only this part of the validation "
        "split. After training with half of it as --val-use, 1/2 is that half.")
    add("--data", help="main, socratic, math, math500 or your own .jsonl file. Default: main, or "
        "math or your file if the run was trained on it.")
    flags.add_data_dir_flag(p)
    flags.add_unscored_flag(p)
    # The prompt
    add("--shots", type=int, choices=range(9), metavar="N", help="Worked examples before the "
        "question, up to 8: the first training problems. Default: as trained (untuned: 1).")
    add("--instruction", action=argparse.BooleanOptionalAction, default=None,
        help="Begin with the instruction. Default: as trained (untuned: yes).")
    add("--style", choices=("plain", "chat"),
        help="Style of the prompt. Default: as trained (untuned: plain).")
    # Decoding
    add("--samples", type=int, default=1, help="Completions per problem.")
    add("--temperature", type=float, default=0.0, help="Sampling temperature. 0 is greedy.")
    add("--max-new-tokens", type=int, help="Longest answer, in tokens. Default: 320 (socratic 512, "
        "math 1024, tiny 128, tiny's socratic 160), or the limit of the run's own validation if "
        "larger.")
    add("--batch-size", type=int,
        help="Answers sampled per batch. More take more memory. Default: 64 (tiny: 256).")
    add("--seed", type=int, default=0, help="Seed of the sampling. The problems stay the same.")
    add("--rerank", metavar="RUN", help="Choose among --samples by the critic of this PPO run, or "
        "by this run of train_prm.py.")
    add("--rerank-by", choices=("last", "least"), default="last", help="An answer's value: the "
        "critic's prediction at its end, or the least at the end of any line.")
    # Output, and the two other uses of this script
    add("--out", help="Folder for the result. Default: the run's (untuned: runs/eval-...).")
    add("--ask", nargs="?", const=True, metavar="QUESTION", help="Answer one question, or without "
        "QUESTION each line of standard input. An answer knows nothing of earlier ones.")
    add("--compare", nargs=2, metavar=("A", "B"), help="Compare two runs or eval-....jsonl files.")
    add("--all", action="store_true", help="Let --compare print every changed answer.")
    flags.add_compute_flags(p)
    # fmt: on
    args = p.parse_args(argv)
    if args.run and args.model:
        raise UserError(f"two models, {args.run} and --model {args.model}: give one")
    if args.compare and (args.model or args.run):
        raise UserError(f"--compare A B compares two runs: leave out {args.model or args.run}")
    args.model = args.model or args.run or ("tiny" if args.tiny else "google/gemma-2b-it")
    args.model = os.path.expanduser(args.model)
    args.tiny = args.tiny or past.is_tiny(args.model)
    eval_data.choose_data(args)
    at_least = {"n": 1, "samples": 1, "batch_size": 1, "max_new_tokens": 1, "seed": 0}
    flags.check_numbers(args, at_least)
    args.given_n = args.n
    if args.split == "test":
        args.n = args.n or (1319 if args.tiny else 500 if args.data == "math500" else 256)
    elif args.n == flags.ALL:
        args.n = None
    args.batch_size = args.batch_size or (256 if args.tiny else 64)
    args.data, args.precision = flags.for_tiny(args)
    flags.check_unscored(args)
    flags.check_temperature(args, greedy=True)
    if args.part and args.split == "test":
        raise UserError("--part is for --split validation")
    if isinstance(args.ask, str) and not ask.checked(args.ask):
        raise UserError("--ask needs a question")
    others = {"--n": args.given_n, "--part": args.part, "--compare": args.compare}
    extra = [flag for flag, value in others.items() if value and args.ask is not None]
    if extra:
        raise UserError(f"--ask answers your own questions: leave out {extra[0]}")
    if args.samples > 1 and args.temperature == 0:
        raise UserError("--samples above 1 needs --temperature above 0: greedy answers are equal")
    if args.rerank and (args.samples == 1 or args.ask is not None):
        raise UserError("--rerank needs --samples above 1, and problems with known answers")
    return args


def evaluate(args: argparse.Namespace) -> int:
    """Answer every problem, count the right answers, print the summary, write it and the rows."""
    # A misspelt name, or a missing grader, fails before anything is downloaded.
    boxed.check_data(args.data, args.split)
    hub.find_model(args.model, weights=False, base=args.base)
    problems = eval_data.choose_problems(args)
    critic = rerank.critic_for(args.rerank, problems, args.data) if args.rerank else None
    args.model_sha256 = hub.fingerprint(hub.find_model(args.model, base=args.base))
    args.rerank_sha256 = critic.digest() if critic else None
    args.n, args.data_sha256 = len(problems), data.digest(problems)
    prompt, folder, name = resolve(args, problems)
    check_place(args, folder, name)
    limit = args.max_new_tokens or past.answer_limit_of(args.model, args.data)
    names = "model_sha256 data_sha256 rerank_sha256 samples temperature seed precision".split()
    same = {name: getattr(args, name) for name in names}
    distributed.check_same(same | {"max_new_tokens": limit, "prompt": prompt.settings()})
    model, tokenizer = load_for_inference(args)
    decoding = f"{args.samples} samples at {args.temperature:g}" if args.temperature else "greedy"
    whole = args.data not in data.NAMED and args.split == "test"  # own files have no test split
    source = args.data if whole else f"{args.split} split of {args.data}"
    print(f"{args.model}: {args.n} problems, {source}; {prompt}, {decoding}, "
          f"{args.device} {args.precision}")  # fmt: skip
    began = time.perf_counter()
    rate = lambda tokens: tokens / (time.perf_counter() - began)  # noqa: E731
    share = distributed.largest_share(len(problems) * args.samples)  # of this process
    with console.Progress(share, "answer") as line:
        rows = generate.answer_and_mark(
            model, tokenizer, problems, prompt, limit, args.batch_size, args.temperature,
            args.samples, args.seed,
            progress=lambda done, tokens: line.update(done, tokens_per_s=rate(tokens)),
        )  # fmt: skip
    seconds = time.perf_counter() - began
    if critic:
        del model  # its memory is the critic's now
        rerank.rate(critic, rows, args)
    if distributed.RANK:
        return 0  # rank 0 has all answers, too
    settings = "model model_sha256 data data_sha256 split samples temperature batch_size".split()
    settings += ["seed", "precision"] + ["rerank_sha256"] * bool(critic)
    summary = summarise(rows, args.samples) | {key: getattr(args, key) for key in settings}
    summary |= rerank.summarise(rows, args) if critic else {}
    summary |= {
        "seconds": seconds,
        "tokens_per_s": sum(row["tokens"] for row in rows) / seconds,
        "peak_memory": machine.peak_memory(args.device),
        "indices": [problem.index for problem in problems],
        "prompt": prompt.settings(),
        "max_new_tokens": limit,
        "environment": machine.environment(),
    }
    if prompt.shots > 1:
        summary["shots_sha256"] = data.digest([*prompt.examples])
    folder.mkdir(parents=True, exist_ok=True)
    files.remove(folder / f"{name}.json")  # a kill must not leave an old summary with new rows
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files.replace_file(folder / f"{name}.jsonl", lines.encode(), shared=True)
    files.replace_file(folder / f"{name}.json", files.to_json(summary, indent=1), shared=True)
    print_summary(summary)
    print(f"written to {folder / name}.json and .jsonl")
    return 0


def resolve(args: argparse.Namespace, problems: list = ()) -> tuple[data.Prompt, Path, str]:
    """(prompt, folder, file name without ending). A run is asked with the prompt it was trained
    with, an untuned model with one worked example and the instruction."""
    usual = past.prompt_of(args.model) or data.Prompt("plain", 1, True, args.data in boxed.NAMES)
    usual = past.prompt_about(usual, problems) if problems else usual
    given = {key: getattr(args, key) for key in ("style", "shots", "instruction")}
    prompt = usual._replace(**{key: value for key, value in given.items() if value is not None})
    if prompt.shots > 1:
        prompt = prompt._replace(examples=eval_data.worked_examples(args, prompt.shots))
    return prompt, *place_of(args, prompt, usual)


def load_for_inference(args: argparse.Namespace):
    """(model, tokenizer). In float32 an adapter is merged into its base, which is faster. In
    bfloat16 it stays separate, because rounding the sum would change the trained model."""
    dtype = machine.dtype_of(args.precision)
    found = hub.find_model(args.model, base=args.base)
    return load_model(found, dtype, args.device, merge=dtype == torch.float32)


def print_summary(s: dict) -> None:
    length = f"truncated {s['truncated']:.1%}, mean length {s['mean_tokens']:.0f} tokens"
    if "unscored" in s:
        print(f"unscored      {s['completions']} completions, {length}")
    else:
        interval = f"[{100 * s['ci_low']:.1f}, {100 * s['ci_high']:.1f}]"
        right = f"{s['correct']} of {s['completions']}"
        print(f"exact match   {s['accuracy']:6.1%}  {interval}  ({right})")
        for key, value in s.items():
            if "@" in key:  # pass@k, maj@k, best@k
                print(f"{key:<13} {value:6.1%}")
        rerank.print_tests(s.get("rerank", {}).get("tests", ()))
        print_beside(s)
        print(f"in format     {s['formatted']:6.1%}  {length}")
    speed = f"{s['tokens_per_s']:,.0f} tokens/s, {s['seconds']:.0f} s"
    print(f"speed         {speed}, peak {s['peak_memory'] / 2**30:.1f} GiB")


def print_beside(s: dict) -> None:
    """What stands next to exact match."""
    if "flexible_accuracy" in s:
        print(f"flexible      {s['flexible_accuracy']:6.1%}  (last number right, in format or not)")
        return
    timeouts = f", {s['grader_timeouts']} timeouts" * bool(s["grader_timeouts"])
    graded = f"exact match is by {s['grader']}{timeouts}"
    print(f"equal text    {s['text_accuracy']:6.1%}  ({graded})")


def main(argv: list[str] | None = None) -> int:
    args = console.same_command(parse_args(argv))
    if args.compare:
        return compare(*args.compare, args.all)
    args.device, args.precision = machine.pick_compute(args.device, args.precision)
    if args.ask is None:
        return evaluate(args)
    prompt, _, _ = resolve(args)
    return ask.answer_questions(args, *load_for_inference(args), prompt)


if __name__ == "__main__":
    console.entry(main)
