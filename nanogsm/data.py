"""GSM8K: problem -> prompt -> ids + mask -> batch, and back: completion -> answer -> right or wrong.

One problem, as the files have it (the annotations in << >> are part of what the model learns):

    question  Natalia sold clips to 48 of her friends in April, and then she sold half as many ...
    answer    Natalia sold 48/2 = <<48/2=24>>24 clips in May.
              Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
              #### 72

and what training makes of it in plain style (one mask digit a token, 1 where a token is supervised):

    <bos>Question: Natalia sold ... May?\nAnswer:| Natalia sold 48/2 = ... #### 72<eos>
      0     0    0    0    0 ...   0  0   0   0  |  1      1   1   1 ...         1   1

The space after "Answer:" belongs to the target. A prompt ending in a space would end in a lone
space token, which never occurs when prompt and answer are read as one text: training and generation
would see different prompts. Prompt ids are a prefix of training ids, always.

Every BOS, every EOS and every mask of SFT is made in this file and nowhere else. (PPO's mask is what was
sampled.)
"""

import hashlib
import json
import math
import os
import random
import re
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from torch import Tensor

from nanogsm import UserError
from nanogsm.store import hub

# ------------------------------------------------------------------------------------- problems


class Problem(NamedTuple):
    question: str
    answer: str  # worked steps, then "#### " and the number
    index: int  # its place among the file's problems, from 0: what results refer to


# Generated data by name: GSM8K's two styles, and every answer with its working (tiny/problems.py).
GENERATED = {
    "tiny": {"style": "main"},
    "tiny-socratic": {"style": "socratic"},
    "tiny-worked": {"style": "main", "worked_only": True},
}
NAMED = ("main", "socratic", *GENERATED)  # data with a training and a test split


def load_problems(data: str, split: str, data_dir: str | None = None) -> list[Problem]:
    """data: "main", "socratic", a name in GENERATED or a JSONL file of one's own; split "train" or "test"
    (a file of one's own is used whole for either). Raises UserError naming the file and line at
    fault."""
    if data in GENERATED:
        from nanogsm.tiny import problems  # here, because that file writes Problems

        return problems.problems(split, **GENERATED[data])
    if data in ("main", "socratic"):
        name = f"{split}.jsonl" if data == "main" else f"{split}_socratic.jsonl"
        return read_jsonl(hub.data_file(name, data_dir))
    if not data.endswith((".jsonl", ".json")):
        raise UserError(f"--data {data}: give {', '.join(NAMED)} or a file whose name ends in .jsonl")
    return read_jsonl(Path(data))


def read_jsonl(path: Path) -> list[Problem]:
    """One object a line with the texts "question" and "answer", the answer ending in "#### n"."""
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")  # Windows editors add a mark
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start})") from e
    problems = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 is no end
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer = row["question"].strip(), row["answer"].strip()
            (question + answer).encode()  # half a surrogate pair is JSON, but not text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            missing = f"; {e} is missing" if isinstance(e, KeyError) else ""
            wanted = 'a JSON object with "question" and "answer" texts, one a line'
            raise UserError(f"{path} line {number}: not {wanted}{missing}") from e
        if not question:
            raise UserError(f"{path} line {number}: the question is empty")
        if fault := _unscorable(answer):
            raise UserError(f"{path} line {number}: {fault}")
        problems.append(Problem(question, answer, len(problems)))
    if not problems:
        raise UserError(f"{path} has no problems in it")
    return problems


def _unscorable(answer: str) -> str | None:
    """Why no completion could match this answer, or why a wrong one might; None if it is sound."""
    kept = cut(answer)
    if extract_answer(kept) is None:
        there = "" if kept == answer else f' before "{STOP_TEXT}", where completions are cut off'
        return f'the answer has no "#### number"{there}'
    rest = kept.partition("####")[2]
    if _GOES_ON.match(rest, _AFTER_MARKER.match(rest).end()):
        return f'what follows "####" is not one number: {rest.strip()[:40]!r}'
    return None


# Fixed, so that results of different runs and seeds are about the same problems.
SUBSET_SEED = 8


def split_validation(problems: list[Problem], n: int) -> tuple[list[Problem], list[Problem]]:
    """(rest, validation): a fixed sample of n training problems held out. Problem 0 stays in the
    rest: GSM8K's is the one-shot example, whose answer the model is shown."""
    if not 0 <= n < len(problems):
        raise UserError(f"--val-examples {n} of {len(problems)} training problems leaves none to "
                        "train on: give fewer (0: no validation)")  # fmt: skip
    held_out = set(random.Random(SUBSET_SEED).sample(range(1, len(problems)), n))
    rest = [p for i, p in enumerate(problems) if i not in held_out]
    return rest, [problems[i] for i in sorted(held_out)]


