"""train_sft.py: the same steps as transformers' Trainer and peft, and what a run promises."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FIXTURES, VALIDATED, slow
from safetensors.torch import load_file, save_file

import train_ppo
import train_sft
from nanogsm import UserError, data, lora
from nanogsm import model as models
from nanogsm.logprob import next_token_logprobs
from nanogsm.model import PREFIX, load_adapter, load_model, set_checkpointing
from nanogsm.optim import AdamW, cosine_with_min_lr
from nanogsm.run import past
from nanogsm.run.start import encode_all

PLAIN = lambda: torch.autocast("cpu", torch.bfloat16, enabled=False)  # noqa: E731


def trainer_examples():
    rows = json.loads((FIXTURES / "trainer/examples.json").read_text())
    return [
        data.Example(r["ids"], [0] * r["prompt_len"] + [1] * (len(r["ids"]) - r["prompt_len"]), i)
        for i, r in enumerate(rows)
    ]


@pytest.mark.parametrize("flags", [[], ["--lora", "--merge"]])
def test_of_a_multimodal_model_only_adapters_are_trained(tmp_path, capsys, flags):
    argv = ["--model", str(FIXTURES / "gemma3_vision"), "--data", "tiny", "--device", "cpu"]
    with pytest.raises(UserError, match="is multimodal.*train adapters with --lora, without"):
        train_sft.main([*argv, *flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    assert train_sft.main([*argv, "--lora", "--dry-run", "--out", str(tmp_path / "run")]) == 0
    assert "(gemma3_text)" in capsys.readouterr().out


TRAINED = [
    ("gemma3", "trainer", "none"),
    pytest.param("gemma3", "trainer", "light", marks=slow),
    ("llama32", "trainer_llama32", "light"),
    ("llama30", "trainer_llama30", "none"),
]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name, place, checkpointing", TRAINED)
def test_twenty_steps_equal_those_of_trainer_and_peft(
    gemma, name, place, method, checkpointing, tmp_path
):
    record = json.loads((FIXTURES / f"{place}/{method}_losses.json").read_text())
    model, tokenizer = gemma(name)
    set_checkpointing(model, checkpointing)
    if method == "lora":
        load_adapter(model, adapter_folder(tmp_path, "lora_init", place))
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=1e-3, bits=32)
    examples = trainer_examples()
    for step, want in enumerate(record["steps"]):
        optimizer.lr = cosine_with_min_lr(step, 20, 1e-3, 1e-4)
        chosen = examples[8 * step : 8 * step + 8]
        loss = train_sft.backward_step(model, chosen, 4, tokenizer.pad_id, PLAIN)
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.lr == pytest.approx(want["learning_rate"], rel=1e-9)
        assert loss == pytest.approx(want["loss"], abs=1e-5), step
        assert norm.item() == pytest.approx(want["grad_norm"], rel=1e-4), step
    final = load_file(FIXTURES / f"{place}/{method}_expected.safetensors")
    with torch.no_grad():
        assert (model.logits(model(final["ids"])) - final["logits"]).abs().max() <= 1e-4


def adapter_folder(folder, name, place="trainer"):
    """One of a trainer fixture's adapters, copied into folder in peft's layout."""
    shutil.copy(FIXTURES / "gemma3_peft/adapter_config.json", folder)
    shutil.copy(FIXTURES / f"{place}/{name}.safetensors", folder / "adapter_model.safetensors")
    return folder


# ---------------------------------------------------------------------------------- one gradient


def test_the_loss_is_the_mean_over_answer_tokens_by_hand(gemma):
    """Each example alone, with all logits, in float64; then one division by the step's tokens."""
    model, tokenizer = gemma("gemma3", torch.float64)
    examples = trainer_examples()[:5]
    total, count = 0.0, 0
    for e in examples:
        logp = torch.log_softmax(model.logits(model(torch.tensor([e.ids])))[0], -1)
        for position, supervised in enumerate(e.mask):
            if supervised:
                total -= logp[position - 1, e.ids[position]].item()
                count += 1
    loss = train_sft.backward_step(model, examples, 2, tokenizer.pad_id, PLAIN)
    by_hand = pytest.approx(total / count, rel=1e-6)
    assert loss == by_hand
    assert train_sft.mean_loss(model, examples, 3, 0, PLAIN) == by_hand


