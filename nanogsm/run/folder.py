"""The run folder: arguments, metrics, samples, atomic checkpoint and resume.

    runs/<name>/
        run_args.json     {"args": compared on continuation, "info": versions, digests, hardware,
                           "continued": the info of each continuation that differed}
        metrics.jsonl     a row a step
        samples.jsonl     questions with answers, of PPO with rewards
        checkpoint/step-N/{tensors.safetensors, state.json, checksums.json}   until the run ends
        summary.json      written last: its presence is what "finished" means
        model/ adapter/   the result; the scripts write it before `finish`
        value_head.safetensors  of PPO: the critic's own weights, for whoever wants to go on from them
        .lock             held by the running process; the file stays, the lock does not

The promise: the same command again continues, and on the CPU the result equals an uninterrupted
run's bit for bit. So a checkpoint also records how long the logs were, and loading cuts them back to that;
a file is written beside its place, forced to disk and renamed, so a kill at any instant leaves
the older or the newer one, never half of one. No pickle: a checkpoint cannot run code.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
from torch import Tensor

from nanogsm import UserError, data
from nanogsm.run.console import disk_full
from nanogsm.store import files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOGS = ("metrics.jsonl", "samples.jsonl")
CHECKPOINT_FILES = ("tensors.safetensors", "state.json")
# What --overwrite may delete, in this order: killed half-way, the folder must neither look
# finished nor resume onto deleted logs, and must still be known as a run folder by run_args.json.
OWNED = ("summary.json", "checkpoint", "model", "adapter", "value_head.safetensors",
         "eval-*.json", "eval-*.jsonl", *LOGS, "run_args.json")  # fmt: skip


def run_of(model: str) -> tuple[Path, dict] | None:
    """(folder, run_args.json) of the run that `model` names, itself or its model/ or adapter/; None
    if it names none."""
    path = Path(os.path.abspath(os.path.expanduser(model)))
    for folder in (path, *[path.parent] * (path.name in ("model", "adapter"))):
        try:
            record = json.loads((folder / "run_args.json").read_text(encoding="utf-8"))
            data.Prompt(**record["info"]["prompt"]), record["args"]["val_examples"]
            return folder, record
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def is_tiny(model: str) -> bool:
    """Whether `model` is the embedded one or a run that began with --tiny."""
    run = run_of(model)
    return model == "tiny" or bool(run and run[1]["args"].get("tiny"))


def answer_limit_of(model: str, of_data: str) -> int:
    """How many tokens an answer to these data may take by default. The length that the run `model`
    validated with, if that is more: a socratic run answers at length whatever it is asked."""
    run = run_of(model)
    return max(data.answer_limit(of_data), run[1]["args"].get("max_new_tokens", 0) if run else 0)


def what_next(out: str, of_data: str, held_out: int) -> str:
    """What to say when the run in `out` is done. Who trains on a file of their own asks what was held out."""
    own = f" --split validation --data {of_data}" if of_data not in data.NAMED and held_out else ""
    return f"the result is in {out}; next: python evaluate.py --model {out}{own}"


def held_out_by(model: str, of_data: str) -> int | None:
    """How many of these problems the run `model` held out; None if it is no run, or of other problems.
    (main and socratic have the same questions in the same places.)"""
    run = run_of(model)
    theirs = str(run[1]["args"].get("data")) if run else ""
    named = {theirs, of_data} <= set(data.NAMED)
    alike = named and (theirs in data.GENERATED) == (of_data in data.GENERATED)
    return run[1]["args"]["val_examples"] if alike or files.same_place(theirs, of_data) else None


def _append(file: BinaryIO, row: dict) -> None:
    line = files.to_json(row)
    while line:  # a nearly full disk takes a part; the next write then says why
        line = line[file.write(line) :]


class Run:
    """One run folder, locked for this process until `close`.

    args: JSON values that must be equal to continue, except the names in `may_differ`; info:
    versions, digests, hardware: recorded, never compared. Raises UserError if the folder is in
    use, holds something else, or was started with other arguments. Then, in this order: look at
    `finished`; `load_checkpoint` before the first `log`; `log`, `sample` and `save_checkpoint`;
    write the result; `finish`. Trap: `overwrite` left in a repeated command starts anew each time.
    """

    def __init__(self, folder: Path | str, args: dict, info: dict, overwrite: bool = False,
                 may_differ: tuple[str, ...] = ()):  # fmt: skip
        self.folder = Path(folder)
        self._made_folder, self._new = not os.path.exists(self.folder), False
        self._logs: dict[str, BinaryIO] = {}
        self.wandb = None
        self._lock = _claim(self.folder)
        try:
            for pattern in OWNED if overwrite else ():  # whatever else somebody put there stays
                for ending in ("", ".tmp", ".new", ".old"):
                    for path in self.folder.glob(pattern + ending):
                        files.remove(path)
            path = self.folder / "summary.json"
            self.summary = _read_json(path) if path.exists() else None
            self.finished = self.summary is not None
            self._adopt(files.strict(args), files.strict(info), may_differ)
            checkpoint = self.folder / "checkpoint"
            half_made = [self.folder / "checkpoint.tmp", self.folder / "summary.json.tmp"]
            for stale in [*half_made, *checkpoint.glob("step-*.tmp")]:
                files.remove(stale)
            if self.finished:
                files.remove(checkpoint)
            else:
                # Without a checkpoint the run starts over, so whatever it logged before goes.
                # Unbuffered: a row is with the system as soon as it is written.
                mode = "ab" if self._steps() else "wb"
                self._logs = {name: open(self.folder / name, mode, buffering=0) for name in LOGS}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, *_) -> None:
        begun = any(os.fstat(file.fileno()).st_size for file in self._logs.values())
        if kind and self._new and not begun:
            self._withdraw()
        self.close()

    def _withdraw(self) -> None:
        """Leave no trace of a run that failed before its first step, on damaged weights, say: the
        same command with better ones must not be refused for having other arguments. A folder that
        holds anything else, a checkpoint or somebody's notes, remains a run folder."""
        begin = {"run_args.json", *LOGS, ".lock"}
        if {path.name for path in self.folder.iterdir()} - begin:
            return
        for file in self._logs.values():
            file.close()
        self._logs = {}
        with contextlib.suppress(OSError):  # Windows deletes no locked file
            for name in ("run_args.json", *LOGS, ".lock"):
                files.remove(self.folder / name)
            if self._made_folder:
                self.folder.rmdir()

    def close(self) -> None:
        """Close the logs and release the lock; the end of the process does the same."""
        for file in self._logs.values():
            file.close()
        if self.wandb:
            self.wandb.finish(exit_code=0 if self.finished else 1)
        if self._lock is not None:
            os.close(self._lock)
        self._logs, self._lock, self.wandb = {}, None, None

    def log(self, row: dict) -> None:
        """Append one row to metrics.jsonl. NaN becomes null, as in `write_json`."""
        _append(self._logs["metrics.jsonl"], row)
        if self.wandb:
            self.wandb.log(row, step=row["step"])

    def start_wandb(self, project: str, config: dict) -> None:
        """Send what is logged from now on to Weights & Biases as well (WANDB_MODE=offline: to the
        folder wandb beside the run's). A continued run is a new one there."""
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs the package: pip install wandb, or leave the flag out") from error
        try:
            self.wandb = wandb.init(project=project, name=self.folder.name, dir=str(self.folder.parent),
                                    config=config)  # fmt: skip
        except Exception as error:  # of its own kinds: not logged in, not reached, no such project
            raise UserError(f"--wandb: {files.one_line(error)}") from error

    def sample(self, row: dict) -> None:
        """Append one row to samples.jsonl."""
        _append(self._logs["samples.jsonl"], row)

    def _adopt(self, args: dict, info: dict, may_differ: tuple[str, ...]) -> None:
        """Record a new run's arguments, or refuse to continue one that had others."""
        path = self.folder / "run_args.json"
        self._new = not path.exists()
        if self._new:
            files.write_json(path, {"args": args, "info": info})
            return
        record = _read_json(path)
        old = record["args"]
        changed = []
        names = (old.keys() | args.keys()) - set(may_differ)
        for name in sorted(names, key=lambda name: (name.endswith("_sha256"), name)):  # causes first
            # As text, because in Python 1 == 1.0 == True.
            was, now = (json.dumps(a[name], sort_keys=True) if name in a else "absent"
                        for a in (old, args))  # fmt: skip
            if was != now and name.endswith("_sha256"):
                changed.append(f"what --{name.removesuffix('_sha256')} names changed")
            elif was != now:
                changed.append(f"{name} was {was}, now {now}")
        if changed:
            more = f"; and {len(changed) - 6} more" if len(changed) > 6 else ""  # another script's run
            raise UserError(
                f"{self.folder} was started with other arguments ({'; '.join(changed[:6])}{more}): "
                "give the old ones to continue, another run folder, or --overwrite to start anew"
            )
        seen = record.get("continued") or [record["info"]]
        if info != seen[-1]:  # e.g. another machine: bit-for-bit equality is no longer promised
            record.setdefault("continued", []).append(info)
        if not self.finished:  # a finished run is looked at, not changed
            files.write_json(path, {**record, "args": args})

    def _steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        names = [path.name for path in (self.folder / "checkpoint").glob("step-*")]
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name))

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], state: dict) -> None:
        """Write checkpoint/step-<step>, then delete older ones: a kill leaves one that loads.

        tensors: weights and optimizer moments, on any device (no random state: every draw is made from
        seed and step). state: JSON values; NaN and infinity survive, but tuples return as lists and
        keys as strings. Needs room on disk for two checkpoints and in memory for one more tensor;
        SHA-256 takes about a second per GB.
        Raises UserError if the disk is full (the older checkpoint stays). Trap: a step that is
        already saved is not written again, so save only at step boundaries.
        """
        parent = self.folder / "checkpoint"
        final, beside = parent / f"step-{step}", parent / f"step-{step}.tmp"
        if final.exists():  # Ctrl-C right after a regular save
            return
        try:
            beside.mkdir(parents=True)
            self._write_checkpoint(beside, step, tensors, state)
            beside.rename(final)
            files.sync_folder(parent)
            files.sync_folder(self.folder)  # the first time, checkpoint/ itself is new
        except BaseException as error:
            shutil.rmtree(beside, ignore_errors=True)
            if isinstance(error, OSError) and disk_full(error):
                raise UserError(
                    f"disk full while writing the checkpoint of step {step} in {parent} "
                    f"({error.strerror}): free some space, then run the same command again"
                ) from error
            raise
        for older in self._steps():
            if older != step:
                files.remove(parent / f"step-{older}")

    def _write_checkpoint(self, folder: Path, step: int, tensors: dict, state: dict) -> None:
        lengths = {}
        for name, file in self._logs.items():
            os.fsync(file.fileno())  # the logs must be at least this long after a power cut too
            lengths[name] = os.fstat(file.fileno()).st_size
        # Not files.strict: `best = inf` must come back as it was. Python alone reads this file.
        text = json.dumps({"step": step, "logs": lengths, "state": state}).encode()
        sums = {
            "tensors.safetensors": files.write_tensors(folder / "tensors.safetensors", tensors),
            "state.json": files.write(folder / "state.json", [text]),
        }
        files.write_json(folder / "checksums.json", sums)

    def load_checkpoint(self) -> tuple[int, dict[str, Tensor], dict] | None:
        """(step, tensors, state) of the newest checkpoint, or None if the run is to start.

        Cuts metrics.jsonl and samples.jsonl back to that step, so that no row is there twice. The
        tensors are on the CPU. Raises UserError naming the file if one byte is not as it was
        written. Trap: the tensors are mapped from the file; copy them (load_state_dict does).
        """
        steps = self._steps()
        if self.finished or not steps:
            if not (self._new or self.finished):
                print(f"{self.folder} has no checkpoint yet: from the start once more")
            return None
        folder = self.folder / "checkpoint" / f"step-{steps[-1]}"
        older = f"delete {folder} to continue from step {steps[-2]}, or " if steps[1:] else ""
        advice = f"; {older}use --overwrite to start anew"
        _verify(folder, advice)
        saved = json.loads((folder / "state.json").read_bytes())
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self._logs.items()}
        for name, length in saved["logs"].items():  # all are checked before one is changed
            if sizes[name] < length:
                raise UserError(f"{self.folder / name} is shorter than at step {saved['step']} "
                                f"({sizes[name]} of {length} bytes){advice}")  # fmt: skip
        for name, length in saved["logs"].items():
            self._logs[name].truncate(length)
        tensors = safetensors.torch.load_file(folder / "tensors.safetensors")
        return saved["step"], tensors, saved["state"]

    def already_finished(self) -> str:
        """What to say instead of training once more."""
        figures = ", ".join(f"{k} {v:.4g}" for k, v in self.summary.items() if isinstance(v, float))
        return f"{self.folder} is already finished ({figures}); to train again give --overwrite or --out"

    def finish(self, summary: dict) -> None:
        """Mark the run as finished, then drop the checkpoint. Call it when the result is saved."""
        for file in self._logs.values():
            os.fsync(file.fileno())
        files.write_json(self.folder / "summary.json", summary)
        self.summary, self.finished = files.strict(summary), True
        files.remove(self.folder / "checkpoint")


