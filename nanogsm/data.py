"""GSM8K: problem -> prompt -> ids + mask -> batch, and completion -> answer -> right or wrong.

A problem as the files have it (the annotations in << >> are part of what the model learns):

    question  Natalia sold clips to 48 of her friends in April, and then she sold half as many ...
    answer    Natalia sold 48/2 = <<48/2=24>>24 clips in May.
              Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
              #### 72

The same problem as a training example in plain style, with the mask digit of each token:

    <bos>Question: Natalia sold ... May?\nAnswer:| Natalia sold 48/2 = ... #### 72<eos>
      0     0    0    0    0 ...   0  0   0   0  |  1      1   1   1 ...         1   1

The loss counts the tokens with mask 1. The prompt's ids are a prefix of these: training and
generation see the same prompt. `encode` makes every BOS, EOS and mask of SFT and evaluation. PPO's
mask marks sampled tokens, and experiments/pretrain_tiny.py adds BOS and EOS to its own texts.
"""

import functools
import hashlib
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch

from nanogsm import UserError, boxed, distributed
from nanogsm.store import files, hub
from nanogsm.tiny import problems as tiny_problems

GENERATED = {"tiny": "main", "tiny-socratic": "socratic", "tiny-worked": "main"}  # name -> style
NAMED = ("main", "socratic", *boxed.NAMES, *GENERATED)  # data with a test split
SUBSET_SEED = 8  # fixed, so that all runs hold out and evaluate the same problems


class Problem(NamedTuple):
    question: str
    answer: str  # worked steps, then "#### " and the number; in MATH with a box (boxed.py)
    index: int  # position in the file, counted from 0; results refer to problems by it

    @property
    def boxed(self) -> bool:
        """Whether the answer is MATH's kind, a formula in a box. GSM8K's is a number after ####."""
        return boxed.ends_in_box(self.answer)


# -------------------------------------------------------------------------------- ids and masks

INSTRUCTION = (
    "You are a helpful math assistant. Please provide a step-by-step derivation and end your "
    "answer with the final numerical result in the format '#### <number>'."
)
ONE_SHOT = Problem(  # the first training problem
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May?",
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
    0,
)


class Prompt(NamedTuple):
    """How a question is asked."""

    style: str = "plain"  # "plain" is Question: ... Answer:, "chat" has the turns of a conversation
    shots: int = 0  # how many worked examples come before the question
    instruction: bool = False  # whether INSTRUCTION comes first
    boxed: bool = False  # whether instruction and worked example have MATH's kind of answer
    examples: tuple[Problem, ...] = (ONE_SHOT,)  # the first `shots` of these

    def __str__(self) -> str:
        shots = ("zero", "one")[self.shots] if self.shots < 2 else self.shots
        return f"{self.style}, {shots}-shot{', instruction' if self.instruction else ''}"

    def settings(self) -> dict:
        """What files record: all but the examples, and boxes only where they are used."""
        record = {"style": self.style, "shots": self.shots, "instruction": self.instruction}
        return record | ({"boxed": True} if self.boxed else {})


