"""A reward of your own for train_ppo.py: `--reward FILE.py`, with one function in the file.

    def reward(completion: str, problem, truncated: bool) -> float:
        return 1.0 if "####" in completion else 0.0

It is called for every sampled answer. completion: the text, without a question that the model asks
itself. problem: a data.Problem. truncated: whether the answer was cut off at --max-new-tokens.

The file is executed when --reward names it on the command line, and only then. docs/usage.md has an
example.
"""

import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from statistics import fmean
from types import ModuleType

import torch

from nanogsm import UserError, distributed
from nanogsm.data import Problem, cut
from nanogsm.run import console
from nanogsm.store.files import one_line

Reward = Callable[[str, Problem, bool], float]
# The largest reward. The value loss squares it, the gradient norm squares its product with hidden
# states, and both add up many such squares in float32, which ends at 3e38.
MOST = 1e12


def load_reward(path: str) -> tuple[Reward, str]:
    """(the file's function `reward`, made to check what it returns; SHA-256 of the file). Raises
    UserError if the file cannot be read or executed, or has no such function."""
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"--reward {path}: {error.strerror}") from error
    module = ModuleType("reward_file")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up
    with _own_code(f"--reward {path}"):
        exec(compile(source, path, "exec"), vars(module))  # the very bytes that the digest is of
    function = vars(module).get("reward")
    if not callable(function):
        raise UserError(f"--reward {path} has no function reward(completion, problem, truncated)")

    def checked(completion: str, problem: Problem, truncated: bool) -> float:
        console.stop_if_asked()  # 512 answers may take a slow reward minutes
        where = f"--reward {path}, problem {problem.index}"
        with _own_code(where):
            value = function(completion, problem, truncated)
            number = _number(value)
        if not math.isfinite(number):
            raise UserError(f"{where}: it returned {_shown(value)}, which is not a finite number")
        if abs(number) > MOST:
            raise UserError(f"{where}: it returned {number:g}: give numbers up to {MOST:g}, "
                            "because training squares them in float32")  # fmt: skip
        return number

    return checked, hashlib.sha256(source).hexdigest()


@contextlib.contextmanager
def _own_code(where: str) -> Iterator[None]:
    """Around code of the user's file. What it raises becomes one line; so does sys.exit(), which
    would end the run as if all were well. Three things that it may change for the whole process are
    put back: the working directory, where the run writes its result, and PyTorch's default type and
    gradient mode."""
    folder, dtype, with_gradient = os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
    finally:
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(with_gradient)


def _number(value: object) -> float:
    """value as a float, NaN if it is no number."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:  # of None, of a long tensor, of a class whose __float__ fails
        return math.nan


def _shown(value: object) -> str:
    try:
        return f"{value!r:.60}"
    except Exception:  # of an int of more than 4,300 digits, of a class whose __repr__ fails
        return f"an object of the type {type(value).__name__}"


def mean_reward(reward: Reward, problems: list[Problem], rows: list[dict]) -> float:
    """The mean over a validation's rows (generate.answer_and_mark), one per problem."""
    pairs = list(zip(problems, rows, strict=True))
    return distributed.on_rank_0(
        lambda: fmean(reward(cut(row["completion"]), p, row["truncated"]) for p, row in pairs)
    )
