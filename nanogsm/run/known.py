"""Sizes for a plan of a model whose files cannot be had: without its licence, or without a network.

`sizes/` has a config.json for each known size; a new folder there is a new known size. It also has
`gsm8k.json`, GSM8K's lengths in tokens (made by experiments/count_tokens.py). Only a plan for a GPU
that is not here (--gpu-memory) uses these: a run needs the files themselves.
"""

import functools
import json
import math
import os
import re
from pathlib import Path

from nanogsm import data
from nanogsm.store.hub import ModelFiles

FOLDER = Path(__file__).with_name("sizes")
GSM8K = FOLDER / "gsm8k.json"
OWNERS = ("google", "meta-llama", "unsloth")  # unsloth has ungated copies of the same models
TUNED = ("-it", "-Instruct")  # endings of models of the same sizes


def model(name: str) -> ModelFiles | None:
    """The config alone of a Hub model of known size; None if its size is not known. (A folder here
    of that name hides the Hub's model, also if the folder is damaged.)"""
    owner, _, repo = name.partition("/")
    size = FOLDER / functools.reduce(str.removesuffix, TUNED, repo)
    known = owner in OWNERS and size.parent == FOLDER and (size / "config.json").is_file()
    return ModelFiles(size, None, name) if known and not os.path.exists(name) else None


def names() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def is_stand_in(found: ModelFiles) -> bool:
    return found.base.parent == FOLDER


def tokenizer(found: ModelFiles) -> data.Tokenizer | None:
    """The tokenizer of found.base; None if only the size of the model is known."""
    return None if is_stand_in(found) else data.Tokenizer(found.base)


@functools.cache
def table() -> dict:
    return json.loads(GSM8K.read_text("utf-8"))


def load_problems(args, found: ModelFiles) -> list[data.Problem]:
    """The training problems of --data. Without a tokenizer GSM8K's are placeholders that say how
    many tokens they have, so its files are not needed. A note then says where lengths are from."""
    if not is_stand_in(found):
        return data.load_problems(args.data, "train", args.data_dir, args.unscored)
    lengths, socratic = table(), args.data == "socratic"
    if args.data != "main" and not socratic:
        question, answer = lengths["characters"]
        print(f"note: tokens are estimated: one for every {question} characters of a question and "
              f"{answer} of an answer, as in GSM8K")  # fmt: skip
        return data.load_problems(args.data, "train", args.data_dir, args.unscored)
    estimated = "; socratic answers are estimated from main's" * socratic
    print(f"note: GSM8K's tokens are from a table, counted by Gemma 1's tokenizer{estimated}")
    times, plus = lengths["socratic"] if socratic else (1, 0)
    sizes = [(n, round(times * m + plus)) for count, n, m in lengths["main"] for _ in range(count)]
    return [
        data.Problem(f"{n} tokens, problem {i}", f"{m} tokens, problem {i}", i)
        for i, (n, m) in enumerate(sizes)
    ]


def encode(
    tokenizer: data.Tokenizer | None, prompt: data.Prompt, question: str, answer: str | None = None
) -> tuple[list[int], list[int]]:
    """data.encode. Without a tokenizer: as many ids as it would return, all of them 0, and the mask
    of that many."""
    if tokenizer is not None:
        return data.encode(tokenizer, prompt, question, answer)
    found = table()
    more = found["chat"] * (prompt.style == "chat") + found["instruction"] * prompt.instruction
    n = more + _tokens(question, found["characters"][0])
    m = 0 if answer is None else _tokens(answer, found["characters"][1])
    return [0] * (n + m), [0] * n + [1] * m


def _tokens(text: str, characters: float) -> int:
    said = re.fullmatch(r"(\d+) tokens, problem \d+", text)
    return int(said[1]) if said else 1 + math.ceil(len(text) / characters)
