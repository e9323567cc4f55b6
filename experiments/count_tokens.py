"""Count GSM8K's tokens for nanogsm/run/sizes/gsm8k.json, from which a plan takes the lengths where
there is no tokenizer.

    python -m experiments.count_tokens --tokenizer FOLDER --data-dir DIR

FOLDER has Gemma 1's tokenizer.json, DIR has GSM8K's files (all but train_socratic.jsonl).
"""

import json
from pathlib import Path
from statistics import linear_regression, mean

from nanogsm import data
from nanogsm.run import console, flags, known
from nanogsm.store import files

LONGEST = 64  # examples kept one by one: a plan looks at the longest micro-batch
GROUPS = 99  # of the other examples, which are averaged


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser("Count GSM8K's tokens for plans without a tokenizer.")
    p.add_argument("--tokenizer", required=True, help="Folder with Gemma 1's tokenizer.json.")
    p.add_argument("--out", default=str(known.GSM8K), help="The table to write.")
    flags.add_data_dir_flag(p)
    args = p.parse_args(argv)
    table = count(data.Tokenizer(Path(args.tokenizer)), args.data_dir)
    rows = ",\n".join(f"    {json.dumps(row)}" for row in table.pop("main"))
    head = "".join(f"  {json.dumps(k)}: {json.dumps(v)},\n" for k, v in table.items())
    text = f'{{\n{head}  "main": [\n{rows}\n  ]\n}}\n'
    files.replace_file(Path(args.out), text.encode())
    return 0


def count(tokenizer: data.Tokenizer, data_dir: str | None) -> dict:
    """The table. Every figure but the socratic ones is of main's training split."""

    def sizes(problems: list, prompt: data.Prompt) -> list[tuple[int, int]]:
        masks = [data.encode(tokenizer, prompt, p.question, p.answer)[1] for p in problems]
        return [(len(mask) - sum(mask), sum(mask)) for mask in masks]

    def more(prompt: data.Prompt) -> int:
        return round(mean(n - m for (n, _), (m, _) in zip(sizes(problems, prompt), plain)))

    problems = data.load_problems("main", "train", data_dir)
    plain = sizes(problems, data.Prompt())
    ordered = sorted(plain, key=sum)
    others, longest = ordered[:-LONGEST], ordered[-LONGEST:]
    ends = [round(i * len(others) / GROUPS) for i in range(GROUPS + 1)]
    groups = [others[first:end] for first, end in zip(ends, ends[1:])]
    rows = [[len(g), *(round(mean(x)) for x in zip(*g))] for g in groups]
    rows += [[1, *pair] for pair in longest]
    main, socratic = (
        [m for _, m in sizes(data.load_problems(name, "test", data_dir), data.Prompt())]
        for name in ("main", "socratic")
    )
    slope, intercept = linear_regression(main, socratic)
    questions, answers = map(sum, zip(*((len(p.question), len(p.answer)) for p in problems)))
    return {
        "about": "GSM8K's training examples in tokens of Gemma 1, plain style; socratic answers "
        "(times main's, plus) are estimated from the test split",
        "made_by": "python -m experiments.count_tokens --tokenizer FOLDER --data-dir DIR",
        "instruction": more(data.Prompt(instruction=True)),  # tokens that it adds to a prompt
        "chat": more(data.Prompt("chat")),
        "socratic": [round(slope, 3), round(intercept, 1)],
        # Characters of a question for each token of its prompt, of an answer for each of its own.
        "characters": [
            round(questions / sum(n for n, _ in plain), 2),
            round(answers / sum(m for _, m in plain), 2),
        ],
        "rows": "examples, tokens of a prompt with <bos>, tokens of an answer with <eos>",
        "main": rows,
    }


if __name__ == "__main__":
    console.entry(main)
