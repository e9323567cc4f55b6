"""Answers in steps, with a label for each step: the data of train_prm.py.

A file has one object per line, in one of two forms.

    {"index": 7, "question": "...", "steps": ["6*2 = 12", "#### 12"], "labels": [0.75, 1]}

experiments/label.py writes this one. A step is a line of an answer. Its label, from 0 to 1, says
how right everything up to its end is; null says that nobody knows. `index` is the number of the
problem, which all answers to it share. It is in every row of a file or in none; without it the
question tells the problem.

The other form is PRM800K's (Lightman et al. 2023, arXiv 2305.20050), in which people rated GPT-4's
steps on MATH: -1 is wrong, 1 is right, and 0, neutral, counts as right here. At each step there are
several completions, of which one was chosen to go on from, or a person wrote another.
`rated_answers` makes answers of them.
"""

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nanogsm import UserError, data
from nanogsm.store import files, hub

PRM800K = "prm800k"  # the name in --data of PRM800K's phase 1
# Files that rate answers to the 500 problems on which a model trained on PRM800K is tested.
TEST_FILES = ("phase1_test.jsonl", "phase2_test.jsonl")
LEFT_OUT = ("bad_problem", "give_up")  # finish reasons of PRM800K's rows that have no answer


class Solution(NamedTuple):
    """An answer to a problem, step by step."""

    question: str
    steps: list[str]  # without line breaks
    labels: list[float | None]  # of the steps
    index: int  # of the problem


class Example(NamedTuple):
    """A solution in ids. data.collate and data.supervised_tokens take it for a data.Example."""

    ids: list[int]
    mask: list[int]  # 1 on the token that follows a step with a label
    index: int
    labels: list[float]  # one for each 1 in the mask


# ---------------------------------------------------------------------------------- steps and ids


def steps_of(answer: str) -> list[str]:
    """The lines of an answer that have something in them."""
    return [line.strip() for line in data.cut(answer).split("\n") if line.strip()]


@functools.cache
def _ends_line(tokenizer: data.Tokenizer, token: int) -> bool:
    return "\n" in tokenizer.decode([token])


def encode(
    tokenizer: data.Tokenizer, prompt: data.Prompt, question: str, steps: list[str]
) -> tuple[list[int], list[int]]:
    """(ids, ends): a training example of data.encode, and for each step the place of its last
    token. That is the one with the line break, and for the last step the one before the end token.
    """
    ids, mask = data.encode(tokenizer, prompt, question, "\n".join(steps))
    answer = range(mask.index(1), len(ids) - 2)
    ends = [t for t in answer if _ends_line(tokenizer, ids[t])] + [len(ids) - 2]
    if len(ends) != len(steps):
        raise UserError(f"this tokenizer finds {len(ends)} steps in {steps!r:.200}")
    return ids, ends


def example_of(
    tokenizer: data.Tokenizer, prompt: data.Prompt, solution: Solution, outcome: bool = False
) -> Example:
    """outcome: only the last step has a label."""
    ids, ends = encode(tokenizer, prompt, solution.question, solution.steps)
    pairs = list(zip(ends, solution.labels))[-1 if outcome else 0 :]
    known = [(end, label) for end, label in pairs if label is not None]
    mask = [0] * len(ids)
    # Column t of a batch is about hidden state t, which predicts token t + 1 (train_ppo.py's
    # drawing). So the mask is on the token that follows the step, as it is on predicted tokens.
    for end, _ in known:
        mask[end + 1] = 1
    return Example(ids, mask, solution.index, [label for _, label in known])


def examples_of(
    tokenizer, prompt: data.Prompt, solutions: list[Solution], limit: int, outcome: bool = False,
    of: str = "",
) -> list[Example]:  # fmt: skip
    """Solutions as examples. Those over `limit` tokens, or without a label, are left out. of: which
    solutions these are, for messages."""
    made = [example_of(tokenizer, prompt, solution, outcome) for solution in solutions]
    kept = [example for example in made if example.labels and len(example.ids) <= limit]
    if made and not kept:
        raise UserError(f"no {of}answer is at most --max-seq-length {limit} long and has a label")
    if len(kept) < len(made):
        print(f"left out {len(made) - len(kept)} of {len(made)} {of}answers: longer than "
              f"--max-seq-length {limit}, or without a label")  # fmt: skip
    return kept


