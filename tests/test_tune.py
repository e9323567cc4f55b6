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
from types import SimpleNamespace

import pytest

import train_ppo
import train_sft
from experiments import tune, tune_page, tune_space
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
    assert args.space["lr"] == pytest.approx((6e-4, 1.5e-2)) and args.space["lora_r"] == [8, 16, 64]
    assert args.space["epochs"] == [1, 2, 3]
    assert (args.val_use, args.examples) == (512, 7473 - 1024)
    assert "lora_r" not in parsed("sft", "--tiny").space
    assert "lora_r" in parsed("sft", "--tiny", "--lora").space
    assert parsed("sft", "--tiny").space["lr"] == pytest.approx((8.6e-5, 2.15e-3))


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
        (["sft", "--space", "lr=1e-3,nan"], "--space lr=1e-3,nan: give numbers"),
        (["sft", "--space", "lr=1e-3:inf"], "give numbers"),
        (["sft", "--space", "warmup=0,-inf,0.1"], "give numbers"),
        (["sft", "--space", "lr=1e-4:1e-3", "lr=2e-4:1e-3"], "lr=2e-4:1e-3: lr is given twice"),
        (["sft", "--space", "lr=1e-4:1e-3", "--space", "lr=2e-4:1e-3"], "lr is given twice"),
        (["sft", "--space", "lr=1e-3:1.0000001e-3"], "two of the values are the same in three"),
        (["sft", "--space", "lr=1e-4,2e-4,0.0001"], "two of the values are the same in three"),
        (["sft", "--space", "batch=8,16,8"], "batch=8,16,8: two of the values are the same"),
        (["sft", "--space", "warmup=0.1,2,0"], "--space must leave out --warmup 2: --warmup is 2"),
        (["ppo", "--init", "tiny", "--clip-high", "0.25"],
         "--space must leave out --clip 0.3: --clip-high 0.25 is below --clip 0.3"),
        (["ppo", "--init", "tiny", "--advantage", "rloo", "--space", "lam=0.9,1"],
         "ppo searches lr, kl_coef, clip, batch, epochs"),
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


@pytest.mark.parametrize("method", ["gae", "rloo", "grpo"])
def test_ppo_without_a_critic_searches_nothing_of_the_critic(method):
    flags = ["ppo", "--tiny", "--init", "tiny", "--advantage", method]
    of_critic = {"value_lr", "lam"} if method == "gae" else set()
    space = parsed(*flags).space
    assert space.keys() == {"lr", "kl_coef", "clip", "batch", "epochs"} | of_critic
    args = parsed(*flags, "--space", "lr=1e-5:1e-4")
    assert args.space == space | {"lr": (1e-5, 1e-4)}
    params = {name: values[0] for name, values in args.space.items()}
    run = train_ppo.parse_args(tune_space.command_of(args, 0, params)[1:] + ["--device", "cpu"])
    assert run.advantage == (None if method == "gae" else method) and run.lr == 1e-5


def test_space_may_be_given_in_several_flags():
    space = parsed("sft", "--tiny", "--space", "lr=1e-4:1e-3", "--space", "epochs=1,2").space
    assert space["lr"] == (1e-4, 1e-3) and space["epochs"] == [1, 2]


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


ARGV = "sft --tiny --space lr=1e-5:1e-1 --warmup 0 --epochs 1 --micro-batch 16 --accumulation 1"
ARGV = [*ARGV.split(), "--max-examples", "640", "--out", "s", "--device", "cpu"]


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
    give, much = 196 * ((p * (1 - p) + 0.25) / 512) ** 0.5, 100 * (p - 0.5)
    assert f"by {much:.1f} points (95%: {much - give:+.1f} to {much + give:+.1f})." in page
    assert "It scores 50.0% (95%: 45.7 to 54.3) on 512 held-out problems" in said
    numbers = [line.split(" | ")[0] for line in page.splitlines() if re.match(r"\| \d", line)]
    assert len(numbers) == 12 and numbers[0] == f"| {best.number}"
    assert "pruned at step 10" in page and "the score at which it was pruned." in page
    again = page.split("```")[1].split()
    run = train_sft.parse_args(again[2:])
    assert again[:2] == ["python", "train_sft.py"] and f"{run.lr:.3g}" == f"{best.params['lr']:.3g}"
    assert (run.val_examples, run.val_use, run.val_every) == (None, None, 0)
    assert (run.max_examples, run.out) == (640, "runs/tiny/sft-full-main")
    assert len(list(ET.parse("s/tune.svg").iter("{http://www.w3.org/2000/svg}circle"))) == 12
    script.ran.clear()
    assert tune.main([*ARGV, "--trials", "12"]) == 0 and not script.ran  # all is done
    assert tune.main([*ARGV, "--trials", "13"]) == 0 and len(trials()) == 13
    choice = ["lr=1e-5,1e-1" if flag == "lr=1e-5:1e-1" else flag for flag in ARGV]
    with pytest.raises(UserError, match="s is a search with other flags or another space"):
        tune.main([*choice, "--trials", "2"])  # two choices are no range
    with pytest.raises(UserError, match="s is a search with other flags or another space"):
        tune.main([*ARGV, "--seed", "1"])


