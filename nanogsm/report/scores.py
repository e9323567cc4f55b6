"""What evaluations say: a summary with intervals, paired differences, kinds of mistakes.

The rows of an evaluation are those that `generate.answer_and_mark` returns, one per completion.
evaluate.py writes them to eval-*.jsonl and their summary to eval-*.json.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist, fmean

from nanogsm import UserError, boxed, data
from nanogsm.arithmetic import false_annotations

Z95 = NormalDist().inv_cdf(0.975)


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion (Wilson 1927). Unlike p +- 1.96 standard errors it
    stays inside [0, 1] and is accurate near 0, where untuned models are."""
    p, z2n = correct / n, Z95**2 / n
    centre, half = p + z2n / 2, Z95 * math.sqrt(p * (1 - p) / n + z2n / (4 * n))
    return max(0.0, (centre - half) / (1 + z2n)), min(1.0, (centre + half) / (1 + z2n))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of the hypothesis that A and B are equally good. Under it, each
    problem that only one of them solved is the toss of a fair coin (McNemar 1947)."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def by_problem(path: str, rows: list[dict]) -> dict[int, dict]:
    """{problem index: row}. Raises UserError if a problem has several rows."""
    found = {row["index"]: row for row in rows}
    if len(found) < len(rows):
        raise UserError(f"{path} has several samples per problem: compare greedy evaluations")
    return found


def in_common(path_a: str, a: dict[int, dict], path_b: str, b: dict[int, dict]) -> list[int]:
    """Sorted indices of the problems in both evaluations. Raises UserError if one index stands for
    two questions, as it does when the evaluations used different data files."""
    common = sorted(a.keys() & b.keys())
    differ = [i for i in common if any(a[i][key] != b[i][key] for key in ("question", "gold"))]
    if differ:
        raise UserError(f"{path_a} and {path_b} are about different problems (the first is number "
                        f"{differ[0]}): give two evaluations of the same data")  # fmt: skip
    return common


def paired_test(a: list[bool], b: list[bool]) -> dict:
    """Compare B with A, each right or wrong on the same problems. Returns the places `fixed` (only
    B is right) and `broken` (only A is right), the difference in points, and McNemar's p."""
    fixed = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if y and not x]
    broken = [i for i, (x, y) in enumerate(zip(a, b)) if x and not y]
    points = 100 * (len(fixed) - len(broken)) / len(a)
    p = mcnemar(len(broken), len(fixed))
    return {"points": points, "fixed": fixed, "broken": broken, "p": p}


def paired_tests(right: dict[str, list[bool]], pairs: list[tuple[str, str]]) -> list[dict]:
    """`paired_test` of each pair (of, against) of these, with counts in place of places."""
    found = []
    for of, against in pairs:
        test = paired_test(right[against], right[of])
        counts = {change: len(test[change]) for change in ("fixed", "broken")}
        found.append({"of": of, "against": against} | test | counts)
    return found


def paired(a: dict[int, dict], b: dict[int, dict]) -> dict:
    """`paired_test` of two evaluations (problem -> row), on the problems that both have. `fixed`
    and `broken` are indices of problems."""
    common = sorted(a.keys() & b.keys())
    test = paired_test(*([rows[i]["correct"] for i in common] for rows in (a, b)))
    places = {change: [common[i] for i in test[change]] for change in ("fixed", "broken")}
    return {"n": len(common)} | test | places


def majority(rows: list[dict], weights: list[float] | None = None) -> bool:
    """Whether the most frequent answer to one problem is right, or, with a weight for each row, the
    answer of the largest sum. The earliest wins a tie. Answers in boxes that mean the same are
    one."""
    answers = [row["answer"] for row in rows]
    if in_boxes := isinstance(rows[0]["gold"], str):
        answers = [None if place < 0 else place for place in boxed.joined(answers)]
    votes: dict[float, float] = {}
    for answer, weight in zip(answers, weights or [1] * len(rows)):
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + weight
    if not votes:
        return False
    chosen = max(votes, key=votes.get)
    return rows[chosen]["correct"] if in_boxes else data.same_number(chosen, rows[0]["gold"])


