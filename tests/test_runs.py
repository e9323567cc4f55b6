"""The run folder keeps its promises: one owner, no half-written state, no row twice or missing."""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanogsm import UserError, console, files
from nanogsm.console import Interrupt, Progress, graceful_stop, printable
from nanogsm.files import write_json
from nanogsm.runs import Run

ARGS = {"lr": 1e-5, "steps": 8, "save_every": 1}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Only a power cut needs fsync; what that relies on is the order, tested by itself."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def open_run(folder, args=ARGS, **options) -> Run:
    return Run(folder, args, {"torch": "x"}, **options)


def rows(folder, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def next_weight(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return w * 0.9 + torch.rand(w.shape, generator=generator)


def train(folder, until: int, then_finish=False, stop=None) -> torch.Tensor:
    """A toy training loop: its result depends on every step, the order and the RNG."""
    with open_run(folder) as run:
        generator, w, done = torch.Generator().manual_seed(0), torch.zeros(300), 0
        if found := run.load_checkpoint():
            done, tensors, state = found
            assert state == {"twice": 2 * done}
            w = tensors["w"].clone()
            generator.set_state(tensors["rng"].clone())
        for step in range(done + 1, until + 1):
            w = next_weight(w, generator)
            run.log({"step": step, "mean": w.mean().item()})
            run.sample({"step": step})
            tensors = {"w": w, "rng": generator.get_state()}
            run.save_checkpoint(step, tensors, {"twice": 2 * step})
            if stop and stop.requested:
                break
        if then_finish:
            run.finish({"steps": until})
    return w


def expected(until: int) -> tuple[list[dict], torch.Tensor]:
    """The same numbers without a run folder."""
    generator, w, log = torch.Generator().manual_seed(0), torch.zeros(300), []
    for step in range(1, until + 1):
        w = next_weight(w, generator)
        log.append({"step": step, "mean": w.mean().item()})
    return log, w


def forked(work) -> int:
    """The pid of a child process that runs `work` and ends without any of Python's clean-up."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- checkpoints and logs


def test_continued_run_equals_uninterrupted_one(tmp_path):
    train(tmp_path / "r", 3)
    with open_run(tmp_path / "r") as run:  # rows after the checkpoint, as a killed process leaves
        run.log({"step": 4, "mean": -1})
        run.sample({"step": 4})
    w = train(tmp_path / "r", 8)
    log, reference = expected(8)
    assert torch.equal(w, reference)
    assert rows(tmp_path / "r") == log
    assert [row["step"] for row in rows(tmp_path / "r", "samples.jsonl")] == list(range(1, 9))


def test_logs_start_over_without_a_checkpoint(tmp_path):
    with open_run(tmp_path / "r") as run:
        run.log({"step": 1})
        run.sample({"step": 1})
    with open_run(tmp_path / "r") as run:
        assert run.load_checkpoint() is None
        run.log({"step": 7})
    assert rows(tmp_path / "r") == [{"step": 7}] and not rows(tmp_path / "r", "samples.jsonl")


def test_sigkill_at_random_moments_always_leaves_a_loadable_checkpoint(tmp_path):
    folder, draw = tmp_path / "r", random.Random(0)
    seen = [0]
    for _ in range(12):
        pid = forked(lambda: train(folder, 10**9))
        time.sleep(draw.uniform(0.01, 0.1))
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        with open_run(folder) as run:  # also: the killed process no longer holds the lock
            found = run.load_checkpoint()
        seen.append(found[0] if found else 0)
        assert [row["step"] for row in rows(folder)] == list(range(1, seen[-1] + 1))
    assert seen == sorted(seen) and seen[-1] > 0
    w = train(folder, seen[-1] + 3)
    log, reference = expected(seen[-1] + 3)
    assert rows(folder) == log and torch.equal(w, reference)


def die_at(count: int) -> None:
    """End this process just before its `count`-th call that changes what is on the disk."""
    calls = itertools.count()

    def mortal(call):
        def wrapped(*args, **kwargs):
            if next(calls) == count:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapped

    for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, mortal(getattr(os, name)))


def test_death_before_any_disk_operation_is_survived(tmp_path):
    """From 2 saved steps to 3, and on to the end: die at the 1st, 2nd, ... system call."""
    train(tmp_path / "start", 2)
    for count in itertools.count():
        folder = tmp_path / str(count)
        shutil.copytree(tmp_path / "start", folder)
        code = exit_code(forked(lambda: (die_at(count), train(folder, 3, True))))
        assert code in (0, 9)
        with open_run(folder) as run:
            if not run.finished:
                assert run.load_checkpoint()[0] in (2, 3)
            left = [path.name for path in folder.rglob("*.tmp")]
        assert not left
        if not run.finished:
            train(folder, 3, then_finish=True)
        assert rows(folder) == expected(3)[0]
        assert not (folder / "checkpoint").exists()
        if code == 0:
            break
    assert count > 12  # the calls were really counted


@pytest.mark.parametrize("finished", [False, True])
def test_death_while_overwriting_leaves_a_usable_folder(tmp_path, finished):
    train(tmp_path / "start", 2, then_finish=finished)
    (tmp_path / "start/model").mkdir()
    (tmp_path / "start/model/weights").write_text("x")
    for count in itertools.count():
        folder = tmp_path / str(count)
        shutil.copytree(tmp_path / "start", folder)
        code = exit_code(forked(lambda: (die_at(count), open_run(folder, overwrite=True))))
        with open_run(folder) as run:  # the same command, now without --overwrite
            if run.finished:
                assert (folder / "model/weights").exists()
            elif run.load_checkpoint() is None:
                assert rows(folder) == []
        if code == 0:
            break
    assert count > 5


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    """What a power cut leaves depends on this order."""
    calls, rename = [], os.rename

    def name_of(fd):
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name

    with open_run(tmp_path / "r") as run:
        monkeypatch.setattr(os, "fsync", lambda fd: calls.append(name_of(fd)))
        monkeypatch.setattr(os, "rename", lambda *a, **k: (calls.append("RENAME"), rename(*a, **k)))
        run.save_checkpoint(1, {"w": torch.zeros(1)}, {})
    at = calls.index("RENAME")
    assert set(calls[:at]) == {
        "metrics.jsonl", "samples.jsonl", "tensors.safetensors", "state.json",
        "checksums.json.tmp", "step-1.tmp"}  # fmt: skip
    assert calls[at - 1] == "step-1.tmp" and calls[at + 1 :] == ["checkpoint", "r"]


def test_older_checkpoint_goes_only_after_the_new_one_is_complete(tmp_path):
    train(tmp_path / "r", 3)
    assert os.listdir(tmp_path / "r/checkpoint") == ["step-3"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "checksums.json"])
def test_every_flipped_byte_and_any_truncation_is_detected(tmp_path, name):
    train(tmp_path / "r", 2)
    path = tmp_path / "r/checkpoint/step-2" / name
    good = path.read_bytes()
    places = random.Random(0).sample(range(len(good)), 25)
    bad = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in places]
    for data in [*bad, good[:-9], b""]:
        path.write_bytes(data)
        with open_run(tmp_path / "r") as run, pytest.raises(UserError) as caught:
            run.load_checkpoint()
        message = str(caught.value)
        assert str(path) in message or name == "checksums.json"  # there: the file it disowns
        assert "--overwrite" in message and "\n" not in message
        assert len(rows(tmp_path / "r")) == 2  # nothing was cut on the strength of a bad file
    path.unlink()
    with open_run(tmp_path / "r") as run, pytest.raises(UserError, match="missing"):
        run.load_checkpoint()


def test_damage_says_that_an_older_checkpoint_can_be_used(tmp_path):
    train(tmp_path / "r", 2)
    steps = tmp_path / "r/checkpoint"
    shutil.copytree(steps / "step-2", tmp_path / "older")
    train(tmp_path / "r", 3)
    shutil.copytree(tmp_path / "older", steps / "step-2")
    (steps / "step-3/tensors.safetensors").write_bytes(b"")
    with (
        open_run(tmp_path / "r") as run,
        pytest.raises(UserError, match="has 0 bytes instead of .* delete .*step-3 to continue from step 2"),
    ):
        run.load_checkpoint()
    shutil.rmtree(steps / "step-3")
    assert torch.equal(train(tmp_path / "r", 4), expected(4)[1])
    assert rows(tmp_path / "r") == expected(4)[0]


def test_shortened_log_is_refused(tmp_path):
    train(tmp_path / "r", 2)
    (tmp_path / "r/samples.jsonl").write_bytes(b"")
    with open_run(tmp_path / "r") as run, pytest.raises(UserError, match="is shorter than"):
        run.load_checkpoint()
    assert len(rows(tmp_path / "r")) == 2


def test_tensors_of_every_kind_return_bit_for_bit(tmp_path):
    base = torch.randn(6, 4)
    tensors = {
        "a": torch.arange(5, dtype=torch.uint8),  # an odd size would misalign what follows
        "strided": base.t(), "slice": base[1:3, 2], "tied": base, "tied_too": base,
        "expanded": torch.ones(1).expand(7), "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3), "flags": torch.tensor([True, False]),
        "half": base.bfloat16(), "f16": base.half(), "i8": torch.arange(3, dtype=torch.int8),
        "ids": torch.arange(3), "nan": torch.tensor([float("nan"), -0.0]),
        "grad": torch.ones(2, requires_grad=True),
    }  # fmt: skip
    state = {"best": float("inf"), "tiny": 5e-324, "text": "é\ud800", "none": None}
    with open_run(tmp_path / "r") as run:
        run.save_checkpoint(4, tensors, state)
    with open_run(tmp_path / "r") as run:
        step, loaded, back = run.load_checkpoint()
    assert step == 4 and back == state and loaded.keys() == tensors.keys()
    for name, t in tensors.items():
        same = loaded[name].dtype == t.dtype and loaded[name].shape == t.shape
        assert same and torch.equal(loaded[name].nan_to_num(9), t.nan_to_num(9)), name
    assert torch.signbit(loaded["nan"][1])
    loaded["tied"].zero_()
    assert loaded["tied_too"].abs().sum() > 0
    data = (tmp_path / "r/checkpoint/step-4/tensors.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    header = json.loads(data[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}  # transformers refuses a file without it
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0, name


@pytest.mark.parametrize("failing_write", range(3))
def test_full_disk_keeps_the_older_checkpoint(tmp_path, monkeypatch, failing_write):
    train(tmp_path / "r", 2)
    real, calls = files.write, itertools.count()

    def full(path, chunks):
        real(path, chunks)
        if next(calls) == failing_write:
            raise OSError(errno.ENOSPC, "No space left on device")

    with open_run(tmp_path / "r") as run:
        monkeypatch.setattr(files, "write", full)
        with pytest.raises(UserError, match="disk full while writing the checkpoint of step 3"):
            run.save_checkpoint(3, {"w": torch.zeros(9)}, {})
        assert os.listdir(tmp_path / "r/checkpoint") == ["step-2"]
        assert run.load_checkpoint()[0] == 2


def test_real_write_failure_keeps_the_older_checkpoint(tmp_path):
    """The system itself refuses to write: a limit on file sizes."""
    train(tmp_path / "r", 2)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with open_run(tmp_path / "r") as run, pytest.raises(UserError, match="disk full"):
            run.save_checkpoint(3, {"w": torch.zeros(9000)}, {})

    assert exit_code(forked(work)) == 0
    assert os.listdir(tmp_path / "r/checkpoint") == ["step-2"]
    assert torch.equal(train(tmp_path / "r", 3), expected(3)[1])


def test_saving_the_same_step_again_changes_nothing(tmp_path):
    train(tmp_path / "r", 2)
    with open_run(tmp_path / "r") as run:
        run.save_checkpoint(2, {"w": torch.ones(1)}, {})
        assert run.load_checkpoint()[1]["w"].shape == (300,)


# ---- who may use the folder


def test_lock_refuses_a_second_process_and_dies_with_its_holder(tmp_path):
    reader, writer = os.pipe()
    (tmp_path / "r").mkdir()
    (tmp_path / "r/.lock").write_text("9" * 18)  # of a longer pid, long gone

    def hold():
        run = open_run(tmp_path / "r")
        os.write(writer, b"held")
        time.sleep(30)
        run.close()

    pid = forked(hold)
    try:
        os.read(reader, 4)
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"r is in use by process {pid}:"):
                open_run(tmp_path / "r", overwrite=overwrite)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    open_run(tmp_path / "r").close()
    assert (tmp_path / "r/run_args.json").exists()


def test_refused_run_leaves_the_folder_unlocked(tmp_path):
    open_run(tmp_path / "r").close()
    with pytest.raises(UserError):
        open_run(tmp_path / "r", {"lr": 2})
    open_run(tmp_path / "r").close()


def test_other_arguments_are_refused_by_name_with_both_values(tmp_path):
    train(tmp_path / "r", 2)
    changed = {"lr": 2e-4, "steps": 8, "save_every": 5, "seed": 1}
    with pytest.raises(UserError) as caught:
        open_run(tmp_path / "r", changed, may_differ=("save_every",))
    message = str(caught.value)
    assert "lr was 1e-05, now 0.0002" in message and "seed was absent, now 1" in message
    assert "save_every" not in message and "steps" not in message
    assert len(rows(tmp_path / "r")) == 2  # a refused command changes nothing
    with open_run(tmp_path / "r", ARGS | {"save_every": 5}, may_differ=("save_every",)) as run:
        assert run.load_checkpoint()[0] == 2
    assert json.loads((tmp_path / "r/run_args.json").read_text())["args"]["save_every"] == 5
    with pytest.raises(UserError, match="steps was 8, now true"):
        open_run(tmp_path / "r", ARGS | {"steps": True, "save_every": 5})


def test_true_one_and_one_point_zero_are_different_arguments(tmp_path):
    open_run(tmp_path / "r", {"a": 1}).close()
    for value in (True, 1.0, "1"):
        with pytest.raises(UserError, match="a was 1, now"):
            open_run(tmp_path / "r", {"a": value})


def test_continuing_elsewhere_is_recorded(tmp_path):
    for torch_version in ("1", "1", "2", "2"):
        Run(tmp_path / "r", ARGS, {"torch": torch_version}).close()
    record = json.loads((tmp_path / "r/run_args.json").read_text())
    assert record == {"args": ARGS, "info": {"torch": "1"}, "continued": [{"torch": "2"}]}


def test_finished_run_is_reported_and_left_alone(tmp_path):
    train(tmp_path / "r", 2, then_finish=True)
    assert not (tmp_path / "r/checkpoint").exists()
    files = {p: p.read_bytes() for p in (tmp_path / "r").iterdir() if p.name != ".lock"}
    with Run(tmp_path / "r", ARGS, {"torch": "newer"}) as run:
        assert run.finished and run.summary == {"steps": 2} and run.load_checkpoint() is None
    assert all(path.read_bytes() == data for path, data in files.items())
    with pytest.raises(UserError, match="lr was"):
        open_run(tmp_path / "r", ARGS | {"lr": 1.0})


def test_overwrite_starts_anew_and_deletes_only_a_runs_own_files(tmp_path):
    train(tmp_path / "r", 2, then_finish=True)
    (tmp_path / "r/model").mkdir()
    (tmp_path / "r/adapter.tmp").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/weights").write_text("mine")
    (tmp_path / "r/adapter").symlink_to(tmp_path / "elsewhere")
    for name in ("model/weights", "eval-test-256.json", "notes.txt"):
        (tmp_path / "r" / name).write_text("x")
    with open_run(tmp_path / "r", {"lr": 3}, overwrite=True) as run:
        assert not run.finished and run.load_checkpoint() is None
    left = {path.name for path in (tmp_path / "r").iterdir()}
    assert left == {"notes.txt", ".lock", "run_args.json", "metrics.jsonl", "samples.jsonl"}
    assert rows(tmp_path / "r") == [] and (tmp_path / "elsewhere/weights").exists()
    assert json.loads((tmp_path / "r/run_args.json").read_text())["args"] == {"lr": 3}


def test_a_run_that_fails_before_its_first_step_leaves_nothing_unless_there_is_more(tmp_path):
    for folder, there in ((tmp_path / "new", False), (tmp_path / "mine", True)):
        if there:
            folder.mkdir()
        with pytest.raises(ValueError), Run(folder, {}, {}):
            raise ValueError("damaged weights")
        assert folder.exists() == there and (not there or not list(folder.iterdir()))
    with pytest.raises(ValueError), Run(tmp_path / "begun", {}, {}) as run:
        run.log({"step": 1})
        raise ValueError("not finite")
    with pytest.raises(ValueError), Run(tmp_path / "begun", {}, {}):  # no longer new: kept
        raise ValueError("damaged weights")
    assert (tmp_path / "begun/run_args.json").exists()
    with pytest.raises(KeyboardInterrupt), Run(tmp_path / "saved", {}, {}) as run:
        run.save_checkpoint(0, {}, {})  # stopped at the first step, and once more while it was saved
        raise KeyboardInterrupt
    assert Run(tmp_path / "saved", {}, {}).load_checkpoint()[0] == 0
    with Run(tmp_path / "notes", {}, {}) as run:
        run.log({"step": 1})
    (tmp_path / "notes/notes.txt").write_text("mine")
    with pytest.raises(ValueError), Run(tmp_path / "notes", {}, {}, overwrite=True):
        raise ValueError("damaged weights")
    Run(tmp_path / "notes", {}, {}).close()  # still known as a run folder


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folder_is_refused_untouched(tmp_path, overwrite):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        open_run(tmp_path, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be a run folder"):
        open_run(tmp_path / "file/run", overwrite=overwrite)


def test_unreadable_run_args_is_one_line(tmp_path):
    open_run(tmp_path / "r").close()
    for text in ("{", "[]", "{}"):
        (tmp_path / "r/run_args.json").write_text(text)
        with pytest.raises(UserError, match="run_args.json.*--overwrite"):
            open_run(tmp_path / "r")
    open_run(tmp_path / "r", overwrite=True).close()


# ---- signals


@pytest.fixture
def default_signals():
    """Python's own handlers, also where pytest was started with SIGINT ignored."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_sets_a_flag_and_handlers_are_restored(default_signals, capfd, number, code):
    before = signal.getsignal(number)
    with graceful_stop() as stop:
        assert stop.requested is None and stop.exit_code == 0
        signal.raise_signal(number)
        assert stop.requested == number and stop.exit_code == code
        assert "continue from step 7" in stop.message(7)
    assert signal.getsignal(number) is before
    assert "a Ctrl-C from now on" in capfd.readouterr().err


def test_second_ctrl_c_interrupts_at_once(default_signals):
    with pytest.raises(KeyboardInterrupt), graceful_stop():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_sigterm_is_patient(default_signals):
    with graceful_stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert stop.exit_code == 143


def test_stopped_run_saves_exits_with_143_and_continues(tmp_path, default_signals):
    folder = tmp_path / "r"

    def work():
        with graceful_stop() as stop:
            train(folder, 10**9, stop=stop)
        os._exit(stop.exit_code)

    pid = forked(work)
    while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < 3:
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert exit_code(pid) == 143
    done = len(rows(folder))
    assert os.listdir(folder / "checkpoint") == [f"step-{done}"]
    assert torch.equal(train(folder, done + 2), expected(done + 2)[1])
    assert rows(folder) == expected(done + 2)[0]


def test_ignored_signals_and_other_threads_are_left_alone(default_signals):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with graceful_stop():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    caught = []
    thread = threading.Thread(target=lambda: caught.append(graceful_stop().__enter__()))
    thread.start()
    thread.join()
    assert isinstance(caught[0], Interrupt) and caught[0].requested is None


# ---- the way out


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
    assert ended(lambda: fail(KeyboardInterrupt()), capsys) == (130, "")
    assert ended(lambda: sys.exit(7), capsys) == (7, "")


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


def test_reader_who_left_and_unprintable_output_are_no_errors(tmp_path, monkeypatch, capsys):
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


# ---- the console and small things


def test_printable_neutralises_what_a_terminal_obeys():
    text = "\x1b[2J\rgone\x07\x9b31m\u202e\x7f\ud800 é 数\tx\n"
    assert printable(text) == "\\x1b[2J\\rgone\\x07\\x9b31m\\u202e\\x7f\\ud800 é 数\tx\n"


def test_progress_in_a_file_prints_first_last_and_sometimes(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(60) as progress:
        for step in range(41, 61):  # a continued run: 40 steps were made by another process
            clock[0] += 3
            progress.update(step, loss=0.5, tokens_per_s=12345.6, memory=3 * 2**29, em=None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == "41/60 45/60 49/60 53/60 57/60 60/60".split()
    assert lines[0] == "step 41/60  loss 0.5  12,346 tokens/s  1.50 GiB"
    assert lines[1].endswith("ETA 0:00:45")  # 15 steps of 3 s


def test_the_last_step_of_a_progress_line_is_printed_once(monkeypatch, capsys):
    """A validation at the last step reports its own progress, which is no reason to flood a log."""
    with Progress(60) as progress:
        for done in range(20):
            progress.update(60, validating=f"{done}/20")
    assert capsys.readouterr().out == "step 60/60  validating 0/20\n"


def test_progress_on_a_terminal_is_one_line_and_notes_stand_above_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 5)))
    with Progress(9) as progress:
        progress.note("start")
        progress.update(1, loss=1.0, text="far too long for this terminal")
        progress.note("a\x1b[2Jb")
    line, clear = "step 1/9  loss 1  t", "\r\x1b[K"
    assert capsys.readouterr().out == f"start\n{clear}{line}{clear}a\\x1b[2Jb\n{line}\n"


def test_json_is_atomic_and_valid_without_nan(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": float("nan"), "b": [float("-inf"), 1.5, (True,)], "c": "\ud800é"})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5, [True]], "c": "\ud800é"}
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_json(path, {})
    assert "b" in json.loads(path.read_text()) and os.listdir(tmp_path) == ["x.json"]


def test_nan_in_metrics_is_null(tmp_path):
    with open_run(tmp_path / "r") as run:
        run.log({"step": 1, "loss": float("nan")})
        assert rows(tmp_path / "r") == [{"step": 1, "loss": None}]  # there before close


def test_environment_and_peak_memory():
    env = console.environment()
    assert env["torch"].startswith(torch.__version__.split("+")[0]) and env["cores"] >= 1
    json.dumps(env)
    before = console.peak_memory("cpu")
    # 64 MiB more than the process ever held: the peak must move past them, whatever it holds now
    block = torch.ones(before // 4 + 2**24)
    assert before < block.nbytes <= console.peak_memory("cpu") < before + 2 * block.nbytes
    del block


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_commit_is_that_of_our_checkout_or_absent(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    monkeypatch.setattr(console, "__file__", str(tmp_path / "nanogsm/console.py"))
    env = console.environment()
    assert len(env["commit"]) == 40 and env["dirty"] is False
    (tmp_path / "new").write_text("")
    assert console.environment()["dirty"] is True
    # Installed somewhere inside another project's checkout.
    monkeypatch.setattr(console, "__file__", str(tmp_path / "venv/nanogsm/console.py"))
    (tmp_path / "venv").mkdir()
    assert "commit" not in console.environment()


def test_metrics_go_to_wandb_too_and_its_absence_is_said(tmp_path, monkeypatch):
    said = []
    log, finish = lambda row, step: said.append((step, row)), lambda exit_code: said.append(exit_code)
    logger = SimpleNamespace(log=log, finish=finish)
    fake = SimpleNamespace(init=lambda **given: said.append(given) or logger)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Run(tmp_path / "run", {"a": 1}, {}) as run:
        run.log({"step": 1, "loss": 3.0})
        run.start_wandb("mine", {"lr": 1.0})
        run.log({"step": 2, "loss": 2.0})
    where = {"project": "mine", "name": "run", "dir": str(tmp_path), "config": {"lr": 1.0}}
    assert said == [where, (2, {"step": 2, "loss": 2.0}), 1]  # stopped before its end
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    with Run(tmp_path / "run", {"a": 1}, {}) as run:
        run.start_wandb("mine", {"lr": 1.0})
        run.finish({})
    assert said[-1] == 0
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Run(tmp_path / "other", {"a": 1}, {}) as run, pytest.raises(UserError, match="pip install wandb"):
        run.start_wandb("mine", {})
