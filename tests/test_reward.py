"""A reward of one's own: what the file may do, and what is said when it does something else."""

import contextlib
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

import train_ppo
from nanogsm import UserError, data
from nanogsm.run import console
from nanogsm.run.reward import MOST, load_reward

PROBLEM = data.Problem("2 + 3?", "It is 5.\n#### 5", 7)
FLAGS = ["--tiny", "--device", "cpu", "--init", "tiny", "--steps", "1", "--rollouts", "6",
         "--micro-batch", "3", "--accumulation", "1", "--val-examples", "0",
         "--max-new-tokens", "8"]  # fmt: skip


def written(folder: Path, source: str) -> str:
    (folder / "own.py").write_text(source)
    return str(folder / "own.py")


def test_the_documented_example_works(tmp_path):
    text = (Path(__file__).parents[1] / "docs/usage.md").read_text("utf-8")
    source = re.search(r"```python\n(# my_reward.py.*?)```", text, re.DOTALL)[1]
    reward, digest = load_reward(written(tmp_path, source))
    assert reward("so 5.\n#### 5", PROBLEM, False) == 1.0
    assert reward("so 4.\n#### 4", PROBLEM, False) == 0.1
    assert reward("so 5.", PROBLEM, False) == 0.0 and reward("#### 5", PROBLEM, True) == -0.5
    assert len(digest) == 64


