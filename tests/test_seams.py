"""The plain forms and the fast ones give the same runs.

SFT (full and LoRA), PPO and evaluation of the embedded model run twice: as shipped, and with all of
nanogsm/fast/ switched off. Then log-probs come from `logprob.definition`, the embedding is
PyTorch's own, no weight is packed for the CPU, and backward computes nothing again.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import slow

import evaluate
import train_ppo
import train_sft
from nanogsm import logprob, transformer
from nanogsm import model as models
from nanogsm.fast import cpu, head

# The two forms add the same numbers in a different order. In float32 that changed metrics by 3 in a
# million and weights by 1e-4 of the way they moved, because Adam divides a gradient by its own
# size: what is rounded in a small gradient is as large in the update.
METRICS = {"rel": 1e-5, "abs": 1e-6}
WEIGHTS = 1e-3  # length of the difference of the weights, over the length of their change


@pytest.fixture
def count(monkeypatch):
    """count(module, name) puts a counting function in the place of one, by default around that one
    itself. Returns a list that gets an entry with each call."""

    def replace(module, name: str, function=None) -> list:
        calls, real = [], function or getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or real(*a, **k))
        return calls

    return replace


def run_all(folder: Path, checkpointing: str) -> None:
    """Four steps of SFT, full and LoRA, two of PPO with four updates each; evaluate each result."""
    common = ["--tiny", "--device", "cpu", "--recipe", "tuned", "--optim", "adamw"]
    common += ["--checkpointing", checkpointing, "--val-examples", "4", "--max-new-tokens", "12"]
    sft = ["--max-examples", "32", "--epochs", "1", "--micro-batch", "4", "--accumulation", "2"]
    ppo = ["--init", "tiny", "--steps", "2", "--rollouts", "32", "--micro-batch", "4"]
    ppo += ["--accumulation", "2", "--temperature", "0.9", "--entropy-coef", "0.01"]
    for script, name, flags in (
        (train_sft, "full", sft),
        (train_sft, "lora", [*sft, "--lora"]),
        (train_ppo, "ppo", ppo),
    ):
        run = str(folder / name)
        assert script.main([*common, *flags, "--out", run]) == 0
        argv = ["--model", run, "--n", "16", "--max-new-tokens", "12", "--device", "cpu"]
        assert evaluate.main(argv) == 0


def rows(folder: Path, pattern: str) -> list[dict]:
    """The rows of a file, without what depends on the clock and the machine."""
    [file] = folder.glob(pattern)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    changing = ("seconds", "peak_memory")
    return [{k: v for k, v in row.items() if not k.startswith(changing)} for row in found]


def weights(name: Path | str) -> torch.Tensor:
    model, _ = models.load_model(name, merge=True)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@slow
def test_runs_do_not_depend_on_the_fast_forms(tmp_path, monkeypatch, count):
    # The embedded model solves nothing yet. This reward gives PPO something to learn all the same.
    monkeypatch.setattr(train_ppo, "reward", lambda text, *_: float(len(text) % 2))
    # Its vocabulary would be a single block. Cut it into several, and keep exponentials of some.
    monkeypatch.setitem(head.BLOCK_LOGITS, "cpu", 1)
    monkeypatch.setattr(head, "BLOCK_MULTIPLE", 64)
    monkeypatch.setitem(head.KEPT_EXPONENTIALS, "cpu", 30_000)
    monkeypatch.setattr(cpu, "VOCABULARY_BLOCK", 100)
    fast = [
        count(head, "_block"),  # called for every block of head.scores
        count(head, "lookup"),
        count(cpu, "pack"),
        count(transformer, "checkpoint"),
    ]
    run_all(tmp_path / "fast", "light")
    assert all(fast)

    for calls in fast:
        calls.clear()
    plain = count(logprob, "scores", logprob.definition)
    monkeypatch.setattr(models, "use_fast_forms", lambda model: None)
    monkeypatch.setattr(cpu, "can_pack", lambda *_: False)
    run_all(tmp_path / "plain", "none")
    assert plain and not any(fast)

    start = weights("tiny")
    for name in ("full", "lora", "ppo"):
        a, b = tmp_path / "fast" / name, tmp_path / "plain" / name
        logs = zip(rows(a, "metrics.jsonl"), rows(b, "metrics.jsonl"), strict=True)
        for row_a, row_b in logs:
            assert row_a == pytest.approx(row_b, **METRICS), (name, row_a["step"])
        for answers in ("samples.jsonl", "eval-*.jsonl"):  # sampled with scores, and greedy
            assert rows(a, answers) == rows(b, answers), (name, answers)
        moved, difference = weights(a) - start, weights(a) - weights(b)
        assert difference.norm() < WEIGHTS * moved.norm(), name
    rewards = [row["reward"] for row in rows(tmp_path / "fast/ppo", "metrics.jsonl") if "kl" in row]
    assert len(rewards) == 2 and all(0 < reward < 1 for reward in rewards)