@needs_optuna
def test_the_better_half_is_kept_rounded_down_but_always_one():
    """As docs/usage.md says. By hand: of .5 and .4 one, of three .6, of four two, of five two."""
    study, kept = tune.open_study(tune.parse_args(ARGV)), []
    for score in (0.5, 0.4, 0.6, 0.55, 0.52, 0.55):
        trial = study.ask()
        trial.report(score, 1)
        kept.append(not trial.should_prune())
    assert kept == [True, False, True, True, False, True]  # the last: third, but equal to second


class Trial:
    """What tune_page reads of a trial."""

    def __init__(self, number, value, ended=True, **params):
        self.number, self.value, self.params, self.user_attrs = number, value, params, {}
        self.state = SimpleNamespace(name="COMPLETE" if ended else "PRUNED")
        self.last_step = 1


def written(trials: list, space: dict, **args) -> tuple[str, dict]:
    """(tune.md, {title of a panel's x axis: ([labels], [(class, x, y) of each dot])})."""
    usual = {"metric": "val_exact_match", "script": "train_sft.py", "flags": [], "named": set()}
    args = usual | args | {"out": Path("."), "space": space, "val_use": 512}
    args["run"] = SimpleNamespace(micro_batch=16)
    tune_page.write(SimpleNamespace(trials=trials), SimpleNamespace(**args))
    panels, labels, dots = {}, [], []
    for part in ET.parse("tune.svg").getroot():
        kind = part.get("class") or ""
        if kind == "title":
            labels, dots = [], []
        elif kind == "x":
            labels.append((part.text or "", float(part.get("x"))))
        elif kind == "axis":
            panels[part.text] = labels, dots
        elif part.tag.endswith("circle"):
            dots.append((kind, float(part.get("cx")), float(part.get("cy"))))
    return Path("tune.md").read_text(), panels


def test_choices_are_evenly_spaced_and_no_dot_hides_another():
    scores = [0.3, 0.3, 0.3, 0.5, 0.2]
    found = [Trial(i, s, ended=i < 4, batch=1024 if i == 3 else 16) for i, s in enumerate(scores)]
    page, panels = written(found, {"batch": [1024, 8, 16]})
    assert "| 3 | 0.5000 | 1024 |" in page and "trial 3" in page
    [(labels, dots)] = panels.values()
    assert [text for text, _ in labels if text] == ["8", "16", "1,024"]
    first, second, third = [x for text, x in labels if text]
    assert third - second == pytest.approx(second - first, abs=0.11)
    assert len({(x, y) for _, x, y in dots}) == 5
    kinds = {kind: [x for k, x, _ in dots if k == kind] for kind, *_ in dots}
    assert {kind: len(xs) for kind, xs in kinds.items()} == {"c0": 3, "c1": 1, "c2": 1}
    assert kinds["c2"] == pytest.approx([third], abs=0.11)
    equal = kinds["c0"] + kinds["c1"]  # left to right in their order, around their value
    assert equal == sorted(equal) and sum(equal) / 4 == pytest.approx(second, abs=0.11)
    assert max(equal) - min(equal) < (second - first) / 2


def test_rates_have_readable_ticks_at_their_places():
    found = [Trial(0, 0.3, lr=1e-3, epochs=2), Trial(1, 0.4, lr=5e-3, epochs=4)]
    page, panels = written(found, {"lr": (4e-4, 1e-2), "epochs": (1, 4)})
    labels, dots = panels.pop("lr, logarithmic")
    assert [text for text, _ in labels if text] == ["0.0005", "0.001", "0.002", "0.005", "0.01"]
    at = dict(labels)
    assert [x for _, x, _ in dots] == pytest.approx([at["0.001"], at["0.005"]], abs=0.11)
    [(labels, dots)] = panels.values()
    assert [text for text, _ in labels if text] == ["1", "2", "3", "4"]  # no 1.5
    assert [x for _, x, _ in dots] == [dict(labels)["2"], dict(labels)["4"]]
    assert "pruned." not in page


@pytest.mark.parametrize(
    "low, high, want",
    [
        (1e-5, 1e-1, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
        (1e-3, 0.5, [1e-3, 1e-2, 1e-1]),
        (2e-4, 1e-3, [2e-4, 5e-4, 1e-3]),
        (1.1e-3, 1.9e-3, [1.1e-3, 1.9e-3]),
        (1e-12, 1.0, [1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0]),
    ],
)
def test_the_values_that_a_logarithmic_axis_labels(low, high, want):
    assert tune_page.round_values(low, high) == want


def test_the_command_keeps_the_flags_of_the_command_line_and_no_others():
    flags = ["--val-examples", "600", "--val-every", "20"]
    best = [Trial(0, 0.3, ended=False, lr=2e-3), Trial(1, 0.2, lr=1e-3)]
    page, _ = written(best, {"lr": (1e-4, 1e-2)}, flags=flags, named={"--val-examples"})
    assert "\npython train_sft.py --val-examples 600 --val-every 20 --lr 0.001\n" in page
    assert "in the script's usual folder:" in page and "A pruned trial has the score" in page


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
