"""scores.py: intervals and tests against numbers worked by hand and brute force; mistakes."""

import itertools
import math

import pytest

from nanogsm.arithmetic import false_annotations, value_of
from nanogsm.report.scores import (
    KINDS,
    is_looping,
    kind_of,
    majority,
    mcnemar,
    paired,
    summarise,
    wilson,
)

FOUR_DIGITS = 5e-5  # of what is quoted from tables
FLOAT64_ROUNDING = 1e-12


@pytest.mark.parametrize(
    "correct, n, low, high",
    [
        # z^2 = 3.8415. 0 of n: [0, z^2 / (n + z^2)] = 3.8415 / 13.8415; n of n is its mirror.
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        # half of n: 1/2 -+ z / (2 sqrt(n + z^2)) = 1/2 -+ 1.9600 / (2 * 3.7204)
        (5, 10, 0.2366, 0.7634),
        # p = 0.30859, z^2 / n = 0.015006: (0.31610 -+ 0.05708) / 1.015006
        (79, 256, 0.2552, 0.3677),
        (0, 1, 0.0, 0.7935),
    ],
)
def test_wilson_by_hand(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=FOUR_DIGITS)


def test_wilson_bounds_are_where_the_score_test_just_rejects():
    # |correct / n - p| = z * sqrt(p (1 - p) / n) defines both
    for correct, n in [(1, 10), (3, 10), (79, 256), (409, 1319), (1318, 1319)]:
        for p in wilson(correct, n):
            score = abs(correct / n - p) / math.sqrt(p * (1 - p) / n)
            assert score == pytest.approx(1.959963984540054, rel=1e-9)


