"""Real weights, side by side with transformers: logits, greedy tokens, and what we save.

    python -m benchmarks.parity --model PATH_TO_GEMMA --data-dir GSM8K [--n 20]

Needs transformers beside the project's own packages. In float32: the largest difference of logits
over n GSM8K prompts with 64 greedy tokens each, and over one sequence longer than Gemma 3's window
of 512; how many of the n greedy continuations are the same (transformers is asked for its next
token after each prefix of ours: all equal means its own continuation is ours); and whether a model
saved by us gives transformers the same logits again.
"""

import tempfile

import torch

from nanogsm import UserError, data, generate
from nanogsm.model import load_model, save_model
from nanogsm.run import console


def main() -> None:
    p = console.Parser("Logits, greedy tokens and saved files of a real Gemma beside transformers.")
    p.add_argument("--model", required=True, help="folder with a Gemma's weights")
    console.add_data_dir_flag(p)
    p.add_argument("--n", type=int, default=20, help="problems")
    p.add_argument("--new-tokens", type=int, default=64, help="greedy tokens of each")
    args = p.parse_args()
    console.check_numbers(args, {"n": 1, "new_tokens": 1})
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError("transformers is not installed: there is nothing to compare with") from error

    ours, tokenizer = load_model(args.model, torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    theirs = AutoTokenizer.from_pretrained(args.model)
    problems = data.load_problems("main", "test", args.data_dir)[: args.n]
    prompt = data.Prompt("plain", 1, True)
    prompts = [data.encode(tokenizer, prompt, q.question)[0] for q in problems]
    same_ids = sum(
        theirs(tokenizer.decode(ids[1:])).input_ids == ids for ids in prompts  # it adds <bos>
    )
    print(f"prompt ids equal those of AutoTokenizer: {same_ids} of {args.n}")

    done = generate.generate(ours, prompts, frozenset(), args.new_tokens, batch_size=args.n)
    worst, same = 0.0, 0
    with torch.no_grad():
        for ids, completion in zip(prompts, done):
            row = torch.tensor([ids + completion.ids])
            reference = peer(row).logits[0]
            worst = max(worst, (ours.logits(ours(row))[0] - reference).abs().max().item())
            same += reference[len(ids) - 1 : -1].argmax(-1).tolist() == completion.ids
        print(f"largest difference of logits: {worst:.2g} (largest logit {reference.abs().max():.1f})")
        print(f"identical greedy continuations of {args.new_tokens} tokens: {same} of {args.n}")

        row = torch.tensor([sum(prompts, [])[:700]])
        worst = (ours.logits(ours(row)) - peer(row).logits).abs().max().item()
        print(f"the same for {row.shape[1]} tokens in one sequence: {worst:.2g}")

        with tempfile.TemporaryDirectory() as folder:
            save_model(ours, tokenizer, f"{folder}/model")
            again = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
            AutoTokenizer.from_pretrained(f"{folder}/model")
            worst = (again(row).logits - peer(row).logits).abs().max().item()
        print(f"saved by us, read by transformers: {worst:.2g}")


if __name__ == "__main__":
    console.entry(main)
