"""evaluate.py --ask: an answer is printed while it is sampled."""

import argparse
import re
import sys

from nanogsm import UserError, boxed, data, distributed, generate
from nanogsm.run import console, start
from nanogsm.run.past import answer_limit_of
from nanogsm.store.files import one_line

NOT_TEXT = "--ask: the question is not UTF-8 text"


def answer_questions(args: argparse.Namespace, model, tokenizer, prompt: data.Prompt) -> int:
    """Print the answers to a question, or to each line of standard input, with what is graded."""
    limit = args.max_new_tokens or answer_limit_of(args.model, args.data)
    lines = iter(lambda: distributed.on_rank_0(next_line), "")
    for question in lines if args.ask is True else [args.ask]:
        question = checked(question)
        if args.tiny and args.data in data.GENERATED:
            start.note_unknown_words([question])
        if question and args.samples == 1:
            stream(model, tokenizer, prompt, question, limit, args.temperature, args.seed)
        elif question:
            answers = generate.answer(
                model, tokenizer, [question] * args.samples, prompt, limit, args.batch_size,
                args.temperature, args.seed,
            )  # fmt: skip
            for i, answer in enumerate(answers):
                print(f"--- answer {i + 1} of {args.samples}")
                text = data.cut(answer.text)
                print(console.printable(text))
                print_graded(text, prompt)
    return 0


def print_graded(text: str, prompt: data.Prompt) -> None:
    """What would be graded."""
    found = data.extract_answer(text, prompt.boxed)
    missing = "no answer in a box" if prompt.boxed else "no '#### number' in it"
    print(f"-> {missing if found is None else console.printable(boxed.shown(found))}")


def next_line() -> str:
    """The next line of standard input, "" after the last. UserError if there is no input, or if a
    strict encoding cannot decode it."""
    if sys.stdin is None:
        raise UserError("--ask: standard input is closed: give a QUESTION")
    if sys.stdin.isatty():
        print("question (Ctrl-D ends): ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(NOT_TEXT) from error
    except (OSError, ValueError) as error:
        raise UserError(f"--ask: standard input cannot be read ({one_line(error)})") from error


def checked(text: str) -> str:
    """The question without spaces around it. UserError if it is not text."""
    if re.search("[\ud800-\udfff]", text):  # bytes that could not be decoded
        raise UserError(NOT_TEXT)
    return text.strip()


def stream(model, tokenizer, prompt, question: str, limit: int, temperature, seed: int) -> None:
    """Print an answer while it is sampled."""
    shown = 0

    def show(text: str) -> None:
        nonlocal shown
        print(console.printable(text[shown:]), end="", flush=True)
        shown = max(shown, len(text))

    def is_over(ids: list[int]) -> bool:
        # The newest characters wait: they may become STOP_TEXT, or be half of a character.
        show(tokenizer.decode(ids).lstrip()[: -len(data.STOP_TEXT)].rstrip())
        return data.starts_new_question(tokenizer, ids)

    ids, _ = data.encode(tokenizer, prompt, question)
    [done] = generate.generate(
        model, [ids], tokenizer.stop_ids, limit, 1, temperature, seed, is_over
    )
    text = data.cut(tokenizer.decode(done.ids))
    show(text)
    print()
    print_graded(text, prompt)
