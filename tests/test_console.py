"""How a script ends and what it shows: a stop waits for the end of a step, an error is one line,
and the progress line and the record of the machine are true."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from nanogsm import UserError
from nanogsm.run import console, machine
from nanogsm.run.console import Interrupt, Progress, _shown, graceful_stop, printable

# ---- stopping


STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize("number, code", STOPS)
def test_signal_sets_a_flag_and_handlers_are_restored(default_signals, capfd, number, code):
    before = signal.getsignal(number)
    with graceful_stop() as stop:
        assert stop.requested is None and stop.exit_code == 0
        signal.raise_signal(number)
        assert stop.requested == number and stop.exit_code == code
        assert "continue from step 7" in stop.message(7)
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err
    assert "stopping after this step" in said
    assert ("press Ctrl-C again to stop at once" in said) == (number == signal.SIGINT)


def test_second_ctrl_c_interrupts_at_once(default_signals):
    with pytest.raises(KeyboardInterrupt), graceful_stop():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_sigterm_still_waits_for_the_step(default_signals):
    with graceful_stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert stop.exit_code == 143


def test_ignored_signals_and_other_threads_are_left_alone(default_signals):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with graceful_stop():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    caught = []
    thread = threading.Thread(target=lambda: caught.append(graceful_stop().__enter__()))
    thread.start()
    thread.join()
    assert isinstance(caught[0], Interrupt) and caught[0].requested is None


# ---- the way in and out


def fail(error):
    raise error


def ended(main, capsys) -> tuple[int, str]:
    """Exit status and stderr of `entry(main)`."""
    with pytest.raises(SystemExit) as caught:
        console.entry(main)
    return caught.value.code, capsys.readouterr().err


def test_entry_exits_with_what_main_returns(capsys):
    assert ended(lambda: None, capsys) == (0, "")
    assert ended(lambda: 143, capsys) == (143, "")
    code, err = ended(lambda: fail(KeyboardInterrupt()), capsys)
    assert code == 130 and err == "\nstopped at once: what was not saved is lost\n"
    assert ended(lambda: sys.exit(7), capsys) == (7, "")
    assert ended(lambda: sys.exit("a text"), capsys) == (1, "error: a text\n")


def test_user_error_is_one_safe_line(capsys):
    code, err = ended(lambda: fail(UserError("no such\nmodel \x1b[31m")), capsys)
    assert (code, err) == (2, "error: no such model \\x1b[31m\n")


@pytest.mark.parametrize("main", [
    lambda: fail(torch.OutOfMemoryError("CUDA: tried to allocate 2 GiB")),
    lambda: torch.empty(2**46),
    lambda: fail(MemoryError()),
    lambda: fail(RuntimeError("MPS backend out of memory (MPS allocated ...)")),
])  # fmt: skip
def test_out_of_memory_names_the_flags_that_lower_it(main, capsys):
    code, err = ended(main, capsys)
    assert code == 2 and err.startswith("error: out of memory") and err.count("\n") == 1
    for flag in ("--micro-batch", "--lora", "--max-seq-length", "--batch-size"):
        assert flag in err


def test_full_disk_is_one_line(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
    code, err = ended(lambda: fail(full), capsys)
    assert code == 2 and err.startswith("error: disk full") and err.count("\n") == 1
    assert "metrics.jsonl" in err


def test_bugs_keep_their_traceback():
    for error in (FileNotFoundError("gone"), RuntimeError("shapes differ"), KeyError("x")):
        with pytest.raises(type(error)):
            console.entry(lambda: fail(error))


def test_a_closed_pipe_and_unprintable_output_are_no_errors(tmp_path, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert ended(lambda: print("still in the buffer"), capsys) == (141, "")
        print("the flush at exit does not fail either", flush=True)
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert ended(lambda: print("\ud800é"), capsys) == (0, "")
    assert (tmp_path / "out").read_text() == "\\ud800\\xe9\n"


# ---- the progress line


def test_printable_escapes_what_a_terminal_obeys():
    text = "\x1b[2J\rgone\x07\x9b31m\u202e\x7f\ud800 é 数\tx\n"
    assert printable(text) == "\\x1b[2J\\rgone\\x07\\x9b31m\\u202e\\x7f\\ud800 é 数\tx\n"


def test_progress_in_a_file_prints_first_last_and_sometimes(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(60) as progress:
        for step in range(41, 61):  # a continued run: an earlier process did 40 steps
            clock[0] += 3
            progress.update(step, loss=0.5, tokens_per_s=12345.6, memory=3 * 2**29, em=None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == "41/60 45/60 49/60 53/60 57/60 60/60".split()
    assert lines[0] == "step 41/60  loss 0.5  12,346 tokens/s  1.50 GiB"
    # 15 steps of 3 s are left. The time comes early, so that a narrow terminal still shows it.
    assert lines[1].startswith("step 45/60  ETA 0:00:45  loss 0.5")
    assert "ETA" not in lines[-1]


def test_the_time_left_follows_the_recent_steps(monkeypatch, capsys):
    """The first 30 steps were ten times slower, as on a CPU that somebody else used."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(100) as progress:
        for step in range(61):
            clock[0] += 100 if step <= 30 else 10
            progress.update(step)
    assert capsys.readouterr().out.splitlines()[-1] == "step 60/100  ETA 0:06:40"


