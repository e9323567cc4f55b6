"""The run folder: arguments, metrics, samples, checkpoints, and continuing after a stop.

    runs/<name>/
        run_args.json     "args", compared when a run continues; "info": versions, digests,
                          hardware; "continued": the info of each continuation that differed
        metrics.jsonl     one row per step, and one per validation
        samples.jsonl     questions with answers; PPO's with their rewards
        checkpoint/step-N/{tensors.safetensors, state.json, checksums.json}   until the run ends;
                          PPO keeps the last one, so that --steps can grow
        summary.json      written last: a run that has it is finished
        model/ adapter/   the result; the script writes it before `finish`
        value_head.safetensors  the head of a critic (PPO) or of a reward model
        wandb/ wandb-id   with --wandb: its files, and the id by which it continues
        .lock             held by the running process; the file stays, the lock does not

The same command again continues the run. On a CPU the result equals that of an uninterrupted run,
bit for bit. For this a checkpoint also records how long the logs were, and loading cuts them back
to that. A file is written under another name, forced to disk and renamed, so a kill leaves the old
file or the new one and never half of one. There is no pickle, so a checkpoint cannot run code.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
from torch import Tensor

from nanogsm import UserError, distributed
from nanogsm.run.console import disk_full, listed
from nanogsm.store import files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

FORMAT = 2  # of run_args.json and checkpoints; folders without a format are older
# Flags that decide which problems are used.
SELECTS = ("max_examples ", "val_examples ", "val_use ", "tiny ")
LOGS = ("metrics.jsonl", "samples.jsonl")
CHECKPOINT_FILES = ("tensors.safetensors", "state.json")
# What --overwrite deletes, in this order. After a kill half-way the folder must neither look
# finished nor continue with deleted logs, and run_args.json must still show that it is a run
# folder.
OWNED = ("summary.json", "checkpoint", "model", "adapter", "value_head.safetensors",
         "eval-*.json", "eval-*.jsonl", "step-*-eval-*.json", "step-*-eval-*.jsonl", "wandb",
         "wandb-id", "report.html", *LOGS, "run_args.json")  # fmt: skip


class RunFolder:
    """One run folder, locked for this process until `close`.

    args: JSON values that must be equal for a run to continue, except the names in `may_differ`.
    grows: the one number among them that may become larger, also in a finished run, which then
    goes on from its last checkpoint. None: a finished run keeps no checkpoint.
    info: versions, digests, hardware; recorded, never compared. Raises UserError if the folder is
    in use, holds something else, or has a run with other arguments. Then, in this order: look at
    `finished`; `load_checkpoint` before the first `log`; `log`, `sample`, `save_checkpoint`; write
    the result; `finish`. Trap: `overwrite` left in a repeated command starts over each time.
    """

    def __init__(
        self,
        path: Path | str,
        args: dict,
        info: dict,
        overwrite: bool = False,
        may_differ: tuple[str, ...] = (),
        grows: str | None = None,
    ):
        self.path, self.grows = Path(path), grows
        self._made_folder, self._new = not os.path.exists(self.path), False
        self._logs: dict[str, BinaryIO] = {}
        self.wandb = None
        self._lock = _claim(self.path)
        try:
            for pattern in OWNED if overwrite else ():  # files that somebody else put there stay
                for ending in ("", ".tmp", ".new", ".old"):
                    for path in self.path.glob(pattern + ending):
                        files.remove(path)
            summary = self.path / "summary.json"
            self.summary = _read_json(summary) if summary.exists() else None
            self.finished = self.summary is not None
            self._adopt(files.strict(args), files.strict(info), may_differ)
            checkpoint = self.path / "checkpoint"
            if checkpoint.exists() and not checkpoint.is_dir():
                raise UserError(f"{checkpoint} is not a folder: move it away")
            half_made = [self.path / "checkpoint.tmp", self.path / "summary.json.tmp"]
            for stale in [*half_made, *checkpoint.glob("step-*.tmp")]:
                files.remove(stale)
            if self.finished and not grows:
                files.remove(checkpoint)
            if not self.finished:
                # Without a checkpoint the run starts over, so its earlier rows are dropped. The
                # files are unbuffered: a row is with the operating system as soon as it is written.
                mode = "ab" if self._steps() else "wb"
                self._logs = {name: _open_log(self.path / name, mode) for name in LOGS}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, *_) -> None:
        begun = any(os.fstat(file.fileno()).st_size for file in self._logs.values())
        if kind and self._new and not begun:
            self._withdraw()
        self.close()

    def _withdraw(self) -> None:
        """Leave no trace of a run that failed before its first step, for example on damaged
        weights. Otherwise the same command with repaired weights would be refused, because their
        digest has changed. A folder that holds anything else, such as a checkpoint or notes,
        remains a run folder."""
        begin = {"run_args.json", *LOGS, "wandb", "wandb-id", ".lock"}
        if {path.name for path in self.path.iterdir()} - begin:
            return
        for file in self._logs.values():
            file.close()
        self._logs = {}
        self._end_wandb()
        with contextlib.suppress(OSError):  # Windows deletes no locked file
            for name in ("run_args.json", *LOGS, "wandb", "wandb-id", ".lock"):
                files.remove(self.path / name)
            if self._made_folder:
                self.path.rmdir()

    def close(self) -> None:
        """Close the logs and release the lock. The end of the process does the same."""
        for file in self._logs.values():
            file.close()
        self._end_wandb()
        if self._lock is not None:
            os.close(self._lock)
        self._logs, self._lock = {}, None

    def _end_wandb(self) -> None:
        if self.wandb:
            self.wandb.finish(exit_code=0 if self.finished else 1)
        self.wandb = None

    # ---- logs

    def log(self, row: dict) -> None:
        """Append one row to metrics.jsonl. NaN becomes null, as in files.write_json."""
        _append(self._logs["metrics.jsonl"], row)
        if self.wandb:
            self.wandb.log(row, step=row["step"])

    def sample(self, row: dict) -> None:
        """Append one row to samples.jsonl."""
        _append(self._logs["samples.jsonl"], row)

    def write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write tensors to a safetensors file of the folder."""
        files.replace_file(self.path / name, files.safetensors_bytes(tensors, None, metadata))

    def start_wandb(self, project: str, config: dict) -> None:
        """Also send everything logged from now on to Weights & Biases. Its files go to wandb/ in
        the run folder. A continued run goes on there too, by the id in wandb-id."""
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs a package: pip install wandb") from error
        known = self.path / "wandb-id"
        try:
            same = known.read_text("utf-8").strip() if known.exists() else None
            self.wandb = wandb.init(
                project=project, name=self.path.name, dir=str(self.path), config=config,
                id=same, resume="allow" if same else None,
            )  # fmt: skip
            files.replace_file(known, self.wandb.id.encode())
        except Exception as error:  # wandb's own kinds: not logged in, not reached, no such project
            raise UserError(f"--wandb: {files.one_line(error)}") from error

    # ---- arguments

    def _adopt(self, args: dict, info: dict, may_differ: tuple[str, ...]) -> None:
        """Record a new run's arguments, or refuse to continue a run that had others."""
        path = self.path / "run_args.json"
        self._new = not path.exists()
        if self._new:
            files.write_json(path, {"args": args, "info": info, "format": FORMAT})
            return
        record = _read_json(path)
        if record.get("format") != FORMAT:
            if self.finished:
                return  # there is nothing to continue; what it trained can be used
            raise UserError(
                f"{self.path} was started by an earlier version of nanogsm, which alone can "
                "continue it: choose another run folder, or give --overwrite to start over"
            )
        old = record["args"]
        changed, grown = [], False
        names = (old.keys() | args.keys()) - set(may_differ)
        for name in sorted(
            names, key=lambda name: (name.endswith("_sha256"), name)
        ):  # causes first
            # Compared as text, because in Python 1 == 1.0 == True.
            was, now = (
                json.dumps(a[name], sort_keys=True) if name in a else "absent" for a in (old, args)
            )
            selects = name == "data_sha256" and any(x.startswith(SELECTS) for x in changed)
            if selects or was == now:  # other data, as these flags ask for
                continue
            if name not in old and not args[name]:  # an unset flag that did not exist then
                continue
            if name == self.grows and isinstance(old.get(name), int) and old[name] < args[name]:
                grown = True
            elif name.endswith("_sha256"):
                what = "is missing now" if name not in args else "is new"
                flag = f"--{name.removesuffix('_sha256')}"
                both = name in old and name in args
                changed.append(f"the content of {flag} changed" if both else f"{flag} {what}")
            else:
                changed.append(f"{name} was {was}, now {now}".replace("null", "unset"))
        epochs = old.get("epochs"), args.get("epochs")
        longer = all(isinstance(n, int) for n in epochs) and epochs[0] < epochs[1]
        longer = longer and [text.split()[0] for text in changed] == ["epochs"]
        # A reward model is no start for another run.
        if self.finished and not self.grows and longer and "outcome" not in args:
            raise UserError(
                f"{self.path} is finished, and {changed[0]}: more epochs would have needed another "
                "learning rate from the first step on, so they cannot be added; to train its "
                f"result further, give --model {self.path} and another --out"
            )
        if changed:
            more = (
                f"; and {len(changed) - 6} more" if len(changed) > 6 else ""
            )  # another script's run
            raise UserError(
                f"{self.path} was started with other arguments ({'; '.join(changed[:6])}{more}): "
                "give the old ones to continue, or give another --out, or --overwrite to start over"
            )
        if grown and self.finished:
            self._reopen()
        seen = record.get("continued") or [record["info"]]
        if info != seen[-1]:  # another machine, for example: equal bits are no longer promised
            record.setdefault("continued", []).append(info)
        if not self.finished:  # a finished run is only looked at
            files.write_json(path, {**record, "args": args})

    def _reopen(self) -> None:
        """Make a finished run one that has been stopped at its last step."""
        steps = self._steps()
        if not steps:
            raise UserError(
                f"{self.path} is finished, and its checkpoint was deleted: to train further, give "
                f"--init {self.path} and another --out"
            )
        self._checked(steps)
        # These are results of the weights so far. A kill in between leaves the run finished.
        for file in self.path.glob("eval-*.json*"):
            file.rename(self.path / f"step-{steps[-1]}-{file.name}")
        files.remove(self.path / "summary.json")
        self.summary, self.finished = None, False

    # ---- checkpoints

    def _steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        names = [path.name for path in (self.path / "checkpoint").glob("step-*")]
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name))

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], state: dict) -> None:
        """Write checkpoint/step-<step>, then delete older ones, so a kill leaves one that loads.

        tensors: weights and optimizer moments, on any device. There is no random state to save:
        every draw is made from the seed and the step. state: JSON values; NaN and infinity survive,
        tuples return as lists and keys as strings. Needs disk space for two checkpoints and memory
        for one more tensor; SHA-256 takes about a second per GB. Raises UserError if the disk is
        full (the older checkpoint stays). Trap: a step that is already saved is not written again,
        so save only at step boundaries.
        """
        parent = self.path / "checkpoint"
        final, beside = parent / f"step-{step}", parent / f"step-{step}.tmp"
        if distributed.on_rank_0(final.exists):  # Ctrl-C right after a regular save
            return
        try:
            beside.mkdir(parents=True)
            self._write_checkpoint(beside, step, tensors, state)
            beside.rename(final)
            files.sync_folder(parent)
            files.sync_folder(self.path)  # the first time, checkpoint/ itself is new
        except BaseException as error:
            shutil.rmtree(beside, ignore_errors=True)
            if isinstance(error, OSError) and disk_full(error):
                raise UserError(
                    f"disk full while writing the checkpoint of step {step} in {parent} "
                    f"({error.strerror}): free some space, then run the same command again"
                ) from error
            raise
        self._drop_older(step)

    def _drop_older(self, step: int) -> None:
        for older in self._steps():
            if older != step:
                files.remove(self.path / "checkpoint" / f"step-{older}")

    def _write_checkpoint(self, folder: Path, step: int, tensors: dict, state: dict) -> None:
        lengths = {}
        for name, file in self._logs.items():
            os.fsync(file.fileno())  # after a power cut the logs must be at least this long
            lengths[name] = os.fstat(file.fileno()).st_size
        # Not files.strict: `best = inf` must come back as it was. Only Python reads this file.
        text = json.dumps({"step": step, "logs": lengths, "state": state}).encode()
        sums = {
            "tensors.safetensors": files.write_tensors(folder / "tensors.safetensors", tensors),
            "state.json": files.write(folder / "state.json", [text]),
        }
        files.write_json(folder / "checksums.json", sums)

    def load_checkpoint(self) -> tuple[int, dict[str, Tensor], dict] | None:
        """(step, tensors, state) of the newest checkpoint, or None if the run is to start.

        Cuts metrics.jsonl and samples.jsonl back to that step, so that no row is there twice. The
        tensors are on the CPU. Raises UserError with the file's name if one byte has changed. Trap:
        the tensors are mapped from the file; copy them, as load_state_dict does.
        """
        found = distributed.on_rank_0(self._find_checkpoint)
        if found is None:
            return None
        step, folder, state = found
        return step, safetensors.torch.load_file(Path(folder) / "tensors.safetensors"), state

    def _find_checkpoint(self) -> tuple[int, str, dict] | None:
        """(step, folder, state) of the newest checkpoint, with the logs cut back to it."""
        steps = self._steps()
        if self.finished or not steps:
            if not (self._new or self.finished):
                print(f"{self.path} has no checkpoint yet: starting from the beginning")
            return None
        folder, saved = self._checked(steps)
        self._drop_older(steps[-1])  # a kill may have left some
        for name, length in saved["logs"].items():
            self._logs[name].truncate(length)
        return saved["step"], str(folder), saved["state"]

    def _checked(self, steps: list[int]) -> tuple[Path, dict]:
        """(folder, state.json) of the newest checkpoint. UserError if it is damaged, or if a log is
        shorter than it was then."""
        folder = self.path / "checkpoint" / f"step-{steps[-1]}"
        older = f"delete {folder} to continue from step {steps[-2]}, or " if steps[1:] else ""
        advice = f"; {older}use --overwrite to start over"
        if self.finished:  # it is to grow, and its result is still whole
            advice = f": to train further, give --init {self.path} and another --out"
        _verify(folder, advice)
        saved = json.loads((folder / "state.json").read_bytes())
        for name, length in saved["logs"].items():  # all are checked before one is changed
            log = self.path / name
            size = log.stat().st_size if log.exists() else 0
            if size < length:
                raise UserError(
                    f"{log} is shorter than at step {saved['step']} ({size} of {length} bytes)"
                    f"{advice}"
                )
        return folder, saved

    # ---- the end

    def already_finished(self) -> str:
        """What to print instead of training again."""
        shown = listed({k: v for k, v in self.summary.items() if isinstance(v, float)})
        advice = "to train again give --overwrite or another --out"
        return f"{self.path} is already finished ({shown}); {advice}"

    def finish(self, summary: dict) -> None:
        """Mark the run as finished, then drop the checkpoint if the run cannot grow. Call it when
        the result is saved."""
        for file in self._logs.values():
            os.fsync(file.fileno())
        files.write_json(self.path / "summary.json", summary)
        self.summary, self.finished = files.strict(summary), True
        if not self.grows:
            files.remove(self.path / "checkpoint")


