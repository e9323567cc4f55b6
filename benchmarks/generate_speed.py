"""Answering by nanogsm against transformers' generate(): answers and tokens a second, same work.

    python -m benchmarks.generate_speed --model runs/sft-full-main --n 64
    python -m benchmarks.generate_speed --model PATH --data-dir DIR --fixed 64 --batch-sizes 8 32

Greedy, the same weights in the same dtype, the same test problems and stop tokens; one process holds both
models and they take turns, so that whatever else the machine does falls on both. The peer gets its
prompts in batches sorted by length, padded on the left, as it wants them; for every side the best
batch size counts: try several of the peer's, its best is not ours. Two bounds are set beside a side's
time: the products with weights that its tokens need, each once, at the machine's best matrix rate; and,
where --fixed N makes both go on for N tokens whatever they say, the decode steps a second (the time of
one token, the prefill, taken off) that reading every weight once a step allows. The first binds large
batches, the second small ones. In float32 the tokens must be the same, and how many answers are is
printed.
"""

import argparse
import importlib.util
import json
import math
from itertools import zip_longest
from pathlib import Path

import torch

from benchmarks.sides import matrix_rate, now, products, read_rate
from nanogsm import UserError, data, generate
from nanogsm.model import load_model
from nanogsm.run import console
from nanogsm.store import hub


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = console.Parser("Time greedy answers: nanogsm against transformers.")
    p.add_argument("--model", default="runs/sft-full-main", help="run or folder of a whole model")
    p.add_argument("--data", default="main", help="main, socratic or a .jsonl file of your own")
    console.add_data_dir_flag(p)
    p.add_argument("--n", type=int, default=64, help="test problems")
    p.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64], help="tried on either side")
    p.add_argument("--peer-batch-sizes", type=int, nargs="+", help="... on the peer's (as on ours)")
    p.add_argument("--max-new-tokens", type=int, default=320, help="longest answer")
    p.add_argument("--fixed", type=int, help="tokens of every answer, whatever it says")
    p.add_argument("--rounds", type=int, default=2, help="turns of either side; the fastest counts")
    p.add_argument("--json", help="write all figures there")
    console.add_compute_flags(p)
    args = p.parse_args(argv)
    if min(args.n, args.max_new_tokens, args.rounds, args.fixed or 1, *args.batch_sizes) < 1:
        raise UserError("--n, --batch-sizes, --max-new-tokens, --fixed and --rounds are at least 1")
    args.peer_batch_sizes = args.peer_batch_sizes or args.batch_sizes
    args.device, args.precision = console.pick_compute(args.device, args.precision)
    return args


def by_ours(model, prompts, stop_ids, limit: int, batch_size: int) -> list[list[int]]:
    return [c.ids for c in generate.generate(model, prompts, stop_ids, limit, batch_size)]


def by_peer(model, prompts, stop_ids, limit: int, batch_size: int) -> list[list[int]]:
    """Left-padded batches of like lengths; the padding after a stop token is taken off again."""
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
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
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
    bound = read_rate(args.device) / weights  # decode steps a second
    rate = matrix_rate(args.device, dtype)
    answers, rows = {}, []
    for turn in range(args.rounds):
        for sizes in zip_longest(args.batch_sizes, args.peer_batch_sizes):
            for batch_size, (side, (answer, model)) in zip(sizes, sides.items()):
                if batch_size is None:  # the other side has more sizes to try
                    continue
                answer(model, prompts[:2], stop_ids, 2, 2)  # warm again after the other's turn
                began = now(args.device)
                made = answer(model, prompts, stop_ids, limit, batch_size)
                seconds = now(args.device) - began
                answers[side] = made
                tokens = sum(map(len, made))
                through = sum(map(len, prompts)) + tokens - len(made)  # an answer's last token goes nowhere
                least = products(ours, through, tokens) / rate
                rows.append({"side": side, "batch_size": batch_size, "turn": turn, "seconds": seconds,
                             "answers_per_s": len(made) / seconds, "tokens_per_s": tokens / seconds,
                             "tokens": tokens, "products_s": least})  # fmt: skip
                said = f"batch {batch_size:>4}  {side:<12} {seconds:7.1f} s, {least:.1f} of products"
                if args.fixed and args.fixed > 1:
                    began = now(args.device)
                    answer(model, prompts, stop_ids, 1, batch_size)
                    prefill = now(args.device) - began
                    steps = (args.fixed - 1) * math.ceil(len(prompts) / batch_size) / (seconds - prefill)
                    rows[-1] |= {"prefill": prefill, "steps_per_s": steps, "bandwidth_share": steps / bound}
                    said += f"  {steps:7.1f} decode steps/s ({steps / bound:.0%} of the bandwidth's)"
                print(f"{said}  {len(made) / seconds:6.2f} answers/s  {tokens / seconds:7.1f} tokens/s",
                      flush=True)  # fmt: skip

    best = {
        side: max((r for r in rows if r["side"] == side), key=lambda r: r["answers_per_s"]) for side in sides
    }
    if len(sides) == 2:
        same = sum(a == b for a, b in zip(*answers.values()))
        ratio = best["nanogsm"]["answers_per_s"] / best["transformers"]["answers_per_s"]
        sizes = " and ".join(str(row["batch_size"]) for row in best.values())
        print(f"best against best: {ratio:.2f} x the answers a second (batches of {sizes}); "
              f"{same} of {len(prompts)} answers are the same, token for token")  # fmt: skip
    if args.json:
        facts = {"args": vars(args), "environment": console.environment(), "rows": rows,
                 "matrix_rate": rate, "read_rate": bound * weights}  # fmt: skip
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    console.entry(main)