def test_the_cut_into_micro_batches_changes_neither_loss_nor_gradient(gemma):
    examples = trainer_examples()[:8]
    results = []
    for micro_batch in (1, 3, 8):
        model, tokenizer = gemma("gemma3", torch.float64)
        loss = train_sft.backward_step(model, examples, micro_batch, tokenizer.pad_id, PLAIN).item()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        for name, grad in grads.items():
            assert (grad - results[0][1][name]).abs().max() < 1e-6, name


def test_prompt_tokens_do_not_count_in_the_loss(gemma):
    """Another prompt token as a target leaves the loss alone. Another answer token does not."""
    model, tokenizer = gemma("gemma3", torch.float64)
    e = next(e for e in trainer_examples() if sum(e.mask) > 3)
    start = e.mask.index(1)
    hidden = model(torch.tensor([e.ids]))

    def loss(targets):
        batch = data.collate([e], 0)
        logp, _ = next_token_logprobs(model.vocabulary, hidden, targets, batch.mask)
        return logp.sum().item()

    ids = torch.tensor([e.ids])
    for place, matters in ((start - 1, False), (start, True), (len(e.ids) - 1, True)):
        other = ids.clone()
        other[0, place] = 99 if ids[0, place] != 99 else 98
        assert (loss(other) != loss(ids)) == matters, place


def test_every_epoch_is_a_new_permutation_of_the_examples():
    examples = list(range(10))
    step = lambda i, seed=0: train_sft.examples_of_step(examples, i, 4, seed)  # noqa: E731
    epochs = [step(0) + step(1) + step(2), step(3) + step(4) + step(5)]
    assert [sorted(e) for e in epochs] == [examples, examples] and epochs[0] != epochs[1]
    assert len(step(2)) == len(step(5)) == 2  # the last step of an epoch may be short
    assert step(4) == step(4) != step(4, seed=1)


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def problems(tmp_path):
    """Write twelve small problems to a file. Returns the arguments of a short run on them."""
    rows = [
        {"question": f"Tom has {i} apples and buys {i + 1}. How many?",
         "answer": f"{i}+{i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}\n#### {2 * i + 1}"}
        for i in range(12)
    ]  # fmt: skip
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return [
        "--model", str(FIXTURES / "gemma3"), "--data", str(file), "--recipe", "original",
        "--lr", "1e-3", "--epochs", "2", "--micro-batch", "2", "--val-examples", "2",
        "--max-new-tokens", "4", "--device", "cpu", "--precision", "fp32",
    ]  # fmt: skip


