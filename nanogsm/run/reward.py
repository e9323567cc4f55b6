"""A reward of your own for train_ppo.py: `--reward FILE.py`, with one function in the file.

    def reward(completion: str, problem, truncated: bool) -> float:
        return 1.0 if "####" in completion else 0.0

It is called for every sampled answer. completion: the text, without a question that the model asks
itself. problem: a data.Problem. truncated: whether the answer was cut off at --max-new-tokens.

The file is executed when --reward names it on the command line, and only then. docs/usage.md has an
example.
"""

import hashlib
import math
from collections.abc import Callable
from statistics import fmean

from nanogsm import UserError, distributed
from nanogsm.data import Problem, cut
from nanogsm.store.files import one_line

Reward = Callable[[str, Problem, bool], float]


def load_reward(path: str) -> tuple[Reward, str]:
    """(the file's function `reward`, made to check what it returns; SHA-256 of the file). Raises
    UserError if the file cannot be read or executed, or has no such function."""
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"--reward {path}: {error.strerror}") from error
    names = {"__name__": "reward_file", "__file__": path}
    try:
        exec(compile(source, path, "exec"), names)  # the very bytes that the digest is of
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {path}: {type(error).__name__}: {one_line(error)}") from error
    function = names.get("reward")
    if not callable(function):
        raise UserError(f"--reward {path} has no function reward(completion, problem, truncated)")

    def checked(completion: str, problem: Problem, truncated: bool) -> float:
        where = f"--reward {path}, problem {problem.index}"
        try:
            value = function(completion, problem, truncated)
        except Exception as error:
            raise UserError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
        try:
            number = math.nan if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # of None, of a long tensor
            number = math.nan
        if not abs(number) <= 1e30:  # float32 must hold it
            raise UserError(f"{where}: it returned {value!r:.60}, which is not a finite number")
        return number

    return checked, hashlib.sha256(source).hexdigest()


def mean_reward(reward: Reward, problems: list[Problem], rows: list[dict]) -> float:
    """The mean over a validation's rows (generate.answer_and_mark), one per problem."""
    pairs = list(zip(problems, rows, strict=True))
    return distributed.on_rank_0(
        lambda: fmean(reward(cut(row["completion"]), p, row["truncated"]) for p, row in pairs)
    )
