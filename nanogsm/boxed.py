r"""MATH: where an answer stands, and whether it is right.

    completion   ... so the area is $\boxed{\frac{1}{2}}$.
    last_box     \frac{1}{2}
    gold         0.5
    verdict      right by value, not by text

MATH (Hendrycks et al. 2021, arXiv 2103.03874) has formulas for answers, so a text is not enough to
compare. `grade` first compares texts (`plain`). What differs goes to the package math-verify, the
field's usual grader, which reads both as formulas. The package is optional and imported where it is
used. It gets the inside of the last box and nothing else.

Trap: model text is hostile. math-verify's ExprExtractionConfig hands it to a parser that evaluates
Python, so only LatexExtractionConfig is used. "9^{9^{9^9}}" would take all time and memory, so
`too_large` looks first.
"""

import contextlib
import functools
import importlib.metadata
import io
import logging
import re
import signal
import threading
import time
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from nanogsm import UserError, distributed

NAMES = ("math", "math500")  # of --data; math500 is a sample of math's test split
INSTRUCTION = (
    "You are a helpful math assistant. Please provide a step-by-step derivation and put the final "
    r"result, and nothing else, in \boxed{}."
)
ONE_SHOT_ANSWER = (  # to the question of data.ONE_SHOT, in MATH's form
    "Natalia sold $48/2 = 24$ clips in May.\n"
    r"Natalia sold $48+24 = \boxed{72}$ clips altogether in April and May."
)
NO_ANSWER = "nothing stands in the last box of the answer"
NO_LIMITS = (  # Windows has none
    "answers in boxes can be graded in the main thread only, and on Unix: Python has time limits "
    "nowhere else"
)
MOST_CHARACTERS = 300  # of an answer that is read as a formula
MOST_SECONDS = 3.0  # of computing, for reading and comparing two formulas
LARGEST = 10_000  # exponent or factorial that is computed
DEEPEST = 20  # brackets in brackets


def check_data(data: str, split: str) -> None:
    """Raise UserError if --data is MATH and there is no grader, or if it has no such split. Called
    before anything is downloaded."""
    if data == "math500" and split != "test":
        raise UserError("--data math500 is for evaluation only: train and validate on math")
    if data in NAMES:
        if not hasattr(signal, "setitimer"):
            raise UserError(NO_LIMITS)
        grader_name()


@functools.cache
def grader_name() -> str:
    """The grader and its version, for results. UserError if it is not installed."""
    try:
        return f"math-verify {importlib.metadata.version('math-verify')}"
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "answers in boxes are graded by the package math-verify, which is missing: "
            "pip install -r requirements-optional.txt"
        ) from None


# ---------------------------------------------------------------------------------------- the box

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")


def last_box(text: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...}; None if there is none, or if it is empty
    or its braces do not match. A box without braces, as in `$\boxed 5$`, goes up to the dollar."""
    found = None
    for found in _BOX.finditer(text):
        pass
    if found is None:
        return None
    rest = text[found.end() :]
    bare = not rest.startswith("{")
    if bare:
        rest = "{" + re.split(r"[$\n]", rest, maxsplit=1)[0].strip(" .") + "}"
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are text
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            inside = rest[1 : brace.start()].strip()
            return inside if inside and not (bare and brace.end() < len(rest)) else None
    return None


def ends_in_box(answer: str) -> bool:
    """Whether a worked answer gives its result in a box, as MATH's do, and not after ####."""
    last = max((found.start() for found in _BOX.finditer(answer)), default=-1)
    return last > answer.rfind("####")


# ------------------------------------------------------------------------------ comparing the text

# What changes the look of a formula and not its meaning, and signs that are no part of a number.
_LOOKS = re.compile(
    r"\\(?:left|right|displaystyle|q?quad)(?![A-Za-z])|(?<!\\)\\[!,;: \n$%]|[$%~]"
    r"|\^\{?\\(?:circ|degree)\}?"
)
_UNIT = re.compile(r"(?<=[\d}])\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\d)?$")  # 5\text{cm}^2
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}")
_NAME = re.compile(r"^[A-Za-z](?:\([a-z]\))?=(?=[^=]+$)")  # x=5, f(x)=5
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")