def encode(
    tokenizer: "Tokenizer", prompt: Prompt, question: str, answer: str | None = None
) -> tuple[list[int], list[int]]:
    """(ids, mask) of equal length. With an answer: a training example, in which the answer and the
    end token have mask 1. Without: the prompt alone, a prefix of the same ids."""
    ids, mask = [], []

    # Encoding piece by piece gives the ids of the whole text, because no token spans two pieces.
    def add(*pieces: str | int, supervised: int = 0) -> None:
        for piece in pieces:
            new = [piece] if isinstance(piece, int) else tokenizer.encode(piece)
            ids.extend(new)
            mask.extend([supervised] * len(new))

    # Exactly one BOS, because all texts in pretraining start with one. Without it Gemma's
    # perplexity is absurd. Two are a common bug: many tokenizers add one unasked.
    add(tokenizer.bos_id)  # the only one, because `Tokenizer.encode` adds none
    instruction, shots = INSTRUCTION, prompt.examples[: prompt.shots]
    if prompt.boxed:
        instruction, own = boxed.INSTRUCTION, ONE_SHOT._replace(answer=boxed.ONE_SHOT_ANSWER)
        shots = [own if shot == ONE_SHOT else shot for shot in shots]
    lead = instruction + "\n\n" if prompt.instruction else ""
    if prompt.style == "chat":
        # Turn tokens are added as ids: "<end_of_turn>" in a question would only be text.
        family, end, target = tokenizer.family, tokenizer.end_of_turn_id, answer
        turn, after = tokenizer.turn, family.after
        if family.system:
            add(*turn("system", family.system), end, after)
        for shot in shots:
            add(*turn("user", f"{lead}{shot.question}"), end, after, *turn(family.model))
            add(shot.answer, end, after)
            lead = ""
        add(*turn("user", f"{lead}{question}"), end, after, *turn(family.model))
    else:
        # The space after "Answer:" belongs to the target, because these tokenizers join a word with
        # the space before it. A prompt that ended in a space would end in a lone space token, which
        # the model never sees there in training.
        end, target = tokenizer.eos_id, f" {answer}"
        for shot in shots:
            add(f"{lead}Question: {shot.question}\nAnswer:")
            add(f" {shot.answer}\n\n")
            lead = ""
        add(f"{lead}Question: {question}\nAnswer:")
    if answer is not None:
        add(target, end, supervised=1)  # EOS is learnt here, or the model would never stop
    return ids, mask


class Example(NamedTuple):
    ids: list[int]
    mask: list[int]  # 1 on supervised (SFT) or generated (PPO) tokens
    index: int  # of the problem


class Batch(NamedTuple):
    ids: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) bool, always on the CPU
    lengths: list[int]  # of the rows, without padding


def collate(rows: list[Example], pad_id: int, device: str | torch.device = "cpu") -> Batch:
    """Rows padded to the longest. Padding is never supervised."""
    # On the right: position t then holds a row's token t, and causal attention sees no padding.
    T = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), T), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), T), dtype=torch.bool)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = torch.tensor(row.ids)
        mask[b, : len(row.mask)] = torch.tensor(row.mask, dtype=torch.bool)
    # The mask stays behind: to find its positions on a GPU, the CPU would wait for it.
    return Batch(ids.to(device, non_blocking=True), mask, [len(row.ids) for row in rows])


def supervised_tokens(examples: list[Example]) -> int:
    """How many tokens of the examples are predicted in training: answers and end tokens."""
    return sum(sum(example.mask) for example in examples)