class Elsewhere(RunFolder):
    """The run folder as other ranks than 0 have it: they read checkpoints and write nothing."""

    def __init__(self, path: Path | str, summary: dict | None):
        self.path, self.summary, self.finished = Path(path), summary, summary is not None
        self._logs, self._lock, self.wandb, self._new = {}, None, None, False

    def log(self, row: dict) -> None:
        pass

    sample = log

    def start_wandb(self, project: str, config: dict) -> None:
        pass

    def save_checkpoint(self, step: int, tensors: dict, state: dict) -> None:
        if distributed.on_rank_0(None):  # rank 0 has this step already
            return
        files.give_parts(tensors)

    def finish(self, summary: dict) -> None:
        pass


def open_run_folder(path: str, *arguments) -> RunFolder:
    """RunFolder(path, *arguments), which on many devices only rank 0 opens."""
    opened = []

    def open_it() -> dict | None:
        opened.append(RunFolder(path, *arguments))
        return opened[0].summary

    summary = distributed.on_rank_0(open_it)
    return opened[0] if opened else Elsewhere(path, summary)


def _append(file: BinaryIO, row: dict) -> None:
    line = files.to_json(row)
    while line:  # a nearly full disk may write only a part; the next write then raises
        line = line[file.write(line) :]


def _read_json(path: Path) -> dict:
    try:
        obj = files.read_json(path)
    except UserError as error:
        raise UserError(f"{error}; use --overwrite to start over") from error
    is_run = all(isinstance(obj.get(key), dict) for key in ("args", "info"))
    is_run = is_run and isinstance(obj.get("continued", []), list)
    if path.name == "run_args.json" and not is_run:
        raise UserError(
            f"{path} does not belong to a run; use another folder or --overwrite to start over"
        )
    return obj


