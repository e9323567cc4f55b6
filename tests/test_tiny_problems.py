"""The generated problems: GSM8K's split, arithmetic that is right, stories that add up.

Answers are checked against the English of the questions. SOLUTIONS says for every wording what a
reader would calculate from its numbers, and knows nothing about the templates.
"""

import collections
import random
import re

import pytest

from nanogsm.data import ONE_SHOT, Problem, digest, extract_answer, load_problems
from nanogsm.tiny import __main__ as command_line
from nanogsm.tiny import problems as tiny
from nanogsm.tiny.problems import TERSE, WORDY, sample


def problems(*args, **kwargs) -> list[Problem]:
    return [Problem(*pair, index) for index, pair in enumerate(tiny.problems(*args, **kwargs))]


EACH = [(split, style) for split in ("train", "test") for style in ("main", "socratic")]
ALL = {key: problems(*key) for key in EACH}
WORKED = {key: problems(*key, worked_only=True) for key in EACH}
MAIN = ALL["train", "main"] + ALL["test", "main"]
MAIN_WORKED = WORKED["train", "main"] + WORKED["test", "main"]
EVERYTHING = MAIN + WORKED["train", "socratic"] + WORKED["test", "socratic"]  # all lines
ENGLISH = ALL["train", "socratic"] + WORKED["test", "socratic"]  # all wordings

ANNOTATION = re.compile(r"(\d+)([-+*/])(\d+) = \$?<<\1\2\3=(\d+)>>\4(?!\d)")
NAME = re.compile(r"\b(?:Tom|Ben|Max|Leo|Natalia|Anna|Mia|Lily)\b")
NOUN = re.compile(
    r"\b(?:pens|books|cards|clips|stickers|marbles|apples|cookies|eggs|hats|lamps|cups|cakes"
    r"|pages|seats)\b"
)


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def steps(p) -> list[str]:
    *lines, last = p.answer.split("\n")
    assert re.fullmatch(r"#### \d+", last)
    return lines


def is_terse(p) -> bool:
    return "The answer is" in p.answer


