"""The run folder keeps its promises: one owner, no half-written state, no row twice or missing."""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanogsm import UserError
from nanogsm.run import folder as run_folder
from nanogsm.run.console import graceful_stop
from nanogsm.run.folder import RunFolder
from nanogsm.store import files

ARGS = {"lr": 1e-5, "steps": 8, "save_every": 1}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Only a power cut needs fsync. It relies on the order of calls, which has its own test."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def open_run(folder, args=ARGS, **options) -> RunFolder:
    return RunFolder(folder, args, {"torch": "x"}, **options)


def rows(folder, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def contents(folder) -> dict[str, bytes]:
    """All files below a folder, except the lock, which every process writes."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def next_weight(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return w * 0.9 + torch.rand(w.shape, generator=generator)


def train(folder, until: int, then_finish=False, stop=None) -> torch.Tensor:
    """A toy training loop. Its result depends on every step, their order and the random state."""
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
    """Run `work` in a child process that ends without Python's clean-up. Returns its pid."""
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
    with open_run(tmp_path / "r") as run:  # a killed process leaves rows after the checkpoint
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
    """From 2 saved steps to 3 and to the end, dying at the 1st, 2nd, ... system call."""
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
    """What remains after a power cut depends on this order."""
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


def test_an_older_checkpoint_that_a_kill_left_behind_goes_when_the_run_is_continued(tmp_path):
    train(tmp_path / "r", 2)
    shutil.copytree(tmp_path / "r/checkpoint/step-2", tmp_path / "older")
    train(tmp_path / "r", 3)
    shutil.copytree(tmp_path / "older", tmp_path / "r/checkpoint/step-2")
    train(tmp_path / "r", 3)  # not a step is left to do
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
        # With damaged checksums, the message names the file that does not match them.
        assert str(path) in message or name == "checksums.json"
        assert "--overwrite" in message and "\n" not in message
        assert len(rows(tmp_path / "r")) == 2  # no log is cut because of a damaged file
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
    advice = "has 0 bytes instead of .* delete .*step-3 to continue from step 2"
    with open_run(tmp_path / "r") as run, pytest.raises(UserError, match=advice):
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
    """The system itself refuses to write, because of a limit on file sizes."""
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
    (tmp_path / "r/.lock").write_text("9" * 18)  # a longer pid, of a process that is gone

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


def test_a_drive_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.EINVAL, "Invalid argument")  # as some network drives say it

    monkeypatch.setattr(run_folder, "lock_now", no_locks)
    open_run(tmp_path / "r").close()
    assert "cannot be locked: do not start a second run in it" in capsys.readouterr().out


def test_a_finished_run_that_does_not_say_its_epochs_is_refused_in_words(tmp_path):
    open_run(tmp_path / "r").close()
    (tmp_path / "r/summary.json").write_text("{}")
    with pytest.raises(UserError, match="other arguments .epochs was absent, now 3"):
        open_run(tmp_path / "r", {"epochs": 3})


def test_refused_run_leaves_the_folder_unlocked(tmp_path):
    open_run(tmp_path / "r").close()
    with pytest.raises(UserError):
        open_run(tmp_path / "r", {"lr": 2})
    open_run(tmp_path / "r").close()


@pytest.mark.parametrize("name", ["checkpoint", "metrics.jsonl"])
def test_a_file_in_a_folders_place_is_one_line_and_the_other_way_round(tmp_path, name):
    open_run(tmp_path / "r").close()
    odd = tmp_path / "r" / name
    if name == "checkpoint":
        odd.write_text("")
    else:
        odd.unlink()
        odd.mkdir()
    with pytest.raises(UserError, match=f"{name} (is not a folder|cannot be written)"):
        open_run(tmp_path / "r")


def test_a_record_of_another_type_is_one_line(tmp_path):
    open_run(tmp_path / "r").close()
    file = tmp_path / "r/run_args.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"continued": {"a": 1}}))
    with pytest.raises(UserError, match="does not belong to a run"):
        open_run(tmp_path / "r")


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
    others = {f"f{i}": i for i in range(1, 10)}  # as of another script
    with pytest.raises(UserError, match=r"f6 was absent, now 6; and 3 more\)"):
        open_run(tmp_path / "r", ARGS | others | {"save_every": 5})
    newer = {"flag": False, "other": None}  # that did not exist when the run began, and are not set
    open_run(tmp_path / "r", ARGS | newer | {"save_every": 5}).close()