def hold_out(solutions: list[Solution], n: int) -> tuple[list[Solution], list[Solution]]:
    """(rest, validation): all answers to a fixed sample of n problems are held out."""
    problems = sorted({solution.index for solution in solutions})
    if not 0 <= n < len(problems):
        raise UserError(f"--val-examples {n} of {len(problems)} problems leaves none to train on: "
                        "lower it")  # fmt: skip
    held_out = set(random.Random(data.SUBSET_SEED).sample(problems, n))
    return [s for s in solutions if s.index not in held_out], [
        s for s in solutions if s.index in held_out
    ]


# ------------------------------------------------------------------------------------------- files


def load(of_data: str, data_dir: str | None, most: int | None) -> tuple[list[Solution], str]:
    """(solutions, source). of_data: "prm800k" (its phase 1, downloaded) or a file of either form.
    most: keep a fixed sample of this many. The source is "labels", "prm800k phase 1" or "prm800k
    phase 2". A file is read line by line, and only what is kept stays in memory."""
    if of_data == PRM800K:
        return read(hub.data_file("phase1_train.jsonl", data_dir), most)
    if not of_data.lower().endswith((".jsonl", ".json")):
        raise UserError(f"--data {of_data}: give {PRM800K} or a file that ends in .jsonl, such as "
                        "python -m experiments.label makes")  # fmt: skip
    if Path(of_data).name in TEST_FILES:
        raise UserError(f"--data {of_data}: these answers are to the problems of MATH-500, on "
                        "which a model trained on PRM800K is tested")  # fmt: skip
    return read(Path(of_data), most)


def read(path: Path, most: int | None = None) -> tuple[list[Solution], str]:
    """`load` of a path. UserError names the line at fault."""
    kept: list[tuple[int, Solution]] = []
    chance, seen, sources = random.Random(data.SUBSET_SEED), 0, set()
    numbers, questions, indexed = {}, {}, set()  # of a question; of a number; do rows have one?
    try:
        lines = open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    with lines:
        for number, row in _rows(path, lines):
            try:
                source, found = _parse(row)
                for question, steps, labels, index in found:
                    (question + "".join(steps)).encode()  # half a surrogate pair is no text
                    if source == "labels":
                        indexed.add(index is not None)
                    if len(indexed) > 1:
                        raise UserError("some rows have an index and others none")
                    if index is None:
                        index = numbers.setdefault(question, len(numbers))
                    elif questions.setdefault(index, question) != question:
                        raise UserError(f"index {index} has two questions")
                    if all(label is None for label in labels):
                        continue
                    solution = Solution(question, steps, labels, index)
                    sources.add(source)
                    # Reservoir sampling: each solution is kept with the same chance.
                    seen += 1
                    place = chance.randrange(seen) if most else 0
                    if most is None or len(kept) < most:
                        kept.append((seen, solution))
                    elif place < most:
                        kept[place] = seen, solution
            except UserError as error:
                raise UserError(f"{path} line {number}: {error}") from error
            except UnicodeEncodeError as error:
                raise UserError(f"{path} line {number}: it is not UTF-8 text") from error
    if not kept:
        raise UserError(f"{path} has no labelled steps in it")
    if "labels" in sources and len(sources) > 1:
        raise UserError(f"{path} has rows of two forms: give a file of each")
    in_order = [solution for _, solution in sorted(kept, key=lambda pair: pair[0])]
    return in_order, max(sources)  # with rows of phase 2 it is phase 2: see rerank.check_unseen


def _rows(path: Path, lines) -> Iterator[tuple[int, dict]]:
    """(line number, object) of the lines that are not empty."""
    number = 0
    try:
        for number, line in enumerate(lines, start=1):  # bytes: a bad one is in this line
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise UserError(f"{path} line {number}: not a JSON object")
                yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} line {number}: it is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number}: not JSON: {files.one_line(error)}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


Found = Iterator[tuple[str, list[str], list[float | None], int | None]]


def _parse(row: dict) -> tuple[str, Found]:
    """(source, what is in a row)."""
    if isinstance(row.get("question"), dict) and "labels" not in row:
        phase = 1 if row.get("generation") is None else 2
        return f"prm800k phase {phase}", rated_answers(row)
    return "labels", iter([_labelled(row)])