def metrics(folder):
    """The rows of a run's metrics.jsonl, without what depends on the clock and the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")} for row in rows]


def weights(folder):
    return load_file(next(folder.glob("*/*model.safetensors")))


METHODS = [pytest.param([], id="full"), pytest.param(["--lora"], id="lora", marks=slow)]


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_and_continued_run_equals_an_uninterrupted_one(
    problems, method, tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = [*problems, *method, "--save-every", "2", "--val-every", "2"]
    assert train_sft.main([*argv, "--out", str(whole)]) == 0

    real = cosine_with_min_lr
    for die_at in (1, 3, 4):  # before the first checkpoint, after one, after another

        def dies(step, *rest, die_at=die_at):
            if step == die_at:
                raise RuntimeError("killed")
            return real(step, *rest)

        monkeypatch.setattr(train_sft, "cosine_with_min_lr", dies)
        with pytest.raises(RuntimeError, match="killed"):
            train_sft.main([*argv, "--out", str(cut)])
    monkeypatch.setattr(train_sft, "cosine_with_min_lr", real)
    assert train_sft.main([*argv, "--out", str(cut)]) == 0

    assert metrics(cut) == metrics(whole)
    steps = [row["step"] for row in metrics(whole)]  # also the validations at 0, 2, 4 and 6
    assert steps == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    a, b = weights(whole), weights(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not (cut / "checkpoint").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_paused_and_continued_run_equals_one_without_a_pause(problems, method, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = [*problems, *method, "--val-every", "2", "--keep", "best", "--epochs", "1"]
    assert train_sft.main([*argv, "--out", str(whole)]) == 0
    capsys.readouterr()
    assert train_sft.main([*argv, "--pause-at", "2", "--out", str(cut)]) == 0
    said = capsys.readouterr().out
    assert "paused at step 2\n" in said and "the result is in" not in said
    assert not (cut / "summary.json").exists() and metrics(cut)[-1]["step"] == 2
    with pytest.raises(UserError, match="cut is a run whose training has not finished; run the"):
        train_sft.main([*problems, "--model", str(cut), "--out", str(tmp_path / "other")])
    assert train_sft.main([*argv, "--out", str(cut)]) == 0
    assert metrics(cut) == metrics(whole)
    assert (cut / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert (cut / "summary.json").read_text() == (whole / "summary.json").read_text()
    a, b = weights(whole), weights(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_patience_ends_the_run_with_the_best_weights(problems, tmp_path, monkeypatch, capsys):
    scores = iter([0.25, 0.75, 0.5, 0.5, 1.0])  # at steps 0, 1, 2, 3; never asked again
    rows = lambda *a, **k: [VALIDATED | {"correct": next(scores)}]  # noqa: E731
    monkeypatch.setattr(train_sft.generate, "answer_and_mark", rows)
    argv = [*problems, "--lora", "--val-every", "1", "--out", str(tmp_path / "run")]
    assert train_sft.main([*argv, "--patience", "2"]) == 0
    said = capsys.readouterr().out
    assert "standard error of a validation on 2 problems is 32.4 points at 30% right" in said
    assert "the last 2 validations brought nothing better: the weights of step 1 are kept" in said
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    told = {"steps": 3, "stopped_by": "patience", "kept": "best", "step": 1}
    assert told.items() <= summary.items() and summary["val_exact_match"] == 0.75
    assert metrics(tmp_path / "run")[-1] == metrics(tmp_path / "run")[-1] | {"step": 3}
    one = [*problems, "--lora", "--val-every", "1", "--out", str(tmp_path / "one")]
    monkeypatch.setattr(train_sft.generate, "answer_and_mark", lambda *a, **k: [VALIDATED])
    assert train_sft.main([*one, "--pause-at", "1"]) == 0  # trains one step, as the best run did
    saved = load_file(next((tmp_path / "one/checkpoint").glob("*/tensors.safetensors")))
    kept = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    for name, tensor in kept.items():
        assert torch.equal(saved["weight." + name.removeprefix(PREFIX)], tensor), name


def test_validation_on_a_part_of_what_is_held_out(tmp_path, capsys):
    """--val-use takes the first ones in a fixed random order, --part K/N cuts the same order."""
    held_out = list(range(100, 140))
    halves = [past.part_of(held_out, (k, 2)) for k in (1, 2)]
    assert sorted(halves[0] + halves[1]) == held_out and len(halves[0]) == 20
    assert min(map(sum, halves)) > 20 * 113  # mixed: the first half of the file has the mean 109.5
    assert sorted(sum((past.part_of(held_out, (k, 7)) for k in range(1, 8)), [])) == held_out
    assert past.part_of(held_out, None) == held_out
    args = SimpleNamespace(model="tiny", data="tiny", data_dir=None, val_examples=40, val_use=20,
                           tiny=True, keep="last", patience=0, unscored=False)  # fmt: skip
    found = train_sft.start.hub.find_model("tiny")
    rest, used = train_sft.start.split_problems(args, found)
    everything = data.split_validation(data.load_problems("tiny", "train"), 40)
    assert rest == everything[0] and used == past.part_of(everything[1], (1, 2))
    args.val_use = 41
    with pytest.raises(UserError, match="--val-use 41: only 40 problems are held out"):
        train_sft.start.split_problems(args, found)
    with pytest.raises(UserError, match="--part 1/41: only 40 problems are held out"):
        past.part_of(held_out, (1, 41))


def test_a_finished_run_is_reported_and_other_arguments_are_refused(problems, tmp_path, capsys):
    argv = [*problems, "--lora", "--out", str(tmp_path / "run")]
    assert train_sft.main(argv) == 0
    before = metrics(tmp_path / "run")
    assert train_sft.main(argv) == 0 and "is already finished" in capsys.readouterr().out
    assert metrics(tmp_path / "run") == before
    with pytest.raises(UserError, match="seed was 0, now 1"):
        train_sft.main([*argv, "--seed", "1"])
    assert train_sft.main([*argv, "--seed", "1", "--overwrite"]) == 0
    assert metrics(tmp_path / "run") != before


def test_a_run_may_continue_with_other_micro_batches_but_not_with_another_batch(
    problems, tmp_path, monkeypatch
):
    """What one does when memory runs out: half the micro-batch, twice the accumulation."""
    argv = [*problems, "--optim", "adamw", "--save-every", "1", "--micro-batch"]
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    assert train_sft.main([*argv, "4", "--accumulation", "1", "--out", whole]) == 0

    def dies(step, *rest):
        if step == 3:
            raise RuntimeError("killed")
        return cosine_with_min_lr(step, *rest)

    monkeypatch.setattr(train_sft, "cosine_with_min_lr", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train_sft.main([*argv, "4", "--accumulation", "1", "--out", cut])
    monkeypatch.setattr(train_sft, "cosine_with_min_lr", cosine_with_min_lr)
    with pytest.raises(UserError, match=r"\(batch was 4, now 8\)"):
        train_sft.main([*argv, "4", "--accumulation", "2", "--out", cut])
    assert train_sft.main([*argv, "2", "--accumulation", "2", "--out", cut]) == 0
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    start = dict(load_model(FIXTURES / "gemma3")[0].named_parameters())
    for name in a:
        moved = (a[name] - start[name]).abs().max()
        assert (a[name] - b[name]).abs().max() <= 0.01 * moved and moved > 0


def test_a_run_killed_early_starts_over_although_its_data_moved(
    problems, tmp_path, monkeypatch, capsys
):
    def dies(step, *rest):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(train_sft, "cosine_with_min_lr", dies)
        train_sft.main([*problems, "--val-every", "1", "--out", str(tmp_path / "run")])
    at = problems.index("--data") + 1
    new_place = str(shutil.move(problems[at], tmp_path / "moved.jsonl"))
    moved = [*problems[:at], new_place, *problems[at + 1 :]]
    assert "starting from the beginning" not in capsys.readouterr().out
    assert train_sft.main([*moved, "--val-every", "1", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "run has no checkpoint yet: starting from the beginning" in said
    assert said.endswith(f"next: python evaluate.py {tmp_path / 'run'}\n")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="only Linux has this file")
@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_a_continued_run_unmaps_the_checkpoint_it_came_from(
    problems, script, tmp_path, monkeypatch
):
    """A checkpoint is mapped into memory. Kept mapped, Gemma 3 270M's took 1.6 GiB to the end."""
    module, step = {"sft": (train_sft, "backward_step"), "ppo": (train_ppo, "update")}[script]
    argv = [*problems, "--save-every", "1", "--out", str(tmp_path / "run")]
    if script == "ppo":
        at = problems.index("--epochs")
        argv[at : at + 2] = ["--rollouts", "4", "--steps", "3"]
        argv[argv.index("--model")] = "--init"
    real, seen = getattr(module, step), []

    def watched(*args):
        seen.append("/checkpoint/step-" in Path("/proc/self/maps").read_text())
        if len(seen) == 2:
            raise RuntimeError("killed")
        return real(*args)

    monkeypatch.setattr(module, step, watched)
    with pytest.raises(RuntimeError, match="killed"):
        module.main(argv)
    assert module.main(argv) == 0
    assert len(seen) > 3 and not any(seen)


