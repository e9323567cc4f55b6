"""Word problems in GSM8K's exact format, small enough for a model of half a million parameters.

    python -m nanogsm.tiny --show 30 --style socratic

One problem in the main style:

    question  A hall has 6 rows with 8 seats in each row. If 30 seats are taken, how many seats are
              empty?
    answer    There are 6*8 = <<6*8=48>>48 seats in the hall.
              There are 48-30 = <<48-30=18>>18 empty seats.
              #### 18

The socratic style puts a sub-question before each step: "How many seats are there in the hall? **
There are 6*8 = ...". As in GSM8K there are 7,473 training and 1,319 test problems, no question
occurs twice, and both styles have the same questions in the same order. SEED determines all of it.
Training and test problems share their families, names and range of numbers: a test problem is new,
but its kind is not. Four in ten repeat a training problem's calculation in other words.

The data leave something for reinforcement learning to find. Half of the answers show no working:

    The answer is 18.
    #### 18

The people who wrote GSM8K's answers differ in how much working they show. Here the difference is
large, and it depends on the family: in most families three answers in four are terse, in every
third family one in ten (TERSE and WORDY, drawn for each problem). Supervised training learns these
habits. RL can discover that showing the work pays in every family. With `worked_only` all answers
show their working, which is the ceiling for supervised training.
"""

import functools
import operator
import random
import re
from typing import NamedTuple

SEED = 8
SIZES = {"train": 7473, "test": 1319}
TERSE = 0.75  # share of answers without working in most families
WORDY = 0.1  # the same in every third family
LIMIT = 100  # the largest number; the smallest is 2, so every noun can be a plural

HE, SHE = ("he", "He", "his", "him"), ("she", "She", "her", "her")
PEOPLE = dict.fromkeys(("Tom", "Ben", "Max", "Leo"), HE)
PEOPLE |= dict.fromkeys(("Natalia", "Anna", "Mia", "Lily"), SHE)
WORDS = {
    "THINGS": ("pens", "books", "cards", "clips", "stickers", "marbles"),
    "FOOD": ("apples", "cookies", "eggs"),
}

# ---------------------------------------------------------------------------------- the families
#
# = family a=2-9 ...  A kind of problem and the values to draw for it: a range, words, or a number
#                     computed from others. A family listed twice has two calculations in nearly
#                     the same words.
# ? ...               A wording of the question. One is drawn.
# - ... ** ...        A step: its sub-question ** its sentence.
#
# {a} is a number or word; {A} {B} {C} are people; {he} {He} {his} {him} mean {A}. [t=a*b] writes
# 6*8 = <<6*8=48>>48 and names the result t. [$t=a*b] also writes the $ where GSM8K has it. All
# values are drawn again if a number is outside 2 to LIMIT or a division leaves a remainder: h=a-c,
# which no text uses, keeps a above c. An indented line continues the line before it.

