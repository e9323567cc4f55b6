"""What evaluations say: figures with intervals, paired differences, kinds of mistakes.

An evaluation is the rows that `generate.answer_and_mark` makes, one a completion, as evaluate.py writes
them to eval-*.jsonl beside their figures in eval-*.json.
"""

import ast
import collections
import json
import math
import operator
import os
import re
from pathlib import Path
from statistics import NormalDist, fmean

from nanogsm import UserError, data

Z95 = NormalDist().inv_cdf(0.975)


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion. Unlike p +- 1.96 s.e. it stays inside [0, 1] and
    holds near 0, where untuned models are."""
    p, z2n = correct / n, Z95**2 / n
    centre, half = p + z2n / 2, Z95 * math.sqrt(p * (1 - p) / n + z2n / (4 * n))
    return max(0.0, (centre - half) / (1 + z2n)), min(1.0, (centre + half) / (1 + z2n))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p that A and B are equally good, from the problems only one of them solved:
    under that hypothesis each is a fair coin's toss (McNemar 1947, binomial form)."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def by_problem(path: str, rows: list[dict]) -> dict[int, dict]:
    """{index of the problem: row}. UserError if one was answered several times."""
    found = {row["index"]: row for row in rows}
    if len(found) < len(rows):
        raise UserError(f"{path} has several samples a problem: compare greedy evaluations")
    return found


def in_common(path_a: str, a: dict[int, dict], path_b: str, b: dict[int, dict]) -> list[int]:
    """The problems that both evaluations have, in order. UserError if there are any that only share their
    index, as those of two data files do."""
    common = sorted(a.keys() & b.keys())
    differ = [i for i in common if any(a[i][k] != b[i][k] for k in ("question", "gold"))]
    if differ:
        raise UserError(f"{path_a} and {path_b} are about different problems (number {differ[0]}, to begin "
                        "with): give evaluations, eval-....jsonl, of the same ones")  # fmt: skip
    return common


def paired(a: dict[int, dict], b: dict[int, dict]) -> dict:
    """B against A (problem -> row) on the problems both have: those `fixed` (only B has them right)
    and `broken` (only A), the difference in points, and mcnemar's p."""
    common = sorted(a.keys() & b.keys())
    fixed = [i for i in common if b[i]["correct"] and not a[i]["correct"]]
    broken = [i for i in common if a[i]["correct"] and not b[i]["correct"]]
    points = 100 * (len(fixed) - len(broken)) / len(common)
    p = mcnemar(len(broken), len(fixed))
    return {"n": len(common), "points": points, "p": p, "fixed": fixed, "broken": broken}


def majority(rows: list[dict]) -> bool:
    """Whether the commonest answer among a problem's completions is right (a tie: the earliest)."""
    answers = collections.Counter(r["answer"] for r in rows if r["answer"] is not None)
    return bool(answers) and data.same_number(answers.most_common(1)[0][0], rows[0]["gold"])


def summarise(rows: list[dict], samples: int) -> dict:
    """Figures of an evaluation from its rows (samples a problem, together). The interval is over
    problems: several completions of one are not independent, so with samples it is a little wide."""
    groups = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    accuracy = fmean(r["correct"] for r in rows)
    low, high = wilson(accuracy * len(groups), len(groups))
    figures = {
        "n": len(groups),
        "completions": len(rows),
        "correct": sum(r["correct"] for r in rows),  # of the completions
        "accuracy": accuracy,
        "ci_low": low,
        "ci_high": high,
        "flexible_accuracy": fmean(r["flexible"] for r in rows),
        "truncated": fmean(r["truncated"] for r in rows),
        "formatted": fmean(r["answer"] is not None for r in rows),
        "mean_tokens": fmean(r["tokens"] for r in rows),
    }
    if samples > 1:
        figures["pass@1"] = accuracy
        figures[f"pass@{samples}"] = fmean(any(r["correct"] for r in g) for g in groups)
        figures[f"maj@{samples}"] = fmean(majority(g) for g in groups)
    return figures


