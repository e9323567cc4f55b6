"""The pure parts of the PPO experiments in benchmarks/: pairing, tables, the patches' effect."""

import json

import pytest
import torch

import train_ppo
from experiments import ppo_ablation, ppo_curves
from nanogsm import UserError


def test_pairing_counts_what_was_fixed_and_broken():
    before = {i: {"correct": i < 3} for i in range(10)}  # 3 right
    after = {i: {"correct": i in (0, 4, 5, 6, 7, 8)} for i in range(10)}  # 1 kept, 2 broken, 5 fixed
    found = ppo_curves.before_and_after(before, after)
    assert (found["before"], found["after"], found["fixed"], found["broken"]) == (0.3, 0.6, 5, 2)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 7 + 21) / 2**7)  # two-sided, of a fair coin
    with pytest.raises(UserError, match="different problems"):
        ppo_curves.before_and_after(before, {0: before[0]})


def test_every_row_of_the_ablation_is_a_command_that_parses():
    rows = ppo_ablation.rows()
    assert {"report", "tuned", "report, but tuned's gamma", "tuned, but a separate critic"} <= rows.keys()
    for row, (flags, _) in rows.items():
        args = train_ppo.parse_args(["--tiny", *flags])
        assert args.recipe == row.split(",")[0]
    assert train_ppo.parse_args(["--tiny", *rows["report, but tuned's gamma"][0]]).gamma == 1.0


def test_the_table_pairs_rows_with_their_recipe_seed_by_seed(capsys):
    def result(row, seed, exact_match):
        return {"row": row, "seed": seed, "exact_match": exact_match, "mean_reward": 0.3,
                "kl_sequence": 1.0, "response_tokens": 40}  # fmt: skip

    ppo_ablation.table([
        result("report", 0, 0.40), result("report", 1, 0.50), result("report, but x", 0, 0.44),
        result("report, but x", 1, 0.56), result("report, but y", 0, 0.41), result("report, but y", 1, 0.55),
        result("report, but z", 0, 0.40), result("report, but z", 1, 0.50),
    ])  # fmt: skip
    # Differences of 4 and 6 points, 1 and 5: variances 2 and 8, pooled 5; 1.96 sqrt(5 / 2) = 3.1.
    table = capsys.readouterr().out
    assert "| report, but x | 50.0 | +5.0 ± 3.1 |" in table
    assert "| report, but y | 48.0 | +3.0 ± 3.1 |" in table
    assert "| report, but z | 45.0 | the same |" in table


def test_finished_rows_of_the_same_setting_are_not_run_again(tmp_path, monkeypatch, capsys):
    ran = []

    def run(flags, seed, args, folder):
        ran.append((seed, args.steps))
        return dict.fromkeys(("exact_match", "mean_reward", "seconds", "kl_sequence", "response_tokens"), 0.5)

    monkeypatch.setattr(ppo_ablation, "run", run)
    argv = ["--out", str(tmp_path / "rows.jsonl"), "--seeds", "2", "--only", "tuned's gamma"]
    ppo_ablation.main([*argv, "--steps", "5"])
    ppo_ablation.main([*argv, "--steps", "5"])
    assert ran == [(0, 5), (1, 5)]
    ppo_ablation.main([*argv, "--steps", "6"])
    assert ran[2:] == [(0, 6), (1, 6)]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == [5, 5, 6, 6]


def test_whitening_by_update_gives_each_update_mean_0_and_variance_1(monkeypatch):
    torch.manual_seed(0)
    mask = torch.rand(6, 7) < 0.7
    advantages = torch.where(mask, 3 + 2 * torch.randn(6, 7), 0.0)
    updates = [[slice(0, 2), slice(2, 3)], [slice(3, 6)]]
    rollout = train_ppo.Rollout(None, [], mask, None, None, advantages, None, updates, [])
    seen = []
    monkeypatch.setattr(ppo_ablation, "real_update", lambda models, rollout, *_: seen.append(rollout))
    ppo_ablation.whitened_by_update(None, rollout)
    for rows in (slice(0, 3), slice(3, 6)):
        part = seen[0].advantages[rows][mask[rows]]
        assert part.mean().abs() < 1e-6 and part.var(correction=0) == pytest.approx(1, abs=1e-4)
