"""nanogsm/run/loop.py, what surrounds a training loop: rows and checkpoints at the right steps, a
stop that loses no whole step, validations when they are due, and the clock."""

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from nanogsm import UserError
from nanogsm.optim import AdamW
from nanogsm.run import loop
from nanogsm.run.console import Stopped
from nanogsm.run.folder import RunFolder
from nanogsm.run.loop import Run, check_finite

STEPS = 6


def settings(**changes) -> SimpleNamespace:
    """The arguments of a script that Run reads. No checkpoint and no validation is due."""
    return SimpleNamespace(
        **{"save_every": 100, "val_every": 0, "device": "cpu", "wandb": None} | changes
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch, default_signals):
    """No waiting for the disk: what a power cut leaves has its tests in test_runs.py."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


class Toy:
    """A weight whose gradient depends on the step, its optimizer, and a run around them."""

    def __init__(
        self, path, steps=STEPS, held_out=0, show=None, warn=lambda metrics: (), **changes
    ):
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.optimizer = AdamW([("w", self.weight)], lr=0.1, bits=32)
        self.folder = RunFolder(path, {"steps": steps}, {})
        optimizers, args = {"toy/": self.optimizer}, settings(**changes)
        self.run = Run(self.folder, steps, optimizers, args, held_out, show, warn)

    def learn(self, step):
        self.weight.grad = torch.arange(4.0) - step
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, in_step=lambda step: None, validate=None):
        """The loop of the training scripts. `in_step` is called in the middle of each step."""
        run = self.run
        with self.folder, run:
            for step in range(run.first, run.steps):
                if validate and run.validation_due():
                    run.record_validation(validate(step))
                if run.ends_early():
                    break
                in_step(step)
                self.learn(step)
                run.end_step({"loss": self.weight.sum().item(), "tokens": 10})
            if validate and run.validation_due():
                run.record_validation(validate(run.steps))
            run.finish({})
        return run.status or 0


def weights(steps) -> list[torch.Tensor]:
    """The weight after 0, 1, ... steps, without a run."""
    w = torch.nn.Parameter(torch.zeros(4))
    optimizer, found = AdamW([("w", w)], lr=0.1, bits=32), [torch.zeros(4)]
    for step in range(steps):
        w.grad = torch.arange(4.0) - step
        optimizer.step()
        found.append(w.detach().clone())
    return found


def rows(path, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def checkpoints(path) -> list[str]:
    return sorted(os.listdir(path / "checkpoint")) if (path / "checkpoint").exists() else []


def saved(path, args) -> tuple[int, dict, dict]:
    """(step, tensors, state) of the checkpoint in a run folder."""
    with RunFolder(path, args, {}) as folder:
        return folder.load_checkpoint()


def signalled(number):
    os.kill(os.getpid(), number)


# ---- steps


def test_end_step_logs_and_saves_when_due(tmp_path):
    toy = Toy(tmp_path / "r", steps=5, save_every=2)
    found = []
    with toy.folder, toy.run as run:
        for step in range(5):
            toy.learn(step)
            answer = {"question": f"{step}?", "completion": "2", "score": 1.0, "example": ...}
            run.end_step({"loss": float(step), "tokens": 10}, [answer])
            assert run.step == step + 1
            found.append(checkpoints(tmp_path / "r"))
    assert found == [[], ["step-2"], ["step-2"], ["step-4"], ["step-5"]]  # and after the last step
    logged = rows(tmp_path / "r")
    assert [(row["step"], row["loss"]) for row in logged] == [(i + 1, float(i)) for i in range(5)]
    assert all(row["peak_memory"] > 0 and row["seconds"] >= 0 for row in logged)
    assert rows(tmp_path / "r", "samples.jsonl") == [  # the ids of `example` are no text
        {"step": i + 1, "question": f"{i}?", "completion": "2", "score": 1.0} for i in range(5)
    ]
    step, tensors, state = saved(tmp_path / "r", {"steps": 5})
    assert step == 5 and torch.equal(tensors["toy/weight.w"], weights(5)[5])
    assert tensors["toy/step_count"] == 5 and state["metrics"] == logged[-1]


def test_the_console_shows_the_metrics_asked_for_a_sample_and_the_warnings(tmp_path, capsys):
    def warn(metrics):
        return ["the loss is high"] if metrics["loss"] > 1 else []

    toy = Toy(tmp_path / "r", steps=4, val_every=2, show={"cost": "loss"}, warn=warn)
    with toy.folder, toy.run as run:
        for step in range(4):
            answer = {"question": f"{step}?", "completion": " two\nlines ", "score": 0.5}
            run.end_step({"loss": float(step), "hidden": 3.25, "tokens": 10}, [answer])
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "high" in line] == [
        "step 3: the loss is high", "step 4: the loss is high",
    ]  # fmt: skip
    assert "step 1/4" in out and "step 4/4" in out and "cost 3" in out and "3.25" not in out
    assert "GiB" in out and "tokens/s" in out
    preview = "a sampled answer:\n    0?\n    two\n    lines\n    -> reward 0.5\n"
    assert preview in out and preview.replace("0?", "2?") in out  # one for every two steps
    assert out.count("a sampled answer:") == 2


@pytest.fixture
def clock(monkeypatch):
    """[seconds], the clock of the loop. It moves when a test moves it. Writing a checkpoint takes
    1,000 seconds."""
    now = [100.0]
    both = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0])
    monkeypatch.setattr(loop, "time", both)
    save = RunFolder.save_checkpoint

    def slow_save(*given):
        now[0] += 1000
        save(*given)

    monkeypatch.setattr(RunFolder, "save_checkpoint", slow_save)
    return now


def test_the_seconds_of_the_phases_add_up_to_those_of_the_step(tmp_path, clock):
    """Validation, checkpoints and what comes before the first phase are not part of a step."""
    toy = Toy(tmp_path / "r", steps=3, save_every=1, val_every=1, held_out=2)
    with toy.folder, toy.run as run:
        for step in range(2):
            assert run.validation_due()
            clock[0] += 50
            run.record_validation({"val_exact_match": 0.5})
            clock[0] += 20
            for name, seconds in (("rollout", 3.0), ("score", 1.5), ("update", 2.25 + step)):
                run.phase(name)
                clock[0] += seconds
            run.end_step({"tokens": 10})
    for row, update in zip([r for r in rows(tmp_path / "r") if "seconds" in r], (2.25, 3.25)):
        phases = {k: v for k, v in row.items() if k.startswith("seconds_")}
        assert phases == {"seconds_rollout": 3, "seconds_score": 1.5, "seconds_update": update}
        assert row["seconds"] == sum(phases.values())


@pytest.mark.parametrize("val_every", [0, 1])
def test_without_phases_a_step_begins_after_the_checkpoint_and_the_validation(
    tmp_path, clock, val_every
):
    toy = Toy(tmp_path / "r", steps=3, save_every=1, val_every=val_every, held_out=2)
    with toy.folder, toy.run as run:
        for seconds in (4, 5, 6):
            if run.validation_due():
                clock[0] += 50
                run.record_validation({"val_exact_match": 0.5})
            clock[0] += seconds
            run.end_step({"tokens": 10})
    steps = [row for row in rows(tmp_path / "r") if "seconds" in row]
    assert [row["seconds"] for row in steps] == [4, 5, 6]
    assert not [key for row in steps for key in row if key.startswith("seconds_")]


def test_a_run_reports_to_wandb_from_where_it_continues(tmp_path, monkeypatch):
    seen = []
    toy = Toy(tmp_path / "r", save_every=1, wandb="mine")
    monkeypatch.setattr(toy.folder, "start_wandb", lambda *given: seen.append(given))
    toy.train()
    assert seen == [("mine", vars(toy.run.args))]
    toy = Toy(tmp_path / "other")
    monkeypatch.setattr(toy.folder, "start_wandb", lambda *given: seen.append(given))
    toy.train()
    assert len(seen) == 1


def test_a_value_that_is_not_finite_names_the_step_and_its_problems():
    check_finite(3, [7, 8], "--lr", loss=1.0, gradient_norm=2.0)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError) as caught:
            check_finite(3, [7, 8], "--lr", loss=1.5, gradient_norm=bad)
        message = str(caught.value)
        assert f"loss 1.5, gradient norm {bad} at step 4; problems [7, 8]: lower --lr" in message
        assert "\n" not in message and "checkpoint" in message


# ---- stopping and continuing


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_saves_the_step_it_ends_with_and_leaves(tmp_path, number, status, capsys):
    def stop(step):
        if step == 2:  # in the middle of the third step
            signalled(number)

    before = signal.getsignal(number)
    assert Toy(tmp_path / "whole").train() == 0
    capsys.readouterr()
    assert Toy(tmp_path / "cut").train(stop) == status
    assert signal.getsignal(number) is before
    assert "run the same command again to continue from step 3" in capsys.readouterr().out
    assert checkpoints(tmp_path / "cut") == ["step-3"]  # none was due
    assert [row["step"] for row in rows(tmp_path / "cut")] == [1, 2, 3]
    assert not (tmp_path / "cut/summary.json").exists()
    step, tensors, _ = saved(tmp_path / "cut", {"steps": STEPS})
    assert step == 3 and torch.equal(tensors["toy/weight.w"], weights(3)[3])

    toy = Toy(tmp_path / "cut")
    assert toy.train() == 0 and toy.run.first == 3
    assert f"continuing {tmp_path / 'cut'} from step 3" in capsys.readouterr().out
    assert torch.equal(toy.weight, weights(STEPS)[STEPS])
    assert [row["step"] for row in rows(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    losses = ([row["loss"] for row in rows(tmp_path / run)] for run in ("cut", "whole"))
    assert next(losses) == next(losses)
    assert json.loads((tmp_path / "cut/summary.json").read_text()) == {"steps": STEPS}


@pytest.mark.parametrize("in_step, kept", [(3, 3), (0, 0)])
def test_stopped_in_the_middle_of_a_step_saves_the_step_before(tmp_path, in_step, kept, capsys):
    """`watch` raises it, which only sampling calls. Before the first step, step 0 is saved."""
    toy = Toy(tmp_path / "r")
    asked = []

    def sample(step):
        for finished in range(4):
            if step == in_step and finished == 2:
                signalled(signal.SIGTERM)
            toy.run.watch(finished, 10 * finished)
            asked.append((step, finished))

    assert toy.train(sample) == 143
    assert asked[-1] == (in_step, 1)  # at once, and not at the end of the step
    assert checkpoints(tmp_path / "r") == [f"step-{kept}"]
    assert [row["step"] for row in rows(tmp_path / "r")] == list(range(1, kept + 1))
    assert f"continue from step {kept}" in capsys.readouterr().out
    _, tensors, _ = saved(tmp_path / "r", {"steps": STEPS})
    assert torch.equal(tensors["toy/weight.w"], weights(kept)[kept])
    toy = Toy(tmp_path / "r")
    assert toy.train() == 0 and torch.equal(toy.weight, weights(STEPS)[STEPS])


def test_watch_alone_stops_nothing(tmp_path):
    toy = Toy(tmp_path / "r")
    assert toy.train(lambda step: toy.run.watch(1, 10)) == 0


def test_a_stop_in_the_last_step_lets_the_run_end(tmp_path):
    """What is trained is then saved by the script, and the run is finished."""
    toy = Toy(tmp_path / "r")
    assert toy.train(lambda step: signalled(signal.SIGTERM) if step == STEPS - 1 else None) == 0
    assert (tmp_path / "r/summary.json").exists()


@pytest.mark.parametrize("error", [UserError("not finite"), KeyError("a bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("save_every, kept", [(100, []), (2, ["step-2"])])
def test_an_ordinary_exception_propagates_and_saves_nothing(tmp_path, error, save_every, kept):
    def fail(step):
        if step == 3:
            signalled(signal.SIGTERM)  # even if a stop was requested as well
            raise error

    handler = signal.getsignal(signal.SIGTERM)
    toy = Toy(tmp_path / "r", save_every=save_every)
    with pytest.raises(type(error)) as caught:
        toy.train(fail)
    assert caught.value is error and toy.run.status is None
    assert checkpoints(tmp_path / "r") == kept
    assert [row["step"] for row in rows(tmp_path / "r")] == [1, 2, 3]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_stopped_outside_of_a_run_is_not_caught(tmp_path):
    toy = Toy(tmp_path / "r")
    with toy.folder, pytest.raises(Stopped):
        with toy.run as run:
            run.finish({})
        raise Stopped


def test_a_checkpoint_holds_every_optimizer_under_its_own_prefix(tmp_path):
    def optimizers():
        pair = [torch.nn.Parameter(torch.full((3,), x)) for x in (1.0, 2.0)]
        return {
            "policy/": AdamW([("w", pair[0])], lr=0.1),
            "critic/": AdamW([("w", pair[1])], lr=0.2),
        }

    ours, args = optimizers(), settings(save_every=1)
    with RunFolder(tmp_path / "r", {}, {}) as folder, Run(folder, 2, ours, args) as run:
        for name, optimizer in ours.items():
            optimizer.params["w"].grad = torch.ones(3)
            for _ in range(1 + (name == "critic/")):
                optimizer.step()
        run.end_step({"loss": float("nan"), "tokens": 1})
    loaded = optimizers()
    with RunFolder(tmp_path / "r", {}, {}) as folder, Run(folder, 2, loaded, args) as run:
        assert run.first == run.step == 1
        assert run.metrics["step"] == 1 and run.metrics["loss"] != run.metrics["loss"]  # NaN
    for name in ours:
        assert loaded[name].step_count == ours[name].step_count == (2 if name == "critic/" else 1)
        assert torch.equal(loaded[name].params["w"], ours[name].params["w"])
    assert not torch.equal(loaded["policy/"].params["w"], loaded["critic/"].params["w"])


# ---- validation


@pytest.mark.parametrize("val_every, due", [(2, [0, 2, 4, 5]), (1, [0, 1, 2, 3, 4, 5]), (0, [5]),
                                            (5, [0, 5]), (9, [0, 5])])  # fmt: skip
def test_validation_is_due_at_multiples_of_val_every_and_at_the_end(tmp_path, val_every, due):
    toy = Toy(tmp_path / "r", steps=5, val_every=val_every, held_out=3)
    asked = []
    with toy.folder, toy.run as run:
        for step in range(6):
            if run.validation_due():
                assert run.validation_due()  # to ask changes nothing
                asked.append(step)
                run.record_validation({"val_exact_match": 0.5})
                assert not run.validation_due()  # once per step
            if step < 5:
                run.end_step({"tokens": 1})
    assert asked == due
    assert [row["step"] for row in rows(tmp_path / "r") if "val_exact_match" in row] == due


def test_without_held_out_problems_no_validation_is_due(tmp_path):
    toy = Toy(tmp_path / "r", steps=2, val_every=1, held_out=0)
    assert toy.train(validate=lambda step: pytest.fail("nobody to ask")) == 0


def test_a_continued_run_validates_each_step_once(tmp_path):
    """A stop after a validation keeps it. A stop during one repeats it, and the log has it once."""

    def run(stop_in=None, stop_after=None):
        toy = Toy(tmp_path / "r", val_every=2, held_out=3)
        asked = []

        def validate(step):
            asked.append(step)
            if step == stop_in:
                signalled(signal.SIGTERM)
                toy.run.watch(1, 10)
            return {"val_exact_match": step / 10}

        def in_step(step):
            if step == stop_after:
                signalled(signal.SIGTERM)
                toy.run.watch(0, 0)

        return toy.train(in_step, validate), asked, toy.run.validated

    assert run(stop_after=2)[:2] == (143, [0, 2])
    assert run(stop_in=4)[:2] == (143, [4])
    assert run() == (0, [4, 6], {"step": 6, "val_exact_match": 0.6})
    validations = [row for row in rows(tmp_path / "r") if "val_exact_match" in row]
    assert validations == [{"step": s, "val_exact_match": s / 10} for s in (0, 2, 4, 6)]


def test_record_validation_says_which_is_the_best(tmp_path, capsys):
    """By exact match. Where that is equal, by loss. The first of two equal ones stays the best."""
    toy = Toy(tmp_path / "r", steps=7, val_every=1, held_out=3)
    seen = [(0.0, 2.0, True), (0.0, 2.5, False), (0.25, 3.0, True), (0.25, 2.5, True),
            (0.25, 2.5, False), (0.125, 1.0, False), (0.5, 9.0, True)]  # fmt: skip
    best = None
    with toy.folder, toy.run as run:
        for step, (exact_match, loss_, better) in enumerate(seen):
            metrics = {"val_loss": loss_, "val_exact_match": exact_match}
            assert run.record_validation(metrics, [{"completion": "2"}]) == better
            best = {"step": step} | metrics if better else best
            assert run.best == best and run.validated == {"step": step} | metrics
            run.end_step({"tokens": 1})
    assert [row for row in rows(tmp_path / "r") if "val_loss" in row] == [
        {"step": step, "val_loss": x, "val_exact_match": m} for step, (m, x, _) in enumerate(seen)
    ]
    samples = rows(tmp_path / "r", "samples.jsonl")
    assert samples == [{"step": step, "completion": "2"} for step in range(7)]
    assert "step 3, val_loss 2.5, val_exact_match 25.0%" in capsys.readouterr().out
    _, _, state = saved(tmp_path / "r", {"steps": 7})
    assert state["best"] == state["validated"] == best


def test_the_best_validation_survives_a_stop_and_ppo_has_no_loss(tmp_path):
    def train(values, stop_in=None):
        toy = Toy(tmp_path / "r", val_every=1, held_out=3)

        def stop(step):
            if step == stop_in:
                signalled(signal.SIGTERM)

        toy.train(stop, lambda step: {"val_exact_match": values[step]})
        return toy.run

    values = [0.1, 0.4, 0.3, 0.2, 0.4, 0.3, 0.1]
    assert train(values, stop_in=2).best == {"step": 1, "val_exact_match": 0.4}
    run = train(values)
    assert run.best == {"step": 1, "val_exact_match": 0.4}
    assert run.validated == {"step": 6, "val_exact_match": 0.1}


# ---- --pause-at and --patience


@pytest.mark.parametrize("save_every", [100, 1, 2])
def test_a_paused_run_goes_on_as_if_it_had_not_been(tmp_path, capsys, save_every):
    asked = []

    def train(name, **changes):
        toy = Toy(tmp_path / name, val_every=2, held_out=3, save_every=save_every, **changes)

        def validate(step):
            asked.append(step)
            return {"val_exact_match": step / 10}

        toy.train(validate=validate)
        return toy.run.status, (tmp_path / name / "summary.json").exists()

    assert train("whole") == (None, True) and asked == [0, 2, 4, 6]
    asked.clear()
    said = []
    pauses = [(2, 2, [0, 2]), (2, 2, []), (3, 3, []), (1, 3, []), (4, 4, [4])]
    for pause_at, at, validated in pauses:
        assert train("cut", pause_at=pause_at) == (0, False)
        assert checkpoints(tmp_path / "cut") == [f"step-{at}"] and asked == validated
        said.append(f"paused at step {at}\n" in capsys.readouterr().out)
        asked.clear()
    assert all(said)
    assert train("cut", pause_at=6) == (None, True) and asked == [6]  # there is no step after it
    without = [[{k: v for k, v in row.items() if not k.startswith(("seconds", "peak"))}
                for row in rows(tmp_path / name)] for name in ("whole", "cut")]  # fmt: skip
    assert without[0] == without[1] and len(without[0]) == STEPS + 4


def patient(tmp_path, scores, patience, stop_in=None, every=1):
    toy = Toy(tmp_path / "r", len(scores) - 1, held_out=3, val_every=every, patience=patience)

    def stop(step):
        if step == stop_in:
            signalled(signal.SIGTERM)

    return toy.train(stop, lambda step: {"val_loss": scores[step]}), toy.run


@pytest.mark.parametrize(
    "losses, patience, ends",
    [
        ([5, 4, 3, 3, 3, 2, 1, 0], 2, 4),  # an equal one is not better
        ([5, 4, 3, 3, 3, 2, 1, 0], 3, None),
        ([1, 2, 0, 2, 2, 2, 2, 2], 4, 6),  # the best one starts the count again
        ([1, 2, 2, 2, 2, 2, 2, 2], 1, 1),
        ([1, 2, 2, 2, 2, 2, 2, 2], 0, None),
        ([math.nan] * 8, 2, 2),  # the first is the best until there is a better one
    ],
)
@pytest.mark.parametrize("stop_in", [None, 0, 3])
def test_a_run_ends_when_its_patience_is_used_up(tmp_path, losses, patience, ends, stop_in):
    """Also when it was stopped on the way: the checkpoint knows how long it has waited."""
    status, run = patient(tmp_path, losses, patience, stop_in)
    if stop_in is not None and (ends is None or stop_in < ends):
        assert status == 143
        status, run = patient(tmp_path, losses, patience)
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert status == 0 and summary["steps"] == (len(losses) - 1 if ends is None else ends)
    assert summary.get("stopped_by") == (None if ends is None else "patience")
    assert len(rows(tmp_path / "r")) == 2 * summary["steps"] + 1


def test_patience_counts_validations_and_not_steps(tmp_path):
    _, run = patient(tmp_path, [5, 0, 6, 0, 6, 0, 6, 0], 2, every=2)
    assert json.loads((tmp_path / "r/summary.json").read_text())["steps"] == 4
    assert run.best["step"] == 0


def test_finish_writes_the_summary_and_drops_the_checkpoint(tmp_path):
    toy = Toy(tmp_path / "r", steps=1, save_every=1)
    with toy.folder, toy.run as run:
        run.end_step({"loss": 2.0, "tokens": 1})
        assert checkpoints(tmp_path / "r") == ["step-1"]
        run.finish({"loss": run.metrics["loss"]})
    assert json.loads((tmp_path / "r/summary.json").read_text()) == {"steps": 1, "loss": 2.0}
    assert toy.folder.finished and checkpoints(tmp_path / "r") == []


# ------------------------------------------------------------------------------------ a shared CPU


@pytest.mark.parametrize(
    "threads, cores, seconds, device, speaks",
    [
        (1, 0.5, 9.0, "cpu", True),
        (2, 1.0, 9.0, "cpu", True),  # two threads that get one core between them
        (1, 0.9, 9.0, "cpu", False),
        (2, 1.8, 9.0, "cpu", False),
        (64, 1.5, 9.0, "cpu", False),  # small models do not fill so many
        (1, 0.1, 0.01, "cpu", False),  # fast enough, whoever else is there
        (1, 0.1, 9.0, "cuda", False),  # a CPU that waits for a GPU is as it should be
    ],
)
def test_a_shared_cpu_is_noticed_once(
    tmp_path, monkeypatch, capsys, threads, cores, seconds, device, speaks
):
    wall, monkeypatch_threads = [100.0], lambda: threads
    both = SimpleNamespace(perf_counter=lambda: wall[0], process_time=lambda: cores * wall[0])
    monkeypatch.setattr(loop, "time", both)
    monkeypatch.setattr(loop, "peak_memory", lambda device: 0)
    monkeypatch.setattr(torch, "get_num_threads", monkeypatch_threads)

    def take_time(step):
        wall[0] += seconds

    Toy(tmp_path / "r", steps=14, device=device).train(in_step=take_time)
    out = capsys.readouterr().out
    assert out.count("other processes use this CPU") == speaks
    assert out.count("OMP_NUM_THREADS=1") == (speaks and threads > 1)
    if speaks:
        assert f"the last five steps got {100 * cores:.0f}% of a core" in out