FAMILIES = """
= compare a=4-20 b=2-12 x=THINGS
? {A} has {a} {x}. {A} has {b} more {x} than {B}. How many {x} does {B} have?
? {A} has {a} {x}, which is {b} more than {B} has. How many {x} does {B} have?
? {B} has {b} fewer {x} than {A}. If {A} has {a} {x}, how many {x} does {B} have?
- How many {x} does {B} have? ** {B} has [t=a-b] {x}.
= compare a=4-20 b=2-12 x=THINGS
? {A} has {a} {x}. {B} has {b} more {x} than {A}. How many {x} does {B} have?
? {A} has {a} {x}, which is {b} fewer than {B} has. How many {x} does {B} have?
? {A} has {b} fewer {x} than {B}. If {A} has {a} {x}, how many {x} does {B} have?
- How many {x} does {B} have? ** {B} has [t=a+b] {x}.

= times k=3-6 b=2-15 a=k*b x=THINGS
? {A} has {a} {x}. {A} has {k} times as many {x} as {B}. How many {x} does {B} have?
? {A} has {a} {x}, which is {k} times as many as {B} has. How many {x} does {B} have?
- How many {x} does {B} have? ** {B} has [t=a/k] {x}.
= times k=3-6 a=2-15 x=THINGS
? {A} has {a} {x}. {B} has {k} times as many {x} as {A}. How many {x} does {B} have?
? {A} has {a} {x}, and {B} has {k} times as many. How many {x} does {B} have?
- How many {x} does {B} have? ** {B} has [t=a*k] {x}.

= share b=2-9 q=2-12 a=b*q x=FOOD
? {A} shares {a} {x} equally among {b} friends. How many {x} does each friend get?
? {A} gives {b} friends {a} {x} to share equally. How many {x} does each friend get?
- How many {x} does each friend get? ** Each friend gets [t=a/b] {x}.

= rows a=3-12 b=4-12 c=4-80
? There are {a} rows of {b} seats in a hall. If {c} people sit down, how many seats are still empty?
? A hall has {a} rows with {b} seats in each row. If {c} seats are taken, how many seats are empty?
- How many seats are there in the hall? ** There are [t=a*b] seats in the hall.
- How many seats are empty? ** There are [u=t-c] empty seats.
= rows a=4-15 b=4-12 c=2-12
? There are {a} rows of {b} seats in a hall. If people fill {c} rows, how many seats are still
  empty?
? A hall has {a} rows with {b} seats in each row. If {c} rows are taken, how many seats are empty?
- How many rows are empty? ** There are [t=a-c] empty rows.
- How many seats are empty? ** There are [u=t*b] empty seats.

= sold q=2-23 a=q*2 x=THINGS
? {A} sold {x} to {a} of {his} friends in April, and then {he} sold half as many {x} in May. How
  many {x} did {A} sell altogether in April and May?
? In May {A} sold half as many {x} as in April. If {he} sold {a} {x} in April, how many {x} did {he}
  sell altogether?
- How many {x} did {A} sell in May? ** {A} sold [t=a/2] {x} in May.
- How many {x} did {A} sell altogether? ** {A} sold [u=a+t] {x} altogether in April and May.
= sold a=6-20 b=2-12 x=THINGS
? {A} sold {a} {x} in April and {b} fewer {x} in May. How many {x} did {he} sell altogether?
? In April {A} sold {a} {x}, which was {b} more than in May. How many {x} did {he} sell in total?
- How many {x} did {A} sell in May? ** {A} sold [t=a-b] {x} in May.
- How many {x} did {A} sell altogether? ** {A} sold [u=a+t] {x} altogether in April and May.

= week a=2-12 b=2-12
? {A} reads {a} pages each day, and {B} reads {b}. How many pages do they read in total in a week?
? Each day {A} reads {a} pages of a book and {B} reads {b}. How many pages do they read in a week?
- How many pages do they read each day? ** Each day they read [t=a+b] pages.
- How many pages do they read in a week? ** In a week they read [u=t*7] pages.
= week a=4-20 b=2-18
? {A} reads {a} pages each day, and {B} reads {b}. How many more pages does {A} read than {B} in a
  week?
? Each day {A} reads {a} pages of a book and {B} reads {b}. How many more pages does {A} read in a
  week?
- How many more pages does {A} read each day? ** Each day {A} reads [t=a-b] more pages.
- How many more pages does {A} read in a week? ** In a week {A} reads [u=t*7] more pages.

= ages a=4-20 b=2-10
? {A} is {a} years old. {B} is {b} years older than {A}, and {C} is twice as old as {B}. How old is
  {C}?
? {C} is twice as old as {B}, and {B} is {b} years older than {A}. If {A} is {a}, how old is {C}?
- How old is {B}? ** {B} is [t=a+b] years old.
- How old is {C}? ** {C} is [u=t*2] years old.
= ages a=6-20 b=2-12 c=2-10
? {A} is {a} years old. {A} is {b} years older than {B}. How old will {B} be in {c} years?
? {A} is {b} years older than {B}. If {A} is {a} now, how old will {B} be in {c} years?
- How old is {B} now? ** {B} is [t=a-b] years old now.
- How old will {B} be in {c} years? ** In {c} years {B} will be [u=t+c] years old.

= bags c=3-10 q=2-8 p=c*q b=2-12 a=p+b x=FOOD
? {A} has {a} {x}. {He} gives {b} to {B} and puts the rest in bags of {c}. How many bags does {he}
  need?
? How many bags of {c} {x} can {A} fill if {he} has {a} {x} and first gives {b} to {B}?
- How many {x} does {A} have then? ** Then {A} has [t=a-b] {x}.
- How many bags does {A} need? ** {A} needs [u=t/c] bags.
= bags c=3-10 q=2-8 p=c*q b=2-12 a=p-b x=FOOD
? {A} has {a} {x}. {He} gets {b} from {B} and puts them all in bags of {c}. How many bags does {he}
  need?
? How many bags of {c} {x} can {A} fill if {he} has {a} {x} and first gets {b} from {B}?
- How many {x} does {A} have then? ** Then {A} has [t=a+b] {x}.
- How many bags does {A} need? ** {A} needs [u=t/c] bags.

= gifts q=4-40 a=q*2 c=2-20 x=FOOD|THINGS
? {A} has {a} {x}. {He} gives half of them to {B} and {c} to {C}. How many {x} does {A} have left?
? {A} gives half of {his} {a} {x} to {B} and then {c} to {C}. How many {x} are left?
- How many {x} does {B} get? ** {B} gets [t=a/2] {x}.
- How many {x} are left? ** {A} has [u=t-c] {x} left.

= save q=2-9 c=3-10 p=c*q b=5-30 a=b+p y=bike|game
? A {y} costs ${a}. {A} has ${b} and saves ${c} each week. How many weeks does {he} need to save?
? {A} has ${b} and saves ${c} each week for a {y} that costs ${a}. How many weeks does that take?
- How much more money does {A} need? ** {A} needs [$t=a-b] more.
- How many weeks does {A} need to save? ** {A} needs to save for [u=t/c] weeks.

= earn a=4-15 b=2-8 c=2-8
? {A} earns ${a} an hour. {He} works {b} hours on Monday and {c} hours on Friday. How much does {he}
  earn?
? {A} works {b} hours on Monday and {c} hours on Friday for ${a} an hour. How much does {he} earn?
- How many hours does {A} work? ** {A} works [t=b+c] hours.
- How much does {A} earn? ** {A} earns [$u=t*a].
= earn a=4-15 b=2-8 c=2-6 d=4-40
? {A} earns ${a} an hour. {He} works {b} hours each day for {c} days and then spends ${d}. How much
  money does {he} have left?
? {A} works {b} hours each day and earns ${a} an hour. After {c} days {he} spends ${d}. How much
  money does {he} have left?
- How much does {A} earn each day? ** Each day {A} earns [$t=a*b].
- How much does {A} earn altogether? ** Altogether {A} earns [$u=t*c].
- How much money does {A} have left? ** {A} has [$v=u-d] left.

= trip a=6-20 b=2-5 c=5-16 d=2-5 h=a-c
? {A} rides {his} bike at {a} miles an hour for {b} hours and then at {c} miles an hour for {d}
  hours. How many miles does {he} ride?
? {A} rides {his} bike for {b} hours at {a} miles an hour and then for {d} hours at {c} miles an
  hour. How many miles is that in total?
- How many miles does {A} ride first? ** First {A} rides [t=a*b] miles.
- How many miles does {A} ride then? ** Then {A} rides [u=c*d] miles.
- How many miles does {A} ride altogether? ** Altogether {A} rides [v=t+u] miles.
= trip q=2-4 b=6-20 a=q*b c=6-16 h=b-c
? {A} rides {his} bike {a} miles to the beach at {b} miles an hour and comes back at {c} miles an
  hour. How many hours does {he} ride?
? The beach is {a} miles away. {A} rides {his} bike there at {b} miles an hour and comes back at {c}
  miles an hour. How many hours is that in total?
- How many hours does {A} ride to the beach? ** {A} rides [t=a/b] hours to the beach.
- How many hours does {A} ride back? ** {A} rides [u=a/c] hours back.
- How many hours does {A} ride altogether? ** Altogether {A} rides [v=t+u] hours.

= finish b=4-20 c=2-6 h=b*c d=2-6 q=3-15 p=d*q a=h+p
? {A} has a book of {a} pages. {He} reads {b} pages each day for {c} days. How many pages must {he}
  read each day to finish the book in {d} more days?
? {A} wants to finish a book of {a} pages. After reading {b} pages each day for {c} days, {he} has
  {d} days left. How many pages must {he} read each day then?
- How many pages does {A} read first? ** First {A} reads [t=b*c] pages.
- How many pages are left? ** Then there are [u=a-t] pages left.
- How many pages must {A} read each day then? ** {A} must read [v=u/d] pages each day.

= bus a=8-40 b=2-15 c=2-15 d=2-15
? There are {a} people on a bus. At the first stop {b} people get off and {c} get on. At the second
  stop {d} people get off. How many people are on the bus now?
? At the first stop {b} people get off a bus and {c} get on. At the second stop {d} people get off.
  If there were {a} people on the bus at first, how many are there now?
- How many people are left after {b} get off? ** After {b} get off, there are [t=a-b] people.
- How many people are there after {c} get on? ** After {c} get on, there are [u=t+c] people.
- How many people are on the bus now? ** Now there are [v=u-d] people on the bus.

= class a=6-20 b=2-16 c=2-6 d=2-8 h=d-c x=apples|cookies|books|cards
? There are {a} children in a class, and {b} of them are boys. Each boy has {c} {x}, and each girl
  has {d} {x}. How many {x} do they have altogether?
? Each boy in a class has {c} {x}, and each girl has {d}. If {b} of the {a} children are boys, how
  many {x} do they have in total?
- How many {x} do the boys have? ** The boys have [t=b*c] {x}.
- How many girls are there? ** There are [u=a-b] girls.
- How many {x} do the girls have? ** The girls have [v=u*d] {x}.
- How many {x} do they have altogether? ** Altogether they have [w=t+v] {x}.

= farm a=3-15 b=3-7 c=2-12 d=4|5|6|8|10|12 e=2-8
? A farmer has {a} hens that lay {b} eggs each in a week. The farmer keeps {c} eggs and sells the
  rest in boxes of {d} for ${e} a box. How much does the farmer earn in a week?
? Each week a farmer gets {b} eggs from each of {a} hens. After keeping {c} eggs, the farmer puts
  the rest in boxes of {d} and sells each box for ${e}. How much does the farmer earn each week?
- How many eggs are there? ** There are [t=a*b] eggs.
- How many eggs does the farmer sell? ** The farmer sells [u=t-c] eggs.
- How many boxes does the farmer sell? ** The farmer sells [v=u/d] boxes.
- How much does the farmer earn? ** The farmer earns [$w=v*e].

= three a=2-20 b=2-12 x=FOOD|THINGS
? {A} has {a} {x}. {B} has {b} more {x} than {A}, and {C} has twice as many {x} as {B}. How many {x}
  do they have altogether?
? {C} has twice as many {x} as {B}, and {B} has {b} more {x} than {A}. If {A} has {a} {x}, how many
  {x} do they have in total?
- How many {x} does {B} have? ** {B} has [t=a+b] {x}.
- How many {x} does {C} have? ** {C} has [u=t*2] {x}.
- How many {x} do {A} and {B} have? ** {A} and {B} have [v=a+t] {x}.
- How many {x} do they have altogether? ** Altogether they have [w=v+u] {x}.

= shop a=2-8 b=4-12 c=2-8 d=2-9 h=b-d e=20|50|100 x=books|hats|lamps y=cups|cakes|pens
? {A} buys {a} {x} for ${b} each and {c} {y} for ${d} each. If {he} pays with ${e}, how much money
  does {he} get back?
? {A} buys {a} {x} and {c} {y} and pays with ${e}. The {x} cost ${b} each, and the {y} cost ${d}
  each. How much money does {he} get back?
- How much do the {x} cost? ** The {x} cost [$t=a*b].
- How much do the {y} cost? ** The {y} cost [$u=c*d].
- How much does {A} spend? ** {A} spends [$v=t+u].
- How much money does {A} get back? ** {A} gets back [$w=e-v].
"""