def _take(thing: dict, name: str, kinds: type | tuple, where: str = ""):
    """thing[name], if it is there and of one of these types."""
    if name not in thing:
        raise UserError(f"{where}{name} is missing")
    value = thing[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        words = {str: "a text", int: "a number", list: "a list", dict: "an object",
                 bool: "true or false", type(None): "null"}  # fmt: skip
        *others, last = [words[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise UserError(f"{where}{name} is {value!r:.60}, not {wanted}")
    return value


def _labelled(row: dict) -> tuple[str, list[str], list[float | None], int | None]:
    question, steps = _take(row, "question", str).strip(), _take(row, "steps", list)
    labels, index = _take(row, "labels", list), row.get("index")
    if not question:
        raise UserError("the question is empty")
    if not steps or len(steps) != len(labels):
        raise UserError(f"{len(steps)} steps and {len(labels)} labels: give steps, and a label for "
                        "each")  # fmt: skip
    for step in steps:
        if not isinstance(step, str) or not step.strip() or "\n" in step:
            raise UserError(f"a step is {step!r:.60}: give one line of text")
    for label in labels:
        number = isinstance(label, int | float) and not isinstance(label, bool)
        if label is not None and not (number and 0 <= label <= 1):
            raise UserError(f"a label is {label!r:.60}: give a number from 0 to 1, or null")
    if index is not None and (type(index) is not int or not 0 <= index < 2**31):
        raise UserError(f"index is {index!r:.60}, not the number of a problem")
    labels = [None if label is None else float(label) for label in labels]
    return question, [step.strip() for step in steps], labels, index


def rated_answers(row: dict) -> Found:
    """The answers in a row of PRM800K. One is the path of the chosen completions. Every other
    completion makes one more: the path up to it and the completion, which alone has a label.
    (The steps before it have theirs on the path.) What a person wrote instead has no rating, and
    so no label. A step whose completions are null has none. Rows that check the labeller, and
    problems that were given up, have no answers."""
    if any(_take(row, f"is_{kind}_question", bool)
           for kind in ("quality_control", "initial_screening")):  # fmt: skip
        return
    label = _take(row, "label", dict)
    question = _take(row["question"], "problem", str, "question: ").strip()
    if not question:
        raise UserError("the problem is empty")
    if _take(label, "finish_reason", str, "label: ") in LEFT_OUT:
        return
    path: list[str] = []
    labels: list[float | None] = []
    for i, step in enumerate(_take(label, "steps", list, "label: "), start=1):
        where = f"step {i}: "
        if not isinstance(step, dict):
            raise UserError(f"{where}it is {step!r:.60}, not an object")
        listed = _take(step, "completions", (list, type(None)), where) or []
        choices = [_completion(c, f"{where}completion {j}: ") for j, c in enumerate(listed)]
        human = _take(step, "human_completion", (dict, str, type(None)), where)
        if isinstance(human, dict):
            human = _take(human, "text", str, f"{where}human_completion: ")
        chosen = _take(step, "chosen_completion", (int, type(None)), where)
        if chosen is not None and not 0 <= chosen < len(choices):
            raise UserError(f"{where}completion {chosen} was chosen of {len(choices)}")
        text, rating = (_one_line(human or ""), None) if chosen is None else choices[chosen]
        others = [c for j, c in enumerate(choices) if j != chosen and c[1] is not None]
        before = list(path)
        if not text and others:  # nobody went on: the path ends with the first of these
            (text, rating), *others = others
            last = True
        else:
            last = not text
        for other, its_rating in others:
            yield question, [*before, other], [None] * len(before) + [its_rating], None
        if text:
            path, labels = [*path, text], [*labels, rating]
        if last:
            break
    if path:
        yield question, path, labels, None


def _completion(completion, where: str) -> tuple[str, float | None]:
    """(text on one line, label) of a completion."""
    if not isinstance(completion, dict):
        raise UserError(f"{where}it is {completion!r:.60}, not an object")
    text = _one_line(_take(completion, "text", str, where))
    rating = _take(completion, "rating", (int, type(None)), where)
    if rating not in (-1, 0, 1, None):
        raise UserError(f"{where}rating is {rating}, not -1, 0, 1 or null")
    if not text:
        raise UserError(f"{where}text is empty")
    return text, None if rating is None else float(rating >= 0)


def _one_line(text: str) -> str:
    return " ".join(text.split())