def test_changed_data_is_not_continued(problems, tmp_path):
    argv = [*problems, "--lora", "--out", str(tmp_path / "run")]
    train_sft.main(argv)
    file = tmp_path / "sums.jsonl"
    file.write_text(file.read_text().replace("apples", "pears"))
    with pytest.raises(UserError, match="the content of --data changed"):
        train_sft.main(argv)


def test_more_epochs_are_another_run(problems, tmp_path):
    argv = [*problems, "--lora", "--out", str(tmp_path / "run")]
    train_sft.main([*argv, "--epochs", "1"])
    with pytest.raises(UserError, match="epochs was 1, now 2: .* give --model .*/run and another"):
        train_sft.main([*argv, "--epochs", "2"])
    with pytest.raises(UserError, match=r"other arguments \(epochs was 1, now 2; lr was"):
        train_sft.main([*argv, "--epochs", "2", "--lr", "0.5"])
    assert not (tmp_path / "run/checkpoint").exists()


def test_a_run_learns_and_writes_what_evaluate_reads(problems, tmp_path):
    train_sft.main([*problems, "--epochs", "8", "--lr", "1e-2", "--out", str(tmp_path / "run")])
    rows = metrics(tmp_path / "run")
    assert rows[-2]["loss"] < 0.7 * rows[0]["loss"]
    assert {"val_loss", "val_exact_match", "val_truncated"} <= rows[-1].keys()
    assert (tmp_path / "run/samples.jsonl").read_text().count("\n") == 2
    args = json.loads((tmp_path / "run/run_args.json").read_text())
    assert args["info"]["prompt"] == {"style": "plain", "shots": 0, "instruction": False}
    load_model(tmp_path / "run")


