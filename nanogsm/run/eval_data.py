"""Which problems an evaluation asks, and which worked examples it shows before them."""

import argparse

from nanogsm import UserError, data
from nanogsm.run import flags
from nanogsm.run.past import check_unchanged, held_out_by, part_of, run_of


def choose_data(args: argparse.Namespace) -> None:
    """Fill in --data and --split. A run on a file of the user's own is asked what it held out, a
    run on MATH about MATH."""
    run = run_of(args.model)
    trained = run[1]["args"] if run else {}
    own = trained.get("data", "main") not in data.NAMED
    if args.data is None and (own or trained.get("data") == "math" or args.split == "validation"):
        args.data = trained.get("data")
        args.unscored |= bool(trained.get("unscored"))
        if own and trained.get("val_examples"):
            args.split = args.split or "validation"
    args.split = args.split or "test"


def worked_examples(args: argparse.Namespace, n: int) -> tuple[data.Problem, ...]:
    """The first n training problems that are not held out."""
    if args.data not in data.NAMED and args.split == "test":
        raise UserError(f"--shots {n}: all problems of {args.data} are asked, so none can be "
                        "shown; give --split validation")  # fmt: skip
    source = "math" if args.data == "math500" else args.data  # which has no training split
    problems = data.load_problems(source, "train", args.data_dir, args.unscored)
    shown = data.split_validation(problems, count_held_out(args, len(problems)))[0][:n]
    if len(shown) < n:
        raise UserError(f"--shots {n}: there are only {len(shown)} training problems to show")
    return tuple(shown)


def count_held_out(args: argparse.Namespace, n: int) -> int:
    """How many of the n training problems are held out."""
    asked = args.n if args.split == "validation" else None
    known = held_out_by(args.model, args.data)
    return asked or (data.usual_held_out(n, args.tiny) if known is None else known)


def choose_problems(args: argparse.Namespace) -> list[data.Problem]:
    """A fixed sample of the test split, or the training problems that were held out."""
    held_out = held_out_by(args.model, args.data)
    if args.split == "validation":
        if held_out == 0:
            raise UserError(f"{args.model} held out no problems to ask: give --split test")
        if args.n and held_out not in (None, args.n):  # it was trained on some of these
            fault = f"held out {held_out} problems, not {args.n}"
            raise UserError(f"{args.model} {fault}: give --n {held_out}")
        problems = data.load_problems(args.data, "train", args.data_dir, args.unscored)
        check_unchanged(args.model, args.data, problems)
        n = count_held_out(args, len(problems))
        if len(problems) < 2:
            raise UserError("one problem has no part for validation: give --split test")
        if not 0 < n < len(problems):
            raise UserError(f"validation would be {n} of these {len(problems)} problems: give --n "
                            f"from 1 to {len(problems) - 1}")  # fmt: skip
        return part_of(data.split_validation(problems, n)[1], args.part)
    problems = data.load_problems(args.data, "test", args.data_dir, args.unscored)
    if len(problems) < (args.given_n or 0) < flags.ALL:
        print(f"note: --n is {args.n:,}, but there are only {len(problems):,} problems")
    if held_out is not None and args.data not in data.NAMED:
        which = f"all but {held_out} of these: see --split validation" if held_out else "these"
        print(f"note: the run was trained on {which}")
    return data.subset(problems, args.n)