def test_a_long_step_uses_up_the_time_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(12) as progress:
        for step in (0, 1, 2):
            clock[0] += 60
            progress.update(step)
        for _ in range(2):  # as answers of the next step come in
            clock[0] += 20
            progress.update(2, answered=5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[1:]] == ["0:11:00", "0:10:00", "0:09:40", "0:09:20"]


def test_ppos_progress_line_fits_80_columns():
    shown = {
        "reward": 0.35546875,
        "kl": 12.3456789,
        "length": 125.33984375,
        "tokens_per_s": 12345.6,
    }
    line = f"step 100/100  ETA 0:12:34  {'  '.join(_shown(*x) for x in shown.items())}"
    assert line.endswith("reward 0.355  kl 12.3  length 125  12,346 tokens/s") and len(line) < 80


def test_the_last_step_of_a_progress_line_is_printed_once(monkeypatch, capsys):
    """A validation after the last step shows its own progress, which must not flood a log."""
    with Progress(60) as progress:
        for done in range(20):
            progress.update(60, validating=f"{done}/20")
    assert capsys.readouterr().out == "step 60/60  validating 0/20\n"


def test_progress_on_a_terminal_is_one_line_with_notes_above_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 5)))
    with Progress(9) as progress:
        progress.note("start")
        progress.update(1, loss=1.0, text="far too long for this terminal")
        progress.note("a\x1b[2Jb")
    line, clear = "step 1/9  loss 1  t", "\r\x1b[K"
    assert capsys.readouterr().out == f"start\n{clear}{line}{clear}a\\x1b[2Jb\n{line}\n"


# ---- the machine


def test_environment_and_peak_memory():
    env = machine.environment()
    assert env["torch"].startswith(torch.__version__.split("+")[0]) and env["cores"] >= 1
    json.dumps(env)
    before = machine.peak_memory("cpu")
    # 64 MiB more than the process ever held: the peak must rise, whatever it holds now
    block = torch.ones(before // 4 + 2**24)
    assert before < block.nbytes <= machine.peak_memory("cpu") < before + 2 * block.nbytes
    del block


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_commit_is_that_of_our_checkout_or_absent(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "nanogsm/run/machine.py"))
    env = machine.environment()
    assert len(env["commit"]) == 40 and env["dirty"] is False
    (tmp_path / "new").write_text("")  # results, for example
    assert machine.environment()["dirty"] is False
    git("add", "new")
    assert machine.environment()["dirty"] is True
    # Installed somewhere inside another project's checkout.
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "venv/nanogsm/run/machine.py"))
    (tmp_path / "venv").mkdir()
    assert "commit" not in machine.environment()


def test_shares_are_listed_as_percentages_and_steps_in_full():
    metrics = {"step": 15_000, "val_loss": 0.113449, "val_exact_match": 0.5938}
    assert console.listed(metrics) == "step 15000, val_loss 0.1134, val_exact_match 59.4%"


def test_devices_by_name_and_number(monkeypatch):
    for given in ("cpu", "cpu:0"):
        assert machine.pick_compute(given, "fp32") == ("cpu", "fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    has = re.escape("this machine has only cuda (cuda:0 to cuda:1), cpu")
    for given in ("cuda:2", "cuda:", "cuda:x", "cpu:", "cpu:1", "gpu"):
        with pytest.raises(UserError, match=f"--device {given}: {has}"):
            machine.pick_compute(given, "fp32")


def test_a_script_without_stdout_and_under_a_debugger(tmp_path):
    """`>&-` closes it, and a debugger's __main__ has no __spec__."""
    script = tmp_path / "s.py"
    script.write_text(
        "import sys\ndel sys.modules['__main__'].__spec__\nfrom nanogsm.run import console, flags\n"
        "def main():\n    flags.Parser('x').parse_args([])\n    print('said')\n"
        "console.entry(main)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(machine.Path(machine.__file__).parents[2])}
    command = f"{sys.executable} {script} >&- 2>&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
