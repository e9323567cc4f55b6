"""The house stays as it was built: who may import whom, where argparse lives, how long the heart
is.

The floors, lowest first. A file imports only from floors below its own, so no two files import each
other. The heart is what a reader reads; machinery must not grow in it.
"""

import ast
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import mutate
import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    ["nanogsm/__init__.py"],
    ["nanogsm/distributed.py"],
    ["nanogsm/store", "nanogsm/fast", "nanogsm/tiny/problems.py", "nanogsm/tiny/__init__.py"]
    + ["nanogsm/boxed.py"],
    ["nanogsm/transformer.py"],
    ["nanogsm/logprob.py", "nanogsm/lora.py", "nanogsm/optim.py"],
    ["nanogsm/data.py", "nanogsm/arithmetic.py"],
    ["nanogsm/generate.py", "nanogsm/rewards.py", "nanogsm/steps.py"],
    ["nanogsm/model.py"],
    ["nanogsm/run"],
    ["nanogsm/report"],
    ["train_sft.py", "train_ppo.py", "train_prm.py", "evaluate.py", "nanogsm/tiny/__main__.py"],
    ["experiments"],
    ["benchmarks", "docs"],
]
HEART = ["train_sft.py", "train_ppo.py"]
HEART += [f"nanogsm/{name}.py" for name in "data transformer logprob lora generate optim".split()]
MOST_LINES = {
    "train_sft.py": 220, "train_ppo.py": 560, "evaluate.py": 255, "nanogsm/transformer.py": 360,
    "train_prm.py": 248,
}  # fmt: skip


def sources() -> list[str]:
    """All Python files of the project, tests aside."""
    found = []
    for pattern in ("*.py", "nanogsm/**/*.py", "experiments/*.py", "benchmarks/*.py", "docs/*.py"):
        found += [path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)]
    return sorted(found)


def floor(file: str) -> int:
    found = [
        i
        for i, places in enumerate(FLOORS)
        for p in places
        if file == p or file.startswith(p + "/")
    ]
    assert len(found) == 1, f"{file} has no floor: give it one here"
    return found[0]


def imported(file: str) -> set[str]:
    """The project's own files that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        for name in names:
            place = name.replace(".", "/")
            for candidate in (f"{place}.py", f"{place}/__init__.py"):
                if (ROOT / candidate).is_file():
                    found.add(candidate)
    return found - {file}


@pytest.mark.parametrize("file", sources())
def test_a_file_imports_lower_floors_only(file):
    for other in imported(file):
        # A folder's own files may import each other in one direction: see the next test.
        same_room = Path(other).parent == Path(file).parent and floor(other) == floor(file)
        is_room = other.endswith("__init__.py")  # holds nothing but a docstring
        assert floor(other) < floor(file) or same_room or is_room, f"{file} imports {other}"


def test_no_two_files_import_each_other():
    graph = {file: imported(file) for file in sources()}

    def reaches(start: str) -> set[str]:
        seen, todo = set(), list(graph[start])
        while todo:
            file = todo.pop()
            if file not in seen:
                seen.add(file)
                todo += graph.get(file, ())
        return seen

    assert [file for file in graph if file in reaches(file)] == []


def test_rooms_have_nothing_in_their_init():
    for file in sources():
        if file.endswith("__init__.py") and file != "nanogsm/__init__.py":
            body = ast.parse((ROOT / file).read_text("utf-8")).body
            assert all(isinstance(node, ast.Expr) for node in body), file


def top_level(file: str) -> set[str]:
    tree = ast.walk(ast.parse((ROOT / file).read_text("utf-8")))
    names = set()
    for node in tree:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_the_network_and_its_faster_forms_know_torch_only():
    own = sys.stdlib_module_names
    for file in [
        "nanogsm/transformer.py",
        *(f for f in sources() if f.startswith("nanogsm/fast/")),
    ]:
        assert top_level(file) - own <= {"torch"}, file


def test_run_time_packages_are_the_five_on_the_list():
    allowed = {"torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "nanogsm", "wandb"}
    allowed |= {"math_verify"}  # optional, as wandb is
    for file in sources():
        if floor(file) <= floor("train_sft.py"):
            scripts = {"train_sft", "train_ppo", "train_prm", "evaluate"}
            assert top_level(file) - sys.stdlib_module_names - scripts <= allowed, file


def test_each_faster_form_is_named_by_one_file_of_the_heart_or_by_model():
    """nanogsm/run/plan.py may read their sizes, flags.py the names of the choices."""
    for fast in (f for f in sources() if f.startswith("nanogsm/fast/") and "__init__" not in f):
        users = [f for f in sources() if f.startswith(("nanogsm/", "train_", "evaluate"))]
        users = [f for f in users if fast in imported(f) and not f.startswith("nanogsm/run/")]
        assert users and set(users) <= {*HEART, "nanogsm/model.py"}, (fast, users)


def test_argparse_is_imported_where_flags_are_made_only():
    """Every other command uses nanogsm/run/flags.py's Parser."""
    scripts = {"train_sft.py", "train_ppo.py", "evaluate.py"}
    for file in sources():
        if "argparse" in top_level(file):
            annotations_only = "argparse.Namespace" in (ROOT / file).read_text("utf-8")
            made = "ArgumentParser" in (ROOT / file).read_text("utf-8")
            allowed = file in scripts or file.startswith("nanogsm/run/")
            assert allowed or (annotations_only and not made), file


# -------------------------------------------------------------------------------------- the budget