def test_merge_writes_a_model_and_keeps_the_adapter(problems, tmp_path):
    train_sft.main([*problems, "--lora", "--merge", "--out", str(tmp_path / "run")])
    merged, _ = load_model(tmp_path / "run/model")
    kept, _ = load_model(tmp_path / "run")
    ids = torch.tensor([[2, 40, 50, 60]])
    assert not lora.adapters(merged) and lora.adapters(kept)
    assert (merged(ids) - kept(ids)).abs().max() < 1e-5


def test_merge_can_be_asked_for_afterwards(problems, tmp_path):
    argv = [*problems, "--lora", "--out", str(tmp_path / "run")]
    train_sft.main(argv)
    before = metrics(tmp_path / "run")
    train_sft.main([*argv, "--merge"])
    load_model(tmp_path / "run/model")
    assert metrics(tmp_path / "run") == before


def test_merge_refuses_a_base_that_the_run_was_not_trained_on(problems, tmp_path):
    """In the folder of an earlier version, whose arguments are not compared once it is finished."""
    run, base = tmp_path / "run", tmp_path / "base"
    argv = [*problems, "--lora", "--out", str(run)]
    train_sft.main(argv)
    record = json.loads((run / "run_args.json").read_text())
    del record["format"]
    (run / "run_args.json").write_text(json.dumps(record))
    shutil.copytree(FIXTURES / "gemma3", base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, base / "model.safetensors")
    other = [*argv]
    other[other.index("--model") + 1] = str(base)
    with pytest.raises(UserError, match="was trained on another model: give that one as --model"):
        train_sft.main([*other, "--merge"])
    assert not (run / "model").exists()
    assert train_sft.main([*argv, "--merge"]) == 0 and (run / "model").exists()