# ------------------------------------------------------------------------------ reading the table

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
# A remainder gives 0, which is below 2, so the values are drawn again.
OPERATIONS["/"] = lambda a, b: a // b if a % b == 0 else 0
SLOT = re.compile(r"\{(\w+)\}")
SUM = re.compile(r"\[(\$?)(\w)=(\w)([-+*/])(\w)\]")


class Template(NamedTuple):
    values: list[tuple]  # in order: (slot, choices) or (slot, (left, operation, right))
    questions: list[str]
    steps: list[list[str]]  # [sub-question, sentence]


def _read(table: str) -> dict[str, list[Template]]:
    families: dict[str, list[Template]] = {}
    for line in filter(None, table.replace("\n  ", " ").split("\n")):
        kind, text = line[0], line[2:]
        if kind == "=":
            family, *draws = text.split()
            template = Template([_read_draw(draw) for draw in draws], [], [])
            families.setdefault(family, []).append(template)
        elif kind == "?":
            template.questions.append(text)
        else:
            template.steps.append(text.split(" ** "))
            _, slot, *calculation = SUM.search(text).groups()
            template.values.append((slot, tuple(calculation)))
    return families


def _read_draw(draw: str) -> tuple:
    slot, text = draw.split("=")
    if span := re.fullmatch(r"(\d+)-(\d+)", text):
        return slot, range(int(span[1]), int(span[2]) + 1)
    if calculation := re.fullmatch(r"(\w)([-+*])(\w)", text):
        return slot, calculation.groups()
    words = [word for name in text.split("|") for word in WORDS.get(name, (name,))]
    return slot, [int(word) if word.isdigit() else word for word in words]


