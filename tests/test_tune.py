"""experiments/tune.py: what is searched, and that a search survives kills and company.

What needs Optuna is skipped where it is not installed (.ci/run installs it). The scripts are
replaced by one that counts to the last step, writes what a run writes and can be killed anywhere.
"""

import json
import math
import os
import random
import re
import signal
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import train_ppo
import train_sft
from experiments import tune, tune_space
from nanogsm import UserError
from nanogsm.run.folder import hold
from nanogsm.run.loop import check_finite

needs_optuna = pytest.mark.skipif(
    tune.optuna is None, reason="needs Optuna: pip install -r requirements-optional.txt"
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANOGSM_DATA_DIR", raising=False)


def parsed(*argv: str):
    args = tune.parse_args([*argv, "--device", "cpu"])
    tune_space.prepare(args)
    return args


# ---- what is searched


def test_the_usual_space_lies_around_the_recipe():
    args = parsed("lora", "--tiny")
    assert args.space["lr"] == pytest.approx((2e-3, 5e-2)) and args.space["lora_r"] == [8, 16, 64]
    assert args.space["epochs"] == [1, 2, 3]
    assert (args.val_use, args.examples) == (512, 7473 - 1024)
    assert "lora_r" not in parsed("sft", "--tiny").space
    assert "lora_r" in parsed("sft", "--tiny", "--lora").space
    assert parsed("sft", "--tiny").space["lr"] == pytest.approx((4e-4, 1e-2))


def test_the_space_is_narrowed_and_a_given_flag_is_not_searched():
    narrow = ["--space", "lr=3e-6:1e-4", "epochs=1:2", "batch=8,64"]
    args = parsed("sft", "--tiny", "--warmup", "0.1", *narrow)
    assert args.space == {"lr": (3e-6, 1e-4), "epochs": (1, 2), "batch": [8, 64]}
    assert "batch" not in parsed("sft", "--tiny", "--accumulation", "2").space


@pytest.mark.parametrize(
    "argv, says",
    [
        (["sft", "--space", "lr"], "--space lr: give numbers, as LOW:HIGH or A,B,C"),
        (["sft", "--space", "lr=1e-3:1e-4"], "give numbers"),
        (["sft", "--space", "lr=0:1"], "give numbers"),
        (["sft", "--space", "epochs=1.5,2"], "give whole numbers"),
        (["sft", "--space", "batch=8:64"], "give whole numbers, as A,B,C"),
        (["sft", *"--lr 1 --epochs 1 --warmup 0 --accumulation 1".split()], "nothing is left"),
        (["sft", "--space", "lora_r=8"], "sft searches lr, epochs, warmup, batch"),
        (["sft", "--space", "clip=0.1,0.2"], "sft searches"),
        (["sft", "--space", "epochs=0,1"], "--epochs is 0"),
        (["sft", "--space", "warmup=0,2"], "--warmup is 2"),
        (["sft", "--out", "x", "--val-use", "5"], "--val-use is set by the search itself"),
        (["sft", "--pause-at=5"], "--pause-at is set by the search itself"),
        (["sft", "--trials", "0"], "--trials is 0"),
        (["sft", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["dpo"], "invalid choice: 'dpo'"),
        (["sft", "--val-examples", "1"], "a search needs held-out problems"),
        (["ppo"], "there is no runs/tiny/sft-full-main yet"),
    ],
)
def test_bad_flags_are_one_line(argv, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parsed(*argv, "--tiny")
    assert not os.listdir(".")


def test_a_trial_is_a_command_that_the_script_takes():
    args = parsed("sft", "--tiny", "--space", "batch=20,64")
    params = {"lr": 0.00123456, "epochs": 2, "warmup": 0.03, "batch": 20}
    script, *flags = tune_space.command_of(args, 7, params)
    run = train_sft.parse_args([*flags, "--device", "cpu"])
    assert script == "train_sft.py" and run.out == "runs/tiny/tune-sft/trial-007"
    assert (run.lr, run.epochs, run.micro_batch * run.accumulation) == (0.00123, 2, 20)
    assert (run.val_examples, run.val_use) == (1024, 512)
    ppo = tune.parse_args(["ppo", "--tiny", "--init", "tiny", "--device", "cpu"])
    tune_space.prepare(ppo)
    params = {"lr": 1e-4, "value_lr": 1e-3, "kl_coef": 0.02, "lam": 0.95, "clip": 0.1, "batch": 64}
    script, *flags = tune_space.command_of(ppo, 0, params | {"epochs": 2})
    run = train_ppo.parse_args([*flags, "--device", "cpu"])
    assert (run.lam, run.clip, run.epochs, run.val_every) == (0.95, 0.1, 2, 5)


@pytest.mark.parametrize(
    "batch, epochs, flags, every, rungs",
    [
        (16, 1, [], 101, [101, 202]),  # 404 steps: 6449 examples
        (64, 3, [], 76, [76, 152]),  # 303
        (16, 1, ["--val-every", "40"], 40, [120, 200]),  # 101 and 202 are not validated
        (16, 1, ["--val-every", "300"], 300, [300]),
        (16, 1, ["--val-every", "500"], 500, []),  # no validation before the end
        (16, 1, ["--max-examples", "30"], 1, [1]),  # 2
        (16, 1, ["--max-examples", "5"], 1, []),  # 1
    ],
)
def test_rungs_are_steps_that_are_validated(batch, epochs, flags, every, rungs):
    args = parsed("sft", "--tiny", *flags)
    assert tune_space.schedule(args, {"batch": batch, "epochs": epochs}) == (every, rungs)


def test_a_loss_that_is_not_finite_is_told_from_a_mistake():
    with pytest.raises(UserError) as caught:
        check_finite(3, [1, 2], "--lr", loss=float("nan"))
    assert tune.DIVERGED.search(str(caught.value))
    assert not tune.DIVERGED.search("--lr is -1.0: give a positive number")


def test_a_search_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(tune, "optuna", None)
    with pytest.raises(UserError, match="pip install -r requirements-optional.txt"):
        tune.main(["sft", "--tiny"])
    assert not os.listdir(".")


# ---- the search, with scripts that take no time


class Script:
    """What replaces `run`. Each step adds a line to trained.txt, then saves a checkpoint. A
    trial's score is near 0.7 - |log10 lr + 3| / 10 in every validation. With a rate above
    `diverges` the loss is NaN."""

    def __init__(self, seconds=0.0, diverges=1.0, ends=None):
        self.seconds, self.diverges, self.ends, self.ran = seconds, diverges, ends or {}, []

    def __call__(self, command: list[str], keep: tuple = ()) -> tuple[int, str]:
        self.ran.append(command)
        if status := self.ends.get(len(self.ran)):
            return status, "gated weights" if status == 2 else ""
        get = lambda flag: command[command.index(f"--{flag}") + 1]  # noqa: E731
        if command[0] == "evaluate.py":
            folder = Path(get("model"))
            row = {"accuracy": 0.5, "n": 512, "ci_low": 0.457, "ci_high": 0.543}
            (folder / "eval-validation-512-part2of2.json").write_text(json.dumps(row))
            return 0, ""
        folder, lr = Path(get("out")), float(get("lr"))
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        saved, rows = folder / "checkpoint/step", folder / "metrics.jsonl"
        step = int(saved.read_text()) if saved.exists() else 0
        total = 40
        pause = int(get("pause-at")) if "--pause-at" in command else total
        score = 0.7 - abs(math.log10(lr) + 3) / 10 + 0.02 * int(folder.name[-3:])
        while step < pause:
            time.sleep(self.seconds)
            if lr > self.diverges:
                return 2, f"loss nan at step {step + 1}; problems [1]: lower --lr and"
            with open("trained.txt", "a") as file:
                file.write(f"{folder.name} {step}\n")
            step += 1
            saved.with_suffix(".tmp").write_text(str(step))
            saved.with_suffix(".tmp").rename(saved)
        with open(rows, "a") as file:
            file.write(json.dumps({"step": step, "val_exact_match": score}) + "\n")
        (folder / "adapter").mkdir(exist_ok=True)
        if step == total:
            (folder / "model").mkdir(exist_ok=True)
            (folder / "summary.json").write_text(json.dumps({"val_exact_match": score}))
        return 0, ""


ARGV = "sft --tiny --space lr=1e-5:1e-1 --warmup 0 --epochs 1 --accumulation 1 --max-examples 640"
ARGV = [*ARGV.split(), "--out", "s", "--device", "cpu"]


@pytest.fixture
def script(monkeypatch):
    script = Script()
    monkeypatch.setattr(tune, "run", script)
    return script


def trials() -> list:
    return tune.open_study(tune.parse_args(ARGV)).trials


def test_unscored_data_are_judged_by_the_loss_and_in_ppo_by_the_reward():
    rows = [{"question": f"{i}?", "answer": "a poem"} for i in range(40)]
    Path("poems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("r.py").write_text("def reward(completion, problem, truncated):\n    return 1.0\n")
    own = ["--tiny", "--data", "poems.jsonl", "--unscored"]
    args = parsed("sft", *own)
    assert (args.metric, args.val_use, args.examples) == ("val_loss", 4, 32)
    assert parsed("ppo", *own, "--init", "tiny", "--reward", "r.py").metric == "val_reward"


@needs_optuna
def test_a_whole_search(script, capsys):
    assert tune.main([*ARGV, "--trials", "12"]) == 0
    found = trials()
    assert len(found) == 12 and len({t.params["lr"] for t in found}) == 12
    ended = [t for t in found if t.state.name == "COMPLETE"]
    best = max(found, key=lambda t: t.value)
    assert best in ended and 2 < len(ended) < 12
    # A pause at a quarter and a half of the 40 steps, then the whole schedule; nothing twice.
    assert {c[c.index("--pause-at") + 1] for c in script.ran if "--pause-at" in c} == {"10", "20"}
    steps = Path("trained.txt").read_text().splitlines()
    assert len(steps) == len(set(steps)) == 40 * len(ended) + sum(
        10 * max(t.intermediate_values) for t in found if t not in ended
    )
    for t in found:
        folder = Path(f"s/trial-{t.number:03}")
        assert (folder / "model").exists() == (folder / "checkpoint").exists() == (t == best)
        assert (folder / "adapter").exists() == (t in ended)
        assert (folder / "metrics.jsonl").exists()
    said, page = capsys.readouterr().out, Path("s/tune.md").read_text()
    assert [c for c in script.ran if c[0] == "evaluate.py"] == [script.ran[-1]]
    assert script.ran[-1][1:7] == ["--model", f"s/trial-{best.number:03}", "--split", "validation",
                                   "--part", "2/2"]  # fmt: skip
    # By hand: both halves have 512 problems, so with p the search's score the error of p - 0.5 is
    # sqrt((p (1 - p) + 0.25) / 512).
    p = best.value
    give = 196 * ((p * (1 - p) + 0.25) / 512) ** 0.5
    assert f"flattered it by {100 * (p - 0.5):.1f} points, give or take {give:.1f}." in page
    assert "It scores 50.0% (95%: 45.7 to 54.3) on 512 held-out problems" in said
    numbers = [line.split(" | ")[0] for line in page.splitlines() if re.match(r"\| \d", line)]
    assert len(numbers) == 12 and numbers[0] == f"| {best.number}"
    assert f"--out s/trial-{best.number:03}" in page and "pruned at step 10" in page
    assert len(list(ET.parse("s/tune.svg").iter("{http://www.w3.org/2000/svg}circle"))) == 12
    script.ran.clear()
    assert tune.main([*ARGV, "--trials", "12"]) == 0 and not script.ran  # all is done
    assert tune.main([*ARGV, "--trials", "13"]) == 0 and len(trials()) == 13
    with pytest.raises(UserError, match="s is a search with other flags or another space"):
        tune.main([*ARGV, "--seed", "1"])


@needs_optuna
def test_a_mistake_ends_the_search_and_a_bad_rate_only_the_trial(script):
    script.ends = {1: 2}
    with pytest.raises(UserError, match="trial 0 ended with status 2: gated weights"):
        tune.main([*ARGV, "--trials", "6"])
    script.diverges = 1e-3
    assert tune.main([*ARGV, "--trials", "6"]) == 0
    found = trials()
    assert len(found) == 6
    for t in found:
        lost = "loss nan" in t.user_attrs.get("why", "")
        assert lost == (float(f"{t.params['lr']:.3g}") > 1e-3)
        assert not lost or t.state.name == "PRUNED"


@needs_optuna
@pytest.mark.parametrize("status", [129, 130, 143])
def test_a_stop_stops_the_search(script, status):
    script.ends = {3: status}
    assert tune.main([*ARGV, "--trials", "4"]) == status and len(script.ran) == 3
    assert tune.main([*ARGV, "--trials", "4"]) == 0 and len(trials()) == 4


@needs_optuna
@pytest.mark.parametrize("moment", ["report", "should_prune"])
def test_an_interrupted_search_ends_as_an_uninterrupted_one(script, monkeypatch, moment):
    """The same trials with the same ends. A decision that was not written down is made again."""
    whole, key = [*ARGV, "--trials", "8"], lambda t: (t.params, t.value, t.state, t.user_attrs)
    assert tune.main(whole) == 0
    want = [key(t) for t in trials()]
    os.rename("s", "whole")
    Path("trained.txt").unlink()
    real, calls = getattr(tune.optuna.trial.Trial, moment), []

    def dies(*args):
        calls.append(args)
        if len(calls) % 3 == 1:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(tune.optuna.trial.Trial, moment, dies)
        for _ in range(40):
            try:
                assert tune.main(whole) == 0
                break
            except KeyboardInterrupt:
                pass
    assert [key(t) for t in trials()] == want and len(calls) > 6
    steps = Path("trained.txt").read_text().splitlines()
    assert len(steps) == len(set(steps))


@needs_optuna
def test_a_torn_line_of_the_journal_is_cut_off(script):
    assert tune.main([*ARGV, "--trials", "2"]) == 0
    with open("s/journal.log", "ab") as file:
        file.write(b'{"op_code": 4, "wor')
    assert tune.main([*ARGV, "--trials", "3"]) == 0 and len(trials()) == 3


@needs_optuna
def test_a_folder_with_something_else_is_refused(script):
    Path("s").mkdir()
    Path("s/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="s is not empty and not a search"):
        tune.main(ARGV)
    Path("f").write_text("")
    with pytest.raises(UserError, match="f cannot be a search's folder"):
        tune.main([*ARGV, "--out", "f"])


def test_the_script_keeps_the_lock_of_a_search_that_was_killed(tmp_path):
    """Or two processes would train one trial. (A search gives the lock's descriptor to `run`.)"""
    lock = hold(tmp_path / "lock")
    child = os.fork()
    if child == 0:
        os.set_inheritable(lock, True)
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(0.5)"])
    os.close(lock)
    assert hold(tmp_path / "lock") is None
    os.waitpid(child, 0)
    again = hold(tmp_path / "lock")
    assert again is not None
    os.close(again)


linux = pytest.mark.skipif(sys.platform != "linux", reason="forks processes with PyTorch in them")


def forked(script: Script, argv: list[str]) -> int:
    """A process that searches. Returns its id."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        with open("log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        tune.run = script
        ask = tune.optuna.study.Study.ask
        # Time enough for another process to see the same trials, if it were not kept out.
        tune.optuna.study.Study.ask = lambda study: (time.sleep(0.03), ask(study))[1]
        status = tune.main(argv)
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
    finally:
        os._exit(status)


@needs_optuna
@linux
@pytest.mark.parametrize("seed", range(2))
def test_a_search_that_is_killed_again_and_again_loses_no_trial(seed):
    rng, kills, ended = random.Random(seed), 0, False
    while not ended:
        child, until = forked(Script(0.002), [*ARGV, "--trials", "6"]), rng.uniform(0.05, 0.4)
        deadline = time.time() + until
        while not ended and time.time() < deadline:
            time.sleep(0.01)
            pid, status = os.waitpid(child, os.WNOHANG)
            ended = bool(pid)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
    assert status == 0 and kills > 0, Path("log").read_text()
    found = trials()
    assert len(found) == 6 and all(t.state.is_finished() for t in found)
    assert len({t.params["lr"] for t in found}) == 6
    steps = Path("trained.txt").read_text().splitlines()
    assert len(steps) - len(set(steps)) <= kills  # at most the step that was being trained
    for t in found:
        mine = {step for step in steps if step.startswith(f"trial-{t.number:03} ")}
        assert len(mine) == (40 if t.state.name == "COMPLETE" else 10 * t.last_step)


@needs_optuna
@linux
def test_processes_share_a_search(tmp_path):
    """Each does its part, no two draw the same parameters, and no trial is trained twice."""
    children = [forked(Script(0.005), [*ARGV, "--trials", "8"]) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0], Path("log").read_text()
    found = trials()
    assert len(found) == 8 and len({t.params["lr"] for t in found}) == 8
    steps = Path("trained.txt").read_text().splitlines()
    assert len(steps) == len(set(steps))
    spans = [(t.datetime_start, t.datetime_complete) for t in found]
    assert any(a[0] < b[0] < a[1] for a in spans for b in spans)  # at the same time
    evaluated = list(Path("s").glob("trial-*/eval-*.json"))
    best = max(found, key=lambda t: t.value)
    assert [path.parent.name for path in evaluated] == [f"trial-{best.number:03}"]