def _read_json(path: Path) -> dict:
    try:
        obj = files.read_json(path)
    except UserError as error:
        raise UserError(f"{error}; use --overwrite to start anew") from error
    if path.name == "run_args.json" and not all(isinstance(obj.get(k), dict) for k in ("args", "info")):
        raise UserError(f"{path} is not a run's; use another folder or --overwrite to start anew")
    return obj


def _verify(folder: Path, advice: str) -> None:
    """Compare every file of a checkpoint with its recorded size and SHA-256."""
    try:
        sums = json.loads((folder / "checksums.json").read_bytes())
        expected = {name: (sums[name]["size"], sums[name]["sha256"]) for name in CHECKPOINT_FILES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'checksums.json'} is missing or damaged{advice}") from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing{advice}")
        if path.stat().st_size != size:
            raise UserError(f"{path} has {path.stat().st_size} bytes instead of {size}{advice}")
        actual = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                actual.update(block)
        if actual.hexdigest() != digest:
            raise UserError(f"{path} is damaged: its SHA-256 is not the recorded one{advice}")


def _claim(folder: Path) -> int | None:
    """Make the folder if needed and lock it; the descriptor that holds the lock (None: no lock).

    The system drops the lock with the process, however it ends: nothing stale is left to clean.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        # Before the lock file, so that not even that is put into somebody's folder.
        if "run_args.json" not in names and names - {".lock", "run_args.json.tmp"}:
            raise UserError(f"{folder} is not empty and not a run folder: choose another")
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder} cannot be a run folder: {error.strerror}") from error
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:  # Windows forbids others to read locked bytes: lock one far behind the pid
            os.lseek(lock, 1 << 20, os.SEEK_SET)
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
            os.close(lock)  # some network drives: better unlocked than unusable
            print(f"warning: {folder} cannot be locked here: start no second run in it")
            return None
        os.lseek(lock, 0, os.SEEK_SET)
        pid = os.read(lock, 20).decode(errors="replace").strip()
        os.close(lock)
        by = f" by process {pid}" if pid.isdigit() else ""
        raise UserError(f"{folder} is in use{by}: wait for it, or choose another folder") from error
    os.ftruncate(lock, 0)
    os.lseek(lock, 0, os.SEEK_SET)
    os.write(lock, str(os.getpid()).encode())
    return lock
