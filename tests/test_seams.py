"""The plain forms and the fast ones give the same training runs.

SFT (full and LoRA), PPO and an evaluation of the embedded model run twice: as shipped, and with
everything of nanogsm/fast/ switched off. Then log-probs are those of `logprob.definition`, the
embedding is PyTorch's, no weight is packed for the CPU, and nothing is computed again in backward.
"""

import json
from pathlib import Path

import pytest
import torch

import evaluate
import train_ppo
import train_sft
from nanogsm import logprob, transformer
from nanogsm import model as models
from nanogsm.fast import cpu, head

# The same numbers are added up in another order. float32 has 7 digits, and Adam divides a gradient
# by its own size, so that the digits lost in small gradients reach the weights.
LOSS = 1e-5  # relative difference of losses and other metrics
WEIGHTS = 1e-3  # length of the difference of two runs' weights, over how far training moved them


@pytest.fixture
def count(monkeypatch):
    """count(module, name) replaces a function by itself and returns a list that grows by one entry
    with every call."""

    def replace(module, name: str, function=None) -> list:
        calls, real = [], function or getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or real(*a, **k))
        return calls

    return replace


def switch_off(monkeypatch) -> None:
    monkeypatch.setattr(models, "use_fast_forms", lambda model: None)
    monkeypatch.setattr(cpu, "can_pack", lambda *_: False)


def runs(folder: Path, checkpointing: str) -> None:
    """Two steps of SFT, full and LoRA, one step of PPO with four updates, and an evaluation each."""
    common = ["--tiny", "--device", "cpu", "--optim", "adamw", "--checkpointing", checkpointing]
    common += ["--val-examples", "4", "--max-new-tokens", "12"]
    sft = ["--recipe", "tuned", "--max-examples", "32", "--micro-batch", "8"]
    ppo = ["--recipe", "tuned", "--init", "tiny", "--steps", "1", "--rollouts", "32"]
    ppo += ["--micro-batch", "4", "--accumulation", "2", "--entropy-coef", "0.01"]
    for script, name, flags in (
        (train_sft, "full", sft),
        (train_sft, "lora", [*sft, "--lora"]),
        (train_ppo, "ppo", ppo),
    ):
        assert script.main([*common, *flags, "--out", str(folder / name)]) == 0
        argv = ["--model", str(folder / name), "--n", "16", "--max-new-tokens", "12"]
        assert evaluate.main([*argv, "--device", "cpu"]) == 0


def rows(folder: Path, pattern: str) -> list[dict]:
    [file] = folder.glob(pattern)
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_and_answering_do_not_depend_on_the_fast_forms(tmp_path, monkeypatch, count):
    monkeypatch.setattr(train_ppo, "reward", lambda text, problem: float(len(text) % 2))
    fast = [count(head, "_block"), count(head, "lookup"), count(cpu, "pack")]
    fast.append(count(transformer, "checkpoint"))
    runs(tmp_path / "shipped", "light")
    assert all(fast)
    for calls in fast:
        calls.clear()
    plain = count(logprob, "scores", logprob.definition)
    switch_off(monkeypatch)
    runs(tmp_path / "plain", "none")
    assert plain and not any(fast)

    start = weights(models.load_model("tiny")[0])
    for name in ("full", "lora", "ppo"):
        a, b = tmp_path / "shipped" / name, tmp_path / "plain" / name
        for x, y in zip(rows(a, "metrics.jsonl"), rows(b, "metrics.jsonl"), strict=True):
            for key in x:
                if "seconds" not in key and "memory" not in key: print(name, key, x[key], y[key])
        moved_a, moved_b = (weights(models.load_model(f, merge=True)[0]) - start for f in (a, b))
        print(name, ((moved_a-moved_b).norm()/moved_a.norm()).item(), (moved_a-moved_b).abs().max().item(), moved_a.abs().max().item(), ((moved_a-moved_b).abs()>1e-6).sum().item())
        print([r["completion"] for r in rows(a, "eval-*.jsonl")][:4], rows(a,"eval-*.jsonl")==rows(b,"eval-*.jsonl"), rows(a,"samples.jsonl")==rows(b,"samples.jsonl"))