def test_an_adapter_run_can_be_trained_on_in_full(problems, tmp_path):
    """The adapters are merged, and then every weight trains."""
    train_sft.main([*problems, "--lora", "--out", str(tmp_path / "a")])
    train_sft.main([*problems, "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
    before, after = load_model(tmp_path / "a", merge=True)[0], load_model(tmp_path / "b")[0]
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        assert (p - q).abs().max() > 1e-5, name


def test_a_run_does_not_overwrite_the_model_it_starts_from(problems, tmp_path):
    train_sft.main([*problems, "--out", str(tmp_path / "a")])
    for model in ("a", "a/model"):
        start = ["--model", str(tmp_path / model)]
        with pytest.raises(UserError, match="choose another --out"):
            train_sft.main([*problems, *start, "--out", str(tmp_path / "a"), "--overwrite"])
    load_model(tmp_path / "a")


@pytest.mark.parametrize(
    "at", [pytest.param(2, marks=slow), 6], ids=["in the middle", "at the end"]
)
def test_a_stop_during_validation_saves_and_continues_exactly(problems, tmp_path, monkeypatch, at):
    argv = [*problems, "--lora", "--val-every", "2", "--save-every", "99"]
    assert train_sft.main([*argv, "--out", str(tmp_path / "whole")]) == 0

    real, stop = train_sft.console.graceful_stop, []

    @contextlib.contextmanager
    def stoppable():
        with real() as s:
            stop.append(s)
            yield s

    original = train_sft.generate.answer_and_mark
    seen = []

    def interrupted(*args, progress, **kw):
        seen.append(None)
        if len(seen) == 1 + at // 2:  # validations are at 0, 2, 4, 6
            stop[-1].requested = signal.SIGTERM
            progress(0, 0)
        return original(*args, progress=progress, **kw)

    monkeypatch.setattr(train_sft.console, "graceful_stop", stoppable)
    monkeypatch.setattr(train_sft.generate, "answer_and_mark", interrupted)
    assert train_sft.main([*argv, "--out", str(tmp_path / "cut")]) == 143
    monkeypatch.setattr(train_sft.generate, "answer_and_mark", original)
    assert train_sft.main([*argv, "--out", str(tmp_path / "cut")]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_keep_best_keeps_the_weights_of_the_best_validation(problems, tmp_path, monkeypatch):
    scores = iter([0.25, 0.25, 0.75, 0.5])  # at steps 0, 2, 4 and 6; the loss decides a tie
    rows = lambda *a, **k: [VALIDATED | {"correct": next(scores)}]  # noqa: E731
    monkeypatch.setattr(train_sft.generate, "answer_and_mark", rows)
    seen = {}
    real = models.save_adapter

    def save(model, folder, base):
        real(model, folder, base)
        seen[len(seen)] = {n: p.clone() for n, p in model.named_parameters() if "lora_B" in n}

    monkeypatch.setattr(models, "save_adapter", save)
    out = tmp_path / "run"
    train_sft.main([*problems, "--lora", "--val-every", "2", "--keep", "best", "--out", str(out)])
    assert len(seen) == 3  # 0.25, 0.25 at a lower loss, 0.75; not 0.5
    saved = load_file(out / "adapter/adapter_model.safetensors")
    for name, p in seen[2].items():
        assert torch.equal(saved[PREFIX + name], p)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["step"], summary["val_exact_match"]) == (4, 0.75)


def test_a_non_finite_loss_stops_the_run_and_names_the_problems(problems, tmp_path):
    with pytest.raises(UserError, match=r"at step \d.*problems \[\d+, .*lower --lr"):
        train_sft.main([*problems, "--lr", "1e30", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run/model").exists()


def test_examples_over_the_limit_are_left_out_with_a_message_and_never_cut(
    problems, tmp_path, capsys
):
    tokenizer = data.Tokenizer(FIXTURES / "gemma3")
    rows = data.read_jsonl(tmp_path / "sums.jsonl")
    lengths = [len(data.encode(tokenizer, data.Prompt(), p.question, p.answer)[0]) for p in rows]
    kept = encode_all(tokenizer, rows, data.Prompt(), sorted(lengths)[5])
    assert max(len(e.ids) for e in kept) == sorted(lengths)[5] and len(kept) < 12
    assert all(e.ids[-1] == tokenizer.eos_id for e in kept)
    assert f"left out {12 - len(kept)} of 12" in capsys.readouterr().out
    with pytest.raises(UserError, match="every example is longer than --max-seq-length 5"):
        train_sft.main([*problems, "--max-seq-length", "5", "--out", str(tmp_path / "run")])


def test_dry_run_needs_no_weights_and_writes_nothing(problems, tmp_path, capsys):
    model = tmp_path / "no-weights"
    shutil.copytree(FIXTURES / "gemma3", model, ignore=shutil.ignore_patterns("*.safetensors"))
    argv = [*problems, "--model", str(model), "--lora", "--dry-run", "--out", str(tmp_path / "run")]
    assert train_sft.main(argv) == 0
    out = capsys.readouterr().out
    assert "50,328 parameters" not in out and "43,008 trained" in out  # 93,336 with adapters
    assert "6 of 2 x 2 examples" in out and "MiB, an estimate" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--epochs", "0"], "--epochs"),
        (["--micro-batch", "-1"], "--micro-batch"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--min-lr", "1"], "--min-lr"),
        (["--warmup", "2"], "--warmup"),
        (["--max-grad-norm", "0"], "--max-grad-norm is 0"),
        (["--merge"], "--merge needs --lora"),
        (["--keep", "best"], "--keep best needs --val-every"),
        (["--patience", "2"], "--patience needs --val-every"),
        (["--patience", "-1"], "--patience is -1: give at least 0"),
        (["--patience", "1", "--val-every", "1", "--val-examples", "0"], "nothing to choose by"),
        (["--pause-at", "0"], "--pause-at is 0: give at least 1"),
        (["--val-use", "3"], "--val-use 3: only 2 problems are held out"),
        (["--val-examples", "99"], "--val-examples 99"),
        (["--device", "tpu"], "--device tpu"),
        (["--device", "cuda:x"], "--device cuda:x"),
        (["--seed", str(10**14)], "--seed"),
        (["--model", "no/such/folder"], "no such folder"),
        (["--data", "grade-school"], "main, socratic, math or a file that ends"),
    ],
)
def test_bad_flags_are_named(problems, flags, says, tmp_path):
    with pytest.raises(UserError, match=says):
        train_sft.main([*problems, "--out", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()


def peft_adapter(folder, base, some_layers: bool) -> None:
    """PEFT's fixture, with rank-stabilised scaling, on all layers or on two of them."""
    shutil.copytree(FIXTURES / "gemma3_peft", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": str(base), "use_rslora": True}
    if some_layers:
        config |= {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}
        tensors = load_file(folder / "adapter_model.safetensors")
        kept = {k: t for k, t in tensors.items() if re.search("layers.1.*(q_proj|up_proj)", k)}
        save_file(kept, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("some_layers", [False, True])
def test_an_adapter_is_trained_further(problems, tmp_path, some_layers, capsys):
    """Its own matrices, r, scale and layers. With AdamW's first step every entry of A and B that
    has a gradient moves by the learning rate, whatever the gradient's size."""
    base, start, out = FIXTURES / "gemma3", tmp_path / "a", tmp_path / "b"
    peft_adapter(start, base, some_layers)
    argv = [*problems, "--lora", "--model", str(start), "--out", str(out), "--epochs", "1"]
    argv += ["--max-examples", "4", "--micro-batch", "4", "--accumulation", "1", "--lr", "1e-3"]
    train_sft.main([*argv, "--warmup", "0", "--optim", "adamw", "--max-grad-norm", "1e9"])
    said = capsys.readouterr().out
    layers = 2 if some_layers else 7 * load_model(base)[0].config.num_hidden_layers
    assert f"adapters on {layers} layers" in said
    assert "trained further, with its r 4 and alpha 16\n" in said  # 8 / sqrt(4) * 4
    before = load_file(start / "adapter_model.safetensors")
    after = load_file(out / "adapter/adapter_model.safetensors")
    assert f"{sum(t.numel() for t in before.values()):,} trained" in said
    assert after.keys() == before.keys()
    for name in before:
        moved = (after[name] - before[name]).abs()
        assert moved.max() <= 1.01e-3 and (moved > 0.9e-3).float().mean() > 0.9, name
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 16)
    again, _ = load_model(out)  # our own reader finds nothing amiss in its layers
    assert len(lora.adapters(again)) == layers


def test_a_run_that_starts_from_another_takes_over_its_prompt_and_held_out_problems(
    problems, tmp_path
):
    """Or it would be validated on problems that the first run was trained on."""
    first = [*problems, "--style", "chat", "--instruction", "--out", str(tmp_path / "a")]
    train_sft.main(first)
    argv = [*problems, "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    at = argv.index("--val-examples")
    args = train_sft.parse_args(argv[:at] + argv[at + 2 :])
    assert (args.style, args.instruction) == ("chat", True)
    assert args.val_examples == int(argv[at + 1])
    args = train_sft.parse_args([*argv, "--style", "plain", "--no-instruction"])
    assert (args.style, args.instruction) == ("plain", False)
    other = train_sft.parse_args([*argv[:at], *argv[at + 2 :], "--data", "main"])
    assert other.val_examples is None  # other problems: nothing is known of them


def test_the_rank_of_an_adapter_that_is_trained_further_is_its_own(problems, tmp_path):
    peft_adapter(tmp_path / "a", FIXTURES / "gemma3", False)
    argv = [*problems, "--lora", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    for flags, says in [
        (["--lora-r", "8"], "--lora-r 8: the adapter in .* has 4, and keeps it"),
        (["--lora-alpha", "8"], "--lora-alpha 8: the adapter in .* has 16, and keeps it"),
    ]:
        with pytest.raises(UserError, match=says):
            train_sft.main([*argv, *flags])
    assert train_sft.main([*argv, "--lora-r", "4", "--lora-alpha", "16", "--dry-run"]) == 0


def test_the_base_of_an_adapter_can_be_named(problems, tmp_path):
    """--base: an adapter whose own base is somewhere else on another machine."""
    peft_adapter(tmp_path / "a", "/home/somebody/gemma", False)
    argv = [*problems, "--lora", "--model", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    with pytest.raises(UserError, match="no such folder: '/home/somebody/gemma'"):
        train_sft.main(argv)
    base = str(FIXTURES / "gemma3")
    assert train_sft.main([*argv, "--base", base]) == 0
    config = json.loads((tmp_path / "b/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base  # so the result needs no --base
    with pytest.raises(UserError, match="--base tiny names the base of an adapter, but"):
        train_sft.main([*problems, "--base", "tiny", "--out", str(tmp_path / "c")])


def test_recipes_set_what_is_not_given():
    args = train_sft.parse_args(["--device", "cpu", "--recipe", "original"])
    assert (args.lr, args.min_lr, args.warmup) == (1e-5, pytest.approx(1e-6), 0.0)
    assert (args.micro_batch, args.accumulation, args.epochs) == (8, 2, 1)
    assert (args.optim, args.checkpointing) == ("adamw8bit", "light")
    assert args.out == "runs/sft-full-main"
    flags = ["--device", "cpu", "--lora", "--recipe", "tuned", "--warmup", "0"]
    tuned = train_sft.parse_args(flags)
    assert (tuned.lr, tuned.warmup, tuned.out) == (2e-4, 0.0, "runs/sft-lora-main")
    assert (tuned.lora_r, tuned.lora_alpha) == (None, None)  # until the model is known


def test_a_run_that_starts_from_another_has_a_folder_of_its_own(tmp_path, monkeypatch):
    """Without --out. sft-full-main may be that other run, or one that has nothing to do with it."""
    monkeypatch.chdir(tmp_path)
    started = tmp_path / "runs/tiny/sft-full-main"
    started.mkdir(parents=True)
    record = {"args": {"val_examples": 4, "tiny": True}, "info": {"prompt": {}}}
    (started / "run_args.json").write_text(json.dumps(record))
    args = train_sft.parse_args(["--device", "cpu", "--model", "runs/tiny/sft-full-main"])
    assert args.out == "runs/tiny/sft-full-main-from-sft-full-main"
    args = train_sft.parse_args(["--device", "cpu", "--model", str(started), "--out", "mine"])
    assert args.out == "mine"


def test_held_out_questions_that_are_also_trained_on_are_counted(tmp_path, capsys):
    rows = [{"question": f"{i % 9} + 1?", "answer": f"#### {i % 9 + 1}"} for i in range(10)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = []
    for n in range(1, 9):  # 0 + 1? is asked twice: it is counted once one of the two is held out
        argv = ["--model", str(FIXTURES / "gemma3"), "--data", str(tmp_path / "d.jsonl")]
        train_sft.main([*argv, "--val-examples", str(n), "--device", "cpu", "--dry-run"])
        said.append(f"note: 1 of {n} held-out problems are also trained" in capsys.readouterr().out)
    problems = data.load_problems(str(tmp_path / "d.jsonl"), "train")
    halves = [data.split_validation(problems, n) for n in range(1, 9)]
    asked = [[sum(p.question == "0 + 1?" for p in half) for half in both] for both in halves]
    assert said == [both == [1, 1] for both in asked] and any(said) and not all(said)


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of this kind")
def test_a_closed_terminal_saves_and_ends_the_run(tmp_path):
    """As when an ssh connection drops: the terminal is gone, SIGHUP comes, print() fails."""
    out = tmp_path / "run"
    argv = [*"--tiny --val-examples 0 --save-every 1000 --device cpu --out".split(), str(out)]
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, train_sft.__file__, *argv])
    said = b""
    while b"step 2/" not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)
    for _ in range(1200):  # two minutes: a busy machine is not a fault
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
    assert ended and os.waitstatus_to_exitcode(status) == 129
    rows = (out / "metrics.jsonl").read_text().splitlines()
    assert len(rows) >= 2 and [p.name for p in (out / "checkpoint").iterdir()] == [
        f"step-{len(rows)}"
    ]


def test_held_out_problems_that_are_all_too_long_are_left_out_aloud(tmp_path, capsys):
    """The training examples fit: that must not end the run."""
    rows = [data.Problem(f"{i}?", "#### 2", i) for i in range(40)]
    _, held_out = data.split_validation(rows, 2)
    long = {problem.index for problem in held_out}
    text = [
        {"question": f"{i}?" + " long" * 300 * (i in long), "answer": "#### 2"} for i in range(40)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, text)))
    argv = ["--tiny", "--data", str(file), "--val-examples", "2", "--max-seq-length", "100"]
    argv += ["--epochs", "1"]
    argv += ["--max-new-tokens", "4", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert train_sft.main(argv) == 0
    assert "left out 2 of 2 held-out examples" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_loss"] is None and rows[-1]["val_exact_match"] == 0


@pytest.mark.parametrize("move", [False, True])
def test_a_model_that_moved_or_is_spelt_otherwise_is_the_same_model(problems, tmp_path, move):
    """Its digest decides, as for data."""
    shutil.copytree(FIXTURES / "gemma3", tmp_path / "base")
    argv = [*problems, "--val-examples", "0", "--out", str(tmp_path / "run")]
    at = argv.index("--model") + 1
    argv[at] = str(tmp_path / "base")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        real = train_sft.cosine_with_min_lr

        def dies(step, *rest):
            if step == 1:
                raise RuntimeError("killed")
            return real(step, *rest)

        patch.setattr(train_sft, "cosine_with_min_lr", dies)
        train_sft.main([*argv, "--save-every", "1"])
    if move:
        (tmp_path / "base").rename(tmp_path / "elsewhere")
        argv[at] = str(tmp_path / "elsewhere")
    else:
        argv[at] += "/"
    assert train_sft.main([*argv, "--save-every", "1"]) == 0
