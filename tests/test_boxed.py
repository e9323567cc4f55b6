r"""MATH: boxes, texts, grading, and what results say of it. All rows here are made up.

The package math-verify is optional. A stand-in that compares plain numbers takes its place, so that
all of our own code is tested without it. What asks the package itself is skipped where it is not
installed: pip install -r requirements-optional.txt.
"""

import importlib.util
import json
import logging
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

import pytest

import evaluate
import train_ppo
import train_sft
from nanogsm import UserError, boxed, data, distributed, generate
from nanogsm.boxed import Verdict, ends_in_box, grade, last_box, plain, restates, too_large
from nanogsm.data import Problem, Prompt, is_correct, read_jsonl
from nanogsm.report import page, scores
from nanogsm.report.compare import compare
from nanogsm.run import flags, past
from nanogsm.store import hub

HAVE_PACKAGE = importlib.util.find_spec("math_verify") is not None
GRADER_NAME = boxed.grader_name  # tests replace it
needs_package = pytest.mark.skipif(not HAVE_PACKAGE, reason="math-verify is not installed")


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch, tmp_path):
    boxed._grade_on_all.cache_clear()
    GRADER_NAME.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANOGSM_DATA_DIR", raising=False)
    yield
    boxed._grade_on_all.cache_clear()
    GRADER_NAME.cache_clear()


@pytest.fixture
def asked(monkeypatch) -> list:
    """A stand-in for the package, which knows numbers, products, fractions and 1 + 2 + ... + 10.
    Returns the pairs it was asked about."""
    pairs = []

    def value(text: str) -> float | None:
        known = {r"\sum_{n=1}^{10} n": 55.0, r"\frac{1}{2}": 0.5, r"\frac{6}{3}": 2.0}
        factors = text.split(r" \cdot ")
        try:
            found = 1.0
            for factor in factors:
                found *= known.get(factor) or float(factor)
            return found
        except ValueError:
            return None

    def ask(answer: str, gold: str) -> Verdict:
        pairs.append((answer, gold))
        if answer == "slow":
            return Verdict(False, timed_out=True)
        return Verdict(value(answer) is not None and value(answer) == value(gold))

    monkeypatch.setattr(boxed, "_ask", ask)
    monkeypatch.setattr(boxed, "grader_name", lambda: "math-verify 0.0.1")
    return pairs


