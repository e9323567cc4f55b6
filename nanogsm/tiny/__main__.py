"""`python -m nanogsm.tiny` prints problems of problems.py to read or to copy from."""

import re

from nanogsm.run.console import entry
from nanogsm.run.flags import Parser, check_numbers
from nanogsm.tiny.problems import SIZES, problems


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Print problems to read and the number of words they use.")
    parser.add_argument("--show", type=int, default=30, help="How many problems to print.")
    styles = "Style of GSM8K; socratic asks a sub-question before each step."
    parser.add_argument("--style", choices=("main", "socratic"), default="main", help=styles)
    args = parser.parse_args(argv)
    check_numbers(args, {"show": 1})
    pairs = [pair for split in SIZES for pair in problems(split, args.style)]
    for question, answer in pairs[: args.show]:
        print(f"{question}\n{answer}\n")
    words = {word for pair in pairs for word in re.findall("[A-Za-z]+", " ".join(pair))}
    print(f"{len(words)} distinct words in {len(pairs)} problems")


if __name__ == "__main__":
    entry(main)
