"""experiments/study.py: the scripts accept its commands, it continues after a stop, and it says
what it could not run."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import slow

import evaluate
import train_ppo
import train_sft
from experiments import study
from nanogsm import UserError
from nanogsm.run.flags import ppo_args, set_rank, sft_args


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANOGSM_DATA_DIR", raising=False)


def commands_of(argv: list[str]) -> list[list[str]]:
    args = study.parse_args(argv)
    return [command for row in study.ROWS for command in study.commands(row, args)]


@pytest.mark.parametrize("argv", [["--tiny"], ["--model", "a/b", "--data-dir", "d", "--seed", "2"]])
def test_every_command_parses_and_no_two_runs_share_a_folder(argv):
    parse = {"train_sft.py": train_sft, "train_ppo.py": train_ppo, "evaluate.py": evaluate}
    runs = []
    for script, *flags in commands_of(argv):
        args = parse[script].parse_args([*flags, "--device", "cpu"])
        assert args.tiny == ("--tiny" in argv)
        if script.startswith("train"):
            assert args.recipe == ("tuned" if "tuned" in args.out else "original")
            assert "--recipe" in flags  # never left to the default
            runs.append(args.out)
            assert args.seed == (0 if args.tiny else 2) and (args.tiny or args.data_dir == "d")
    assert len(runs) == len(set(runs)) == 8


def test_ppo_starts_from_the_studys_own_run():
    ppo = [command for command in commands_of(["--tiny"]) if command[0] == "train_ppo.py"]
    starts = [command[command.index("--init") + 1] for command in ppo]
    assert starts == ["runs/tiny/study-0/full-main"] * 2


def test_the_rows_are_those_of_the_original_study_and_ours():
    shown = {row.original for row in study.ROWS}
    assert shown == {6.0, 31.0, 23.0, 20.0, 11.0, 28.0, None}
    assert len(study.BY_NAME) == len(study.ROWS) == 12
    assert all(row.against in study.BY_NAME for row in study.ROWS if row.against)


def test_an_evaluation_on_another_number_of_problems_is_not_taken_for_the_one_asked_for():
    """1319 begins like 131 and 13. After the number and a dash, a name has other settings."""
    row, folder = study.BY_NAME["untuned"], Path("s/untuned")
    folder.mkdir(parents=True)

    def found(n: int) -> Path | None:
        return study.evaluation(row, study.parse_args(["--tiny", "--n", str(n), "--out", "s"]))

    whole, shortened = folder / "eval-test-1319.json", folder / "eval-test-13-max64.json"
    whole.write_text("{}")
    assert [found(n) for n in (13, 131, 1319)] == [None, None, whole]
    shortened.write_text("{}")
    assert [found(n) for n in (13, 131, 1319)] == [shortened, None, whole]


@pytest.fixture
def faked(monkeypatch):
    """Replace the scripts by ones that take no time. Returns the commands that ran, and a dict to
    fill with {part of a command: the status it ends with}."""
    ran, ends = [], {}

    def run(command: list[str]) -> tuple[int, str]:
        ran.append(" ".join(command))
        status = next((status for part, status in ends.items() if part in ran[-1]), 0)
        folder = Path(command[command.index("--out" if "--out" in command else "--model") + 1])
        if status:
            return status, "the weights are gated"
        folder.mkdir(parents=True, exist_ok=True)
        if command[0] == "evaluate.py":
            right = {"untuned": 1, "full-main": 3}.get(folder.name, 2)
            row = {"question": "q", "gold": 1.0, "answer": None, "completion": "c",
                   "truncated": False, "flexible": False, "tokens": 5}  # fmt: skip
            rows = [{"index": i, "correct": i < right} | row for i in range(4)]
            name = "eval-probes-5" if "--data" in command else "eval-test-4"
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            summary = evaluate.summarise(rows, 1) | {"seconds": 1.0, "environment": {}}
            (folder / f"{name}.json").write_text(json.dumps(summary))
        else:
            row = {"seconds": 30.0, "tokens": 60, "peak_memory": 2**30, "reward": 0.5}
            rows = [{"step": step, "loss": 1 / step} | row for step in (1, 2)]
            if "ppo" not in command[0]:
                rows.append({"step": 2, "val_loss": 0.25})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            args = (ppo_args if "ppo" in command[0] else sft_args)(command[1:])
            set_rank(args)
            settled = {"val_examples": 64, "init_sha256": "a start",
                       "batch": args.micro_batch * args.accumulation}  # fmt: skip
            record = {"args": vars(args) | settled, "info": {"prompt": {}}}
            (folder / "run_args.json").write_text(json.dumps(record))
            (folder / "summary.json").write_text("{}")
        return 0, ""

    monkeypatch.setattr(study, "run", run)
    return ran, ends


def rows_of(folder: str) -> dict[str, dict]:
    return {row["row"]: row for row in json.loads(Path(folder, "study.json").read_text())["rows"]}


def test_a_row_that_was_trained_before_by_itself_is_used(faked, capsys):
    ran, _ = faked
    default = Path("runs/tiny/sft-lora-main")
    args = train_sft.parse_args(["--tiny", "--lora", "--device", "cpu"])
    set_rank(args)
    args = vars(args)
    default.mkdir(parents=True)
    record = {"args": {k: v for k, v in args.items() if k != "left_open"} | {"val_examples": 256},
              "info": {"prompt": {"style": "plain", "shots": 0, "instruction": False}}}  # fmt: skip
    (default / "run_args.json").write_text(json.dumps(record))
    step = {"step": 1, "seconds": 1, "tokens": 2, "peak_memory": 3, "loss": 0.5}
    (default / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    argv = ["--tiny", "--n", "4", "--out", "s", "--device", "cpu", "--rows", "lora-tuned"]
    assert study.main(argv) == 0  # it is not finished
    assert [command.split()[0] for command in ran] == ["train_sft.py", "evaluate.py"]
    shutil.rmtree("s")
    (default / "summary.json").write_text("{}")
    ran.clear()
    assert study.main([*argv, "--seed", "1"]) == 0  # another seed
    shutil.rmtree("s")
    assert len(ran) == 2
    ran.clear()
    assert study.main(argv) == 0
    [ask] = ran
    assert f"--model {default} " in ask
    assert f"row lora-tuned is trained already: {default}" in capsys.readouterr().out
    assert rows_of("s")["lora-tuned"]["training"]["loss"] == 0.5
    shutil.rmtree("s")
    record["args"]["max_examples"] = 32  # the default is all, so these are other settings
    (default / "run_args.json").write_text(json.dumps(record))
    ran.clear()
    assert study.main(argv) == 0 and len(ran) == 2


def test_a_whole_study_has_its_table_and_is_not_done_twice(faked, capsys):
    ran, _ = faked
    assert study.main(["--tiny", "--n", "4", "--out", "s"]) == 0
    assert len(ran) == 24  # 8 trainings, 12 evaluations, 4 times the probes
    rows = rows_of("s")
    assert rows["full-main"]["points"] == 50.0 and rows["full-main"]["against"] == "untuned"
    assert (rows["ppo"]["fixed"], rows["ppo"]["broken"]) == (0, 1)
    trained = rows["full-main"]["training"]
    assert (trained["minutes"], trained["val_loss"]) == (1.0, 0.25)
    assert rows["full-main"]["kinds"]["no answer"] == 1
    table = Path("s/study.md").read_text()
    scores = "| full SFT, main | 31.0% | 75.0% | 30.1 to 95.4 |"
    assert f"{scores} untuned, one-shot + instruction | +50." in table
    assert table.startswith("| | original study, gemma-2b-it | exact match here |")
    assert len({line.count("|") for line in table.splitlines() if "|" in line}) == 1
    assert "of the runs here: the embedded model, 4 problems." in table
    assert Path("s/report.html").exists() and table in capsys.readouterr().out
    ran.clear()
    assert study.main(["--tiny", "--n", "4", "--out", "s"]) == 0
    assert not ran and "row ppo is trained already: s/ppo" in capsys.readouterr().out
    assert Path("s/study.md").read_text() == table and "other flags" not in table


def test_a_row_that_was_trained_with_other_flags_is_used_and_marked(faked, capsys, monkeypatch):
    ran, _ = faked
    argv = ["--tiny", "--n", "4", "--out", "s", "--rows", "full-main", "ppo"]
    study.main([*argv, "--sft=--lr 0.5"])
    ran.clear()
    capsys.readouterr()
    monkeypatch.setattr(study.hub, "find_model", lambda name: name)
    monkeypatch.setattr(study.hub, "fingerprint", lambda found: f"weights of {found}")
    study.main([*argv, "--sft=--micro-batch 8", "--ppo=--micro-batch 8 --accumulation 2"])
    said = capsys.readouterr().out
    assert not ran and "| full SFT, main (other flags: see below) | 31.0% | 75.0%" in said
    differ = "lr 0.5 instead of 0.001; min_lr 0.05 instead of 0.0001; "
    differ += "micro-batch x accumulation 16 instead of 8"
    assert f"other flags than this command would use ({differ})" in said
    assert "would use (it started from other weights than those in s/full-main)." in said
    assert "To train it anew, delete s/ppo or give another --out." in said
    assert rows_of("s")["full-main"]["other_flags"][0] == "lr 0.5 instead of 0.001"
    Path("s/ppo/run_args.json").write_text("{}")
    study.main(argv)
    assert "would use (settings that cannot be read)" in capsys.readouterr().out


@pytest.mark.parametrize("given", [{"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "1"}])
def test_torchrun_is_refused(faked, monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="run it without torchrun"):
        study.main(["--tiny", "--out", "s"])
    assert not faked[0] and not Path("s").exists()


def test_the_reason_of_a_row_that_cannot_run_is_shown_and_the_others_go_on(faked, capsys):
    ran, ends = faked
    ends |= {"--data socratic": 2}
    assert study.main(["--model", "a/b", "--n", "4", "--out", "s"]) == 2
    assert "row lora-socratic was not run: the weights are gated" in capsys.readouterr().err
    rows, why = rows_of("s"), "the weights are gated"
    assert rows["full-socratic"]["not_run"] == rows["lora-socratic"]["not_run"] == why
    assert "not_run" not in rows["ppo"] and "points" in rows["lora-main"]
    assert f"| LoRA, socratic | 11.0% | not run: {why} |" in Path("s/study.md").read_text()


def test_flags_for_lora_go_to_the_lora_rows_alone():
    commands = commands_of(["--tiny", "--sft=--epochs 2", "--sft-lora=--lora-r 8"])
    trained = [command for command in commands if command[0] == "train_sft.py"]
    assert len(trained) == 6
    for command in trained:
        assert "--epochs" in command and ("--lora-r" in command) == ("--lora" in command)
        train_sft.parse_args([*command[1:], "--device", "cpu"])


def test_a_dry_run_needs_no_device():
    trained = [c for c in commands_of(["--tiny", "--device", "cuda"]) if c[0] == "train_sft.py"]
    assert len(trained) == 6 and all("cuda" in command for command in trained)


def test_flags_that_no_study_can_use_are_refused_at_once(faked):
    ran, _ = faked
    for flags, says in (
        (["--eval=--samples 4 --temperature 0.7"], "--eval: leave out --samples"),
        (["--eval=--data socratic"], "--eval: leave out --data"),
        (["--eval=--n=1"], "--eval: leave out --n=1, which the study decides"),
        (["--sft-lora=--out x"], "--sft-lora: leave out --out"),
        (["--sft=--lr '1"], "--sft=.*quotation"),
        (["--sft=--bogus 1"], "unrecognized arguments: --bogus 1"),
        (["--eval=words"], "two models, words and --model"),
        (["--ppo=--gamma 2"], "--gamma is 2"),
    ):
        with pytest.raises(UserError, match=says):
            study.main(["--tiny", *flags])
    assert not ran


def test_a_folder_that_cannot_be_is_one_line(faked, tmp_path):
    ran, _ = faked
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file cannot be the study's folder"):
        study.main(["--tiny", "--out", "file"])
    assert not ran


def test_ppo_is_not_run_without_its_start(faked):
    ran, ends = faked
    ends |= {"full-main": 2}
    study.main(["--tiny", "--n", "4", "--out", "s"])
    rows = rows_of("s")
    assert rows["ppo"]["not_run"] == rows["ppo-tuned"]["not_run"] == "needs full-main"
    assert "points" not in rows["lora-main"] and "accuracy" in rows["lora-main"]


@pytest.mark.parametrize("status", [129, 130, 143])
def test_a_stop_stops_the_study(faked, status):
    ran, ends = faked
    ends |= {"--lora": status}
    assert study.main(["--tiny", "--n", "4", "--out", "s"]) == status
    assert not Path("s/study.json").exists() and "--lora" in ran[-1]


def test_a_bug_in_a_script_ends_the_study(faked):
    ran, ends = faked
    ends |= {"--lora": 1}
    with pytest.raises(UserError, match="row lora-main ended with status 1"):
        study.main(["--tiny", "--n", "4", "--out", "s"])


def test_only_the_rows_asked_for_are_run_and_shown(faked, capsys):
    ran, _ = faked
    argv = ["--tiny", "--n", "4", "--out", "s", "--rows"]
    study.main([*argv, "untuned", "full-main"])
    assert len(ran) == 5 and rows_of("s")["ppo"]["not_run"] == "left out"
    said = capsys.readouterr().out
    assert "| full SFT, main | 31.0% | 75.0%" in said
    assert "not run" not in said and "PPO" not in said
    assert Path("s/study.md").read_text() in said
    study.main([*argv, "untuned-one-shot"])  # earlier rows stay in the file
    said, table = capsys.readouterr().out, Path("s/study.md").read_text()
    assert "| untuned, one-shot |" in said and "full SFT" not in said
    assert "| untuned, one-shot |" in table and "| full SFT, main |" in table
    assert "PPO" not in table


@slow
def test_a_real_row_end_to_end(capfd):
    """Two rows on few problems, in real processes. The second call finds all done."""
    argv = ["--tiny", "--n", "6", "--out", "s", "--rows", "untuned", "full-main",
            "--eval=--max-new-tokens 8",
            "--sft=--max-examples 32 --val-examples 8 --max-new-tokens 8"]  # fmt: skip
    assert study.main([*argv, "--device", "cpu"]) == 0
    rows = rows_of("s")
    assert rows["untuned"]["n"] == 6 and rows["full-main"]["training"]["steps"] == 2
    capfd.readouterr()
    trained = Path("s/full-main/metrics.jsonl").stat().st_mtime_ns
    assert study.main([*argv, "--device", "cpu"]) == 0
    out = capfd.readouterr().out
    assert "full-main is trained already" in out and not re.search(r"\$ python", out)
    assert "other flags" not in out
    assert Path("s/full-main/metrics.jsonl").stat().st_mtime_ns == trained
    assert "Probes" in Path("s/report.html").read_text()


def test_a_row_that_cannot_run_shows_its_scripts_error(capfd):
    status, last = study.run(["train_sft.py", "--tiny", "--lr", "-1"])
    assert status == 2 and last == "--lr is -1.0: give a positive number"


def test_a_closed_stderr_does_not_leave_a_script_waiting(tmp_path, monkeypatch):
    """The script goes on writing to a pipe that nobody reads any more."""

    def show(*_, file=None, **__):
        if file:
            raise BrokenPipeError

    (tmp_path / "talks.py").write_text("import sys\nsys.stderr.write('y\\n' * 10**6)\n")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "print", show, raising=False)

    def late(*_):
        raise TimeoutError

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        with pytest.raises(BrokenPipeError):
            study.run(["talks.py"])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