TEMPLATES = _read(FAMILIES)

# ------------------------------------------------------------------------------- writing problems


class Worked(NamedTuple):
    question: str
    steps: list[str]
    subquestions: list[str]
    answer: int
    family: str


def sample(rng: random.Random) -> Worked:
    """Draw one problem with its working. Trap: it may also be in problems("test"). Anyone who
    trains on samples must leave those questions out."""
    family = rng.choice(list(TEMPLATES))
    template = rng.choice(TEMPLATES[family])
    values = _draw(template, rng)

    def fill(text: str) -> str:
        text = SLOT.sub(lambda slot: str(values[slot[1]]), text)
        return SUM.sub(lambda found: _write(values, *found.groups()), text)

    question = fill(rng.choice(template.questions))
    steps = [fill(step) for _, step in template.steps]
    subquestions = [fill(subquestion) for subquestion, _ in template.steps]
    return Worked(question, steps, subquestions, values[template.values[-1][0]], family)


def _draw(template: Template, rng: random.Random) -> dict:
    """The value of every slot: numbers (drawn or computed), words, people and pronouns."""
    values: dict = {}
    while not values or any(not 2 <= v <= LIMIT for v in values.values() if isinstance(v, int)):
        values = {"2": 2, "7": 7}  # the only literal numbers in the calculations
        for slot, source in template.values:
            if isinstance(source, tuple):
                left, operation, right = source
                values[slot] = OPERATIONS[operation](values[left], values[right])
            else:
                values[slot] = rng.choice(source)
    people = list(PEOPLE)
    for slot in "ABC":
        values[slot] = people.pop(rng.randrange(len(people)))
    return values | dict(zip(HE, PEOPLE[values["A"]]))