def plain(answer: str) -> str:
    r"""An answer without what does not change its meaning. Two answers are equal in text if these
    are equal. Our own rules, in the spirit of Hendrycks' math_equivalence.py: no value is computed,
    and `0.5` differs from `\frac{1}{2}`.

        \dfrac 12 -> \frac{1}{2}      x = 5 -> 5      1,000 -> 1000      5\text{ cm} -> 5
    """
    # The lengths of runs are limited, so that a hostile text takes no more than linear time.
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", _LOOKS.sub("", answer))
    text = re.sub(r"\s+", "", text).replace("{,}", ",").replace("\u2212", "-").rstrip(".")
    text = _TEXT.sub(r"\1", _UNIT.sub("", text))
    text = _NAME.sub("", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\w)\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac(\{[^{}]{1,40}\})(\w)", r"\\frac\1{\2}", text)
    text = re.sub(r"^(-?\d{1,40})/(\d{1,40})$", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


# ---------------------------------------------------------------------------- what is not computed

# Commands that may stand in an exponent: they make no number larger than its digits say.
_HARMLESS = re.compile(
    r"\\(?:[dt]?frac|cdot|times|pi|infty|circ|prime|text|mathrm|left|right|[!,;: ])"
)
_BIG = re.compile(r"\\(?:sum|prod|i*int|oint|lim|bigcup|bigcap)(?![A-Za-z])")


def too_large(answer: str) -> bool:
    """Whether computing an answer might take very long: whether the powers and factorials in it
    could multiply to an exponent above LARGEST, or brackets are nested more than DEEPEST times.
    Judged by the text alone, and in doubt yes."""
    text = re.sub(r"\s+", "", _LOOKS.sub("", answer)).replace("**", "^")
    depth = 0
    for bracket in re.findall(r"[({\[)}\]]", text):
        depth += 1 if bracket in "({[" else -1
        if depth > DEEPEST:
            return True
    cost, highest = 1, 1
    for found in re.finditer(r"[\^!]|\\[dt]?binom(?![A-Za-z])", text):
        before, rest = text[: found.start()], text[found.end() :]
        if found[0] == "!":
            number = re.search(r"(?<![\d.,_^}])\d{1,6}$", before)
            if number is None and not re.search(r"(?<![\w^}])[a-z]$", before):
                return True  # (5!)!, 5!!, \frac{9}{1}!
            cost *= int(number[0]) if number else 1
            continue
        if found[0] != "^":
            numbers = re.findall(r"\d+", rest[:40])
            cost *= max((int(n) for n in numbers[:2]), default=1)
            continue
        exponent = _group(rest)
        if re.search(r"[\^!]|\\", _HARMLESS.sub("", exponent)):
            return True  # a power of a power, or a function whose value is not known
        # Joined, the digits are at least as large as any sum, product or quotient of the numbers.
        size = int("".join(re.findall(r"\d", exponent))[:9] or 1)
        size *= 1 + len(re.search(r"\d*$", before)[0]) // 5  # of a number with many digits
        if _BIG.search(text) or re.search(r"(?:[)}\]|]|\^\w)$", before):
            cost *= max(size, 1)  # of something that may hold powers itself
        else:
            highest = max(highest, size)
    limits = [int(n[:9]) for n in re.findall(r"\d+", text)] if _BIG.search(text) else []
    return cost * max(highest, *limits, 1) > LARGEST


def _group(text: str) -> str:
    """The argument with which LaTeX text starts: {...} without its braces, a command, one
    character."""
    if not text.startswith("{"):
        return re.match(r"(?:\\[A-Za-z]+|-?\d+|.?)", text, re.DOTALL)[0]
    depth = 0
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[1 : brace.start()]
    return text[1:]


# ---------------------------------------------------------------------------------------- grading


class Verdict(NamedTuple):
    right: bool
    by_text: bool = False  # whether the texts are equal, which is always right
    timed_out: bool = False  # which counts as wrong


class _OutOfTime(BaseException):
    """Not an Exception: the package catches those."""


def grade(answer: str | None, gold: str) -> Verdict:
    """Whether an answer (the inside of a box, or None) is right. On many devices rank 0 asks the
    package and tells the others, because a timeout may come on one and not on another. Trap: so all
    ranks have to call this in the same order, or rank 0 alone inside distributed.on_rank_0."""
    return (_grade_alone if distributed.ALONE else _grade_on_all)(answer, gold)


@functools.lru_cache(2**14)
def _grade_on_all(answer: str | None, gold: str | None) -> Verdict:
    return _grade(answer, gold, distributed.on_rank_0)


# Trap: this needs a memory of its own. The other must hold the same on all ranks, or one of them
# would ask again, and the ranks would get out of step. What rank 0 grades alone would push out
# verdicts there that the others still have.
_grade_alone = functools.lru_cache(2**14)(_grade_on_all.__wrapped__)


def _grade(answer: str | None, gold: str | None, asked: Callable) -> Verdict:
    if answer is None or gold is None:  # unscored data may have an empty box
        return Verdict(False)
    if plain(answer) == plain(gold):
        return Verdict(True, by_text=True)
    if max(len(answer), len(gold)) > MOST_CHARACTERS or too_large(answer) or too_large(gold):
        return Verdict(False)
    return Verdict(*asked(functools.partial(_ask, answer, gold)))


def _ask(answer: str, gold: str) -> Verdict:
    """The verdict of math-verify. UserError if it is missing, or outside the main thread."""
    grader_name()
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or not hasattr(signal, "setitimer"):
        raise UserError(NO_LIMITS)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        logging.getLogger("math_verify").setLevel(logging.CRITICAL + 1)
        logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL + 1)
        import math_verify

        latex = math_verify.LatexExtractionConfig(boxed_match_priority=0)

        def read(text: str) -> list:
            inside = text.replace("\\$", "").replace("$", "")
            box = rf"\boxed{{{inside}}}"
            return math_verify.parse(box, [latex], "no_fallback", "first_match", None, True)

        try:
            read("1")  # the first call compiles what the package needs, outside the limit
            with _time_limit(MOST_SECONDS):
                a, b = read(gold), read(answer)
                right = math_verify.verify(a, b, timeout_seconds=None, raise_on_error=True)
                return Verdict(bool(a and b and right))
        except _OutOfTime:
            return Verdict(False, timed_out=True)
        except Exception:  # what cannot be read is not right
            return Verdict(False)