def measure(file: str) -> tuple[int, int, int, int]:
    """(lines, lines of code, # comments, docstring lines). Directives are no comments, and a line
    of code may carry a comment."""
    text = (ROOT / file).read_text("utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            docstrings |= set(range(first.lineno, first.end_lineno + 1))
    code, comments = set(), set()
    skip = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with open(ROOT / file, encoding="utf-8") as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type == tokenize.COMMENT:
                if not re.match(r"#\s*(fmt:|noqa|-+)", token.string):
                    comments.add(token.start[0])
            elif token.type not in skip:
                code |= set(range(token.start[0], token.end[0] + 1))
    return len(text.splitlines()), len(code - docstrings), len(comments), len(docstrings)


@pytest.mark.parametrize("file", MOST_LINES)
def test_a_file_of_the_heart_stays_short(file):
    assert measure(file)[0] <= MOST_LINES[file]


def test_the_heart_stays_small_and_explained():
    lines, code, comments, docstrings = map(sum, zip(*map(measure, HEART)))
    # At first 2,200 and 1,300. Since then, lines and code: many devices 0 and 20; data, rewards and
    # worked examples of one's own 30 and 20; groups in a critic's place 15 and 20; Llama 70 and 50;
    # MATH 35 and 30; PPO's --keep best and --patience 10 and 14.
    assert lines <= 2200 + 30 + 15 + 70 + 35 + 10, (lines, code)
    assert code <= 1300 + 20 + 20 + 20 + 50 + 30 + 14, (lines, code)
    assert 100 * comments >= 12 * lines, (comments, lines)
    assert 100 * (comments + docstrings) >= 28 * lines, (comments, docstrings, lines)


# Counted in tokens of code, which neither comments nor the width of lines change. Before the rooms
# were built the same files had 46,221. The plain forms of what fast/ computes, which a reader needs
# and a test compares, account for 1,100 more. A feature adds what it needs here, by name.
MOST_TOKENS = {
    "the house": 49_000,
    "adapters of the Hub, revisions, --base, adapters trained further": 650,
    "the reason why a checkpoint of another tool is refused": 300,
    "a run's prompt and held-out problems go with it": 150,
    "fast/cuda.py: one launch for many, and what fits a card": 3200,
    "distributed.py: many devices, replicas and parts": 4000,
    "a rank that fails ends its process and is heard once": 60,
    "PPO runs can be made longer": 300,
    "run/reward.py: a reward of one's own": 500,
    "own data: chats, unscored answers, unknown words, few steps": 750,
    "evaluate.py: several worked examples, --n all, questions from standard input": 700,
    "a run continues in its own wandb run; the study uses runs that are there": 400,
    "run/card.py, run/known.py: a plan for a GPU that is not here": 2700,
    "RLOO, GRPO and the upper clip": 560,
    "rewards.py: terms of the reward": 880,
    "run/critic.py, report/rerank.py: a critic that chooses among answers": 1760,
    "the HTML page explains itself: sentences, shares, healthy curves, unfinished runs": 2900,
    "the study says which rows were trained with other flags": 490,
    "shares as percentages, a folder for a run that starts from another": 120,
    "Llama 3, an untied output head, the text part of multimodal Gemmas": 1500,
    "boxed.py: MATH as data, and its grading": 3200,
    "what experiments/tune.py asks of a run: pauses, patience, parts of what is held out": 1030,
    "report/charts.py: an axis with ticks of its own": 40,
    "train_prm.py, steps.py, run/prm.py, coloured.py: a process reward model": 6450,
    "reward models on the page, settings of another type, results of another critic": 800,
    "one line for odd rewards, rows and ranks, and for ranks with different commands": 660,
    "what a plan chose to sample at once, known sizes by name, a page's numbers checked": 300,
    "train_prm.py's val_pairs; refusals and odd drives that a review found": 480,
    "a data file changed since training; the study's own flags; a damaged value head": 700,
    "a stop between two calls of one's own reward": 50,
    "--ask refuses what it would ignore; a checkpoint that a kill left behind": 80,
    "reports without sampled evaluations, real sizes of updates, commands to paste": 200,
}


def test_the_rooms_did_not_become_a_place_to_grow():
    files = [f for f in sources() if f.startswith(("nanogsm/", "train_", "evaluate"))]
    files += ["experiments/study.py", "experiments/pretrain_tiny.py"]
    assert sum(map(code_tokens, files)) <= sum(MOST_TOKENS.values())


def test_each_mutation_is_of_a_line_that_is_there_once():
    for name, file, text, _ in mutate.MUTATIONS:
        assert (ROOT / file).read_text("utf-8").count(text) == 1, name


def code_tokens(file: str) -> int:
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    with open(ROOT / file, encoding="utf-8") as source:
        return sum(t.type not in blank for t in tokenize.generate_tokens(source.readline))


@pytest.mark.parametrize("file", sources())
def test_lines_are_at_most_100_wide(file):
    lines = (ROOT / file).read_text("utf-8").splitlines()
    long = [i for i, line in enumerate(lines, start=1) if len(line) > 100]
    assert not long, f"{file}: lines {long}"


@pytest.mark.parametrize("file", sources())
def test_one_statement_a_line(file):
    starts = [
        node.lineno
        for node in ast.walk(ast.parse((ROOT / file).read_text("utf-8")))
        if isinstance(node, ast.stmt)
    ]
    assert len(starts) == len(set(starts)), file


def test_the_readme_stays_on_one_page():
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 10_240
    inside_fence, wide = False, []
    for line in text.decode().splitlines():
        inside_fence ^= line.startswith("```")
        if len(line) > 100 and not inside_fence and not line.startswith("|"):
            wide.append(line)
    assert not wide


def test_nothing_names_the_place_it_was_made_in():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split() if listed.returncode == 0 else ():
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".toml", ".txt")
            and path.exists()
            and path != Path(__file__)
        ):
            text = path.read_text("utf-8")
            assert "../shared" not in text and "/work/" not in text and "/tmp/" not in text, name