def _open_log(path: Path, mode: str) -> BinaryIO:
    try:
        return open(path, mode, buffering=0)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


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


def hold(path: Path) -> int | None:
    """Lock a file, which is made if needed. Returns its descriptor, whose end is the lock's end, or
    None if another process has the lock. UserError where files cannot be locked."""
    path.parent.mkdir(exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock_now(lock)
    except OSError as error:
        os.close(lock)
        if isinstance(error, (BlockingIOError, PermissionError)):
            return None
        raise UserError(f"{path} cannot be locked ({error.strerror}): choose another --out, on a "
                        "file system with locks") from error  # fmt: skip
    return lock


def lock_now(descriptor: int) -> None:
    """Lock an open file, or raise OSError if another process has locked it."""
    if fcntl:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:  # Windows forbids others to read locked bytes: lock one far beyond the process id
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


def _claim(folder: Path) -> int | None:
    """Make the folder if needed and lock it. Returns the descriptor that holds the lock, or None
    where there is no locking. The system drops the lock with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        # Checked before the lock file is made, so that a user's own folder stays untouched.
        if "run_args.json" not in names and names - {".lock", "run_args.json.tmp"}:
            raise UserError(f"{folder} is not empty and not a run folder: choose another")
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder} cannot be a run folder: {error.strerror}") from error
    try:
        lock_now(lock)
    except OSError as error:
        if not isinstance(error, (BlockingIOError, PermissionError)):
            os.close(lock)  # some network drives have no locks, and must stay usable
            print(f"warning: {folder} cannot be locked: do not start a second run in it")
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