def rank(path: Path) -> tuple:
    """What evaluations are sorted by; the last is the one that is meant: of the test split, with no
    settings of its own (each adds to the name), of the most problems, the newest."""
    parts = path.stem.split("-")
    n = max((int(part) for part in parts if part.isdecimal()), default=0)
    return path.name.startswith("eval-test"), -len(parts), n, path.stat().st_mtime


def read_rows(where: str) -> tuple[str, list[dict]]:
    """(path, rows) of an evaluation: a .jsonl file, or of those in a run's folder the one that `rank`
    puts last."""
    path = Path(where)
    if path.suffix == ".json" and not os.path.isdir(path):  # the figures, beside which the rows are
        path = path.with_suffix(".jsonl")
    if os.path.isdir(path):
        found = sorted(path.glob("eval-*.jsonl"), key=rank)
        if not found:
            raise UserError(f"{where} has no evaluation yet: python evaluate.py --model {where}")
        path = found[-1]
    elif not os.path.exists(path):
        raise UserError(f"there is no {path}: give a run's folder or an eval-....jsonl file")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        kinds = {"index": int, "correct": bool, "gold": (int, float), "question": str, "completion": str}
        for row in rows:
            if wrong := [k for k, kind in kinds.items() if not isinstance(row[k], kind)]:
                raise ValueError(f"a row's {wrong[0]} is {row[wrong[0]]!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        problem = f"a row has no {e}" if isinstance(e, KeyError) else str(e)
        raise UserError(f"cannot read an evaluation from {path}: {problem}") from e
    return str(path), rows


# ------------------------------------------------------------------------------ kinds of mistakes

# In the order in which they are asked about; the first that holds is a completion's kind.
KINDS = {
    "right": "the right number after ####",
    "looping": "cut off at the token limit, going round in circles",
    "cut off": "cut off at the token limit otherwise",
    "no answer": "ended without a number after ####",
    "arithmetic": "a calculator annotation is false, as in <<3*4=15>>",
    "guessed": "shows no calculation at all",
    "set-up": "calculates correctly, but not what was asked",
}
ANNOTATION = re.compile(r"<<([^<>]{1,100})=([^<>=]{1,30})>>")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}  # fmt: skip


def value_of(expression: str) -> float | None:
    """The value of plain arithmetic ("3*(4+.5)", "20%*80"); None for anything else. The text is a
    model's: it is parsed, never evaluated."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        return OPERATORS[type(node.op)](value(node.left), value(node.right))

    text = re.sub(r"([\d.]+)%", r"(\1/100)", re.sub(r"[,$\s]", "", expression))
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # Python reads no 007
    try:
        return value(ast.parse(text, mode="eval").body) if re.fullmatch(r"[\d.+\-*/()]+", text) else None
    except (SyntaxError, ValueError, ArithmeticError, AttributeError, KeyError, RecursionError, MemoryError):
        return None


def false_annotations(completion: str) -> list[str]:
    """Calculator annotations whose result is not that of their expression, to the decimals it is
    given with (1/3=.33 is right). What cannot be read is not called false."""
    found = []
    for whole in ANNOTATION.finditer(completion):
        want, got = value_of(whole[1]), value_of(whole[2])
        decimals = len(whole[2].partition(".")[2].strip())
        if want is not None and got is not None and abs(want - got) > (10**-decimals if decimals else 1e-6):
            found.append(whole[0])
    return found


def is_looping(completion: str) -> bool:
    """Whether a cut completion repeats itself: its last 20 characters stood there three times."""
    return completion.count(completion[-20:]) > 3


def kind_of(row: dict) -> str:
    """One of KINDS."""
    text = data.cut(row["completion"])
    if row["correct"]:
        return "right"
    if row["truncated"] and row["answer"] is None:
        return "looping" if is_looping(row["completion"]) else "cut off"
    if row["answer"] is None:
        return "no answer"
    if false_annotations(text):
        return "arithmetic"
    return "set-up" if "<<" in text else "guessed"