def test_a_run_is_scored_by_it_and_goes_on_only_with_the_same_content(tmp_path, capsys):
    file = written(tmp_path, "def reward(completion, problem, truncated):\n"
                             "    return len(completion) + 100 * truncated\n")  # fmt: skip
    argv = [*FLAGS, "--out", str(tmp_path / "run")]
    assert train_ppo.main([*argv, "--reward", file]) == 0
    rows = [json.loads(x) for x in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["score"] == len(data.cut(row["completion"])) + 100 * row["truncated"]
    assert len(rows) == 4 and not any(row["correct"] for row in rows)
    metrics = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert metrics["reward"] > 1 and metrics["exact_match"] == 0

    elsewhere = tmp_path / "moved.py"
    elsewhere.write_bytes(Path(file).read_bytes())
    assert train_ppo.main([*argv, "--reward", str(elsewhere)]) == 0  # the content counts
    capsys.readouterr()
    longer = [*argv, "--steps", "2"]
    with pytest.raises(UserError, match=r"\(--reward is missing now\)"):
        train_ppo.main(longer)
    elsewhere.write_text(elsewhere.read_text() + "# changed\n")
    with pytest.raises(UserError, match="the content of --reward changed"):
        train_ppo.main([*longer, "--reward", str(elsewhere)])
    assert train_ppo.main([*FLAGS, "--out", str(tmp_path / "plain")]) == 0
    with pytest.raises(UserError, match=r"\(--reward is new\)"):
        train_ppo.main([*FLAGS, "--out", str(tmp_path / "plain"), "--reward", file])


def test_the_file_is_executed_for_the_command_line_only(tmp_path):
    """Not because a run folder names it. And nothing in the current folder can be imported."""
    trace = tmp_path / "trace"
    source = f"open({str(trace)!r}, 'a').write('x')\ndef reward(*_): return 1\n"
    argv = [*FLAGS, "--out", str(tmp_path / "run")]
    file = written(tmp_path, source)
    before = list(sys.path)
    assert train_ppo.main([*argv, "--reward", file]) == 0
    assert trace.read_text() == "x" and sys.path == before
    with pytest.raises(UserError, match="--reward is missing now"):
        train_ppo.main([*argv, "--steps", "2"])
    more = ["--init", str(tmp_path / "run"), "--out", str(tmp_path / "other")]
    assert train_ppo.main([*FLAGS, *more]) == 0
    assert trace.read_text() == "x"


@pytest.mark.parametrize(
    "source, says",
    [("def reward(:", "SyntaxError"), ("import no_such_module_at_all", "ModuleNotFoundError"),
     ("reward = 3", "has no function reward"), ("x = 1", "has no function reward"),
     ("raise SystemExit(0)", "SystemExit"), ("1 / 0", "ZeroDivisionError: division by zero"),
     ("\0", "null bytes"), (b"\\udcff".decode("unicode_escape"), "SyntaxError")],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, source, says):
    (tmp_path / "own.py").write_bytes(source.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        load_reward(str(tmp_path / "own.py"))
    assert str(tmp_path / "own.py") in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(UserError, match="--reward"):
            train_ppo.main([*FLAGS, "--reward", str(path), "--dry-run"])


@pytest.mark.parametrize(
    "body, says",
    [("return None", "it returned None"), ("return 'yes'", "it returned 'yes'"),
     ("return '1'", "it returned '1'"), ("return float('nan')", "it returned nan"),
     ("return float('inf')", "it returned inf"), ("return 10**400", "it returned 1000"),
     ("return [1]", "it returned [1]"), ("return 1j", "it returned 1j"),
     ("return problem.missing", "AttributeError"), ("raise KeyError('x')", "KeyError: 'x'"),
     ("return problem.question[99]", "IndexError: string index out of range"),
     ("return 10**5000", "it returned an object of the type int, which is not a finite number"),
     ("return Odd()", "it returned an object of the type Odd, which is not a finite number"),
     ("raise Silent", "Silent: Silent"), ("raise GeneratorExit", "GeneratorExit"),
     ("import sys; sys.exit()", "SystemExit"), ("import sys; sys.exit('x')", "SystemExit: x"),
     ("return -1e25", "it returned -1e+25: give numbers up to 1e+12, because")],
)  # fmt: skip
def test_a_reward_that_fails_names_the_problem(tmp_path, body, says):
    odd = "class Odd:\n    def __repr__(self): raise KeyError\n    __float__ = __repr__\n"
    odd += "class Silent(Exception):\n    def __str__(self): raise KeyError\n"
    file = written(tmp_path, f"{odd}def reward(completion, problem, truncated):\n    {body}\n")
    with pytest.raises(UserError, match=re.escape(f"own.py, problem 7: {says}")):
        load_reward(file)[0]("text", PROBLEM, False)


@pytest.mark.parametrize(
    "value, number",
    [("True", 1.0), ("2", 2.0), ("-0.5", -0.5), ("torch.tensor(1.5)", 1.5),
     ("numpy.float32(0.25)", 0.25)],
)  # fmt: skip
def test_numbers_of_any_kind_are_taken(tmp_path, value, number):
    file = written(tmp_path, f"import numpy, torch\ndef reward(*_):\n    return {value}\n")
    found = load_reward(file)[0]("text", PROBLEM, False)
    assert type(found) is float and found == number


CHANGES = "os.chdir('/'); torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False)"


@pytest.mark.parametrize(
    "source",
    [f"{CHANGES}\ndef reward(*_): return 1", f"def reward(*_):\n    {CHANGES}; return 1",
     f"def reward(*_):\n    {CHANGES}; raise ValueError", f"{CHANGES}; raise ValueError"],
    ids=["file", "call", "failing call", "failing file"],
)  # fmt: skip
def test_what_a_file_changes_for_the_process_is_put_back(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, "import os, torch\n" + source)
    with pytest.raises(UserError) if "raise" in source else contextlib.nullcontext():
        load_reward(file)[0]("text", PROBLEM, False)
    left = Path.cwd(), torch.get_default_dtype(), torch.is_grad_enabled()
    os.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    assert left == (tmp_path, torch.float32, True)


def test_dataclasses_of_a_file_find_its_module(tmp_path):
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Score:\n    value: float\n"
        "def reward(*_): return Score(0.5).value\n"
    )
    assert load_reward(written(tmp_path, source))[0]("text", PROBLEM, False) == 0.5


def test_a_slow_reward_does_not_hold_up_a_stop(tmp_path):
    """A signal that comes during one call is heeded before the next."""
    path = tmp_path / "reward.py"
    path.write_text("calls = []\ndef reward(*given):\n    calls.append(given)\n    return 1.0\n")
    function, _ = load_reward(str(path))
    problem = data.Problem("2 + 3?", "#### 5", 0)
    assert function("5", problem, False) == 1.0
    with console.graceful_stop() as stop:
        assert function("5", problem, False) == 1.0
        stop.requested = signal.SIGTERM
        with pytest.raises(console.Stopped):
            function("5", problem, False)
    assert function("5", problem, False) == 1.0
    assert len(sys.modules["reward_file"].calls) == 3


def test_the_largest_reward_can_be_trained_on(tmp_path):
    """Its square, added up, is a number of float32."""
    file = written(tmp_path, f"def reward(text, *_): return {MOST!r} * (-1) ** len(text)")
    out = tmp_path / "run"
    assert train_ppo.main([*FLAGS, "--reward", file, "--out", str(out), "--steps", "2"]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row["value_grad_norm"] > 1e9 for row in rows if "value_grad_norm" in row)
    assert math.isfinite(rows[-1]["value_loss"])