def usual_held_out(n: int, tiny: bool) -> int:
    """How many of n training problems are held out if nobody says: of a small file a tenth."""
    return min(256 if tiny else 64, n // 10)


def subset(problems: list[Problem], n: int) -> list[Problem]:
    """A fixed sample of n problems (all when n is larger), in file order."""
    chosen = random.Random(SUBSET_SEED).sample(range(len(problems)), min(n, len(problems)))
    return [problems[i] for i in sorted(chosen)]


def digest(problems: list[Problem]) -> str:
    """SHA-256 of what the problems say, in the file's order: a run refuses to go on with other data."""
    in_order = sorted(problems, key=lambda problem: problem.index)
    return hashlib.sha256(json.dumps(in_order).encode()).hexdigest()


# ------------------------------------------------------------------------------------- answers

# Commas count only where thousands have them: "1,234" is one number, "3, 5" and "1,5" are two. What
# may come before the digits shares no character with them, so a long run of spaces costs no more
# than its length. A minus after a digit is a subtraction: the last number of "10-3" is 3.
_DIGITS = r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_AFTER_MARKER = re.compile(r"([-$\s]*)" + _DIGITS)  # "#### 72", "####$72", "#### -$72"
_ANYWHERE = re.compile(r"((?:(?<![0-9])-)?\$?)" + _DIGITS)
_GOES_ON = re.compile(r"\s*[-+*/^:.,]\s*[0-9(]|[eE][-+]?[0-9]")  # as in "1/2", "5 - 10", "1,5", "1e6"
TOLERANCE = 1e-6
STOP_TEXT = "Question:"  # a completion that starts a new question has run past its answer


def extract_answer(text: str) -> float | None:
    """The number right after the first "####" (the report's rule); None without either."""
    _, marker, rest = text.partition("####")
    found = _AFTER_MARKER.match(rest) if marker else None
    return _to_number(*found.groups()) if found else None


def last_number(text: str) -> float | None:
    """The last number anywhere: what the model computed, whether or not it kept to the format."""
    found = None
    for found in _ANYWHERE.finditer(text):
        pass
    return _to_number(*found.groups()) if found else None


def _to_number(prefix: str, digits: str) -> float | None:
    value = float(digits.replace(",", ""))
    if math.isinf(value):  # a run of several hundred digits
        return None
    return -value if "-" in prefix else value


def same_number(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and abs(a - b) <= TOLERANCE


def cut(completion: str) -> str:
    """What counts of a completion: up to where it starts asking itself a new question."""
    return completion.split(STOP_TEXT, 1)[0].strip()


def starts_new_question(tokenizer: "Tokenizer", ids: list[int]) -> bool:
    """Whether the newest of ids complete STOP_TEXT, which may be sampled a character at a time."""
    return STOP_TEXT in tokenizer.decode(ids[-len(STOP_TEXT) :])


def answer_limit(data: str) -> int:
    """How many tokens an answer may take by default: all but a few of the data's own fit."""
    limits = {"socratic": 512, "tiny": 128, "tiny-worked": 128, "tiny-socratic": 160}
    return limits.get(data, 320)


def is_correct(completion: str, problem: Problem) -> bool:
    """Exact match, strict: the report's measure and PPO's default reward."""
    return same_number(extract_answer(cut(completion)), extract_answer(problem.answer))


def is_correct_flexible(completion: str, problem: Problem) -> bool:
    """The last number counts. Reported beside exact match, never instead of it."""
    return same_number(last_number(cut(completion)), extract_answer(problem.answer))


# ------------------------------------------------------------------------------------ tokenizer


class Tokenizer:
    """A checkpoint's tokenizer.json. `encode` adds no special token and reads none out of the text:
    a problem that mentions "<eos>" is just text.

    stop_ids is the union of what config.json and generation_config.json call end of sequence and
    the ids of <eos> and <end_of_turn>: sibling repositories disagree, and a model that is stopped
    on only one of them runs on after its answer.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as e:  # the Rust library raises bare Exceptions
            raise UserError(f"cannot use {self.folder / 'tokenizer.json'}: {e}") from e
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.pad_id, self.bos_id = self._id("<pad>"), self._id("<bos>")
        self.eos_id, self.end_of_turn_id = self._id("<eos>"), self._id("<end_of_turn>")
        self.start_of_turn_id = self._id("<start_of_turn>")
        self.stop_ids = frozenset({self.eos_id, self.end_of_turn_id} | self._configured_stops())
        if self.pad_id in self.stop_ids:
            raise UserError(f"{folder}: <pad> is also a stop token: not Gemma's settings")

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"{self.folder / 'tokenizer.json'} has no {token}: not Gemma's tokenizer")
        return found

    def _configured_stops(self) -> set[int]:
        stops: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            try:
                given = json.loads((self.folder / name).read_text("utf-8")).get("eos_token_id")
            except (OSError, ValueError, AttributeError, RecursionError):
                continue  # read_config complains about config.json; the other is optional
            stops |= {i for i in (given if isinstance(given, list) else [given]) if type(i) is int}
        return stops

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def show(self, ids: list[int], mask: list[int]) -> str:
        """Each token with its mask bit, for looking at what is supervised: `tok|0 tok|1`."""
        pieces = (self._tokenizer.id_to_token(i) for i in ids)
        return " ".join(f"{piece!r}|{bit}" for piece, bit in zip(pieces, mask, strict=True))


# -------------------------------------------------------------------------------- ids and masks

INSTRUCTION = (
    "You are a helpful math assistant. Please provide a step-by-step derivation and end your "
    "answer with the final numerical result in the format '#### <number>'."
)
ONE_SHOT = Problem(  # the first training problem
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?",
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
    0,
)


class Prompt(NamedTuple):
    """How a question is put: style "plain" (Question: ... Answer:) or "chat" (Gemma's turns), with
    no or one worked example before it, with or without the instruction."""

    style: str = "plain"
    shots: int = 0
    instruction: bool = False

    def __str__(self) -> str:
        shot = "one-shot" if self.shots else "zero-shot"
        return f"{self.style}, {shot}{', instruction' if self.instruction else ''}"


def encode(
    tokenizer: Tokenizer, prompt: Prompt, question: str, answer: str | None = None
) -> tuple[list[int], list[int]]:
    """(ids, mask) of equal length. With an answer: a training example, whose answer and end token
    are supervised (mask 1). Without: the prompt alone, a prefix of the same ids."""
    ids, mask = [], []

    def add(piece: str | int, supervised: int = 0) -> None:
        new = [piece] if isinstance(piece, int) else tokenizer.encode(piece)
        ids.extend(new)
        mask.extend([supervised] * len(new))

    add(tokenizer.bos_id)  # exactly one: Gemma's perplexity is absurd without it
    lead = INSTRUCTION + "\n\n" if prompt.instruction else ""
    if prompt.style == "chat":
        # user\n...\nmodel\n between turn tokens, which are put in as ids: text is only ever text.
        def ask(text: str) -> None:
            add(tokenizer.start_of_turn_id)
            add(f"user\n{text}")
            add(tokenizer.end_of_turn_id)
            add("\n")
            add(tokenizer.start_of_turn_id)
            add("model\n")

        for _ in range(prompt.shots):
            ask(lead + ONE_SHOT.question)  # Gemma 1 and 2 have no system turn: the instruction leads
            add(ONE_SHOT.answer)
            add(tokenizer.end_of_turn_id)
            add("\n")
            lead = ""
        ask(lead + question)
        target, end = answer, tokenizer.end_of_turn_id
    else:
        for _ in range(prompt.shots):
            add(f"{lead}Question: {ONE_SHOT.question}\nAnswer:")
            add(f" {ONE_SHOT.answer}\n\n")
            lead = ""
        add(f"{lead}Question: {question}\nAnswer:")
        target, end = f" {answer}", tokenizer.eos_id
    if answer is not None:
        add(target, 1)
        add(end, 1)  # supervised, or the model never learns to stop
    return ids, mask


class Example(NamedTuple):
    ids: list[int]
    mask: list[int]  # 1 on supervised (SFT) or generated (PPO) tokens
    index: int  # of the problem


class Batch(NamedTuple):
    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool
    lengths: list[int]  # of the rows, without padding


def collate(rows: list[Example], pad_id: int, device: str | torch.device = "cpu") -> Batch:
    """Rows padded on the right to the longest; padding is never supervised."""
    T = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), T), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), T), dtype=torch.bool)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = torch.tensor(row.ids)
        mask[b, : len(row.mask)] = torch.tensor(row.mask, dtype=torch.bool)
    return Batch(ids.to(device), mask.to(device), [len(row.ids) for row in rows])


def micro_batches(rows: list, size: int) -> list[list]:
    """A step's rows in the order drawn, `size` at a time. The loss is normalised over the whole step and
    padding costs nothing (model.py), so the cut changes nothing but rounding."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]