def summarise(rows: list[dict], samples: int) -> dict:
    """The summary of an evaluation; `rows` holds the samples of a problem next to each other. The
    interval counts problems, because samples of one problem are not independent. With several
    samples it is wider than it needs to be. Unscored rows have lengths only."""
    groups = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    truncated = fmean(row["truncated"] for row in rows)
    mean_tokens = fmean(row["tokens"] for row in rows)
    if any(row["gold"] is None for row in rows):
        lengths = {"truncated": truncated, "mean_tokens": mean_tokens}
        return {"n": len(groups), "completions": len(rows), "unscored": True} | lengths
    accuracy = fmean(row["correct"] for row in rows)
    low, high = wilson(accuracy * len(groups), len(groups))
    summary = {
        "n": len(groups),
        "completions": len(rows),
        "correct": sum(row["correct"] for row in rows),  # completions, not problems
        "accuracy": accuracy,
        "ci_low": low,
        "ci_high": high,
        **_beside(rows),
        "truncated": truncated,
        "formatted": fmean(row["answer"] is not None for row in rows),
        "mean_tokens": mean_tokens,
    }
    if samples > 1:
        summary["pass@1"] = accuracy
        summary[f"pass@{samples}"] = fmean(any(row["correct"] for row in g) for g in groups)
        summary[f"maj@{samples}"] = fmean(majority(g) for g in groups)
    return summary


def _beside(rows: list[dict]) -> dict:
    """What stands next to exact match: for GSM8K the last number, for MATH the comparison of texts
    and the grader. In a mixed file GSM8K's problems are compared as numbers in both."""
    if not any("timed_out" in row for row in rows):
        return {"flexible_accuracy": fmean(row["flexible"] for row in rows)}
    return {
        "text_accuracy": fmean(row.get("correct_by_text", row["correct"]) for row in rows),
        "grader": boxed.grader_name(),
        "grader_timeouts": sum(row.get("timed_out", False) for row in rows),
    }


# ---- kinds of mistakes: a completion is of the first kind, in this order, that applies

KINDS = {
    "right": "the right number after ####",
    "looping": "reached the token limit while repeating itself",
    "cut off": "reached the token limit without repeating itself",
    "no answer": "ended without a number after ####",
    "arithmetic": "a calculator annotation is wrong, as in <<3*4=15>>",
    "guessed": "shows no calculation at all",
    "set-up": "every calculation is right, but the answer is not",
}
KINDS_OF_MATH = {
    "right": "the right answer in the last box",
    "looping": KINDS["looping"],
    "cut off": KINDS["cut off"],
    "no answer": "ended without an answer in a box",
    "wrong": "the answer in the last box is another one",
}


def is_looping(completion: str) -> bool:
    """Whether a truncated completion repeats itself: its last 20 characters occur over 3 times."""
    return completion.count(completion[-20:]) > 3


def kind_of(row: dict) -> str:
    """The key of KINDS for one completion, of KINDS_OF_MATH for one with a box."""
    text = data.cut(row["completion"])
    if row["correct"]:
        return "right"
    if row["truncated"] and row["answer"] is None:
        return "looping" if is_looping(row["completion"]) else "cut off"
    if row["answer"] is None:
        return "no answer"
    if isinstance(row.get("gold"), str):  # MATH has no annotations
        return "wrong"
    if false_annotations(text):
        return "arithmetic"
    return "set-up" if "<<" in text else "guessed"


def kinds_in(rows: Iterable[dict]) -> dict[str, str]:
    """{kind: meaning} of all that these completions could be: GSM8K's kinds, MATH's, or both."""
    in_box = {isinstance(row["gold"], str) for row in rows}
    return (KINDS_OF_MATH if True in in_box else {}) | (KINDS if False in in_box else {})