# ------------------------------------------------------------------------------------- the box


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"so $\boxed{5}$.", "5"),
        (r"\boxed{17} \boxed{18}", "18"),
        (r"\boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\fbox{5} after \boxed{4}", "4"),
        (r"\boxed{4} then \fbox{5}", "5"),
        (r"\boxed{\boxed{6}}", "6"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{x \} y}", r"x \} y"),
        (r"\boxed {7}", "7"),
        (r"so $\boxed 5$ apples", "5"),
        (r"so $\boxed\frac12$.", r"\frac12"),
        (r"\boxed{x^{2^{3}}} }", "x^{2^{3}}"),
        ("no box, 5", None),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed{5", None),
        (r"\boxed{5} and \boxed{6", None),  # the last one counts, and it has no end
        (r"$\boxed9}$", None),
        (r"\boxedx{5}", None),
        (r"\boxed", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text, inside):
    assert last_box(text) == inside


@pytest.mark.parametrize("text", [r"\boxed{" * 20_000, "{" * 100_000, "\\boxed" + " " * 100_000])
def test_a_box_is_found_in_linear_time(text):
    began = time.perf_counter()
    assert last_box(text) is None and not ends_in_box("#### 5") and len(plain(text)) >= 0
    assert time.perf_counter() - began < 2


def test_what_an_answer_ends_in_decides_its_kind():
    assert ends_in_box(r"\boxed{5}") and ends_in_box(r"#### 4 \boxed{5}")
    assert not ends_in_box("#### 5") and not ends_in_box("\\boxed{4}\n#### 5")
    assert not ends_in_box("5")
    assert Problem("?", r"\boxed{5}", 0).boxed and not Problem("?", "#### 5", 0).boxed


# ------------------------------------------------------------------------------------- the text


@pytest.mark.parametrize(
    "a, b",
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\tfrac1{72}", r"\frac{1}{72}"),
        (r"\frac{72}3", r"\frac{72}{3}"),
        ("1/2", r"\frac{1}{2}"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("x = 5", "5"),
        ("f(x)=2x", "2x"),
        ("1,000", "1000"),
        ("10,\\!080", "10080"),
        ("1{,}000", "1000"),
        (r"5\text{ cm}", "5"),
        (r"5\text{ cm}^2", "5"),
        (r"\text{Monday}", "Monday"),
        (r"\left( 3, 4 \right)", "(3,4)"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$18.90", "18.90"),
        (r"50\%", "50"),
        (".5", "0.5"),
        ("7.", "7"),
        ("\u22125", "-5"),
        ("x +  1", "x+1"),
    ],
)
def test_texts_that_mean_the_same_are_equal(a, b):
    assert plain(a) == plain(b) and grade(a, b) == Verdict(True, by_text=True)


@pytest.mark.parametrize(
    "a, b",
    [
        ("5", "6"), ("5", "-5"), ("0.5", r"\frac{1}{2}"), ("3,5", "5,3"), ("(1,2)", "[1,2]"),
        (r"1\\ 2", r"1\ 2"), ("x=5=y", "5=y"), ("1,00", "100"), ("1,2", "12"), ("2x", "2"), (r"\sqrt{35}", r"\sqrt{3}5"),
        (r"\frac{1}{23}", r"\frac{12}{3}"), ("1.5", "15"), ("C", "D"), ("5", ""),
        (r"\text{no}", r"\text{on}"),
    ],
)  # fmt: skip
def test_other_texts_are_not(a, b):
    assert plain(a) != plain(b)


# ------------------------------------------------------------------------- what is not computed

FINE = [
    "5", "10!", "100!", "n!", "2^{10}", "2^{2006}", "3^{1999}", "10^{10000}", "x^{10}+x^9+x^8",
    "(x+1)^5(x+2)^6", r"\frac{3^{10}}{2^{10}}", r"\sqrt[3]{2}", r"\sum_{n=1}^{10} n", "90^{\\circ}",
    r"\binom{10}{3}", "10,\\!080", r"e^{-\frac{x}{2}}", r"e^{2\pi i}", r"\int_0^1 x^2 dx",
    "((((((((((1))))))))))", r"9^{\text{th}}", "x_1^2", "2^{-3}", "x^{n+1}",
]  # fmt: skip
TOO_LARGE = [
    "9^{9^{9^9}}", "9^9!", "10001!", "9999999999!", "(5!)!", "5!!", "10^{10001}", "10^{99 999}",
    "10^{99{,}999}", "10^{10 \\cdot 10 \\cdot 999}", "((9^{999})^{99})", "{9^{999}}^{99}",
    r"\prod_{n=1}^{5000} n^{5000}", r"\sum_{n=1}^{99999999} n", r"\binom{99999}{4}", "9**99999",
    r"9^{\binom{99}{49}}", r"9^{\exp(99)}", "(1000!)^{99}", "9^{(9^9)}", "(" * 21 + "1" + ")" * 21,
    r"\frac{1}{" * 30 + "1" + "}" * 30, "100!^{100}!", "9^{9!}", "9" * 100 + "^{999}", "9^{\u0669\u0669\u0669\u0669\u0669}",
]  # fmt: skip


@pytest.mark.parametrize("text", FINE)
def test_ordinary_powers_are_computed(text):
    assert not too_large(text)


@pytest.mark.parametrize("text", TOO_LARGE)
def test_large_powers_are_wrong_without_being_computed(asked, text):
    assert too_large(text)
    assert grade(text, "1") == Verdict(False) and not asked
    assert grade(text, text) == Verdict(True, by_text=True)  # but equal text is right


def test_the_package_is_asked_only_where_it_has_to_be(asked):
    assert grade(None, "5") == Verdict(False)
    assert grade("5", "5") == Verdict(True, by_text=True)
    assert grade("5" * 301, "5") == Verdict(False) and not asked
    assert grade("5.0", "5") == Verdict(True) and grade("5.0", "5") == Verdict(True)
    assert grade("5" * 299 + ".", "5") == Verdict(False)
    assert grade("slow", "5") == Verdict(False, timed_out=True)
    assert asked == [("5.0", "5"), ("5" * 299 + ".", "5"), ("slow", "5")]  # each one once


def test_on_many_devices_rank_0_grades_and_tells(asked, monkeypatch):
    told = []

    def on_rank_0(do):
        told.append(do)
        return [True, False, False]  # as JSON from rank 0

    monkeypatch.setattr(distributed, "on_rank_0", on_rank_0)
    assert grade("6", "5") == Verdict(True) and len(told) == 1 and not asked
    assert grade("5", "5").right and not grade(None, "5").right and len(told) == 1
    # maj@k is counted by rank 0 alone: it must not wait for the others.
    assert boxed.joined(["0.5", r"\frac{1}{2}"]) == [0, 0] and len(told) == 1 and len(asked) == 1


# ------------------------------------------------------------------- the package, and its manners


@pytest.fixture
def package(monkeypatch):
    """package(parse, verify): a math_verify made of these two functions."""

    def install(parse, verify=lambda *a, **k: True):
        module = types.ModuleType("math_verify")
        module.LatexExtractionConfig = lambda **given: ("latex", given)
        module.parse, module.verify = parse, verify
        monkeypatch.setitem(sys.modules, "math_verify", module)
        monkeypatch.setattr(boxed, "grader_name", lambda: "math-verify 0.0.1")
        monkeypatch.setattr(boxed, "MOST_SECONDS", 0.2)

    return install


def test_the_package_gets_the_box_and_no_parser_that_evaluates(package):
    seen = []
    package(lambda text, configs, *more: seen.append((text, configs, more)) or [text])
    assert grade("\\$6$", "7\n8").right
    more = ("no_fallback", "first_match", None, True)  # no timeout of its own; errors are raised
    latex = [("latex", {"boxed_match_priority": 0})]
    texts = ["\\boxed{1}", "\\boxed{7\n8}", "\\boxed{6}"]  # 1 only to wake it up
    assert seen == [(text, latex, more) for text in texts]


def test_what_cannot_be_read_is_wrong(package):
    package(lambda text, *_: [] if "6" in text else [text])
    assert grade("6", "7") == Verdict(False) and grade("7.0", "6") == Verdict(False)
    assert grade("8", "7") == Verdict(True)

    def fails(*_):
        raise RecursionError

    package(fails)
    assert grade("9", "7") == Verdict(False)


def test_a_system_without_time_limits_is_told_before_the_work(package, monkeypatch):
    package(lambda text, *_: [text])
    boxed.check_data("math", "train")
    monkeypatch.delattr(signal, "setitimer")  # as on Windows
    boxed.check_data("main", "train")
    with pytest.raises(UserError, match="graded in the main thread only, and on Unix"):
        boxed.check_data("math", "train")


def test_a_timeout_is_wrong_and_our_signal_handlers_are_put_back(package, capfd):
    def stubborn(text, *_):
        while "6" in text:
            try:
                sum(range(1000))
            except:  # noqa: E722 (as third-party code has them)
                stubborn.caught = getattr(stubborn, "caught", 0) + 1
                if stubborn.caught > 1:
                    raise

    def slow_machine(text, *_):
        end = time.monotonic() + 0.25
        while time.monotonic() < end:
            time.sleep(0.01)
        return [text]

    package(stubborn)
    mine = lambda *_: None  # noqa: E731
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    old = signal.signal(signal.SIGALRM, mine)
    try:
        signal.setitimer(signal.ITIMER_REAL, 500)
        assert grade("6", "7") == Verdict(False, timed_out=True) and stubborn.caught == 2
        assert signal.getsignal(signal.SIGALRM) is mine
        package(slow_machine)
        assert grade("9", "7").right  # 0.5 s passed, but it did not compute
        assert 400 < signal.setitimer(signal.ITIMER_REAL, 0)[0] <= 500  # another's alarm goes on
        package(lambda text, *_: [text])
        assert grade("8", "7").right and signal.getsignal(signal.SIGALRM) is mine
        time.sleep(0.3)  # no alarm is left
    finally:
        signal.signal(signal.SIGALRM, old)
    assert before == {number: signal.getsignal(number) for number in before}


def test_ctrl_c_during_grading_is_for_our_handler(package):
    number = []

    def parse(text, *_):
        os.kill(os.getpid(), signal.SIGINT)
        return [text]

    package(parse)
    old = signal.signal(signal.SIGINT, lambda n, frame: number.append(n))
    try:
        assert grade("6", "7").right and set(number) == {signal.SIGINT}
    finally:
        signal.signal(signal.SIGINT, old)


def test_nothing_of_it_reaches_the_console(package, capfd):
    def noisy(text, *_):
        print("model text")
        print("model text", file=sys.stderr)
        logging.getLogger("math_verify.parser").warning("model text")
        return [text]

    package(noisy)
    assert grade("6", "7").right
    assert capfd.readouterr() == ("", "")


def test_outside_the_main_thread_it_says_so(package):
    package(lambda text, *_: [text])
    said = []

    def run():
        try:
            grade("6", "7")
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert said and "main thread only" in said[0]


# ------------------------------------------------------------------------------------- the reward


@pytest.mark.parametrize(
    "answer, gold, restated",
    [
        (r"\sum_{n=1}^{10} n", "55", True),
        (r"\sum_{n=1}^{10} n", r"\sum_{n=1}^{10}n", False),  # equal text
        (r"2 \cdot 3", "6", True),
        (r"\frac{6}{3}", "2", True),
        (r"\frac{1}{2}", "0.5", False),
        ("6.0", "6", False),
        ("7.0", "6", False),  # wrong is wrong, not restated
    ],
)
def test_a_right_answer_that_restates_the_problem_earns_nothing(asked, answer, gold, restated):
    problem = Problem("?", rf"So $\boxed{{{gold}}}$.", 0)
    completion = rf" It is $\boxed{{{answer}}}$."
    assert restates(completion, problem.answer) == restated
    earned = is_correct(completion, problem) and not restated
    assert train_ppo.reward(completion, problem, False) == float(earned)


@pytest.mark.parametrize(
    "answer, gold, restated",
    [
        ("2^{10}", "1024", True), ("4!", "24", True), ("20+4", "24", True), ("25-1", "24", True),
        (r"\sqrt{4}", "2", True), (r"\gcd(4,6)", "2", True), ("-5", "-5.0", False),
        (r"\frac{-1}{2}", "-0.5", False), ("2^{x}", "2^{1x}", False),
        (r"\int_0^1 x dx", "x+1", True), (r"\prod_{n=1}^{3} n", "6", True), ("x=5", "5.0", False),
    ],
)  # fmt: skip
def test_operations_that_are_left_undone(monkeypatch, answer, gold, restated):
    monkeypatch.setattr(boxed, "_ask", lambda *_: Verdict(True))
    assert restates(rf"\boxed{{{answer}}}", rf"\boxed{{{gold}}}") == restated


def test_gsm8k_earns_what_it_did(asked):
    problem = Problem("?", "2+3=<<2+3=5>>5\n#### 5", 0)
    assert train_ppo.reward("#### 5", problem, False) == 1.0 and not asked
    assert train_ppo.reward(r"\boxed{5}", problem, False) == 0.0 and not asked


# ------------------------------------------------------------------------------------- the files


def write(folder: Path, *rows: dict) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SUM = {"problem": "2 + 3?", "level": "Level 1", "solution": r"It is $\boxed{5}$."}
CLIPS = {"question": "How many?", "answer": "2+2=<<2+2=4>>4\n#### 4"}


def test_a_file_may_have_both_kinds_of_row(tmp_path, asked):
    found = read_jsonl(write(tmp_path, SUM, CLIPS, {"question": "?", "answer": r"\boxed{x}"}))
    assert [(p.question, p.boxed, p.index) for p in found] == [
        ("2 + 3?", True, 0), ("How many?", False, 1), ("?", True, 2),
    ]  # fmt: skip
    answers = [data.extract_answer(p.answer, p.boxed) for p in found]
    assert answers == ["5", 4.0, "x"]
    assert is_correct(r"\boxed{5}", found[0]) and not is_correct("#### 5", found[0])
    assert is_correct("#### 4", found[1]) and not is_correct(r"\boxed{4}", found[1])
    assert not is_correct(r"\boxed{4} Question: \boxed{5}", found[0])


@pytest.mark.parametrize(
    "row, said",
    [
        ({"problem": "?", "solution": r"\boxed{}"}, "line 2: nothing stands in the last box"),
        ({"problem": "?", "solution": r"\boxed{5"}, "line 2: nothing stands in the last box"),
        ({"problem": "?", "solution": r"Question: \boxed{5}"}, "line 2: nothing stands in the"),
        ({"problem": "?", "solution": "It is 5."}, "line 2: the answer has no .* and no .boxed"),
        ({"problem": "?", "answer": "5"}, 'line 2: not .* "problem" and "solution" .*solution'),
        ({"problem": "", "solution": r"\boxed{5}"}, "line 2: the question is empty"),
        ({"problem": ["?"], "solution": r"\boxed{5}"}, "line 2: not a JSON object"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, asked, row, said):
    with pytest.raises(UserError, match=said):
        read_jsonl(write(tmp_path, SUM, row))


def test_maths_rows_with_an_empty_box_are_left_out_in_words(tmp_path, asked, monkeypatch, capsys):
    path = write(tmp_path, SUM, SUM | {"solution": r"\boxed{}"}, SUM)
    wanted = []
    monkeypatch.setattr(hub, "data_file", lambda *given: wanted.append(given) or path)
    assert [p.index for p in data.load_problems("math", "train", "there")] == [0, 2]
    assert capsys.readouterr().out == (
        "left out 1 of 3 problems: nothing stands in the last box of the answer\n"
    )
    with pytest.raises(UserError, match="line 2: nothing stands"):
        data.load_problems("math500", "test")
    assert wanted == [("math_train.jsonl", "there"), ("math500.jsonl", None)]


def test_each_file_has_its_own_addresses(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="download https://raw.*/ToRA/.*/math/train.jsonl by hand "
                       "as math_train.jsonl into that folder"):  # fmt: skip
        hub.data_file("math_train.jsonl", tmp_path)
    fetched = []

    def fetch(url, size):
        fetched.append((url, size))
        raise OSError("no network here")

    monkeypatch.setattr(hub, "_fetch", fetch)
    monkeypatch.setenv("NANOGSM_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match="cannot get math500.jsonl"):
        hub.data_file("math500.jsonl")
    assert [(url.split("/")[2], size) for url, size in fetched] == [
        ("huggingface.co", 446_564), ("media.githubusercontent.com", 446_564),
    ]  # fmt: skip


def no_package(monkeypatch) -> None:
    def version(name):
        raise boxed.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(boxed.importlib.metadata, "version", version)
    monkeypatch.setattr(hub, "data_file", lambda *_: pytest.fail("asked for a file"))
    monkeypatch.setattr(hub, "find_model", lambda *_, **__: pytest.fail("asked for a model"))


@pytest.mark.parametrize("main, argv", [
    (train_sft.main, ["--data", "math"]),
    (train_ppo.main, ["--data", "math", "--init", "google/gemma-2b-it"]),
    (evaluate.main, ["--data", "math"]),
    (evaluate.main, ["--data", "math500"]),
])  # fmt: skip
def test_without_the_package_math_is_refused_before_any_download(monkeypatch, main, argv):
    no_package(monkeypatch)
    with pytest.raises(UserError, match="pip install -r requirements-optional.txt"):
        main(argv)


def test_without_the_package_a_file_of_ones_own_is_refused(tmp_path, monkeypatch):
    no_package(monkeypatch)
    with pytest.raises(UserError, match="math-verify, which is missing"):
        read_jsonl(write(tmp_path, CLIPS, SUM))
    assert len(read_jsonl(write(tmp_path, CLIPS))) == 1


def test_math500_is_for_evaluation_only(asked, monkeypatch):
    monkeypatch.setattr(hub, "find_model", lambda *_, **__: pytest.fail("asked for a model"))
    for main, argv in [
        (train_sft.main, ["--data", "math500"]),
        (train_ppo.main, ["--data", "math500"]),
        (evaluate.main, ["--data", "math500", "--split", "validation"]),
    ]:
        with pytest.raises(UserError, match="--data math500 is for evaluation only"):
            main(argv)


# ------------------------------------------------------------------------------ limits and names


def test_limits_and_names_follow_the_data(asked):
    sft = flags.sft_args(["--data", "math"])
    assert (sft.max_seq_length, sft.max_new_tokens, sft.out) == (1024, 1024, "runs/sft-full-math")
    assert flags.sft_args([]).max_seq_length == 768
    assert flags.sft_args(["--data", "math", "--max-seq-length", "99"]).max_seq_length == 99
    with pytest.raises(UserError, match="--max-seq-length is 0"):
        flags.sft_args(["--max-seq-length", "0"])
    ppo = flags.ppo_args(["--data", "math", "--lora"])
    assert (ppo.max_new_tokens, ppo.init) == (1024, "runs/sft-lora-math")
    with pytest.raises(UserError, match="train_sft.py --lora --data math"):
        train_ppo.main(["--data", "math", "--lora"])
    args = evaluate.parse_args(["--data", "math500"])
    prompt, folder, name = evaluate.resolve(args)
    assert args.n == 500 and prompt == Prompt("plain", 1, True, boxed=True)
    assert name == "eval-test-500-math500"
    assert evaluate.parse_args(["--data", "math"]).n == 256


@pytest.mark.parametrize("trained_on, asked_for", [("math", "math"), ("socratic", "main")])
def test_a_run_on_math_is_evaluated_on_math(tmp_path, trained_on, asked_for):
    record = {"args": {"val_examples": 8, "data": trained_on}, "info": {"prompt": {"boxed": True}}}
    (tmp_path / "run_args.json").write_text(json.dumps(record))
    args = evaluate.parse_args(["--model", str(tmp_path)])
    assert (args.data, args.n) == (asked_for, 256)
    assert evaluate.parse_args(["--model", str(tmp_path), "--data", "main"]).data == "main"
    problems = [Problem("?", r"\boxed{5}" if asked_for == "math" else "#### 5", 0)]
    prompt, _, name = evaluate.resolve(args, problems)
    assert prompt.boxed == (asked_for == "math")
    assert name == "eval-test-256" + "-math" * prompt.boxed


def test_a_run_on_gsm8k_held_out_nothing_of_math(tmp_path, asked):
    def run(trained_on):
        record = {"args": {"val_examples": 8, "data": trained_on}, "info": {"prompt": {}}}
        (tmp_path / "run_args.json").write_text(json.dumps(record))
        return [past.held_out_by(str(tmp_path), d) for d in ("main", "socratic", "math", "tiny")]

    assert run("main") == [8, 8, None, None]
    assert run("math") == [None, None, 8, None]
    assert run("tiny") == [None, None, None, 8]


def test_the_prompt_asks_for_a_box(gemma):
    _, tokenizer = gemma()
    for style in ("plain", "chat"):
        ids, _ = data.encode(tokenizer, Prompt(style, 1, True, boxed=True), "2 + 3?")
        text = tokenizer.decode(ids)
        assert boxed.INSTRUCTION in text and "####" not in text and r"\boxed{72}" in text
        assert last_box(boxed.ONE_SHOT_ANSWER) == "72" and "2 + 3?" in text


def test_most_problems_decide_what_the_prompt_asks_for():
    math, gsm = Problem("?", r"\boxed{5}", 0), Problem("?", "#### 5", 0)
    for problems, kind in [([math], True), ([gsm], False), ([math, gsm], False),
                           ([math, math, gsm], True)]:  # fmt: skip
        prompt = past.prompt_about(Prompt(boxed=not kind), problems)
        assert prompt.boxed == kind
    assert Prompt().settings() == {"style": "plain", "shots": 0, "instruction": False}
    assert Prompt(**Prompt(boxed=True).settings()) == Prompt(boxed=True)


# ------------------------------------------------------------------------------------ the results


def result(index, answer, gold="0.5", truncated=False, **more) -> dict:
    right = grade(answer, gold) if isinstance(gold, str) else None
    completion = "so" if answer is None else rf"so $\boxed{{{answer}}}$"
    row = {"index": index, "question": f"What is {index} < 9?", "truncated": truncated,
           "tokens": 9, "completion": completion, "answer": answer, "gold": gold}  # fmt: skip
    if right is None:
        return row | {"correct": answer == gold, "flexible": False} | more
    return row | {"correct": right.right, "correct_by_text": right.by_text,
                  "timed_out": right.timed_out} | more  # fmt: skip


def test_the_summary_names_the_grader_and_has_the_texts_beside_it(asked):
    rows = [result(0, "0.5"), result(1, r"\frac{1}{2}"), result(2, "slow"), result(3, None)]
    found = scores.summarise(rows, 1)
    assert (found["accuracy"], found["text_accuracy"], found["formatted"]) == (0.5, 0.25, 0.75)
    assert (found["grader"], found["grader_timeouts"]) == ("math-verify 0.0.1", 1)
    assert "flexible_accuracy" not in found
    # A row of GSM8K in between is compared as a number in both columns.
    found = scores.summarise([*rows, result(4, 4.0, 4.0)], 1)
    assert (found["accuracy"], found["text_accuracy"]) == (0.6, 0.4)
    assert boxed.shares(rows, "val_") == {
        "val_right_by_value_only": 0.25, "val_grader_timeouts": 0.25,
    }  # fmt: skip
    assert boxed.shares([result(4, 4.0, 4.0)]) == {}


def test_answers_of_equal_value_vote_together(asked):
    votes = ["7", "0.5", "7", r"\frac{1}{2}", "0.50", "7", None, "8"]
    # "0.5", "\frac{1}{2}" and "0.50" are three for one value, like the three 7s that came first.
    assert boxed.joined(votes) == [0, 1, 0, 1, 1, 0, -1, 7]
    rows = [result(0, answer) for answer in votes]
    assert not scores.majority(rows) and scores.majority([*rows, result(0, "0.5")])
    assert not scores.majority([result(0, None)] * 3)
    assert scores.majority([result(0, "7", "7"), result(0, r"\frac{1}{2}", "7")])


def test_kinds_of_mistakes_do_without_annotations(asked):
    rows = [
        result(0, "0.5"), result(1, "7"), result(2, None),
        result(3, None, truncated=True), result(4, None, truncated=True, completion="and on " * 20),
    ]  # fmt: skip
    kinds = [scores.kind_of(row) for row in rows]
    assert kinds == ["right", "wrong", "no answer", "cut off", "looping"]
    assert set(scores.kinds_in(rows)) == set(kinds)
    gsm = result(5, 4.0, 5.0)
    assert scores.kinds_in([gsm]) == scores.KINDS
    assert set(scores.kinds_in([*rows, gsm])) == {*scores.KINDS, "wrong"}


def test_the_page_and_the_comparison_show_formulas(asked, tmp_path, capsys):
    for name, answers in (("a", ["7", "0.5"]), ("b", [r"\frac{1}{2}", "<b>\x1b"])):
        rows = [result(i, answer) for i, answer in enumerate(answers)]
        (tmp_path / name).mkdir()
        place = tmp_path / name / "eval-test-2-math500"
        place.with_suffix(".json").write_text(json.dumps(scores.summarise(rows, 1)))
        place.with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert compare(str(tmp_path / "a"), str(tmp_path / "b"), False) == 0
    out = capsys.readouterr().out
    assert "--- problem 0, answer 0.5\n" in out and "\x1b" not in out
    page.main([str(tmp_path / "a"), str(tmp_path / "b")])
    text = (tmp_path / "report.html").read_text()
    assert "<td>equal text<small>" in text and "math-verify 0.0.1" in text
    assert "last number" not in text
    assert "<td>wrong<small>" in text and "guessed" not in text and "<b>\x1b" not in text


def test_gsm8ks_rows_and_summary_have_no_new_keys(asked):
    rows = [result(0, 4.0, 4.0)]
    assert list(scores.summarise(rows, 1)) == [
        "n", "completions", "correct", "accuracy", "ci_low", "ci_high", "flexible_accuracy",
        "truncated", "formatted", "mean_tokens",
    ]  # fmt: skip
    assert data.beside("#### 4", Problem("?", "#### 4", 0)) == {"flexible": True}
    assert list(generate.validation_metrics(rows)) == ["val_exact_match", "val_truncated"]


def test_sft_ppo_and_evaluation_with_the_embedded_model(tmp_path, asked, monkeypatch, capsys):
    rows = []
    for n in range(2, 42):
        rows.append({"problem": f"Mia has {n} cookies. How many cookies does Mia have?",
                     "solution": rf"Mia has $\boxed{{{n % 3}}}$ cookies."})  # fmt: skip
    path = str(write(tmp_path, *rows))
    common = ["--tiny", "--data", path, "--device", "cpu"]
    assert train_sft.main([*common, "--out", "sft", "--epochs", "3", "--max-new-tokens", "24",
                           "--val-examples", "4"]) == 0  # fmt: skip
    boxes, terms_of = [], train_ppo.terms_of
    monkeypatch.setattr(train_ppo, "terms_of", lambda *a: boxes.append(a[3]) or terms_of(*a))
    assert train_ppo.main([*common, "--init", "sft", "--out", "ppo", "--steps", "1",
                           "--rollouts", "8", "--max-new-tokens", "24", "--advantage", "rloo",
                           "--group", "2", "--penalty-no-answer", "0.3"]) == 0  # fmt: skip
    asking = ["--data", path, "--split", "validation", "--samples", "2", "--temperature", "1"]
    assert evaluate.main(["--model", "ppo", *asking, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "equal text" in out and "exact match is by math-verify 0.0.1" in out
    metrics = [json.loads(line) for line in Path("ppo/metrics.jsonl").read_text().splitlines()]
    assert all("right_by_value_only" in row for row in metrics if "reward" in row)
    assert all("reward_no_answer" in row for row in metrics if "reward" in row)
    assert boxes == [True] * 8  # "no answer" means no box here
    assert all("val_grader_timeouts" in row for row in metrics if "val_exact_match" in row)
    sample = json.loads(Path("ppo/samples.jsonl").read_text().splitlines()[0])
    assert {"correct_by_text", "timed_out"} <= sample.keys()
    info = json.loads(Path("ppo/run_args.json").read_text())["info"]
    assert info["grader"] == "math-verify 0.0.1" and info["prompt"]["boxed"] is True
    [summary] = Path("ppo").glob("eval-mine-validation-*.json")
    row = json.loads(summary.with_suffix(".jsonl").read_text().splitlines()[0])
    assert isinstance(row["gold"], str) and "flexible" not in row
    assert json.loads(summary.read_text())["prompt"]["boxed"] is True
    evaluate.main(["--model", "ppo", "--ask", "How many cookies does Mia have?", "--device", "cpu"])
    assert "-> " in capsys.readouterr().out


# ------------------------------------------------------------------------------ the package itself

EQUAL = [
    (r"\frac{1}{2}", "0.5"), (r"\frac{3}{6}", r"\frac12"), ("x = 5", "5.0"), ("3, 5, 7", "7,3,5"),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)"), (r"\{1,2\}", "1,2"), ("2i+3", "3+2i"),
    ("x^2+2x+1", "(x+1)^2"), (r"2\sqrt{3}", r"\sqrt{12}"), (r"\text{Monday}", r"\text{monday}"),
    (r"[3,\infty)", r"[3, +\infty)"), ("y=2x+1", "2x-y+1=0"), (r"11\frac{1}{2}", r"\frac{23}{2}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2/2 \\ 2 \end{pmatrix}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), ("2^{10}", "1024"), ("0.333333333", "1/3"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"), (r"4 \text{ or } 5", "4,5"),
    ("5!", "120"),
]  # fmt: skip
UNEQUAL = [
    ("5", "6"), (r"\frac12", r"\frac13"), ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"), ("3,5", "3,5,7"),
    ("x+1", "x+2"), (r"\sqrt{2}", "1.41"), ("-5", "5"), ("0.33", "1/3"), ("1,2", "12"), ("C", "D"),
    (r"\text{Monday}", r"\text{Tuesday}"), ("x<3", "x>3"), (r"2\pi", "6.28"), ("3+2i", "3-2i"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"), ("10^3", "10^4"),
    (r"[3,\infty)", r"(3,\infty)"), ("y=2x", "y=3x"), ("5!", "119"),
]  # fmt: skip
HOSTILE = [
    "9^{9^{9^9}}", "9^9^9^9^9", "9999999999!", "((5!)!)!", "e^{e^{e^{e^{9}}}}", "1e999999999",
    r"\binom{99999999}{49999999}", r"\sum_{n=1}^{99999999} n^{n}", "9" * 290 + "^{9}",
    "__import__('os').system('touch owned')", r"\text{__import__('os').mkdir('owned')}",
    "eval(open('/etc/passwd').read())", "(" * 140 + "1" + ")" * 140, r"\frac{1}{" * 30 + "1" * 31,
    r"\sqrt{" * 15 + "2" + "}" * 15, "\ud800", "\u0663", "\x00\x1b[2J", "\\" * 299, "x" * 10_000,
]  # fmt: skip


@needs_package
@pytest.mark.parametrize("answer, gold", EQUAL)
def test_the_package_sees_equal_values(answer, gold, capfd):
    assert grade(answer, gold).right and capfd.readouterr() == ("", "")


@needs_package
@pytest.mark.parametrize("answer, gold", UNEQUAL)
def test_the_package_sees_unequal_values(answer, gold, capfd):
    assert not grade(answer, gold).right and capfd.readouterr() == ("", "")


@needs_package
@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_wrong_and_do_nothing(answer, capfd, monkeypatch):
    monkeypatch.setattr(boxed, "MOST_SECONDS", 1.0)
    began = time.perf_counter()
    for gold in ("1", r"\frac{\pi}{2}"):
        assert not grade(answer, gold).right
    assert time.perf_counter() - began < 4 and not Path("owned").exists()
    assert capfd.readouterr() == ("", "") and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@needs_package
def test_a_real_timeout_counts_as_wrong(monkeypatch):
    monkeypatch.setattr(boxed, "MOST_SECONDS", 0.3)
    assert grade("(x+y+z+w)^{200}", "(x+y+z+w)^{201}") == Verdict(False, timed_out=True)


@needs_package
def test_the_grader_has_a_version():
    assert boxed.grader_name().startswith("math-verify 0.")


@pytest.mark.skipif("NANOGSM_MATH500" not in os.environ, reason="NANOGSM_MATH500 names no file")
def test_the_500_right_answers_of_math500_are_right(monkeypatch):
    rows = [json.loads(line) for line in Path(os.environ["NANOGSM_MATH500"]).open()]
    assert len(rows) == 500
    assert sum(last_box(row["solution"]) == row["answer"] for row in rows) == 500
    assert sum(grade(last_box(r["solution"]), r["answer"]).by_text for r in rows) == 500
    assert not any(too_large(row["answer"]) for row in rows)
    if HAVE_PACKAGE:  # and by value, without the texts
        assert sum(boxed._ask(row["answer"], row["answer"]).right for row in rows) == 500


def test_an_empty_box_in_unscored_data_is_no_answer_to_compare_with(package):
    package(lambda text, *_: [text])
    problem = Problem("1 + 1?", r"It is \boxed{}.", 0)
    assert problem.boxed and last_box(problem.answer) is None
    assert not is_correct(r"\boxed{2}", problem) and not is_correct("2", problem)