def _write(values: dict, dollar: str, slot: str, left: str, operation: str, right: str) -> str:
    text = f"{values[left]}{operation}{values[right]}"
    return f"{text} = {dollar}<<{text}={values[slot]}>>{values[slot]}"


@functools.cache
def _both_splits() -> list[tuple[Worked, bool]]:
    """The training problems, then the test problems, each with whether its answer is terse."""
    rng, seen, drawn = random.Random(SEED), set(), []
    while len(drawn) < sum(SIZES.values()):
        worked = sample(rng)
        if worked.question not in seen:
            seen.add(worked.question)
            wordy = list(TEMPLATES).index(worked.family) % 3 == 2
            drawn.append((worked, rng.random() < (WORDY if wordy else TERSE)))
    return drawn


def problems(split: str, style: str = "main", worked_only: bool = False) -> list[tuple[str, str]]:
    """All (question, answer) pairs of split "train" or "test" in style "main" or "socratic".
    worked_only: no answer is terse."""
    start = {"train": 0, "test": SIZES["train"]}[split]
    socratic = {"main": False, "socratic": True}[style]
    pairs = []
    for worked, terse in _both_splits()[start : start + SIZES[split]]:
        steps, subquestions = worked.steps, worked.subquestions
        if terse and not worked_only:
            steps, subquestions = [f"The answer is {worked.answer}."], subquestions[-1:]
        if socratic:
            steps = [f"{asked} ** {step}" for asked, step in zip(subquestions, steps)]
        pairs.append((worked.question, "\n".join([*steps, f"#### {worked.answer}"])))
    return pairs