# The arguments are the question's numbers in their order. If a question matches several lines, all
# of them must agree.
SOLUTIONS = {
    # compare: more and fewer, each with a sum and with a difference
    r"(\w+) has \d+ \w+\. \1 has \d+ more": lambda a, b: a - b,
    r"\w+ has \d+ \w+, which is \d+ more than": lambda a, b: a - b,
    r"\w+ has \d+ fewer \w+ than (\w+)\. If \1 has": lambda b, a: a - b,
    r"(\w+) has \d+ \w+\. (?!\1)\w+ has \d+ more \w+ than \1\.": lambda a, b: a + b,
    r"\w+ has \d+ \w+, which is \d+ fewer than": lambda a, b: a + b,
    r"(\w+) has \d+ fewer \w+ than \w+\. If \1 has": lambda b, a: a + b,
    # times
    r"(\w+) has \d+ \w+\. \1 has \d+ times as many": lambda a, k: a / k,
    r"\w+ has \d+ \w+, which is \d+ times as many": lambda a, k: a / k,
    r"(\w+) has \d+ \w+\. (?!\1)\w+ has \d+ times as many \w+ as \1": lambda a, k: a * k,
    r"(\w+) has \d+ \w+, and \w+ has \d+ times as many\.": lambda a, k: a * k,
    # share, rows, sold, week
    r"\w+ shares \d+ \w+ equally among \d+ friends": lambda a, b: a / b,
    r"\w+ gives \d+ friends \d+ \w+ to share equally": lambda b, a: a / b,
    r".* (\d+) (people sit down|seats are taken), how many seats": lambda a, b, c: a * b - c,
    r".* (fill \d+ rows|\d+ rows are taken), how many seats": lambda a, b, c: (a - c) * b,
    r".*sold half as many": lambda a: a + a / 2,
    r".*sold \d+ \w+ in April and \d+ fewer": lambda a, b: a + (a - b),
    r"In April \w+ sold \d+ \w+, which was \d+ more": lambda a, b: a + (a - b),
    r".*How many pages do they read .*in a week": lambda a, b: (a + b) * 7,
    r".*How many more pages does .* in a week": lambda a, b: (a - b) * 7,
    # ages, bags, gifts, save
    r"\w+ is \d+ years old\. .* twice as old": lambda a, b: (a + b) * 2,
    r"\w+ is twice as old": lambda b, a: (a + b) * 2,
    r"(\w+) is \d+ years old\. \1 is \d+ years older than (\w+)\. How old will \2": (
        lambda a, b, c: a - b + c
    ),
    r"(\w+) is \d+ years older than (\w+)\. If \1 .* will \2 be in": lambda b, a, c: a - b + c,
    r"\w+ has \d+ \w+\. S?[Hh]e gives \d+ to \w+ and puts the rest": lambda a, b, c: (a - b) / c,
    r"How many bags of .* first gives": lambda c, a, b: (a - b) / c,
    r"\w+ has \d+ \w+\. S?[Hh]e gets \d+ from": lambda a, b, c: (a + b) / c,
    r"How many bags of .* first gets": lambda c, a, b: (a + b) / c,
    r".* half of (them|his \d+|her \d+)": lambda a, c: a - a / 2 - c,
    r"A \w+ costs .* saves \$\d+ each week": lambda a, b, c: (a - b) / c,
    r"\w+ has \$\d+ and saves \$\d+ each week for a": lambda b, c, a: (a - b) / c,
    # earn, trip, finish, bus
    r"\w+ earns .* on Monday and": lambda a, b, c: a * b + a * c,
    r"\w+ works .* on Monday and": lambda b, c, a: a * b + a * c,
    r".* days( and then)? s?h?e? ?spends": lambda a, b, c, d: a * b * c - d,
    r".* bike (at|for) \d+ .* and then": lambda a, b, c, d: a * b + c * d,
    r".* comes back at": lambda a, b, c: a / b + a / c,
    r".* finish (the|a) book": lambda a, b, c, d: (a - b * c) / d,
    r"There are \d+ people on a bus": lambda a, b, c, d: a - b + c - d,
    r"At the first stop \d+ people get off a bus": lambda b, c, d, a: a - b + c - d,
    # class, farm, three, shop
    r"There are \d+ children in a class": lambda a, b, c, d: b * c + (a - b) * d,
    r"Each boy in a class": lambda c, d, b, a: b * c + (a - b) * d,
    r"(A|Each week a) farmer": lambda a, b, c, d, e: (a * b - c) / d * e,
    r"\w+ has .* and \w+ has twice as many": lambda a, b: a + (a + b) + 2 * (a + b),
    r"\w+ has twice as many": lambda b, a: a + (a + b) + 2 * (a + b),
    r"\w+ buys .* If s?he pays": lambda a, b, c, d, e: e - a * b - c * d,
    r"\w+ buys .* and pays": lambda a, c, e, b, d: e - a * b - c * d,
}


def test_the_story_has_the_answer_given():
    used = set()
    for p in MAIN_WORKED:
        found = [wording for wording in SOLUTIONS if re.match(wording, p.question)]
        used.update(found)
        answers = {SOLUTIONS[wording](*numbers(p.question)) for wording in found}
        assert answers == {extract_answer(p.answer)}, p
    assert used == set(SOLUTIONS)


# ---------------------------------------------------------------------------------- the data set


def test_sizes_and_indices_are_gsm8k_s():
    assert {key: len(each) for key, each in ALL.items()} == {
        ("train", "main"): 7473,
        ("train", "socratic"): 7473,
        ("test", "main"): 1319,
        ("test", "socratic"): 1319,
    }
    for split in ("train", "test"):  # the index of a problem is its place in its split
        assert load_problems("tiny", split) == ALL[split, "main"]
        assert load_problems("tiny-socratic", split) == ALL[split, "socratic"]
        assert load_problems("tiny-worked", split) == WORKED[split, "main"]