def test_true_one_and_one_point_zero_are_different_arguments(tmp_path):
    open_run(tmp_path / "r", {"a": 1}).close()
    for value in (True, 1.0, "1"):
        with pytest.raises(UserError, match="a was 1, now"):
            open_run(tmp_path / "r", {"a": value})


def test_continuing_elsewhere_is_recorded(tmp_path):
    for torch_version in ("1", "1", "2", "2"):
        RunFolder(tmp_path / "r", ARGS, {"torch": torch_version}).close()
    record = json.loads((tmp_path / "r/run_args.json").read_text())
    assert record == {
        "args": ARGS,
        "info": {"torch": "1"},
        "format": 2,
        "continued": [{"torch": "2"}],
    }


def test_finished_run_is_said_to_be_finished_and_left_alone(tmp_path):
    train(tmp_path / "r", 2, then_finish=True)
    assert not (tmp_path / "r/checkpoint").exists()
    before = contents(tmp_path / "r")
    with RunFolder(tmp_path / "r", ARGS, {"torch": "newer"}) as run:
        assert run.finished and run.summary == {"steps": 2} and run.load_checkpoint() is None
        assert run.already_finished().startswith(f"{tmp_path / 'r'} is already finished")
    assert contents(tmp_path / "r") == before
    with pytest.raises(UserError, match="lr was"):
        open_run(tmp_path / "r", ARGS | {"lr": 1.0})


def test_overwrite_starts_over_and_deletes_only_a_runs_own_files(tmp_path):
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
        with pytest.raises(ValueError), RunFolder(folder, {}, {}):
            raise ValueError("damaged weights")
        assert folder.exists() == there and (not there or not list(folder.iterdir()))
    with pytest.raises(ValueError), RunFolder(tmp_path / "begun", {}, {}) as run:
        run.log({"step": 1})
        raise ValueError("not finite")
    with pytest.raises(ValueError), RunFolder(tmp_path / "begun", {}, {}):  # it was there before
        raise ValueError("damaged weights")
    assert (tmp_path / "begun/run_args.json").exists()
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / "saved", {}, {}) as run:
        run.save_checkpoint(0, {}, {})  # stopped at the first step, and again while that was saved
        raise KeyboardInterrupt
    assert RunFolder(tmp_path / "saved", {}, {}).load_checkpoint()[0] == 0
    with RunFolder(tmp_path / "notes", {}, {}) as run:
        run.log({"step": 1})
    (tmp_path / "notes/notes.txt").write_text("mine")
    with pytest.raises(ValueError), RunFolder(tmp_path / "notes", {}, {}, overwrite=True):
        raise ValueError("damaged weights")
    RunFolder(tmp_path / "notes", {}, {}).close()  # still known as a run folder


