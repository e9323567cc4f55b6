"""Greedy answers by nanogsm and by transformers' generate(): answers and tokens per second.

    python -m benchmarks.generate_speed --model runs/sft-full-main --n 64
    python -m benchmarks.generate_speed --model PATH --data-dir DIR --fixed 64 --batch-sizes 8 32

Both sides have the same weights in the same dtype, the same test problems and the same stop tokens.
Both models are in one process and take turns, so that whatever else the machine does affects both
alike. The peer gets its prompts in batches sorted by length and padded on the left. Each side is
judged by its best batch size. Try several for the peer: its best is not ours.

Two lower bounds on the time are printed. One is the matrix products with weights that the tokens
need, at the machine's best matrix rate. It matters for large batches. The other matters for small
ones: a decode step has to read every weight once. It needs --fixed N, which lets every answer go on
for N tokens; the prefill is timed and subtracted. In float32 the tokens must be the same. The
number of equal answers is printed.
"""

import argparse
import importlib.util
import math
from itertools import zip_longest

import torch

from benchmarks.sides import check, matrices_of, matrix_rate, now, read_rate
from nanogsm import UserError, data, generate
from nanogsm.model import load_model
from nanogsm.run import card, console, flags, machine
from nanogsm.store import files, hub


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser("Time greedy answers: nanogsm against transformers.")
    add = p.add_argument
    add("--model", default="runs/sft-full-main", help="Run or folder of a whole model.")
    add("--data", default="main", help="main, socratic, tiny or a .jsonl file of your own.")
    flags.add_data_dir_flag(p)
    add("--n", type=int, default=64, help="Test problems.")
    add("--batch-sizes", type=int, nargs="+", default=[16, 64], help="Batch sizes to try.")
    add("--peer-batch-sizes", type=int, nargs="+", help="Those for the peer. Default: the same.")
    add("--max-new-tokens", type=int, default=320, help="Longest answer, in tokens.")
    add("--fixed", type=int, help="Let every answer have this many tokens, whatever it says.")
    add("--rounds", type=int, default=2, help="Turns of each side. The fastest counts.")
    add("--json", help="File to write all results to.")
    flags.add_compute_flags(p)
    args = p.parse_args(argv)
    if min(args.n, args.max_new_tokens, args.rounds, args.fixed or 1, *args.batch_sizes) < 1:
        raise UserError("--n, --batch-sizes, --max-new-tokens, --fixed and --rounds are at least 1")
    args.peer_batch_sizes = args.peer_batch_sizes or args.batch_sizes
    args.device, args.precision = machine.pick_compute(args.device, args.precision)
    return args


def by_ours(model, prompts, stop_ids, limit: int, batch_size: int) -> list[list[int]]:
    """The generated ids of each prompt."""
    return [c.ids for c in generate.generate(model, prompts, stop_ids, limit, batch_size)]


def by_peer(model, prompts, stop_ids, limit: int, batch_size: int) -> list[list[int]]:
    """The same by transformers, in left-padded batches of similar lengths. What it appends after a
    stop token is cut off."""
    found = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    stops = {"eos_token_id": sorted(stop_ids)} if stop_ids else {"eos_token_id": None}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in rows])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
        made = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
            max_new_tokens=limit, pad_token_id=0, **stops,
        )[:, width:].tolist()  # fmt: skip
        for i, answer in zip(rows, made):
            end = next((k + 1 for k, token in enumerate(answer) if token in stop_ids), len(answer))
            found[i] = answer[:end]
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check(args)
    dtype = machine.dtype_of(args.precision)
    found = hub.find_model(args.model)
    ours, tokenizer = load_model(found, dtype, args.device)
    problems = data.load_problems(args.data, "test", args.data_dir)[: args.n]
    prompts = [data.encode(tokenizer, data.Prompt(), p.question)[0] for p in problems]
    sides = {"nanogsm": (by_ours, ours)}
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForCausalLM

        peer = AutoModelForCausalLM.from_pretrained(found.base, dtype=dtype).to(args.device).eval()
        sides["transformers"] = (by_peer, peer)
    else:
        print("transformers is not installed: only nanogsm is timed")

    limit = args.fixed or args.max_new_tokens
    stop_ids = frozenset() if args.fixed else tokenizer.stop_ids
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    print(f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens; "
          f"{args.device}, {dtype}{threads}")  # fmt: skip
    weights = sum(p.nbytes for p in ours.parameters())
    bound = read_rate(args.device) / weights  # decode steps per second
    rate = matrix_rate(args.device, dtype)
    answers, rows = {}, []
    for turn in range(args.rounds):
        for sizes in zip_longest(args.batch_sizes, args.peer_batch_sizes):
            for batch_size, (side, (answer, model)) in zip(sizes, sides.items()):
                if batch_size is None:  # the other side has more sizes to try
                    continue
                answer(model, prompts[:2], stop_ids, 2, 2)  # warm up after the other side's turn
                began = now(args.device)
                made = answer(model, prompts, stop_ids, limit, batch_size)
                seconds = now(args.device) - began
                answers[side] = made
                tokens = sum(map(len, made))
                # The last token of an answer is never fed back into the model.
                through = sum(map(len, prompts)) + tokens - len(made)
                least = card.forward_flops(matrices_of(ours), through, tokens) / rate
                row = {"side": side, "batch_size": batch_size, "turn": turn, "seconds": seconds,
                       "answers_per_s": len(made) / seconds, "tokens_per_s": tokens / seconds,
                       "tokens": tokens, "products_s": least}  # fmt: skip
                said = f"batch {batch_size:>4}  {side:<12} {seconds:7.1f} s"
                said += f", {least:.1f} of products"
                if args.fixed and args.fixed > 1:
                    began = now(args.device)
                    answer(model, prompts, stop_ids, 1, batch_size)
                    prefill = now(args.device) - began
                    batches = math.ceil(len(prompts) / batch_size)
                    steps = (args.fixed - 1) * batches / (seconds - prefill)
                    share = steps / bound
                    row |= {"prefill": prefill, "steps_per_s": steps, "bandwidth_share": share}
                    said += f"  {steps:7.1f} decode steps/s ({share:.0%} of the bandwidth's)"
                rows.append(row)
                speed = f"{len(made) / seconds:6.2f} answers/s  {tokens / seconds:7.1f} tokens/s"
                print(f"{said}  {speed}", flush=True)

    best = {}
    for side in sides:
        mine = [row for row in rows if row["side"] == side]
        best[side] = max(mine, key=lambda row: row["answers_per_s"])
    if len(sides) == 2:
        same = sum(a == b for a, b in zip(*answers.values()))
        ratio = best["nanogsm"]["answers_per_s"] / best["transformers"]["answers_per_s"]
        sizes = " and ".join(str(row["batch_size"]) for row in best.values())
        print(f"best against best: {ratio:.2f} x the answers per second (batches of {sizes}); "
              f"{same} of {len(prompts)} answers are the same, token for token")  # fmt: skip
    if args.json:
        facts = {"args": vars(args), "environment": machine.environment(), "rows": rows,
                 "matrix_rate": rate, "read_rate": bound * weights}  # fmt: skip
        files.write_json(args.json, facts)
    return 0


if __name__ == "__main__":
    console.entry(main)