def test_wilson_stays_inside_and_around_the_proportion():
    for n in (1, 7, 1319):
        for correct in range(0, n + 1, max(1, n // 7)):
            low, high = wilson(correct, n)
            assert 0 <= low < high <= 1
            assert low - FLOAT64_ROUNDING <= correct / n <= high + FLOAT64_ROUNDING


@pytest.mark.parametrize(
    "only_a, only_b, p",
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 0.0625),  # 2 * 1/32
        (3, 1, 0.625),  # 2 * (1 + 4)/16
        (10, 2, 0.03857421875),  # 2 * (1 + 12 + 66)/4096
        (2, 2, 1.0),  # 2 * (1 + 4 + 6)/16 is above 1
    ],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == p


def test_mcnemar_counts_the_coin_tosses_at_least_as_uneven():
    for n in range(1, 9):
        tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
        for a in range(n + 1):
            uneven = [abs(2 * heads - n) >= abs(2 * a - n) for heads in tosses]
            assert mcnemar(a, n - a) == sum(uneven) / 2**n


def test_mcnemar_of_large_counts_is_near_the_normal_approximation():
    # (|600 - 500| - 1) / sqrt(1100) = 2.985 standard deviations; 2**1100 is no float
    assert mcnemar(600, 500) == pytest.approx(math.erfc(2.98496 / math.sqrt(2)), rel=0.02)
    assert 0 < mcnemar(900, 400) < 1e-40


def a_row(answer=None, gold=7.0, flexible=False, truncated=False, tokens=10) -> dict:
    return {
        "answer": answer,
        "gold": gold,
        "correct": answer == gold,
        "flexible": flexible,
        "truncated": truncated,
        "tokens": tokens,
    }


def test_summary_of_greedy_answers():
    rows = [
        a_row(7.0, flexible=True, tokens=20),
        a_row(8.0, flexible=True, tokens=30),
        a_row(None, flexible=True, truncated=True, tokens=40),
        a_row(9.0, tokens=10),
    ]
    summary = summarise(rows, 1)
    low, high = summary.pop("ci_low"), summary.pop("ci_high")
    assert (low, high) == pytest.approx((0.0456, 0.6994), abs=FOUR_DIGITS)  # Wilson of 1 in 4
    assert summary == {
        "n": 4,
        "completions": 4,
        "correct": 1,
        "accuracy": 0.25,
        "flexible_accuracy": 0.75,
        "truncated": 0.25,
        "formatted": 0.75,
        "mean_tokens": 25,
    }


def test_summary_of_samples_has_pass_and_majority():
    rows = [a_row(a) for a in (7.0, 7.0, 8.0)]  # majority right
    rows += [a_row(a) for a in (8.0, 8.0, 7.0)]  # right once, outvoted
    rows += [a_row(a) for a in (8.0, None, 9.0)]  # never right
    rows += [a_row(a) for a in (None, None, 7.0)]  # what gives no answer has no vote
    summary = summarise(rows, 3)
    assert (summary["n"], summary["correct"]) == (4, 4)
    assert summary["accuracy"] == pytest.approx(4 / 12)
    assert summary["pass@3"] == 0.75
    assert summary["maj@3"] == 0.5
    # Wilson of 4/3 problems in 4: p = 1/3, z^2 / n = 0.96036, and with it
    # (1/3 + 0.48018 -+ 1.95996 * sqrt(2/9 / 4 + 0.96036 / 16)) / 1.96036, which is
    # (0.81352 -+ 0.66633) / 1.96036.
    assert summary["ci_low"] == pytest.approx(0.0751, abs=FOUR_DIGITS)
    assert summary["ci_high"] == pytest.approx(0.7549, abs=FOUR_DIGITS)


def test_greedy_summary_has_no_pass_or_majority():
    assert not [key for key in summarise([a_row(7.0)], 1) if "@" in key]


@pytest.mark.parametrize(
    "answers, low, high",
    [
        # 0 of n: [0, z^2 / (n + z^2)] = 3.8415 / 8.8415; n of n is its mirror
        ([8.0] * 10, 0.0, 0.4345),
        ([7.0] * 10, 0.5655, 1.0),
        # one problem, half right: 1/2 -+ z / (2 sqrt(1 + z^2)) = 1/2 -+ 1.9600 / (2 * 2.2003)
        ([7.0, 8.0], 0.0546, 0.9454),
    ],
)
def test_interval_of_sampled_problems_has_a_width_even_where_they_agree(answers, low, high):
    summary = summarise([a_row(a) for a in answers], 2)
    found = summary["ci_low"], summary["ci_high"]
    assert found == pytest.approx((low, high), abs=FOUR_DIGITS)


def test_more_completions_of_the_same_problems_do_not_narrow_the_interval():
    answers = [7.0, 8.0, 8.0, 7.0, 8.0]
    once = summarise([a_row(a) for a in answers], 1)
    often = summarise([a_row(a) for a in answers for _ in range(6)], 6)
    for key in ("accuracy", "ci_low", "ci_high"):
        assert often[key] == pytest.approx(once[key], rel=FLOAT64_ROUNDING)
    assert (once["correct"], often["correct"], often["n"]) == (2, 12, 5)


def test_majority_tie_goes_to_the_earliest():
    def votes(*answers):
        return majority([a_row(a) for a in answers])

    assert votes(7.0, 8.0) and not votes(8.0, 7.0)
    assert votes(7.0, 8.0, 8.0, 7.0) and not votes(8.0, 7.0, 7.0, 8.0)
    assert votes(8.0, 7.0, 7.0)
    assert votes(None, None, 7.0)
    assert not votes(None, None)


def test_a_pair_is_compared_on_the_problems_both_have():
    a = {i: {"correct": i in (1, 2, 3, 9)} for i in (0, 1, 2, 3, 4, 9)}
    b = {i: {"correct": i in (0, 2, 4, 7)} for i in (0, 1, 2, 3, 4, 7)}
    found = paired(a, b)
    assert (found["n"], found["fixed"], found["broken"]) == (5, [0, 4], [1, 3])
    assert found["points"] == 0 and found["p"] == 1.0
    assert paired(a, {1: b[1], 2: b[2]})["points"] == -50.0


@pytest.mark.parametrize(
    "text, value",
    [
        ("3*4", 12), ("48/2", 24), ("2 + 3*4", 14), ("(2+3)*4", 20), ("-5+8", 3), (".5*10", 5),
        ("20%*80", 16), ("100/20%", 500), ("2.5%", 0.025),
        ("1,200*2", 2400), ("$3*2", 6), ("007+1", 8), ("100.05-0.05", 100), ("7", 7),
        ("1/0", None), ("2**9", None), ("9//2", None), ("x+1", None), ("", None), ("3*", None),
        ("()", None), ("((((1", None), ("__import__", None), ("1e9", None), ("(" * 99, None),
        ("3 apples", None),
    ],
)  # fmt: skip
def test_arithmetic_is_read_and_nothing_else(text, value):
    assert value_of(text) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    "text, false",
    [
        ("3*4 = <<3*4=12>>12 and <<12+1=13>>13", []),
        ("3*4 = <<3*4=15>>15 and <<15+1=16>>16", ["<<3*4=15>>"]),
        ("<<1/3=.33>> <<1/3=0.333>> <<2/3=0.66>> <<2/3=0.67>>", []),
        ("<<1/3=0.3>> <<2/3=0.5>> <<7/2=3>>", ["<<2/3=0.5>>", "<<7/2=3>>"]),
        ("<<5*1,000=5,000>> <<20%*80=16>> <<a*b=7>> <<3*4=12", []),
    ],
)
def test_a_false_annotation_is_found(text, false):
    assert false_annotations(text) == false


def test_looping_is_told_from_being_long():
    assert is_looping("He has 5. " + "So he has 5 more apples than that. " * 6)
    assert not is_looping(" ".join(f"Step {i}: {i} + 1 = {i + 1}." for i in range(40)))


@pytest.mark.parametrize(
    "completion, answer, truncated, kind",
    [
        (" 3*4=<<3*4=12>>12\n#### 12", 12.0, False, "right"),
        (" 3*4=<<3*4=15>>15\n#### 15", 15.0, False, "arithmetic"),
        (" 3+4=<<3+4=7>>7\n#### 7", 7.0, False, "set-up"),
        (" The answer is 9.\n#### 9", 9.0, False, "guessed"),
        (" I am not sure.", None, False, "no answer"),
        (" first this, then that, and", None, True, "cut off"),
        (" and then he goes on and on" * 9, None, True, "looping"),
        (" 3+4=<<3+4=7>>7\n#### 7" + "\n#### 7" * 99, 7.0, True, "set-up"),  # its answer came first
        (
            " 3+4=<<3+4=7>>7\n#### 7\nQuestion: <<1+1=3>>",
            7.0,
            False,
            "set-up",
        ),  # the next question does not count
    ],
)
def test_mistakes_are_told_apart(completion, answer, truncated, kind):
    row = {
        "completion": completion,
        "answer": answer,
        "correct": answer == 12.0,
        "truncated": truncated,
    }
    assert kind_of(row) == kind and kind in KINDS
