"""A search as Optuna knows it: its journal, and which trial is next.

Several processes may work on one search. Locks of files keep them apart. The system drops a lock
with the process that holds it, however it ends, so a killed search leaves nothing to clean up.
"""

import contextlib
import json
import os
import time
from pathlib import Path

from nanogsm import UserError
from nanogsm.run.folder import hold

try:
    import optuna
except ImportError:
    optuna = None


def lock_file(args, name: str | int) -> Path:
    return args.out / ".locks" / str(name)


@contextlib.contextmanager
def alone(args, name: str = "search"):
    """One process at a time chooses a trial, ends one, or writes to the journal."""
    while (lock := hold(lock_file(args, name))) is None:
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(lock)


class JournalLock:
    """Optuna's lock on its journal. Its own would be left behind by a process that is killed."""

    def __init__(self, args):
        self.args = args

    def acquire(self) -> bool:
        self.inside, journal = contextlib.ExitStack(), self.args.out / "journal.log"
        self.inside.enter_context(alone(self.args, "journal"))
        written = journal.read_bytes()
        if not written.endswith(b"\n"):  # a process was killed in the middle of a line
            os.truncate(journal, written.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.inside.close()


def open_study(args):
    """The search in args.out, new or continued. UserError if it is a search for something else."""
    journal = args.out / "journal.log"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in args.out.iterdir()}  # one look: others may start, too
        if journal.name not in names and names - {".locks"}:
            raise UserError(f"{args.out} is not empty and not a search: choose another --out")
    except OSError as error:
        raise UserError(f"{args.out} cannot be a search's folder: {error.strerror}") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # JSON has no tuples: a range of two numbers must not pass for a choice of them.
    space = {n: {"from_to": v} if isinstance(v, tuple) else v for n, v in args.space.items()}
    asked = json.loads(json.dumps([args.method, args.flags, space]))
    with alone(args):
        backend = optuna.storages.journal.JournalFileBackend(str(journal), JournalLock(args))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend), study_name="tune", load_if_exists=True,
            direction="minimize" if args.metric == "val_loss" else "maximize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        )  # fmt: skip
        if study.user_attrs.get("search", asked) != asked:
            raise UserError(f"{args.out} is a search with other flags or another space: give those "
                            "to continue it, or choose another --out")  # fmt: skip
        study.set_user_attr("search", asked)
    return study


def take(study, args):
    """(trial, its lock): a trial whose process is gone, or a new one. None if all trials are taken
    or done."""
    with alone(args):
        known = study.trials
        for old in known:
            if old.state.name == "RUNNING" and (lock := hold(lock_file(args, old.number))):
                trial = optuna.trial.Trial(study, old._trial_id)
                break
        else:
            if len(known) >= args.trials:
                return None
            # Trap: two samplers with one seed propose the same trial.
            seed = (args.run.seed * 1_000_003 + len(known)) % 2**31
            study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            trial = study.ask()
            lock = hold(lock_file(args, trial.number))
        for name, values in args.space.items():  # what a trial has already is not drawn again
            if isinstance(values, list):
                trial.suggest_categorical(name, values)
            elif isinstance(values[0], int):
                trial.suggest_int(name, *values)
            else:
                trial.suggest_float(name, *values, log=True)
    return trial, lock