def micro_batches(rows: Sequence, size: int) -> list[Sequence]:
    """A step's rows in the order drawn, `size` at a time, or fewer to give more devices some."""
    # The size changes only rounding: the loss is divided by the whole step's supervised tokens.
    size = min(size, distributed.largest_share(len(rows))) or 1
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def permutation(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n items in an epoch. Only (seed, epoch) decide it, so no state is saved."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def problems_of_step(problems: list, step: int, n: int, seed: int, group: int = 1) -> list:
    """A PPO step's n // group problems, each `group` times, from endless permutations of all."""
    found, n = [], n // group
    for place in range(step * n, (step + 1) * n):
        epoch, i = divmod(place, len(problems))
        if i == 0 or not found:
            order = permutation(len(problems), seed, epoch)
        found += [problems[order[i]]] * group
    return found


# ------------------------------------------------------------------------------------- answers

# "1,234" is one number, "3, 5" and "1,5" are two, and "10-3" ends in 3. The part before the digits
# shares no character with them, so matching takes linear time.
_DIGITS = r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_AFTER_MARKER = re.compile(r"([-\u2212$\s]*)" + _DIGITS)  # "#### 72", "####$72", "#### -$72"
_ANYWHERE = re.compile(r"((?:(?<![0-9])-)?\$?)" + _DIGITS)
# What may follow the digits on their line and make another number of them: "18 000", "18/1",
# "5 - 10", "1'234", "1_234", "1,5", "18e2", "1 1/2", "1½", "2 x 10", "5 or 6", "1 million".
# "18 apples" stays 18.
_OPERATOR = r"[-\u2010-\u2015\u2212+*/\u2044^:.,'\u2019_x\u00d7\u00b7=]"
_WORD = r"(?:or|and|to)"
_AMOUNT = r"(?:k|dozen|hundred|thousand|million|billion|trillion)"
_DIGIT = r"[\d\u00bc-\u00be\u2150-\u215f]"  # of any script, or a fraction such as ½
_GOES_ON = re.compile(
    rf"[^\S\n]*(?:(?:{_OPERATOR}|{_WORD}\b)?[^\S\n]*{_DIGIT}|{_OPERATOR}[^\S\n]*\(|{_AMOUNT}\b)"
    r"|e[-+\u2212]?\d",
    re.IGNORECASE,
)
TOLERANCE = 1e-6
STOP_TEXT = "Question:"  # a completion that starts a new question has gone past its answer


def extract_answer(text: str, in_box: bool = False) -> float | str | None:
    """The number right after the first "####" (the original study's rule), or None. in_box: MATH's
    rule, what stands in the last box."""
    if in_box:
        return boxed.last_box(text)
    _, marker, rest = text.partition("####")
    found = _AFTER_MARKER.match(rest) if marker else None
    # Trap: without the second check "#### 18 000" and "#### 18/2" would count as 18.
    if found is None or _GOES_ON.match(rest, found.end()):
        return None
    return _to_number(*found.groups())


def last_number(text: str) -> float | None:
    """The last number anywhere: what the model computed, in whatever format."""
    found = _ANYWHERE.findall(text)
    return _to_number(*found[-1]) if found else None


def _to_number(prefix: str, digits: str) -> float | None:
    value = float(digits.replace(",", "")) * (-1 if re.search(r"[-\u2212]", prefix) else 1)
    return value if math.isfinite(value) else None  # several hundred digits are infinite


def same_number(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and abs(a - b) <= TOLERANCE


def cut(completion: str) -> str:
    """The part of a completion that counts. A model that has not learnt to stop asks itself a new
    question after its answer. That question and all text after it are dropped."""
    return completion.split(STOP_TEXT, 1)[0].strip()


def starts_new_question(tokenizer: "Tokenizer", ids: list[int]) -> bool:
    """Whether the newest ids complete STOP_TEXT, where sampling stops. A token can be a letter."""
    # Only a token with its last character, ":", can complete it, and decoding takes time.
    return ids[-1] in tokenizer.colons and STOP_TEXT in tokenizer.decode(ids[-len(STOP_TEXT) :])


def answer_limit(data: str) -> int:
    """Default number of tokens an answer may take. Nearly all answers of the data fit."""
    limits = {"socratic": 512, "tiny": 128, "tiny-worked": 128, "tiny-socratic": 160}
    return (limits | dict.fromkeys(boxed.NAMES, 1024)).get(data, 320)


def is_correct(completion: str, problem: Problem) -> bool:
    """Strict exact match, on which PPO's default reward rests: the measure of the study that this
    project implements (README.md)."""
    if problem.boxed:
        return boxed.grade(boxed.last_box(cut(completion)), boxed.last_box(problem.answer)).right
    # The first "####" decides. Working is not checked, and later lines do not count.
    return same_number(extract_answer(cut(completion)), extract_answer(problem.answer))


def is_correct_flexible(completion: str, problem: Problem) -> bool:
    """Whether the last number is right. Reported next to exact match, never instead of it."""
    return same_number(last_number(cut(completion)), extract_answer(problem.answer))


def beside(completion: str, problem: Problem) -> dict:
    """What a result says next to exact match."""
    if problem.boxed:
        return boxed.beside(cut(completion), problem.answer)
    return {"flexible": is_correct_flexible(completion, problem)}


# ------------------------------------------------------------------------------------ tokenizer


class Family(NamedTuple):
    """The special tokens of a family of models, and how it writes the turns of a conversation."""

    name: str
    bos: str
    eos: str
    end_of_turn: str
    header: tuple[str, ...]  # what opens a turn: special tokens and text; {} is the role
    after: str  # text between the end of a turn and the next
    model: str  # the model's role
    pad: tuple[str, ...]  # the first that the tokenizer has; `collate` hides padding from the loss
    system: str = ""  # what the first turn, the system's, always says
    stops: tuple[str, ...] = ()  # more tokens that end an answer


GEMMA = Family(
    "Gemma", "<bos>", "<eos>", "<end_of_turn>",
    ("<start_of_turn>", "{}\n"), "\n", "model", ("<pad>",),
)  # fmt: skip
# Trap: Llama names no padding token. Where EOS serves as one and all its places are hidden from
# the loss, the model never learns to stop.
LLAMA = Family(
    "Llama 3", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
    ("<|start_header_id|>", "{}", "<|end_header_id|>", "\n\n"), "", "assistant",
    ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"),
)  # fmt: skip
# The dates are those that Llama 3.1's own template writes if it is told no other.
LLAMA_31 = LLAMA._replace(
    system="Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
    stops=("<|eom_id|>",),
)


class Tokenizer:
    """The tokenizer.json of a checkpoint. `encode` adds no special tokens and finds none in the
    text: a problem that mentions "<eos>" is only text.

    stop_ids are all ids that end an answer: the family's EOS and end of turn, and the eos_token_id
    of both config.json and generation_config.json. Trap: checkpoints differ in these. A model that
    stops at only one of the ids may run on after its answer.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as e:  # the Rust library raises bare Exceptions
            raise UserError(f"cannot use {self.folder / 'tokenizer.json'}: {e}") from e
        self._tokenizer.no_padding()  # whatever the file says; `collate` pads
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "<eos>" in a text is only text
        has = lambda token: self._tokenizer.token_to_id(token) is not None  # noqa: E731
        llama = LLAMA_31 if has("<|eom_id|>") else LLAMA
        family = self.family = llama if has(LLAMA.bos) else GEMMA
        pad = next(filter(has, family.pad), family.pad[-1])
        self.pad_id, self.bos_id = self._id(pad), self._id(family.bos)
        self.eos_id, self.end_of_turn_id = self._id(family.eos), self._id(family.end_of_turn)
        self._header = [self._id(p) if p[0] == "<" else p for p in family.header]
        more = {self._id(token) for token in family.stops} | self._configured_stops()
        self.stop_ids = frozenset({self.eos_id, self.end_of_turn_id} | more)
        if self.pad_id in self.stop_ids:
            raise UserError(f"{folder}: {pad} is also a stop token, which it is not in this family")

    def _id(self, token: str) -> int:
        if (found := self._tokenizer.token_to_id(token)) is None:
            raise UserError(f"{self.folder}: tokenizer.json has no {token}, so it is neither "
                            "Gemma's nor Llama 3's")  # fmt: skip
        return found

    def turn(self, role: str, text: str = "") -> list[int | str]:
        """A turn of a conversation up to its end token, in pieces: ids of special tokens, and text.
        The text is joined to the last piece of the header, as in the whole conversation."""
        *pieces, last = (p if type(p) is int else p.format(role) for p in self._header)
        return [*pieces, last + text]

    def _configured_stops(self) -> set[int]:
        stops: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            try:
                given = json.loads((self.folder / name).read_text("utf-8")).get("eos_token_id")
            except (OSError, ValueError, AttributeError, RecursionError):
                continue  # read_config reports a bad config.json; the other file is optional
            stops |= {i for i in (given if isinstance(given, list) else [given]) if type(i) is int}
        return stops

    def token_beyond(self, size: int) -> str | None:
        """A token that text can contain and whose id is not below size. (Special tokens cannot be
        contained in text, so Gemma 3's image tokens may lie beyond its text model's embeddings.)"""
        added = self._tokenizer.get_added_tokens_decoder()
        ids = [self._tokenizer.get_vocab_size(with_added_tokens=False) - 1]
        ids += [i for i, token in added.items() if not token.special]
        return self._tokenizer.id_to_token(max(ids)) if max(ids) >= size else None

    @functools.cached_property
    def colons(self) -> frozenset[int]:
        """All tokens whose text has ":", the last character of STOP_TEXT. One is its byte."""
        names = self._tokenizer.get_vocab()  # piece -> id
        return frozenset(i for piece, i in names.items() if ":" in piece or piece == "<0x3A>")

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def show(self, ids: list[int], mask: list[int]) -> str:
        """Each token with its mask digit, to see what is supervised: `'▁May'|1 '<eos>'|1`."""
        pieces = (self._tokenizer.id_to_token(i) for i in ids)
        return " ".join(f"{piece!r}|{bit}" for piece, bit in zip(pieces, mask, strict=True))


# ------------------------------------------------------------------------------- files of problems


def load_problems(
    data: str, split: str, data_dir: str | None = None, unscored: bool = False
) -> list[Problem]:
    """Problems of a name in NAMED or of your own JSONL file. split is "train" or "test"; your own
    file is used whole for both. unscored: its answers need no result. UserError names the file and
    line at fault."""
    boxed.check_data(data, split)
    if data in GENERATED:
        pairs = tiny_problems.problems(split, GENERATED[data], data == "tiny-worked")
        return [Problem(*pair, index) for index, pair in enumerate(pairs)]
    if data in NAMED:
        file = hub.data_file(hub.DATA_NAMES[data].format(split), data_dir)
        return read_jsonl(file, leave_out=boxed.NO_ANSWER if data == "math" else None)
    if not data.lower().endswith((".jsonl", ".json")):
        hint = "; worked needs --tiny" * (data == "worked")
        names = "main, socratic, math"
        raise UserError(f"--data {data}: give {names} or a file that ends in .jsonl{hint}")
    return read_jsonl(Path(data), unscored)


def read_jsonl(
    path: Path, unscored: bool = False, leave_out: str | None = None
) -> list[Problem]:
    """One object per line with a question and an answer (files.read_pairs has the forms). Unless
    `unscored`, each answer ends in "#### n" or in a box. leave_out: a fault that is no error."""
    problems, pairs = [], files.read_pairs(path)
    for index, (number, question, answer) in enumerate(pairs):
        fault = None if unscored else _unscorable(answer)
        if fault is None:
            problems.append(Problem(question, answer, index))
        elif fault != leave_out:
            raise UserError(f"{path} line {number}: {fault}")
    if left_out := len(pairs) - len(problems):
        print(f"left out {left_out} of {len(pairs):,} problems: {leave_out}")
    if any(problem.boxed for problem in problems):
        boxed.grader_name()  # raises if it is missing
    return problems


def _unscorable(answer: str) -> str | None:
    """Why no completion could match this answer, or why a wrong one could. None if it is fine."""
    kept = cut(answer)  # as completions are cut
    if boxed.ends_in_box(answer):
        return None if boxed.last_box(kept) else boxed.NO_ANSWER
    rest = kept.partition("####")[2]
    found = _AFTER_MARKER.match(rest)
    if not re.search(_DIGIT, rest):
        where = f' before "{STOP_TEXT}", where completions are cut off'
        where = r" and no \boxed{}" if kept == answer else where
        return f'the answer has no "#### number"{where} (--unscored trains on such answers)'
    # In doubt a gold answer is refused: one that nobody can match would only lower the score.
    if extract_answer(kept) is None or rest[found.end() :].strip() not in ("", "."):
        shown = rest.strip()[:40]
        return f'what follows the first "####" is not one number and nothing else: {shown!r}'
    return None


def split_validation(problems: list[Problem], n: int) -> tuple[list[Problem], list[Problem]]:
    """(rest, validation): a fixed sample of n training problems is held out. Problem 0 is never
    held out: in GSM8K it is the one-shot example, whose answer the prompt shows."""
    if not 0 <= n < len(problems):
        raise UserError(f"--val-examples {n} of {len(problems)} leaves none to train on: lower it")
    held_out = set(random.Random(SUBSET_SEED).sample(range(1, len(problems)), n))
    rest = [p for i, p in enumerate(problems) if i not in held_out]
    return rest, [problems[i] for i in sorted(held_out)]


def usual_held_out(n: int, tiny: bool) -> int:
    """Default validation size: 64 (tiny: 256), at most 10% of the n training problems."""
    return min(256 if tiny else 64, n // 10)


def subset(problems: list[Problem], n: int) -> list[Problem]:
    """A fixed sample of n problems in file order, or all if there are fewer."""
    chosen = random.Random(SUBSET_SEED).sample(range(len(problems)), min(n, len(problems)))
    return [problems[i] for i in sorted(chosen)]


def digest(problems: list[Problem]) -> str:
    """SHA-256 of the problems in file order. With it a run refuses to continue on other data."""
    in_order = sorted(problems, key=lambda problem: problem.index)
    return hashlib.sha256(json.dumps(in_order).encode()).hexdigest()
