"""RLOO and GRPO: train_ppo.py's loop with groups of answers in the place of a critic."""

import json
import math
import os
import signal

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file

import evaluate
import train_ppo
from nanogsm import UserError, data
from nanogsm.model import read_config
from nanogsm.optim import AdamW
from nanogsm.report import page
from nanogsm.run import plan
from nanogsm.run.health import health
from train_ppo import group_advantages, policy_loss, token_rewards

METHODS = ("rloo", "grpo")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(rows, columns=9):
    """Answers of different lengths at different places."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for b in range(rows):
        mask[b, b % 3 : columns - (b * 5) % 4] = True
    return mask


def by_hand(rewards, mask, group, method):
    """Slow loops in float64. Each baseline is computed without the answer it is for."""
    rewards = rewards.double()
    totals = [sum(rewards[b, t].item() for t in range(rewards.shape[1])) for b in range(len(mask))]
    found = torch.zeros_like(rewards)
    for b, total in enumerate(totals):
        mine = totals[b // group * group : b // group * group + group]
        others = [x for i, x in enumerate(mine) if i != b % group]
        advantage = total - sum(others) / len(others)
        if method == "grpo":
            mean = sum(mine) / group
            deviation = math.sqrt(sum((x - mean) ** 2 for x in mine) / (group - 1))
            advantage = (total - mean) / (deviation + 1e-6)
        for t in range(rewards.shape[1]):
            found[b, t] = advantage if mask[b, t] else 0.0
    return found


# --------------------------------------------------------------------------------------- the math


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", [2, 3, 4, 12])
def test_the_advantages_are_those_of_slow_loops(method, group):
    mask = masks(12)
    rewards = token_rewards(noise(12, seed=1), noise(12, 9), noise(12, 9, seed=2), mask, 0.1)
    got = group_advantages(rewards, mask, group, method)
    want = by_hand(rewards, mask, group, method)
    assert torch.allclose(got.double(), want, atol=2e-6) and (got[~mask] == 0).all()
    assert (got != 0).any(1).all()


def test_the_advantages_of_four_answers_worked_by_hand():
    """Right, wrong, wrong, wrong: 1 against a mean of 0, and 0 against a mean of 1/3."""
    mask = torch.tensor([[True, True], [False, True], [True, False], [True, True]])
    rewards = token_rewards(torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, 2), torch.zeros(4, 2),
                            mask, 0.0)  # fmt: skip
    rloo = group_advantages(rewards, mask, 4, "rloo")
    third = -1 / 3
    want = torch.tensor([[1, 1], [0, third], [third, 0], [third, third]])
    assert torch.allclose(rloo, want)
    # m = 1/4; s with n - 1 is sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2.
    grpo = group_advantages(rewards, mask, 4, "grpo")
    assert grpo[:, 1].tolist() == pytest.approx([1.5, -0.5, 0, -0.5], abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_changes_nothing_but_rounding(method):
    mask, scores, zero = masks(12), noise(12, seed=1), torch.zeros(12, 9)
    one, other = (
        group_advantages(token_rewards(scores + c, zero, zero, mask, 0.0), mask, 4, method)
        for c in (0.0, 7.0)
    )
    assert torch.allclose(one, other, atol=1e-5)
    # Of one group alone, too: the others' baselines do not see it.
    shifted = scores + torch.tensor([3.0, 0, 0]).repeat_interleave(4)
    third = group_advantages(token_rewards(shifted, zero, zero, mask, 0.0), mask, 4, method)
    assert torch.allclose(one, third, atol=1e-5) and torch.equal(one[4:], third[4:])


def test_grpo_does_not_know_the_scale_of_the_rewards_and_rloo_does():
    mask, rewards = masks(12), torch.where(masks(12), noise(12, 9), 0.0)
    for method, factor in (("grpo", 1), ("rloo", 100)):
        one, large = (group_advantages(x, mask, 3, method) for x in (rewards, 100 * rewards))
        assert torch.allclose(large, factor * one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("score", [0.0, 1.0, 0.1, -3.7])
@pytest.mark.parametrize("group", [2, 3, 7])
def test_equal_rewards_give_exactly_zero(method, score, group):
    """Also where their mean is not exactly the reward: 0.1 seven times, divided by 7."""
    mask = masks(42)
    same = torch.full((42,), score)
    rewards = token_rewards(same, noise(42, 9), noise(42, 9, seed=1), mask, 0.0)
    assert not group_advantages(rewards, mask, group, method).any()


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.25, 2.0, -2.5, -2.5),  # above 1 + clip, below 1 + high
        (1.5, 2.0, -2.56, 0.0),
        (0.5, -2.0, 1.6, 0.0),  # the lower clip stays
        (0.75, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_asymmetric_clip_by_hand(ratio, advantage, loss, slope):
    logp = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    given = torch.tensor([[-1.0]]), torch.tensor([[advantage]])
    got, clipped = policy_loss(logp, *given, 0.2, 0.28)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-5) and clipped.item() == (slope == 0)
    assert logp.grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-7)
    same = policy_loss(logp, *given, 0.2), policy_loss(logp, *given, 0.2, 0.2)
    assert torch.equal(same[0][0], same[1][0])


# ---------------------------------------------------------------------------------------- one step


def setup_of(gemma, **changes):
    """train_ppo.set_up for a fixture model. Nothing but `changes` differs from the flags."""
    args = train_ppo.parse_args(["--advantage", "rloo", "--group", "4", "--rollouts", "8",
                                 "--device", "cpu", "--precision", "fp32"])  # fmt: skip
    small = {"lr": 1e-2, "micro_batch": 3, "accumulation": 2, "checkpointing": "none"}
    args.__dict__.update({"lora_r": 4, "kl_coef": 0.0} | small | changes)
    base, tokenizer = gemma("gemma3", torch.float32)
    models = train_ppo.build(base, args)
    policy = AdamW(models.policy_weights().items(), args.lr)
    return train_ppo.Setup(models, policy, None, tokenizer, data.Prompt(), args,
                           lambda: torch.autocast("cpu", enabled=False))  # fmt: skip


def answers(scores):
    rng = torch.Generator().manual_seed(0)
    rows = []
    for i, score in enumerate(scores):
        prompt = torch.randint(7, 300, (2 + i % 3,), generator=rng).tolist()
        response = torch.randint(7, 300, (1 + i,), generator=rng).tolist()
        example = data.Example(prompt + response, [0] * len(prompt) + [1] * len(response), i)
        rows.append({"example": example, "score": score, "correct": score == 1,
                     "truncated": False, "completion": "2"})  # fmt: skip
    return rows


def stepped(setup, scores, step=0):
    """One step of the loop on made-up answers: (metrics, whether any weight moved)."""
    args, rows = setup.args, answers(scores)
    rollout = train_ppo.score(setup, rows)
    rewards = token_rewards(rollout.scores, rollout.logp, rollout.ref_logp, rollout.mask,
                            args.kl_coef)  # fmt: skip
    advantages = group_advantages(rewards, rollout.mask, args.group, args.advantage)
    metrics = train_ppo.rollout_metrics(rows, rollout, rewards, None, args)
    before = {n: p.detach().clone() for n, p in setup.models.policy_weights().items()}
    metrics |= train_ppo.update(setup, rollout, advantages, None, step)
    now = setup.models.policy_weights()
    return metrics, any(not torch.equal(before[n], now[n]) for n in before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", [False, True])
def test_equal_scores_move_no_weight_by_a_gradient_of_exactly_0(gemma, method, lora):
    """Equal in each group, not in all. 0.1 is no sum of powers of two."""
    setup = setup_of(gemma, advantage=method, lora=lora)
    metrics, moved = stepped(setup, [0.1] * 4 + [1.0] * 4)
    assert metrics["grad_norm"] == 0 and not moved and metrics["moved"] == 0
    assert metrics["groups_without_spread"] == 1 and metrics["reward_std"] > 0
    metrics, moved = stepped(setup, [0.0, 1.0, 0.0, 0.0] + [1.0] * 4)
    assert metrics["grad_norm"] > 0 and moved and metrics["groups_without_spread"] == 0.5
    assert metrics["first_ratio_error"] == 0


def test_the_update_is_the_same_however_it_is_cut(gemma):
    """A group may lie in two micro-batches and in two updates: the advantages are made before."""
    found = []
    for micro_batch, accumulation in ((8, 1), (3, 3), (1, 8)):
        setup = setup_of(gemma, micro_batch=micro_batch, accumulation=accumulation)
        found.append(stepped(setup, [0.0, 1, 0, 1, 0, 0, 0, 1])[0])
    for metrics in found[1:]:
        assert metrics == pytest.approx(found[0], rel=1e-4, abs=1e-6)


def test_nothing_of_a_critic_is_there(gemma):
    setup = setup_of(gemma)
    assert setup.models.value_head is None and setup.models.critic is setup.models.actor
    assert setup.models.value_weights() == {}
    metrics, _ = stepped(setup, [0.0, 1, 0, 1, 0, 0, 0, 1])
    absent = {"explained_variance", "value", "return", "value_loss", "value_clipped",
              "value_grad_norm"}  # fmt: skip
    assert not absent & metrics.keys()


def test_a_group_is_one_problem_asked_several_times():
    drawn = [data.problems_of_step(list(range(10)), step, 12, 3, 4) for step in range(5)]
    assert all(len(step) == 12 for step in drawn)
    for step in drawn:
        assert all(len(set(step[i : i + 4])) == 1 for i in (0, 4, 8))
    firsts = [step[i] for step in drawn for i in (0, 4, 8)]
    plain = [data.problems_of_step(list(range(10)), step, 3, 3) for step in range(5)]
    assert firsts == sum(plain, []) and sorted(firsts[:10]) == list(range(10))


# --------------------------------------------------------------------------------------- the flags


def parsed(*argv):
    return train_ppo.parse_args([*argv, "--device", "cpu"])


def test_the_flags_and_what_they_are_without_a_group():
    plain = parsed()
    assert (plain.advantage, plain.group, plain.clip_high) == (None, None, None)  # as older records
    assert vars(parsed("--advantage", "gae")) == vars(plain)
    rloo = parsed("--advantage", "rloo")
    assert (rloo.group, rloo.out, rloo.init) == (8, "runs/rloo-full-main", "runs/sft-full-main")
    grpo = parsed("--advantage", "grpo", "--lora", "--tiny", "--group", "16")
    assert (grpo.group, grpo.out) == (16, "runs/tiny/grpo-lora-main")
    for args in (rloo, grpo):
        assert args.critic is args.value_lr is args.value_coef is args.value_clip is None
        assert (args.critic_warmup, args.gamma, args.lam) == (0, 1.0, 1.0)
    assert parsed("--clip-high", "0.2").clip_high == 0.2  # as --clip
    original = parsed("--advantage", "rloo", "--recipe", "original")
    assert (original.gamma, original.kl_coef, original.lr) == (1.0, 0.05, 5e-7)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--group", "4"], "--group needs --advantage rloo or grpo"),
        (["--advantage", "gae", "--group", "4"], "--group needs --advantage"),
        (["--advantage", "rloo", "--group", "1"], "--group is 1: give at least 2"),
        (["--advantage", "rloo", "--group", "0"], "--group is 0: give at least 2"),
        (["--advantage", "grpo", "--group", "3"], "--rollouts 512 is no multiple of --group 3"),
        (["--advantage", "rloo", "--rollouts", "4"], "--rollouts 4 is no multiple of --group 8"),
        (["--advantage", "dr-grpo"], "--advantage"),
        (["--clip-high", "0"], "--clip-high is 0.0: give a positive number"),
        (["--clip-high", "nan"], "--clip-high"),
        (["--clip-high", "0.1"], "--clip-high 0.1 is below --clip 0.2"),
        (["--clip-high", "0.28", "--clip", "0.3"], "--clip-high 0.28 is below --clip 0.3"),
        *[
            (["--advantage", "rloo", flag, value], f"{flag} has no meaning with --advantage rloo")
            for flag, value in {
                "--critic": "shared", "--critic-warmup": "0", "--value-lr": "1e-4",
                "--value-coef": "1", "--value-clip": "0.5", "--gamma": "1", "--lam": "1",
            }.items()
        ],
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(argv, says):
    with pytest.raises(UserError, match=says) as caught:
        parsed(*argv)
    assert "\n" not in str(caught.value)


def test_adapters_need_lora_where_there_is_no_critic():
    with pytest.raises(UserError, match="--lora-r needs --lora"):
        parsed("--advantage", "rloo", "--lora-r", "4")


def test_the_plan_has_no_memory_for_a_critic():
    config = read_config(FIXTURES / "gemma3")
    everything = [(10, 10), (7,)]
    head = [(1, config.hidden_size), (1,)]
    of = {}
    for name, argv in (("gae", []), ("rloo", ["--advantage", "rloo"])):
        args = parsed(*argv, "--tiny")
        critic = head if name == "gae" else []
        of[name] = plan.ppo_budget(args, config, everything, everything, critic, 50)
    less = {key: of["gae"][key] - of["rloo"][key] for key in of["gae"]}
    size = config.hidden_size + 1
    assert less["weights"] == less["gradients"] == 4 * size and less["optimizer"] > 0
    assert {k for k, v in less.items() if v} == {"weights", "gradients", "optimizer"}


def test_health_says_when_groups_teach_nothing():
    m = {
        "first_ratio_error": 0.0, "truncated": 0.0, "kl_sequence": 1.0, "clipped": 0.0, "step": 9,
        "entropy": 0.3, "reward": 0.01, "reward_std": 0.1, "moved": 1.0,
        "groups_without_spread": 0.95,
    }  # fmt: skip
    [line] = health(m, 0)
    assert "in 95% of the groups" in line and "--group" in line
    assert health(m | {"groups_without_spread": 0.6}, 0) == []
    [line] = health(m | {"groups_without_spread": 1.0, "reward_std": 0.0}, 0)
    assert "every reward" in line


# -------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def run_flags(tmp_path, monkeypatch):
    """A short run on a dozen problems and the random fixture model, whose reward it sometimes
    earns."""
    odd = lambda text, problem, truncated: float(len(text) % 2)  # noqa: E731
    monkeypatch.setattr(train_ppo, "reward", odd)
    rows = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(12)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "--advantage", "rloo", "--group", "3", "--init", str(FIXTURES / "gemma3"),
        "--data", str(tmp_path / "sums.jsonl"), "--steps", "3", "--rollouts", "6",
        "--rollout-batch", "4", "--micro-batch", "2", "--accumulation", "2",
        "--max-new-tokens", "5", "--val-examples", "2", "--val-every", "2", "--save-every", "1",
        "--lr", "1e-3", "--device", "cpu", "--precision", "fp32", "--checkpointing", "none",
    ]  # fmt: skip


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "peak_memory")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


@pytest.mark.parametrize("more", [[], ["--lora", "--advantage", "grpo", "--clip-high", "0.28"]])
def test_a_stopped_run_continues_and_has_no_critic(run_flags, more, tmp_path, monkeypatch):
    flags = [*run_flags, *more]
    assert train_ppo.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    real = train_ppo.update

    def interrupted(*given):
        if given[-1] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(train_ppo, "update", interrupted)
        assert train_ppo.main([*flags, "--out", str(tmp_path / "cut")]) == 143
    saved = load_file(next((tmp_path / "cut/checkpoint").glob("step-2/*.safetensors")))
    assert saved and all(name.startswith("policy/") for name in saved)
    assert train_ppo.main([*flags, "--out", str(tmp_path / "cut")]) == 0
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")
    files = ["adapter/adapter_model.safetensors" if more else "model/model.safetensors"]
    for file in files:
        a, b = (load_file(tmp_path / run / file) for run in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert not (tmp_path / "whole/value_head.safetensors").exists()
    row = next(row for row in logged(tmp_path / "whole") if "reward" in row)
    assert not [key for key in row if "value" in key or "variance" in key or key == "return"]
    assert 0 <= row["groups_without_spread"] <= 1
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert "explained_variance" not in summary and "reward" in summary
    indices = [json.loads(x)["question"] for x in open(tmp_path / "whole/samples.jsonl")][:4]
    assert len(set(indices[:3])) == 1 and indices[3] != indices[0]
    with pytest.raises(UserError, match=r"\(group was 3, now 2\)"):
        train_ppo.main([*flags, "--group", "2", "--out", str(tmp_path / "whole")])


def test_a_dry_run_says_what_stands_in_the_critics_place(run_flags, capsys):
    assert train_ppo.main([*run_flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "no critic: rloo, groups of 3 answers" in out and "of the critic" not in out
    assert "note" not in out
    for kl, noted in (("0.1", True), ("0", False)):
        train_ppo.main([*run_flags, "--advantage", "grpo", "--kl-coef", kl, "--dry-run"])
        assert ("GRPO scales up the KL penalties" in capsys.readouterr().out) == noted


def test_the_report_shows_the_groups_and_no_critic(run_flags, tmp_path):
    out = str(tmp_path / "run")
    assert train_ppo.main([*run_flags, "--out", out]) == 0
    problems = run_flags[run_flags.index("--data") + 1]
    argv = ["--model", out, "--data", problems, "--n", "4", "--max-new-tokens", "4"]
    assert evaluate.main([*argv, "--device", "cpu"]) == 0
    assert page.main([out, "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "groups whose answers all earned the same" in text
    assert "RLOO of all weights of" in text and "3 answers to each problem" in text
    assert "critic" not in text and "value loss" not in text and "None" not in text


def test_a_run_that_began_before_these_flags_is_not_refused_while_they_are_unset():
    """A record without them is compared with values that are falsy."""
    args = parsed("--tiny")
    assert not any(getattr(args, name) for name in ("advantage", "group", "clip_high"))
