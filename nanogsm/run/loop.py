"""What surrounds a training loop, so that the loop itself shows only the training.

    with run:                                        # continue from the last checkpoint, if any
        for step in range(run.first, steps):
            if run.validation_due():
                run.record_validation(validate())
            if run.ends_early():                     # --patience is used up
                break
            ...                                      # one step
            run.end_step(metrics)                    # log, show, save when due, stop when asked
        if run.validation_due():
            run.record_validation(validate())
        run.finish({})

Ctrl-C, SIGTERM and a closed terminal raise Stopped at the end of a step, or in `run.watch` during
sampling. The `with` catches it, saves the last whole step, and leaves `run.status` at 130, 143 or
129. So an update must never raise Stopped: half of it would be in the checkpoint. --pause-at raises
it in `run.ends_early` and leaves `run.status` at 0. The status of a run that has come to its end is
None.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable

import torch

from nanogsm import UserError
from nanogsm.optim import AdamW
from nanogsm.run import console
from nanogsm.run.folder import RunFolder
from nanogsm.run.machine import peak_memory

NOW = {"rollout": "sampling", "score": "scoring", "update": "updating"}  # as the console says it
WORTH_SAYING = 2.0  # seconds; five steps that take less are not worth a remark about their speed


class Run:
    """One training run of `steps` steps in a run folder.

    optimizers: {prefix of its names in the checkpoint: optimizer}. They hold all that training
    changes: weights, moments and step counts. args: the script's, of which save_every, val_every,
    patience, pause_at, device and wandb are read here. held_out: how many problems a validation
    asks, 0 for no validation. show: {label: metric} for the progress line. warn(metrics) returns
    lines to print.
    """

    def __init__(
        self,
        folder: RunFolder,
        steps: int,
        optimizers: dict[str, AdamW],
        args,
        held_out: int = 0,
        show: dict[str, str] | None = None,
        warn: Callable[[dict], Iterable[str]] = lambda metrics: (),
    ):
        self.folder, self.steps, self.optimizers, self.args = folder, steps, optimizers, args
        self.held_out, self.show, self.warn = held_out, show or {}, warn
        self.first = self.step = 0  # where this process begins; how many steps are done
        self.metrics: dict = {}  # of the last step
        self.validated: dict = {}  # the last validation, and the best one
        self.best: dict = {}
        self.out_of_patience = False
        self.status: int | None = None
        self.patience, self.pause_at = (getattr(args, k, None) for k in ("patience", "pause_at"))
        self._phases: list[tuple[str, float]] = []
        self._clock: tuple[int, float, float] | None = None  # step, wall time, CPU time
        self.device = torch.device(args.device).type

    def __enter__(self) -> "Run":
        self._continue()
        if self.args.wandb:
            self.folder.start_wandb(self.args.wandb, vars(self.args))
        self._entered = contextlib.ExitStack()
        self.stop = self._entered.enter_context(console.graceful_stop())
        self.progress = self._entered.enter_context(console.Progress(self.steps))
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        with self._entered:
            if kind is not None and issubclass(kind, console.Stopped):
                self.save_checkpoint()
                paused = f"paused at step {self.step}"
                asked = self.stop.requested
                self.progress.note(self.stop.message(self.step) if asked else paused)
                self.status = self.stop.exit_code
                return True  # the exception ends here
        return False

    # ---- steps

    def phase(self, name: str) -> None:
        """Name what the step does from here on. Its duration is logged as seconds_<name>."""
        self._phases.append((name, time.perf_counter()))
        self.progress.update(self.step, now=NOW.get(name, name))

    def end_step(self, metrics: dict, answers: list[dict] = ()) -> None:
        """Log a step's metrics and some of its answers, save if a checkpoint is due, stop if
        asked."""
        self.step += 1
        end = time.perf_counter()
        marks = [*self._phases, ("", end)]
        seconds = {
            f"seconds_{name}": after - at for (name, at), (_, after) in zip(marks, marks[1:])
        }
        seconds["seconds"] = end - (marks[0][1] if self._phases else self._began)
        memory = peak_memory(self.args.device)
        self.metrics = {"step": self.step} | metrics | seconds | {"peak_memory": memory}
        self.folder.log(self.metrics)
        for answer in answers:
            text = {name: value for name, value in answer.items() if name != "example"}
            self.folder.sample({"step": self.step} | text)
        for line in self.warn(self.metrics):
            self.progress.note(f"step {self.step}: {line}")
        if answers and (self.step - 1) % (self.args.val_every or self.steps) == 0:
            self.progress.note(preview(answers[0]))
        shown = {label: self.metrics[name] for label, name in self.show.items()}
        speed = self.metrics["tokens"] / self.metrics["seconds"]
        self.progress.update(self.step, **shown, tokens_per_s=speed, memory=memory)
        self._look_at_the_clock(end)
        self._phases, self._began = [], time.perf_counter()
        due = self.step % self.args.save_every == 0 and self.step != self.pause_at
        if due or self.step == self.steps:  # a pause saves after its validation
            self.save_checkpoint()
        if self.stop.agreed() and self.step < self.steps:
            raise console.Stopped

    def _look_at_the_clock(self, now: float) -> None:
        """After five steps on a CPU, say once if this process had to wait for a core. Threads that
        wait for each other on a shared CPU can be far slower than a single one."""
        self._clock = self._clock or (self.step, now, time.process_time())
        step, wall, cpu = self._clock
        if self.device != "cpu" or self.step != step + 5 or now - wall < WORTH_SAYING:
            return
        cores, threads = (time.process_time() - cpu) / (now - wall), torch.get_num_threads()
        if cores < 0.6 * min(2, threads):
            advice = "; a run with OMP_NUM_THREADS=1 in front of the command is then often faster"
            self.progress.note(f"the last five steps got {cores:.0%} of a core: other processes "
                               f"use this CPU{advice * (threads > 1)}")  # fmt: skip

    def watch(self, finished: int, tokens: int) -> None:
        """The `progress` of generate: show how many answers are finished, stop if asked. On many
        devices a stop waits for the end of the step, where all hear of it."""
        self.progress.update(self.step, answered=finished)
        console.stop_if_asked()

    # ---- validation

    def validation_due(self) -> bool:
        """Whether to validate now, before the next step or after the last one."""
        self._began = time.perf_counter()  # the next step's clock
        every = self.args.val_every
        due = self.step == self.steps or (every and self.step % every == 0)
        return bool(self.held_out and due and self.validated.get("step") != self.step)

    def record_validation(self, metrics: dict, answers: list[dict] = ()) -> bool:
        """Log a validation and some of its answers. Returns whether it is the best so far."""
        self.validated = {"step": self.step} | metrics
        for answer in answers:
            self.folder.sample({"step": self.step} | answer)
        self.folder.log(self.validated)
        self.progress.note(console.listed(self.validated))
        better = not self.best or _score(self.validated) > _score(self.best)
        if better:
            self.best = self.validated
        self._began = time.perf_counter()
        return better

    def ends_early(self) -> bool:
        """Whether the run ends before its next step, because as many validations as --patience says
        have brought nothing better. Raises Stopped if --pause-at is reached."""
        # A checkpoint has both validations, so a continued run knows how long it has waited.
        waited = self.validated.get("step", 0) - self.best.get("step", 0)
        self.out_of_patience = bool(self.patience) and waited >= self.patience * self.args.val_every
        if self.out_of_patience:
            self.progress.note(f"the last {self.patience} validations brought nothing better: "
                               f"the weights of step {self.best['step']} are kept")  # fmt: skip
        elif self.pause_at and self.step >= self.pause_at:
            raise console.Stopped
        return self.out_of_patience

    # ---- checkpoints

    def save_checkpoint(self) -> None:
        """Write what training has changed after `self.step` whole steps."""
        tensors = {}
        for prefix, optimizer in self.optimizers.items():
            tensors |= {prefix + name: t for name, t in optimizer.state_tensors().items()}
        state = {"metrics": self.metrics, "validated": self.validated, "best": self.best}
        self.folder.save_checkpoint(self.step, tensors, state)

    def _continue(self) -> None:
        checkpoint = self.folder.load_checkpoint()
        if checkpoint is None:
            return
        self.first, tensors, state = checkpoint
        self.step = self.first
        for prefix, optimizer in self.optimizers.items():
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            optimizer.load_state_tensors(own)
        self.metrics, self.validated, self.best = (
            state[name] for name in ("metrics", "validated", "best")
        )
        print(f"continuing {self.folder.path} from step {self.first}")

    def finish(self, summary: dict) -> None:
        """Mark the run as finished. Call it when the result is saved."""
        early = {"stopped_by": "patience"} if self.out_of_patience else {}
        self.folder.finish({"steps": self.step} | early | summary)


def check_finite(step: int, indices: list[int], lower: str, **values: float) -> None:
    """UserError that names the step and its problems if a value is NaN or infinite."""
    if all(map(math.isfinite, values.values())):
        return
    what = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
    raise UserError(
        f"{what} at step {step + 1}; problems {indices}: lower {lower} and start over with another "
        "--out, or with --overwrite, which deletes the last checkpoint"
    )


def _score(validated: dict) -> tuple[float, float, float]:
    """How --keep best compares validations: by exact match, then by the reward of one's own, then
    by loss. Those that a run does not have are equal."""
    exact, reward = validated.get("val_exact_match", -1.0), validated.get("val_reward", -math.inf)
    return exact, reward, -validated.get("val_loss", math.inf)


def preview(answer: dict) -> str:
    """A sampled answer for the console, indented."""
    reward = answer["score"] + sum(value for *_, value in answer.get("terms", ()))
    text = f"{answer['question']}\n{answer['completion'].strip()}\n-> reward {reward:g}"
    return "\n".join(["a sampled answer:", *("    " + line for line in text.split("\n"))])