def test_no_question_occurs_twice_in_either_split():
    questions = {p.question for p in MAIN}
    assert len(questions) == 7473 + 1319
    assert ONE_SHOT.question not in questions  # one-shot prompts show its answer


@pytest.mark.parametrize("of", [ALL, WORKED], ids=["mixed", "worked"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_both_styles_have_the_same_questions_and_finals(of, split):
    main, socratic = of[split, "main"], of[split, "socratic"]
    assert [p.question for p in main] == [p.question for p in socratic]
    assert [extract_answer(p.answer) for p in main] == [extract_answer(p.answer) for p in socratic]
    for p, q in zip(main, socratic):
        assert [line.split(" ** ")[1] for line in steps(q)] == steps(p)


def test_the_data_are_these_and_no_others():
    """Trained models, results and checkpoints refer to these problems. A change of a template, the
    seed or Python's generator must be on purpose."""
    assert {key: digest(each) for key, each in ALL.items()} == {
        ("train", "main"): "c0690e81c494ac8de981098a573d64e9883ffb73c90a5f83e481c54e0055244b",
        ("train", "socratic"): "d33b5c30268ac547eb021a295972edaaafa2d9ee41c4c443c23a79bd4d437fd5",
        ("test", "main"): "f5421e839d4124e1a9428b40f376b2520d8a3f4b5033d12a03de4ef83737abfd",
        ("test", "socratic"): "3e94d1ad7a515817a0521dce1437e165f5c9a238fe85ac33cf2cb9cdf81f7978",
    }


def test_samples_follow_from_the_seed_alone():
    def draw(seed):
        rng = random.Random(seed)
        return [sample(rng) for _ in range(50)]

    assert draw(1) == draw(1) != draw(2)
    for question, lines, subquestions, answer, family in draw(3):
        assert len(lines) == len(subquestions) and family in tiny.TEMPLATES
        assert ANNOTATION.search(lines[-1])[4] == str(answer) and "####" not in " ".join(lines)


def test_each_family_has_its_share_of_terse_answers():
    for (split, style), each in ALL.items():
        assert abs(sum(map(is_terse, each)) / len(each) - 0.54) < 0.03
        for p, worked in zip(each, WORKED[split, style]):
            final = worked.answer.split("#### ")[1]
            lines, terse = worked.answer.split("\n"), f"The answer is {final}.\n#### {final}"
            if style == "socratic":
                terse = lines[-2].split(" ** ")[0] + " ** " + terse
            assert p.answer == (terse if is_terse(p) else worked.answer)
            assert not is_terse(worked)
    families = collections.defaultdict(list)
    for (worked, terse), p in zip(tiny._both_splits(), MAIN):
        assert terse == is_terse(p)
        families[worked.family].append(terse)
    wordy = {"share", "week", "gifts", "trip", "class", "shop"}
    for family, terse in families.items():  # at least 440 each: three standard errors are 0.07
        share = WORDY if family in wordy else TERSE
        assert abs(sum(terse) / len(terse) - share) < 0.08, family


def test_steps_and_families_are_spread():
    n_steps = collections.Counter(len(steps(p)) for p in MAIN_WORKED)
    assert set(n_steps) == {1, 2, 3, 4} and min(n_steps.values()) >= 0.08 * len(MAIN)
    families = collections.Counter(worked.family for worked, _ in tiny._both_splits())
    assert len(families) >= 14 and min(families.values()) >= 0.03 * len(MAIN)


# ------------------------------------------------------------------------------------ arithmetic


def test_every_annotation_is_right_and_followed_by_its_result():
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for p in EVERYTHING:
        lines = [] if is_terse(p) else steps(p)
        for line in lines:
            found = ANNOTATION.findall(line)
            assert len(found) == line.count("<<") == line.count("=") - 1 == 1, line
            left, operation, right, result = found[0]
            assert apply[operation](int(left), int(right)) == int(result), line
            assert operation != "/" or int(left) % int(right) == 0, line
        if lines:
            assert int(result) == extract_answer(p.answer), p


def test_every_number_is_whole_and_from_2_to_100():
    for p in EVERYTHING:
        text = p.question + "\n" + p.answer
        assert not re.search(r"\d[.,]\d|[^0-9]-|-[^0-9]", text), p
        written = re.findall(r"\d+", text)
        assert all(n[0] != "0" and 2 <= int(n) <= 100 for n in written), p


def test_steps_use_the_question_s_numbers_and_each_other():
    """The steps use every number of the question and every result except the last. The only other
    numbers are the 2 of half and twice and the 7 days of a week."""
    for p in MAIN_WORKED:
        known = numbers(p.question)
        words = {2: r"\b(half|twice)\b", 7: r"\bpages .* in a week\?"}
        known += [n for n, word in words.items() if re.search(word, p.question)]
        unused = collections.Counter(known)
        for line in steps(p):
            left, _, right, result = ANNOTATION.search(line).groups()
            for operand in map(int, (left, right)):
                assert operand in known, (p, line)
                unused[operand] -= 1
            known.append(int(result))
            unused[int(result)] += 1
        assert +unused == collections.Counter([int(extract_answer(p.answer))]), p


# --------------------------------------------------------------------------------------- English


def test_sentences_are_written_as_sentences():
    for p in ENGLISH:
        sentences = re.split(r"(?<=[.?]) (?!\*\*)", p.question)
        for line in steps(p):
            sentences += line.split(" ** ")
        for sentence in sentences:
            assert re.fullmatch(r"[A-Z][^.?]*[.?]", sentence), p
            assert not re.search(r"\s\s|\s[.,?]|[{}\[\]|]", sentence), p
        assert p.question.endswith("?") and p.question == p.question.strip()
        assert all(line.endswith(".") for line in steps(p))
        assert not re.search(r"\ba [aeiou]|\ban (?!hour)", p.question), p
        assert not re.search(r"\b(an?|each|one|1) (?!bus|class)\w+s\b", p.question + p.answer), p


def test_socratic_lines_are_a_sub_question_and_a_step():
    for key in EACH:
        for p in ALL[key] + WORKED[key]:
            for line in steps(p):
                asked = r"How [^?*]*\? \*\* " if key[1] == "socratic" else ""
                assert re.fullmatch(asked + r"[A-Z][^?]*\.", line), p


def test_people_and_things_of_an_answer_are_the_question_s():
    he = {"Tom", "Ben", "Max", "Leo"}
    for p in ENGLISH:
        people = NAME.findall(p.question)
        assert set(NAME.findall(p.answer)) <= set(people), p
        assert set(NOUN.findall(p.answer)) <= set(NOUN.findall(p.question)), p
        pronouns = set(re.findall(r"\b(he|his|him|she|her)\b", (p.question + p.answer).lower()))
        if pronouns:  # they refer to the first person named
            assert pronouns <= ({"he", "his", "him"} if people[0] in he else {"she", "her"}), p


def test_a_step_is_about_whom_its_sub_question_asks():
    for p in WORKED["train", "socratic"]:
        for line in steps(p):
            asked, step = map(NAME.findall, line.split(" ** "))
            assert asked in ([], step), line


def test_the_vocabulary_is_small_and_has_the_one_shot_example_s_words():
    words = collections.Counter()
    for p in [*MAIN_WORKED, *WORKED["train", "socratic"], *MAIN]:
        words.update(re.findall("[A-Za-z]+", f"{p.question} {p.answer}"))
    assert len(words) < 260 and min(words.values()) >= 50
    assert set(re.findall("[A-Za-z]+", f"{ONE_SHOT.question} {ONE_SHOT.answer}")) <= set(words)


def test_command_line_prints_problems_and_the_number_of_words(capsys):
    command_line.main(["--show", "2", "--style", "socratic"])
    first, second, last = capsys.readouterr().out.split("\n\n")
    assert first == "{}\n{}".format(*ALL["train", "socratic"][0][:2])
    assert second.startswith(ALL["train", "socratic"][1].question)
    assert re.fullmatch(r"\d+ distinct words in 8792 problems\n", last)