def older_run(folder: Path) -> Path:
    """A folder as the version before "format" left it after two of PPO's steps."""
    checkpoint = folder / "checkpoint/step-2"
    checkpoint.mkdir(parents=True)
    args = {"lr": 1e-5, "steps": 8, "save_every": 1, "recipe": "report", "answers_an_update": 16}
    files.write_json(folder / "run_args.json", {"args": args, "info": {"torch": "x"}})
    metrics = [json.dumps({"step": step, "reward": 0.5}) + "\n" for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(metrics))
    (folder / "samples.jsonl").write_text("")
    lengths = {name: (folder / name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")}
    state = {"validated": {}, "figures": {"step": 2, "reward": 0.5}}
    text = json.dumps({"step": 2, "logs": lengths, "state": state}).encode()
    tensors = {"policy/weight.w": torch.zeros(3), "policy/step_count": torch.tensor(2)}
    sums = {
        "tensors.safetensors": files.write_tensors(checkpoint / "tensors.safetensors", tensors),
        "state.json": files.write(checkpoint / "state.json", [text]),
    }
    files.write_json(checkpoint / "checksums.json", sums)
    (folder / ".lock").write_text("123")
    return folder


@pytest.mark.parametrize("args", [ARGS, {"lr": 2.0}])
def test_an_unfinished_run_of_an_earlier_version_is_refused_in_one_line(tmp_path, args):
    folder = older_run(tmp_path / "r")
    before = contents(folder)
    with pytest.raises(UserError, match="r was started by an earlier version of nanogsm") as caught:
        open_run(folder, args)
    assert "--overwrite" in str(caught.value) and "\n" not in str(caught.value)
    assert contents(folder) == before
    with open_run(folder, args, overwrite=True) as run:  # what the message advises
        assert run.load_checkpoint() is None
    assert json.loads((folder / "run_args.json").read_text())["format"] == 2


def test_a_finished_run_of_an_earlier_version_is_said_to_be_finished(tmp_path):
    folder = older_run(tmp_path / "r")
    shutil.rmtree(folder / "checkpoint")
    files.write_json(folder / "summary.json", {"steps": 2, "reward": 0.5})
    (folder / "model").mkdir()
    (folder / "model/model.safetensors").write_bytes(b"weights")
    before = contents(folder)
    with open_run(folder) as run:
        assert run.finished and run.load_checkpoint() is None
        assert run.already_finished().startswith(f"{folder} is already finished (reward 0.5)")
    assert contents(folder) == before


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


# ---- stopping, and the logs


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


def test_nan_in_metrics_is_null(tmp_path):
    with open_run(tmp_path / "r") as run:
        run.log({"step": 1, "loss": float("nan")})
        assert rows(tmp_path / "r") == [{"step": 1, "loss": None}]  # there before close


def test_metrics_go_to_wandb_too_and_a_continued_run_goes_on_there(tmp_path, monkeypatch):
    said = []
    logger = SimpleNamespace(
        log=lambda row, step: said.append((step, row)),
        finish=lambda exit_code: said.append(exit_code),
        id="x7",
    )
    fake = SimpleNamespace(init=lambda **given: said.append(given) or logger)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with RunFolder(tmp_path / "run", {"a": 1}, {}) as run:
        run.log({"step": 1, "loss": 3.0})
        run.start_wandb("mine", {"lr": 1.0})
        run.log({"step": 2, "loss": 2.0})
    where = {"project": "mine", "name": "run", "dir": str(tmp_path / "run"), "config": {"lr": 1.0}}
    first = where | {"id": None, "resume": None}
    assert said == [first, (2, {"step": 2, "loss": 2.0}), 1]  # stopped before its end
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    with RunFolder(tmp_path / "run", {"a": 1}, {}) as run:
        run.start_wandb("mine", {"lr": 1.0})
        run.finish({})
    assert said[-2:] == [where | {"id": "x7", "resume": "allow"}, 0]
    with RunFolder(tmp_path / "run", {"a": 1}, {}, overwrite=True) as run:
        run.start_wandb("mine", {"lr": 1.0})
        assert said[-1]["id"] is None  # another run


def test_why_wandb_cannot_be_used_is_said(tmp_path, monkeypatch):
    def refuse(**given):
        raise RuntimeError("not logged in\nrun wandb login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with RunFolder(tmp_path / "other", {"a": 1}, {}) as run:
        with pytest.raises(UserError, match="--wandb: not logged"):
            run.start_wandb("mine", {})
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(UserError, match="pip install wandb"):
            run.start_wandb("mine", {})


def test_the_real_wandb_writes_into_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (requirements-optional.txt)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for step in (1, 2):
        with RunFolder(tmp_path / "run", {"a": 1}, {}) as run:
            run.start_wandb("mine", {"lr": 1.0})
            run.log({"step": step, "loss": 2.0})
            ids.append(run.wandb.id)
    assert ids[0] == ids[1] and len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 2
    assert not (tmp_path / "wandb").exists()
    with pytest.raises(UserError), RunFolder(tmp_path / "failed", {"a": 1}, {}) as run:
        run.start_wandb("mine", {})
        raise UserError("the weights are damaged")
    assert not (tmp_path / "failed").exists()  # it left no trace, as without wandb