@contextlib.contextmanager
def _time_limit(seconds: float):
    """Raise _OutOfTime in the body once this thread has computed for that long, and again every
    0.1 s: a bare `except:` somewhere in the body may swallow the first. What SIGALRM did before is
    put back."""
    # The package's own limit raises once, and logs. It goes by the wall clock, and so a busy
    # machine would turn right answers into wrong ones.
    end = time.thread_time() + seconds

    def ring(number, frame):
        if time.thread_time() > end:
            raise _OutOfTime

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # a second time, because it may have rung just before the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


# ------------------------------------------------------------------------ what results say of it


def beside(completion: str, answer: str) -> dict:
    """What stands beside right or wrong in a result: the strict comparison of texts, and whether
    the grader ran out of time. completion: as `data.cut` leaves it; answer: the worked one."""
    verdict = grade(last_box(completion), last_box(answer))
    return {"correct_by_text": verdict.by_text, "timed_out": verdict.timed_out}


def shares(rows: list[dict], prefix: str = "") -> dict:
    """Metrics of marked answers: the share that is right by value and not by text, and the share at
    which the grader ran out of time. {} for GSM8K."""
    boxed = [row for row in rows if "timed_out" in row]
    if not boxed:
        return {}
    by_value = [row["correct"] and not row["correct_by_text"] for row in boxed]
    return {
        f"{prefix}right_by_value_only": fmean(by_value),
        f"{prefix}grader_timeouts": fmean(row["timed_out"] for row in boxed),
    }


_NUMBER = re.compile(r"-?\d+(?:\.\d+)?|-?\\frac\{-?\d+\}\{\d+\}")
_OPERATION = re.compile(r"[+*^!]|(?<=[\w)}])-|\\(?!frac)[A-Za-z]+")


def restates(completion: str, answer: str) -> bool:
    r"""Whether a right answer only says the problem again, as \sum_{n=1}^{10} n for 55 does: it is
    a sum, product, integral or limit, or it leaves an operation undone where gold is a number. As
    a reward it would teach the policy to copy the question into the box. Never for GSM8K."""
    if not ends_in_box(answer):
        return False
    given, gold = last_box(completion), last_box(answer)
    verdict = grade(given, gold)
    if not verdict.right or verdict.by_text:
        return False
    given, gold = plain(given), plain(gold)
    if _BIG.search(given) and not _BIG.search(gold):
        return True
    if not _NUMBER.fullmatch(gold):
        return False
    quotient = gold.lstrip("-").isdecimal() and re.search(r"/|\\frac", given)
    return bool(_OPERATION.search(given) or quotient)


def joined(answers: list[str | None]) -> list[int]:
    """For each answer the place of the first one that means the same, -1 for None. Answers of equal
    text come together first, and then those that the grader calls equal. One rank can call this
    alone."""
    leaders, places = {}, []  # the text of a group: where it began
    for i, answer in enumerate(answers):
        if answer is None:
            places.append(-1)
            continue
        text = plain(answer)
        if text not in leaders:
            equal = (
                first for first in set(leaders.values())
                if _grade(answer, answers[first], lambda ask: ask()).right
            )  # fmt: skip
            leaders[text] = min(equal, default=i)
        places.append(leaders[text])
    return places


def shown(answer: float | str | None) -> str:
    """An answer for the console or the page."""
    return answer if isinstance(answer, str) else f"{answer:.15g}"
