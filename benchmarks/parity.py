"""A real Gemma compared with transformers: logits, greedy tokens, and the files we save.

    python -m benchmarks.parity --model PATH_TO_GEMMA --data-dir GSM8K [--n 20]

Needs transformers in addition to the project's own packages. Everything is float32. It prints

- the largest difference of logits over n GSM8K prompts, each with 64 greedy tokens of ours, and
  over one sequence that is longer than Gemma 3's window of 512;
- how many of the n greedy continuations are the same: after every prefix of ours transformers must
  choose our next token, and then its own continuation is ours;
- whether transformers computes the same logits from a model that we saved.
"""

import tempfile

import torch

from nanogsm import UserError, data, generate
from nanogsm.model import load_model, save_model
from nanogsm.run import console, flags


def main() -> None:
    p = flags.Parser("Compare a real Gemma with transformers: logits, tokens, saved files.")
    p.add_argument("--model", required=True, help="Folder with a Gemma's weights.")
    flags.add_data_dir_flag(p)
    p.add_argument("--n", type=int, default=20, help="Problems.")
    p.add_argument("--new-tokens", type=int, default=64, help="Greedy tokens per problem.")
    args = p.parse_args()
    flags.check_numbers(args, {"n": 1, "new_tokens": 1})
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError("transformers is not installed: nothing to compare with") from error

    ours, tokenizer = load_model(args.model, torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    theirs = AutoTokenizer.from_pretrained(args.model)
    problems = data.load_problems("main", "test", args.data_dir)[: args.n]
    prompt = data.Prompt("plain", 1, True)
    prompts = [data.encode(tokenizer, prompt, q.question)[0] for q in problems]
    texts = [tokenizer.decode(ids[1:]) for ids in prompts]  # AutoTokenizer adds <bos>
    same_ids = sum(theirs(text).input_ids == ids for text, ids in zip(texts, prompts))
    print(f"prompt ids equal those of AutoTokenizer: {same_ids} of {args.n}")

    done = generate.generate(ours, prompts, frozenset(), args.new_tokens, batch_size=args.n)
    worst, same = 0.0, 0
    with torch.no_grad():
        for ids, completion in zip(prompts, done):
            row = torch.tensor([ids + completion.ids])
            reference = peer(row).logits[0]
            worst = max(worst, (ours.logits(ours(row))[0] - reference).abs().max().item())
            same += reference[len(ids) - 1 : -1].argmax(-1).tolist() == completion.ids
        largest = reference.abs().max()
        print(f"largest difference of logits: {worst:.2g} (largest logit {largest:.1f})")
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
