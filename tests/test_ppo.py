"""train_ppo.py: its math against slow loops and numbers worked by hand, the promises about actor,
reference and critic, a task that must be learnt, and whole runs."""

import contextlib
import inspect
import itertools
import json
import math
import os
import shutil
import signal
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, VALIDATED, slow
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import train_ppo
from nanogsm import UserError, data
from nanogsm.lora import adapters, add_lora
from nanogsm.model import load_model, save_adapter, save_model, set_checkpointing
from nanogsm.optim import AdamW
from nanogsm.run.flags import sft_args
from nanogsm.run.health import health
from nanogsm.run.loop import Run
from train_ppo import (
    gae,
    kl_estimates,
    masked_mean,
    masked_share,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)

ROUNDING = 1e-6  # of float32
PLAIN = contextlib.nullcontext
HALF = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
MODES = [
    pytest.param(PLAIN, False, id="full, float32"),
    pytest.param(HALF, False, id="full, bfloat16"),
    pytest.param(PLAIN, True, id="LoRA, float32"),
    pytest.param(HALF, True, id="LoRA, bfloat16"),
]


# ------------------------------------------------------------------------------------- the helpers


def random_mask(rows, columns, seed=0):
    """Responses of different lengths at different places, at least one action each."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for b in range(rows):
        start = int(torch.randint(0, columns - 1, (), generator=rng))
        end = int(torch.randint(start + 1, columns + 1, (), generator=rng))
        mask[b, start:end] = True
    return mask


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings(**changes):
    """Arguments as train_ppo.parse_args returns them, with small batches."""
    args = train_ppo.parse_args(["--recipe", "original", "--device", "cpu", "--precision", "fp32"])
    small = {"micro_batch": 3, "accumulation": 2, "checkpointing": "none", "lora_r": 4}
    args.__dict__.update({"lr": 1e-2, "value_lr": 1e-2, "val_examples": 2} | small | changes)
    return args


def answers(n=8, seed=0):
    """Made-up answers of 1 to 12 tokens to prompts of 2 to 6, about half of them right."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high, size=()):
        return torch.randint(low, high, size, generator=rng).tolist()

    rows = []
    for i in range(n):
        prompt, response = draw(7, 300, (draw(2, 7),)), draw(7, 300, (draw(1, 13),))
        example = data.Example(prompt + response, [0] * len(prompt) + [1] * len(response), i)
        right = bool(draw(0, 2))
        completion = "<<1+1=2>>2" if i == 0 else "2"
        rows.append({"example": example, "score": float(right), "correct": right,
                     "truncated": False, "completion": completion})  # fmt: skip
    return rows


def setup_of(gemma, autocast=PLAIN, **changes):
    """train_ppo.set_up for a fixture model."""
    args = settings(precision="bf16" if autocast is HALF else "fp32", **changes)
    dtype = torch.bfloat16 if args.lora and autocast is HALF else torch.float32
    base, tokenizer = gemma("gemma3", dtype)
    models = train_ppo.build(base, args)
    policy = AdamW(models.policy_weights().items(), args.lr)
    value = AdamW(models.value_weights().items(), args.value_lr)
    return train_ppo.Setup(models, policy, value, tokenizer, data.Prompt(), args, autocast)


class Case(NamedTuple):
    """A step up to its update: what the loop in train_ppo.train has by then."""

    setup: train_ppo.Setup
    rollout: train_ppo.Rollout
    advantages: torch.Tensor  # whitened
    returns: torch.Tensor
    metrics: dict

    @property
    def models(self):
        return self.setup.models


def assessed(setup, rows) -> Case:
    """Score answers, as the loop does."""
    args, rollout = setup.args, train_ppo.score(setup, rows)
    rewards = token_rewards(
        rollout.scores, rollout.logp, rollout.ref_logp, rollout.mask, args.kl_coef
    )
    advantages, returns = gae(rewards, rollout.values, rollout.mask, args.gamma, args.lam)
    metrics = train_ppo.rollout_metrics(rows, rollout, rewards, returns, args)
    return Case(setup, rollout, train_ppo.whiten(advantages, rollout.mask), returns, metrics)


def models_and_rollout(gemma, autocast=PLAIN, **changes) -> Case:
    """Models at their start, with the made-up answers scored by them."""
    return assessed(setup_of(gemma, autocast, **changes), answers())


def all_micro_batches(case):
    args = case.setup.args
    size = args.micro_batch, args.accumulation
    updates = train_ppo.micro_batches_of(len(case.rollout.indices), *size)
    return [rows for update in updates for rows in update]


def gradients(case):
    """(metrics, largest |ratio - 1|, gradients by name) of all rows as one update."""
    setup, rollout, advantages, returns, _ = case
    critic = {f"critic.{n}": p for n, p in setup.models.value_weights().items()}
    weights = setup.models.policy_weights() | critic
    for p in weights.values():
        p.grad = None
    shares, errors = [], []
    for rows in all_micro_batches(case):
        share, error = train_ppo.backward_micro(
            setup, rollout, advantages, returns, rows, rollout.mask.sum(), warming=False
        )
        shares.append(share)
        errors.append(error.item())
    metrics = dict(zip(train_ppo.SHARES, sum(shares).tolist()))
    grads = {n: p.grad for n, p in weights.items() if p.grad is not None}
    return metrics, max(errors), grads


def update(case, step):
    return train_ppo.update(case.setup, case.rollout, case.advantages, case.returns, step)


def sample(setup, problems, step=0):
    return train_ppo.sample(setup, problems, step, lambda finished, tokens: None)


def shake(models, scale=0.05):
    """Move everything that is trained off its start, so that nothing is zero by chance."""
    weights = [*models.policy_weights().values(), *models.value_weights().values()]
    for i, p in enumerate(weights):
        p.data += scale * noise(*p.shape, seed=i)


# ------------------------------------------------------------------------------------ the rewards


def test_the_score_is_at_the_last_action_only_and_kl_at_every_action():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]]).bool()
    score = torch.tensor([1.0, 0.5, 0.0])
    logp, ref = -torch.rand(3, 4), -torch.rand(3, 4)
    plain = token_rewards(score, logp, ref, mask, 0.0)
    assert plain.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0.5], [0, 0, 0, 0]]
    shaped = token_rewards(score, logp, ref, mask, 0.1)
    for b, t in itertools.product(range(3), range(4)):
        want = -0.1 * (logp[b, t] - ref[b, t]) * mask[b, t] + plain[b, t]
        assert shaped[b, t].item() == pytest.approx(want.item(), abs=ROUNDING)
    total = score - 0.1 * ((logp - ref) * mask).sum(1)
    assert torch.allclose(shaped.sum(1), total, atol=ROUNDING)


def test_the_number_after_the_marker_counts():
    problem = data.Problem("How many?", "#### 72", 0)
    right = "so 72.\n#### 72"
    assert train_ppo.reward(right, problem, False) == 1.0
    assert train_ppo.reward(right, problem, True) == 0.0
    for wrong in ("so 72.\n#### 7", "72"):
        assert train_ppo.reward(wrong, problem, False) == 0.0


# --------------------------------------------------------------------------------------- advantage


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (0.5, 0.0), (0.9, 1.0)])
def test_gae_is_the_discounted_sum_of_temporal_differences(gamma, lam):
    mask, rewards, values = random_mask(6, 9), noise(6, 9), noise(6, 9, seed=1)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b in range(6):
        steps = [t for t in range(9) if mask[b, t]]
        v = {t: values[b, t].item() for t in steps}
        for t in range(9):
            want = sum(
                (gamma * lam) ** (k - t) * (rewards[b, k].item() + gamma * v.get(k + 1, 0.0) - v[k])
                for k in steps
                if k >= t
            )
            want = want if mask[b, t] else 0.0
            assert advantages[b, t].item() == pytest.approx(want, abs=1e-5)
            want_return = want + v[t] if mask[b, t] else 0.0
            assert returns[b, t].item() == pytest.approx(want_return, abs=1e-5)


def test_without_discount_the_return_of_every_action_is_the_answers_score():
    mask, values = random_mask(5, 8), noise(5, 8)
    score = noise(5, seed=3)
    rewards = token_rewards(score, values, values, mask, 0.5)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    assert torch.allclose(returns[mask], score[:, None].expand(5, 8)[mask], atol=1e-5)
    assert torch.allclose(advantages[mask], (returns - values)[mask], atol=1e-5)


def test_values_outside_the_mask_and_more_padding_change_nothing():
    mask, rewards, values = random_mask(6, 9), noise(6, 9), noise(6, 9, seed=1)
    want = gae(rewards, values, mask, 0.9, 0.8)
    noisy = gae(rewards.where(mask, 1e6), values.where(mask, -1e6), mask, 0.9, 0.8)
    longer = gae(*(F.pad(x, (2, 3)) for x in (rewards, values)), F.pad(mask, (2, 3)), 0.9, 0.8)
    for a, b, c in zip(want, noisy, longer):
        assert torch.equal(a, b) and torch.equal(a, c[:, 2:-3])
    padded = whiten(F.pad(want[0], (2, 3), value=9.0), F.pad(mask, (2, 3)))
    assert torch.allclose(whiten(want[0], mask), padded[:, 2:-3], atol=ROUNDING)


def test_whitening_is_over_all_actions_and_survives_constants():
    mask, x = random_mask(6, 9), noise(6, 9) * 7 + 3
    white = whiten(x, mask)
    kept = white[mask].double()
    assert abs(kept.mean()) < ROUNDING and abs(kept.var(unbiased=False) - 1) < 1e-5
    assert (white[~mask] == 0).all()
    assert (whiten(torch.full((2, 3), 5.0), torch.ones(2, 3).bool()) == 0).all()
    one = torch.tensor([[False, True]])
    assert whiten(torch.tensor([[3.0, 4.0]]), one).tolist() == [[0.0, 0.0]]


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # it went up as far as it may
        (0.5, 2.0, -1.0, -1.0),  # it went the wrong way: pushed back
        (0.5, -2.0, 1.6, 0.0),  # it went down as far as it may
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_clipped_objective_by_hand(ratio, advantage, loss, slope):
    """d loss / d logp = -ratio A where the loss is not the clipped form."""
    logp = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    got, clipped = policy_loss(logp, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), 0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-5) and clipped.item() == (slope == 0)
    assert logp.grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    "value, old, target, loss, slope",
    [
        (0.5, 0.5, 1.0, 0.125, -0.5),
        (0.9, 0.5, 1.0, 0.5 * 0.3**2, 0.0),  # moved 0.4 towards the return: counts as 0.7
        (0.1, 0.5, 1.0, 0.5 * 0.9**2, -0.9),  # moved away from it: pushed back in full
    ],
)
def test_the_clipped_value_loss_by_hand(value, old, target, loss, slope):
    v = torch.tensor([[value]], requires_grad=True)
    got, clipped = value_loss(v, torch.tensor([[old]]), torch.tensor([[target]]), 0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-5) and clipped.item() == (slope == 0)
    assert v.grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_value_clipped_counts_only_values_that_moved_further_than_the_clip():
    """`near` is old + (V - old), which rounding can make another number than V. Where it ends up
    further from the return, the clipped form is the larger one, and the old rule counted that."""
    old, value, target = (torch.tensor([[x]]) for x in (0.04, 0.17, 1.0))
    near = old + (value - old).clamp(-0.2, 0.2)
    assert (value - old).abs() < 0.2 and near != value
    assert 0.5 * (near - target) ** 2 > 0.5 * (value - target) ** 2  # the old rule
    loss, clipped = value_loss(value, old, target, 0.2)
    assert not clipped.item()
    assert torch.equal(loss, 0.5 * (near - target) ** 2)  # the loss stays the larger of the two

    old, value, target = noise(40, 50), noise(40, 50, seed=1), noise(40, 50, seed=2)
    free = 0.5 * (value - target) ** 2
    clipped_form = 0.5 * (old + (value - old).clamp(-0.2, 0.2) - target) ** 2
    loss, clipped = value_loss(value, old, target, 0.2)
    moved_far = (value - old).abs() > 0.2
    assert torch.equal(loss, torch.maximum(free, clipped_form))
    assert torch.equal(clipped, moved_far & (clipped_form > free))
    assert clipped.any() and (~clipped & (clipped_form > free)).any()


def test_both_kl_estimates_have_the_kl_divergence_as_their_mean():
    """Over all tokens of a small vocabulary, weighted by their probability: no sampling."""
    p, q = (noise(7, seed=i).double().log_softmax(-1) for i in (0, 5))
    exact = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist()))
    k1, k3 = kl_estimates(p, q)
    assert (p.exp() * k1).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (p.exp() * k3).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (k3 >= 0).all() and (k1 < 0).any()


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6])
def test_k3_of_close_policies_is_not_rounding(apart):
    """About d^2 / 2: in float32 exp(-d) - 1 would have errors of 1e-7, and k3 of either sign."""
    logp, d = -noise(1000, seed=1).abs(), apart * noise(1000, seed=2)
    other = logp - d
    exact = (logp.double() - other.double()) ** 2 / 2
    _, k3 = kl_estimates(logp, other)
    assert (k3 >= -1e-9 * apart).all()
    assert k3.mean().item() == pytest.approx(exact.mean().item(), rel=0.05)


def test_no_kl_between_the_same():
    p = noise(7, seed=0)
    assert kl_estimates(p, p)[0].abs().max() == kl_estimates(p, p)[1].abs().max() == 0


def test_the_shares_of_micro_batches_add_up_to_the_mean():
    mask, x = random_mask(7, 9), noise(7, 9)
    want = sum(x[mask].tolist()) / int(mask.sum())
    assert masked_mean(x, mask).item() == pytest.approx(want, rel=1e-5)
    rows = (slice(0, 1), slice(1, 5), slice(5, 7))
    shares = [masked_share(x[r], mask[r], mask.sum()) for r in rows]
    assert sum(shares).item() == pytest.approx(want, rel=1e-5)
    noisy = x.where(mask, math.nan)
    assert masked_mean(noisy, mask).isfinite() and masked_share(noisy, mask, 3).isfinite()


def test_explained_variance_of_a_perfect_a_constant_and_a_wrong_critic():
    mask, returns = random_mask(6, 9), noise(6, 9)
    explained = lambda values: train_ppo.explained_variance(values, returns, mask)  # noqa: E731
    assert explained(returns) == pytest.approx(1.0)
    assert explained(torch.full_like(returns, 3.0)) == pytest.approx(0.0, abs=1e-5)
    assert explained(-returns) == pytest.approx(-3.0, rel=1e-4)


# ----------------------------------------------------------------------- actor, reference, critic


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("autocast, lora", MODES)
def test_the_first_ratio_is_exactly_one_and_kl_exactly_zero(gemma, autocast, lora, critic):
    """With rows of different lengths, cut into micro-batches. The critic's first value is 0."""
    case = models_and_rollout(gemma, autocast, lora=lora, critic=critic)
    assert len(set(case.rollout.batch.lengths)) > 4
    assert case.metrics["kl"] == case.metrics["kl_sequence"] == case.metrics["value"] == 0
    assert (case.rollout.logp[case.rollout.mask] < 0).all()
    metrics, largest, _ = gradients(case)
    assert largest == metrics["clipped"] == metrics["approx_kl"] == 0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_first_value_loss_is_that_of_the_rollouts_own_values(gemma, critic):
    """An action's value is read at the token before it, in the rollout and in the update alike."""
    setup = setup_of(gemma, critic=critic)
    models = setup.models
    shake(models)
    case = assessed(setup, answers())
    values, mask = case.rollout.values, case.rollout.mask
    with torch.no_grad():
        hidden = models.critic(case.rollout.batch.ids)
    # (N, T): the value of action t is at token t
    by_hand = hidden @ models.value_head.weight[0] + models.value_head.bias
    assert torch.allclose(values, by_hand[:, :-1] * mask, atol=1e-5)
    late = by_hand[:, 1:][mask]
    assert (late - values[mask]).abs().max() > 0.01  # one token later it is another value
    metrics, *_ = gradients(case)
    want = (0.5 * (values - case.returns) ** 2)[mask].mean().item()
    assert metrics["value_loss"] == pytest.approx(want, rel=1e-4)
    assert metrics["value_clipped"] == 0


@pytest.mark.parametrize("autocast, lora", MODES)
def test_the_first_gradient_is_that_of_reinforce(gemma, autocast, lora):
    case = models_and_rollout(gemma, autocast, lora=lora, critic="separate", entropy_coef=0.0)
    *_, got = gradients(case)
    models, mask = case.models, case.rollout.mask
    weights = models.policy_weights()
    for p in weights.values():
        p.grad = None
    for rows in all_micro_batches(case):
        ids = case.rollout.batch.ids[rows]
        with autocast():
            logits = models.actor.logits(models.actor(ids)[:, :-1]).float()
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        weighted = logp * case.advantages[rows] * mask[rows]
        (-weighted.sum() / mask.sum()).backward()
    off = 1e-5 if autocast is PLAIN else 0.06  # roundings of 2^-9 on the way through all layers
    for name, p in weights.items():
        if p.grad is not None:
            assert (got[name] - p.grad).norm() <= off * p.grad.norm() + 1e-6, name


def test_the_reference_starts_as_the_actor_and_never_changes(gemma):
    for lora in (False, True):
        case = models_and_rollout(gemma, lora=lora, critic="separate")
        before = {n: p.clone() for n, p in case.models.reference.named_parameters()}
        metrics = update(case, step=5)
        after = dict(case.models.reference.named_parameters())
        assert before.keys() == after.keys()
        assert all(torch.equal(p, after[n]) for n, p in before.items())
        assert metrics["updates"] == 2 * 2 and metrics["first_ratio_error"] == 0
        assert assessed(case.setup, answers()).metrics["kl"] > 1e-4


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("lora", [False, True])
def test_critic_warm_up_leaves_the_actor_unchanged_to_the_bit(gemma, lora, critic):
    case = models_and_rollout(gemma, lora=lora, critic=critic, critic_warmup=3)
    models = case.models
    actor = {n: p.clone() for n, p in models.actor.named_parameters()}
    value = {n: p.clone() for n, p in models.value_weights().items()}
    update(case, step=2)
    assert all(torch.equal(p, actor[n]) for n, p in models.actor.named_parameters())
    # Bias correction starts with the policy's first real step.
    assert case.setup.policy_optimizer.step_count == 0
    # Value head, then B, then A: each has a gradient once the one before it is no longer zero.
    assert all(not torch.equal(p, value[n]) for n, p in models.value_weights().items())
    update(case, step=3)
    assert any(not torch.equal(p, actor[n]) for n, p in models.actor.named_parameters())


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("how", ["light", "full"])
def test_checkpointing_changes_no_gradient_of_actor_or_critic(gemma, lora, critic, how):
    """Both forwards come before the one backward. With one set of weights whose adapters are
    switched, backward would recompute the actor with the critic's."""
    case = models_and_rollout(gemma, lora=lora, critic=critic)
    shake(case.models)
    *_, want = gradients(case)
    for model in (case.models.actor, case.models.critic):
        set_checkpointing(model, how)
    *_, got = gradients(case)
    assert got.keys() == want.keys() and len(want) >= len(case.models.policy_weights())
    for name in want:
        assert want[name].abs().max() > 0 and (got[name] - want[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_micro_batches_row_order_and_padding_change_neither_gradient_nor_metrics(gemma, critic):
    found = []
    for micro_batch, order in ((1, 1), (3, 1), (8, -1)):
        setup = setup_of(gemma, micro_batch=micro_batch, accumulation=9, critic=critic, lora=True)
        shake(setup.models)
        case = assessed(setup, answers()[::order])
        metrics, _, grads = gradients(case)
        found.append((case.metrics | metrics, grads))
    for metrics, grads in found[1:]:
        for key, value in metrics.items():
            assert value == pytest.approx(found[0][0][key], abs=1e-4), key
        for name, grad in grads.items():
            assert (grad - found[0][1][name]).abs().max() < 1e-5, name


def test_an_update_is_the_same_however_it_is_cut(gemma):
    """Two updates of eight answers: 8 x 1, 4 x 2, 1 x 8. AdamW's first steps are nearly signs, so
    weights with tiny gradients may differ."""
    moved = []
    for micro_batch in (8, 4, 1):
        size = {"micro_batch": micro_batch, "accumulation": 8 // micro_batch}
        setup = setup_of(gemma, epochs=1, lr=1e-3, value_lr=1e-3, **size)
        updates = train_ppo.micro_batches_of(16, **size)
        assert [len(micro_batches) for micro_batches in updates] == [8 // micro_batch] * 2
        metrics = update(assessed(setup, answers(16)), step=0)
        weights = torch.cat([p.detach().flatten() for p in setup.models.actor.parameters()])
        moved.append((metrics, weights))
    first_metrics, first_weights = moved[0]
    for metrics, weights in moved[1:]:
        assert metrics["grad_norm"] == pytest.approx(first_metrics["grad_norm"], rel=1e-3)
        assert metrics["policy_loss"] == pytest.approx(first_metrics["policy_loss"], abs=1e-4)
        assert ((weights - first_weights).abs() < 1e-4).float().mean() > 0.99


def test_micro_batches_stay_within_their_update_and_have_each_row_once(gemma):
    updates = train_ppo.micro_batches_of(11, 2, 2)
    assert [len(update) for update in updates] == [2, 2, 2]
    rows = [micro_batch for update in updates for micro_batch in update]
    assert rows == [slice(i, min(i + 2, 11)) for i in range(0, 11, 2)]
    uneven = train_ppo.micro_batches_of(7, 2, 2)  # no micro-batch has rows of two updates
    assert uneven == [[slice(0, 2), slice(2, 4)], [slice(4, 6), slice(6, 7)]]
    rollout = assessed(setup_of(gemma, micro_batch=2, accumulation=2), answers(11)).rollout
    ids, _, lengths = rollout.batch
    got = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    assert got == [row["example"].ids for row in answers(11)]  # in the order drawn, nothing cut off


def test_the_drawing_at_the_top(gemma):
    """Three prompt tokens, three answer tokens and the end: columns of mask, reward, log-prob."""
    setup = setup_of(gemma, kl_coef=0.0, gamma=1.0, lam=0.0)
    models = setup.models
    example = data.Example([2, 11, 12, 13, 14, 15, 1], [0, 0, 0, 1, 1, 1, 1], 0)
    longer = data.Example([2, 11, 12, 13, 14, 15, 16, 1], [0, 0, 0, 1, 1, 1, 1, 1], 1)
    row = {"score": 1.0, "correct": True, "truncated": False, "completion": ""}
    models.value_head.bias.data += 0.25  # so lambda 0 leaves an advantage at the last action only
    case = assessed(setup, [row | {"example": e} for e in (longer, example)])
    rollout = case.rollout
    assert rollout.mask[1].tolist() == [False, False, True, True, True, True, False]
    assert case.returns[1].tolist() == [0, 0, 0.25, 0.25, 0.25, 1.0, 0]
    assert rollout.values[1].tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25, 0]
    with torch.no_grad():
        logits = models.actor.logits(models.actor(torch.tensor([example.ids])))[0]
    for column in range(2, 6):
        want = logits.log_softmax(-1)[column, example.ids[column + 1]].item()
        assert rollout.logp[1, column].item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_the_entropy_bonus_pushes_towards_entropy(gemma, lora):
    """Its gradient alone, against one written out with all logits."""
    grads = []
    for coef in (0.0, 0.5):
        case = models_and_rollout(gemma, lora=lora, entropy_coef=coef)
        grads.append(gradients(case)[2])
    actor, weights = case.models.actor, case.models.policy_weights()
    for p in weights.values():
        p.grad = None
    logp = actor.logits(actor(case.rollout.batch.ids)[:, :-1]).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    (-0.5 * entropy[case.rollout.mask].mean()).backward()
    for name, p in weights.items():
        assert (grads[1][name] - grads[0][name] - p.grad).abs().max() < 1e-5, name


def test_the_value_loss_is_weighted_by_its_coefficient(gemma):
    """In the shared trunk, once the value head is no longer zero."""
    grads = []
    for coef in (0.0, 1.0, 3.0):
        case = models_and_rollout(gemma, value_coef=coef)
        case.models.value_head.weight.data += 0.1
        grads.append(gradients(case)[2])
    for name, plain in grads[0].items():
        once, thrice = grads[1][name] - plain, grads[2][name] - plain
        assert (thrice - 3 * once).abs().max() < 1e-5, name
    assert sum(float((g - grads[0][n]).abs().sum()) for n, g in grads[1].items()) > 1e-3


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_critic_learns_what_the_answers_were_worth(gemma, lora, critic):
    case = models_and_rollout(
        gemma, lora=lora, critic=critic, gamma=1.0, lam=1.0, kl_coef=0.0, value_clip=9.0,
        value_coef=5.0, epochs=12, clip=1e-6,
    )  # fmt: skip
    update(case._replace(advantages=torch.zeros_like(case.advantages)), step=9)  # the critic alone
    after = assessed(case.setup, answers())
    assert case.metrics["explained_variance"] == pytest.approx(0.0, abs=1e-5)
    assert after.metrics["explained_variance"] > 0.5


def test_the_metrics_of_a_rollout_by_hand():
    """Two answers, of two actions and of one."""
    mask = torch.tensor([[False, True, True], [False, True, False]])
    batch = data.Batch(torch.zeros(2, 4, dtype=torch.long), None, [4, 3])
    logp = torch.tensor([[9.0, -1.0, -2.0], [9.0, -3.0, 9.0]])
    ref_logp = torch.tensor([[0.0, -1.5, -1.0], [0.0, -3.0, 0.0]])  # log-ratios 0.5, -1 and 0
    entropy = torch.tensor([[9.0, 0.5, 1.0], [9.0, 3.0, 9.0]])
    values = torch.tensor([[0.0, 0.5, 0.25], [0.0, 0.0, 0.0]])
    scores = torch.tensor([1.0, 0.0])
    rollout = train_ppo.Rollout(batch, mask, logp, ref_logp, entropy, values, scores, [5, 6])
    answered = [
        {"correct": True, "truncated": False, "completion": "<<1+1=2>>2"},
        {"correct": True, "truncated": True, "completion": "2 and so on"},
    ]
    rewards = token_rewards(scores, logp, logp, mask, 0.0)
    _, returns = gae(rewards, values, mask, 1.0, 0.0)
    args = settings(gamma=1.0, lam=0.0)
    got = train_ppo.rollout_metrics(answered, rollout, rewards, returns, args)
    # With lambda 0 the returns are 0.25, 1 and 0. With lambda 1 they are 1, 1 and 0.
    variance = lambda a, b, c: (a * a + b * b + c * c) / 3 - ((a + b + c) / 3) ** 2  # noqa: E731
    want = {
        "reward": 0.5, "reward_std": 0.5, "exact_match": 1.0, "truncated": 0.5, "worked": 0.5,
        "response_tokens": 1.5, "tokens": 7, "kl_sequence": -0.25, "entropy": 1.5, "value": 0.25,
        "return": 1.25 / 3, "kl": (math.exp(-0.5) - 1 + 0.5 + math.e - 1 - 1) / 3,
        "explained_variance": 1 - variance(0.5, 0.75, 0) / variance(1, 1, 0),
    }  # fmt: skip
    assert got == pytest.approx(want, rel=1e-5)


def test_the_temperature_of_sampling_is_that_of_every_logprob(gemma):
    case = models_and_rollout(gemma, temperature=0.5)
    actor, (ids, _, _) = case.models.actor, case.rollout.batch
    with torch.no_grad():
        logits = actor.logits(actor(ids)[:, :-1]) / 0.5
    want = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert (case.rollout.logp - want)[case.rollout.mask].abs().max() < 1e-5
    _, largest, _ = gradients(case)
    assert largest == 0 and case.metrics["kl"] == 0


def test_sampling_in_bfloat16_rounds_a_weight_once_and_not_at_every_token(gemma):
    """The vocabulary among them: it is float32, and used for each token."""
    setup = setup_of(gemma, HALF, max_new_tokens=6)
    setup.tokenizer.stop_ids = frozenset()
    weights = {p.data_ptr(): 0 for p in setup.models.actor.parameters() if p.dim() == 2}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, given=(), kw=None):
            is_cast = operation is torch.ops.aten._to_copy.default
            if is_cast and given[0].data_ptr() in weights:
                weights[given[0].data_ptr()] += 1
            return operation(*given, **(kw or {}))

    with Casts():
        sample(setup, [data.Problem("2?", "#### 2", 0)])
    assert set(weights.values()) == {1}


def test_the_reward_is_told_whether_an_answer_is_truncated(gemma):
    """And gets the text without a question that the model asks itself."""
    seen = []

    def reward(text, problem, truncated):
        seen.append((text, problem.index, truncated))
        return len(seen)

    setup = setup_of(gemma, max_new_tokens=3)._replace(reward=reward)
    setup.tokenizer.stop_ids = frozenset(range(0, 384, 3))
    rows = sample(setup, [data.Problem(f"{i}?", "#### 2", i) for i in range(20)])
    assert [row["score"] for row in rows] == list(range(1, 21))
    assert 0 < sum(row["truncated"] for row in rows) < 20
    for (text, index, truncated), row in zip(seen, rows):
        ids, mask, i = row["example"]
        assert (text, index, truncated) == (data.cut(row["completion"]), i, row["truncated"])
        assert (ids[-1] in setup.tokenizer.stop_ids) == (not row["truncated"]) and mask[-1] == 1


def test_at_the_original_rate_bfloat16_weights_hardly_move_and_float32_ones_do():
    """5e-7 is below the rounding of nearly every weight of a bfloat16 matrix."""
    start = 0.02 * noise(200, 500)
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        p = torch.nn.Parameter(start.to(dtype))
        before = p.detach().clone()
        p.grad = noise(200, 500, seed=1).to(dtype)
        AdamW([("p", p)], 5e-7).step()
        moved[dtype] = (p.detach() != before).float().mean().item()
    assert moved[torch.bfloat16] < 0.02 and moved[torch.float32] > 0.99


# ---------------------------------------------------------------------------------------- a task


LETTERS = tuple("abcdefghijklm")


def learn(gemma, monkeypatch, steps=40, spoil=None):
    """Reward answers that begin with a letter up to m. Returns the share that does, after some
    steps."""
    starts_well = lambda text, *_: float(text.strip()[:1].lower() in LETTERS)  # noqa: E731
    if spoil:
        monkeypatch.setattr(train_ppo, *spoil)

    def flatter(name, dtype):
        """A start with something to explore, for which every token ends its answer."""
        base, tokenizer = gemma(name, dtype)
        tokenizer.stop_ids = frozenset(range(base.config.vocab_size))
        base.model.embed_tokens.weight.data *= 0.3
        return base, tokenizer

    setup = setup_of(
        flatter, rollouts=64, rollout_batch=64, micro_batch=64, accumulation=1, epochs=2, seed=1,
        max_new_tokens=1, lr=2e-2, value_lr=2e-2, gamma=1.0, lam=1.0, kl_coef=0.0,
        entropy_coef=0.0, critic="shared", value_coef=0.1,
    )._replace(reward=starts_well)  # fmt: skip
    problems = [data.Problem(f"{i} + {i}?", "#### 7", i) for i in range(8)]
    for step in range(steps):
        chosen = data.problems_of_step(problems, step, setup.args.rollouts, 0)
        case = assessed(setup, sample(setup, chosen, step))
        update(case, step)
        if case.metrics["reward"] > 0.97:
            break
    return case.metrics["reward"]


def test_a_simple_task_is_learnt(gemma, monkeypatch):
    assert learn(gemma, monkeypatch) > 0.95


@slow
def test_and_it_is_not_learnt_with_the_advantages_sign_flipped(gemma, monkeypatch):
    flipped = lambda x, mask: -whiten(x, mask)  # noqa: E731
    assert learn(gemma, monkeypatch, steps=15, spoil=("whiten", flipped)) < 0.2


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def flags(tmp_path):
    """Arguments of a short run on a dozen problems and the random fixture model."""
    rows = [
        {"question": f"{i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(12)
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "--recipe", "original", "--init", str(FIXTURES / "gemma3"),
        "--data", str(tmp_path / "sums.jsonl"), "--steps", "4", "--rollouts", "6",
        "--rollout-batch", "4", "--micro-batch", "2", "--accumulation", "2",
        "--max-new-tokens", "5", "--val-examples", "2", "--val-every", "2", "--save-every", "1",
        "--lr", "1e-3", "--value-lr", "1e-2", "--device", "cpu", "--precision", "fp32",
        "--checkpointing", "none",
    ]  # fmt: skip


@pytest.fixture
def rewarding(monkeypatch):
    """A reward that a random model sometimes earns: an odd number of characters. And an end that it
    sometimes finds: every third token."""
    odd = lambda text, problem, truncated: float(not truncated and len(text) % 2)  # noqa: E731
    monkeypatch.setattr(train_ppo, "reward", odd)
    monkeypatch.setattr(data.Tokenizer, "_configured_stops", lambda _: set(range(7, 384, 3)))


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("peak_memory", "seconds", "seconds_rollout", "seconds_score", "seconds_update")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def result(folder):
    """Everything the run saved, by file and name."""
    files = [*folder.glob("model/*.safetensors"), *folder.glob("adapter/*.safetensors"),
             folder / "value_head.safetensors"]  # fmt: skip
    return {(f.name, k): t for f in files for k, t in load_file(f).items()}


def stop_in_update_of(step, monkeypatch):
    """SIGTERM as the updates of a step (from 0) begin."""
    real = train_ppo.update

    def interrupted(setup, rollout, advantages, returns, at):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(setup, rollout, advantages, returns, at)

    monkeypatch.setattr(train_ppo, "update", interrupted)


def assert_same_run(one, other):
    """Equal metrics, samples and weights, to the bit."""
    assert metrics(one) == metrics(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    a, b = result(one), result(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


LORA = ["--lora", "--critic", "separate"]
SEPARATE = ["--critic", "separate", "--critic-warmup", "2"]
KINDS = [
    pytest.param([], id="full"),
    pytest.param(LORA, id="LoRA"),
    pytest.param(SEPARATE, id="full, separate critic", marks=slow),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_continues_bit_for_bit(flags, rewarding, kind, tmp_path, monkeypatch, capsys):
    assert train_ppo.main([*flags, *kind, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        stop_in_update_of(1, patched)
        assert train_ppo.main([*flags, *kind, "--out", str(tmp_path / "cut")]) == 143
    assert "continue from step 2" in capsys.readouterr().out
    assert train_ppo.main([*flags, *kind, "--out", str(tmp_path / "cut")]) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    steps = [row["step"] for row in metrics(tmp_path / "cut") if "reward" in row]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", [[], pytest.param(LORA, marks=slow)], ids=["full", "LoRA"])
def test_a_paused_run_continues_bit_for_bit(flags, rewarding, kind, tmp_path, capsys):
    assert train_ppo.main([*flags, *kind, "--out", str(tmp_path / "whole")]) == 0
    cut = [*flags, *kind, "--out", str(tmp_path / "cut")]
    capsys.readouterr()
    assert train_ppo.main([*cut, "--pause-at", "2"]) == 0
    said = capsys.readouterr().out
    assert "paused at step 2\n" in said and "the result is in" not in said
    assert not (tmp_path / "cut/summary.json").exists()
    assert metrics(tmp_path / "cut")[-1]["step"] == 2
    assert train_ppo.main(cut) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_the_best_policy_and_its_critic_are_kept(flags, rewarding, tmp_path, monkeypatch):
    """The weights after step 2 of 4, as a run has them that ends there. Such a run does not grow,
    because its best weights may come from a validation that the longer run does not have."""
    scores = iter([0.25, 0.5, 0.25])  # at steps 0, 2 and 4
    rows = lambda *a, **k: [VALIDATED | {"correct": next(scores)}]  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(train_ppo.generate, "answer_and_mark", rows)
        best = [*flags, "--keep", "best", "--out", str(tmp_path / "best")]
        assert train_ppo.main(best) == 0
    assert train_ppo.main([*flags, "--steps", "2", "--out", str(tmp_path / "two")]) == 0
    a, b = result(tmp_path / "best"), result(tmp_path / "two")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    summary = json.loads((tmp_path / "best/summary.json").read_text())
    told = {"steps": 4, "kept": "best", "step": 2, "val_exact_match": 0.5}
    assert told.items() <= summary.items()
    assert "kept" not in json.loads((tmp_path / "two/summary.json").read_text())
    assert not (tmp_path / "best/checkpoint").exists()
    with pytest.raises(UserError, match="steps was 4, now 6"):
        train_ppo.main([*best, "--steps", "6"])


def test_the_last_weights_are_kept_however_that_is_said(flags, rewarding, tmp_path):
    """--keep last is the default. A run from before the flag existed goes on with either."""
    run = [*flags, "--out", str(tmp_path / "run")]
    assert train_ppo.main([*run, "--steps", "1"]) == 0
    record = json.loads((tmp_path / "run/run_args.json").read_text())
    for name in ("keep", "patience", "pause_at", "val_use"):
        del record["args"][name]
    (tmp_path / "run/run_args.json").write_text(json.dumps(record))
    assert train_ppo.main([*run, "--steps", "2", "--keep", "last"]) == 0
    assert train_ppo.main([*run, "--steps", "3"]) == 0


# A validation after step 2 belongs to both runs, or only to the shorter one.
@pytest.mark.parametrize(
    "kind, val_every", [([], "3"), pytest.param(LORA, "2", marks=slow)], ids=["full", "LoRA"]
)
def test_a_finished_run_may_grow_bit_for_bit(flags, rewarding, kind, val_every, tmp_path, capsys):
    flags = [*flags, *kind, "--val-every", val_every]
    assert train_ppo.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    grown = [*flags, "--out", str(tmp_path / "grown")]
    assert train_ppo.main([*grown, "--steps", "2"]) == 0
    assert "lets --steps grow later" in capsys.readouterr().out
    (tmp_path / "grown/eval-test-9.jsonl").write_text("of the weights after step 2")
    assert train_ppo.main([*grown, "--steps", "2"]) == 0  # the same command does nothing
    assert "is already finished" in capsys.readouterr().out
    assert (tmp_path / "grown/eval-test-9.jsonl").exists()
    assert train_ppo.main([*grown, "--steps", "4"]) == 0
    assert "continuing" in capsys.readouterr().out
    assert_same_run(tmp_path / "grown", tmp_path / "whole")
    assert (tmp_path / "grown/step-2-eval-test-9.jsonl").read_text().startswith("of the weights")
    assert not (tmp_path / "grown/eval-test-9.jsonl").exists()


def test_a_run_grows_only_from_its_checkpoint_and_never_shrinks(flags, rewarding, tmp_path):
    flags += ["--out", str(tmp_path / "run")]
    assert train_ppo.main([*flags, "--steps", "2"]) == 0
    with pytest.raises(UserError, match="steps was 2, now 1"):
        train_ppo.main([*flags, "--steps", "1"])
    with pytest.raises(UserError, match=r"\(lr was 0.001, now 0.01\)"):
        train_ppo.main([*flags, "--steps", "3", "--lr", "0.01"])
    # What it cannot grow from is found before anything of the finished run is touched.
    (tmp_path / "run/eval-test-9.json").write_text("{}")
    [tensors] = (tmp_path / "run/checkpoint").glob("*/tensors.safetensors")
    whole, log = tensors.read_bytes(), tmp_path / "run/metrics.jsonl"
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged: .*to train further, give --init"):
        train_ppo.main([*flags, "--steps", "3"])
    tensors.write_bytes(whole)
    log.rename(tmp_path / "log")
    with pytest.raises(UserError, match="metrics.jsonl is shorter than at step 2 .0 of"):
        train_ppo.main([*flags, "--steps", "3"])
    (tmp_path / "log").rename(log)
    shutil.rmtree(tmp_path / "run/checkpoint")
    with pytest.raises(UserError, match="its checkpoint was deleted: to train further, give"):
        train_ppo.main([*flags, "--steps", "3"])
    assert (tmp_path / "run/summary.json").exists() and (tmp_path / "run/eval-test-9.json").exists()
    args = json.loads((tmp_path / "run/run_args.json").read_text())["args"]
    assert args["steps"] == 2 and train_ppo.main([*flags, "--steps", "2"]) == 0


def test_how_an_update_is_cut_and_where_the_data_are_may_change_on_the_way(
    flags, rewarding, tmp_path, monkeypatch
):
    """The size of an update may not. Answers and rewards stay the same, weights up to rounding."""
    flags = [*flags, "--optim", "adamw"]
    assert train_ppo.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patched:
        stop_in_update_of(1, patched)
        assert train_ppo.main([*flags, "--out", str(tmp_path / "cut")]) == 143
    at = flags.index("--data") + 1
    flags[at] = str(shutil.move(flags[at], tmp_path / "moved.jsonl"))
    flags += ["--out", str(tmp_path / "cut"), "--rollout-batch", "3"]
    with pytest.raises(UserError, match=r"\(batch was 4, now 2\)"):
        train_ppo.main([*flags, "--micro-batch", "1"])
    assert train_ppo.main([*flags, "--micro-batch", "1", "--accumulation", "4"]) == 0
    whole, cut = (
        [row["reward"] for row in metrics(tmp_path / run) if "reward" in row]
        for run in ("whole", "cut")
    )
    assert whole == cut and len(cut) == 4
    want, got = result(tmp_path / "whole"), result(tmp_path / "cut")
    start = load_file(FIXTURES / "gemma3" / "model.safetensors")
    for key in want:
        moved = (want[key] - start.get(key[1], 0)).abs().max()
        assert 0 < moved and (want[key] - got[key]).abs().max() <= 0.02 * moved, key


def test_a_stop_while_answers_are_sampled_saves_and_continues(
    flags, rewarding, tmp_path, monkeypatch
):
    """In the middle of the second step's sampling. Its checkpoint is that of the first step, and it
    exists because of the stop: no other is due."""
    flags = [*flags, "--save-every", "100"]
    assert train_ppo.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    real, calls, finished = train_ppo.generate.generate, [], []

    def interrupted(*args, progress, **kw):
        calls.append(None)

        def watched(answered, tokens):
            if len(calls) == 3 and answered:  # the first call is the validation at step 0
                finished.append(answered)
                os.kill(os.getpid(), signal.SIGTERM)
            progress(answered, tokens)

        return real(*args, progress=watched, **kw)

    with monkeypatch.context() as patched:
        patched.setattr(train_ppo.generate, "generate", interrupted)
        assert train_ppo.main([*flags, "--out", str(tmp_path / "cut")]) == 143
    assert len(finished) == 1 and 0 < finished[0] < 6  # some answers were there, and some were not
    assert [row["step"] for row in metrics(tmp_path / "cut") if "reward" in row] == [1]
    assert os.listdir(tmp_path / "cut/checkpoint") == ["step-1"]
    assert train_ppo.main([*flags, "--out", str(tmp_path / "cut")]) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_an_update_never_sees_watch(flags, rewarding, tmp_path, monkeypatch):
    """A stop that is requested during an update waits for its end. Otherwise half of the update
    would be in the checkpoint."""
    given = {*inspect.signature(train_ppo.update).parameters, *train_ppo.Setup._fields}
    assert not {"watch", "run", "stop", "progress"} & given
    updating, shares = [], []
    real_update, real_micro, real_watch = train_ppo.update, train_ppo.backward_micro, Run.watch

    def update(*args):
        updating.append(True)
        result = real_update(*args)
        updating.clear()
        return result

    def backward_micro(*args):
        shares.append(args)
        if len(shares) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_micro(*args)

    def watch(run, *progress):
        assert not updating
        return real_watch(run, *progress)

    monkeypatch.setattr(train_ppo, "update", update)
    monkeypatch.setattr(train_ppo, "backward_micro", backward_micro)
    monkeypatch.setattr(Run, "watch", watch)
    assert train_ppo.main([*flags, "--out", str(tmp_path / "run")]) == 143
    assert len(shares) == 2 * 3  # 2 epochs over 6 answers in micro-batches of 2
    assert os.listdir(tmp_path / "run/checkpoint") == ["step-1"]
    assert [row["updates"] for row in metrics(tmp_path / "run") if "reward" in row] == [4]


def test_the_loop_hands_the_update_what_the_formulas_say(flags, rewarding, tmp_path, monkeypatch):
    """Rewards, GAE and whitening of a whole rollout, by slow loops in float64."""
    real, seen = train_ppo.update, []

    def update(setup, rollout, advantages, returns, step):
        seen.append((rollout, advantages, returns))
        return real(setup, rollout, advantages, returns, step)

    monkeypatch.setattr(train_ppo, "update", update)
    more = ["--steps", "2", "--kl-coef", "0.3", "--gamma", "0.9", "--lam", "0.8"]
    assert train_ppo.main([*flags, *more, "--out", str(tmp_path / "run")]) == 0
    rollout, advantages, returns = seen[1]  # in the first step there is no KL yet
    assert rollout.scores.unique().tolist() == [0, 1]
    by_hand = {}
    for b in range(6):
        steps = rollout.mask[b].nonzero()[:, 0].tolist()
        kl = (rollout.logp[b].double() - rollout.ref_logp[b].double()).tolist()
        value = rollout.values[b].double().tolist()
        last = steps[-1]
        for t in steps:
            advantage = 0.0
            for k in range(t, last + 1):
                reward = -0.3 * kl[k] + (rollout.scores[b].item() if k == last else 0.0)
                next_value = value[k + 1] if k < last else 0.0
                advantage += (0.9 * 0.8) ** (k - t) * (reward + 0.9 * next_value - value[k])
            by_hand[b, t] = advantage
            assert returns[b, t].item() == pytest.approx(advantage + value[t], abs=1e-5)
    mean = sum(by_hand.values()) / len(by_hand)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in by_hand.values()) / len(by_hand))
    assert rollout.mask.sum() == len(by_hand) and (advantages[~rollout.mask] == 0).all()
    for place, advantage in by_hand.items():
        want = (advantage - mean) / deviation
        assert advantages[place].item() == pytest.approx(want, abs=1e-4)
    assert any(abs(x) > 1e-3 for x in (rollout.logp - rollout.ref_logp)[rollout.mask].tolist())


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_problems(
    flags, rewarding, tmp_path, monkeypatch
):
    real, calls = train_ppo.reward, []

    def reward(*given):
        calls.append(given)
        return math.inf if len(calls) > 6 else real(*given)  # six answers per step

    monkeypatch.setattr(train_ppo, "reward", reward)
    every_token = set(range(1, 384))  # so that no answer is truncated
    monkeypatch.setattr(data.Tokenizer, "_configured_stops", lambda _: every_token)
    with pytest.raises(UserError, match=r"norm nan.* at step 2; problems \[\d+, \d+.*: lower --lr"):
        train_ppo.main([*flags, "--out", str(tmp_path / "run")])
    assert [p.name for p in (tmp_path / "run/checkpoint").iterdir()] == ["step-1"]
    assert not (tmp_path / "run/model").exists()


def test_a_run_does_not_continue_from_another_start(flags, rewarding, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(FIXTURES / "gemma3", start)
    argv = [*flags, "--init", str(start), "--out", str(tmp_path / "run")]
    assert train_ppo.main(argv) == 0
    model, tokenizer = load_model(start)
    model.model.layers[2].mlp.up_proj.weight.data += 0.01
    save_model(model, tokenizer, tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", start)
    with pytest.raises(UserError, match="the content of --init changed"):
        train_ppo.main(argv)


def test_a_dry_run_says_what_is_trained_and_how_much_memory_it_needs(flags, tmp_path, capsys):
    more = ["--lora", "--critic", "separate", "--dry-run", "--out", str(tmp_path / "run")]
    train_ppo.main([*flags, *more])
    out = capsys.readouterr().out
    assert "43,008 of the policy, 43,033 of the critic" in out and "in all" in out
    assert not (tmp_path / "run").exists()


def test_the_result_is_a_run_folder_that_evaluates_and_loads(flags, rewarding, tmp_path):
    out = str(tmp_path / "run")
    train_ppo.main([*flags, "--out", out])
    model, _ = load_model(out, torch.float32)
    start, _ = load_model(FIXTURES / "gemma3", torch.float32)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters())]
    assert all(moved)
    problems = flags[flags.index("--data") + 1]
    argv = ["--model", out, "--data", problems, "--n", "4", "--max-new-tokens", "4"]
    assert evaluate.main([*argv, "--device", "cpu"]) == 0
    rows = [row for row in metrics(tmp_path / "run") if "reward" in row]
    varied = next(row for row in rows if row["reward_std"])  # else there is nothing to explain
    assert varied.keys() == {
        "step", "reward", "reward_std", "exact_match", "truncated", "worked", "response_tokens",
        "tokens", "kl", "kl_sequence", "entropy", "explained_variance", "value", "return",
        "policy_loss", "value_loss", "clipped", "value_clipped", "approx_kl", "grad_norm",
        "value_grad_norm", "updates", "first_ratio_error", "moved",
    }  # fmt: skip
    for name, value in varied.items():
        assert math.isfinite(value), name
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    timed = [row for row in map(json.loads, lines) if "reward" in row]
    for row in timed:
        phases = [row[f"seconds_{phase}"] for phase in ("rollout", "score", "update")]
        assert min(phases) > 0 and row["seconds"] == pytest.approx(sum(phases))
    assert rows[0]["first_ratio_error"] == 0 and rows[0]["kl"] == 0 and rows[0]["moved"] > 0.9


def test_lora_from_an_adapter_starts_there_and_ends_as_one_adapter(flags, rewarding, tmp_path):
    """The reference is base and adapter together; the result is one adapter of both changes."""
    base, _ = load_model(FIXTURES / "gemma3", torch.float32)
    add_lora(base, 4, 8.0)
    for i, layer in enumerate(adapters(base).values()):
        layer.lora_B.weight.data = 0.1 * noise(*layer.lora_B.weight.shape, seed=i)
    save_adapter(base, tmp_path / "sft" / "adapter", str(FIXTURES / "gemma3"))
    argv = [*flags, "--lora", "--init", str(tmp_path / "sft"), "--out", str(tmp_path / "run")]
    assert train_ppo.main(argv) == 0
    rows = [row for row in metrics(tmp_path / "run") if "reward" in row]
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0
    model, _ = load_model(tmp_path / "run", torch.float32)
    assert {layer.lora_A.weight.shape[0] for layer in adapters(model).values()} == {4 + 16}
    assert not (tmp_path / "run" / "model").exists()
    ids = torch.randint(7, 300, (2, 9))
    with torch.no_grad():
        start, end = base.logits(base(ids)), model.logits(model(ids))
    assert 0 < (start - end).abs().max() < 0.5 * start.abs().max()


def test_a_small_adapter_to_start_from_is_not_rounded_away(flags, tmp_path, monkeypatch):
    """Merged into a bfloat16 base, a change below half its last bit would be lost. PPO would then
    start from another model than the one that was fine-tuned and evaluated."""
    base, _ = load_model(FIXTURES / "gemma3", torch.bfloat16)
    add_lora(base, 4, 8.0)
    for i, layer in enumerate(adapters(base).values()):
        layer.lora_B.weight.data = 0.002 * noise(*layer.lora_B.weight.shape, seed=i)
    save_adapter(base, tmp_path / "sft" / "adapter", str(FIXTURES / "gemma3"))
    started = []
    monkeypatch.setattr(train_ppo, "build", lambda base, args: started.append(base) or sys.exit())
    argv = [*flags, "--lora", "--init", str(tmp_path / "sft"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        train_ppo.main([*argv, "--precision", "bf16"])
    ids = torch.randint(7, 300, (2, 9))
    logits = lambda model: model.logits(model(ids)).float()  # noqa: E731
    with torch.no_grad():
        start = logits(started[0])
        tuned = logits(load_model(tmp_path / "sft", torch.bfloat16)[0])
        merged = logits(load_model(tmp_path / "sft", torch.bfloat16, merge=True)[0])
    assert torch.equal(start, tuned) and not torch.equal(merged, tuned)


def test_a_missing_start_says_what_to_do_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no runs/sft-full-main yet.*with python train_sft.py,"):
        train_ppo.main([])
    with pytest.raises(UserError, match=r"runs/tiny/sft-full-main yet.*train_sft.py --tiny,"):
        train_ppo.main(["--tiny"])
    with pytest.raises(UserError, match=r"no runs/sft-lora-main yet.*train_sft.py --lora,"):
        train_ppo.main(["--lora"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, says",
    [
        (["--gamma", "1.5"], "--gamma"),
        (["--lr", "0"], "--lr"),
        (["--kl-coef", "-1"], "--kl-coef"),
        (["--rollouts", "0"], "--rollouts"),
        (["--temperature", "0"], "--temperature"),
        (["--clip", "nan"], "--clip"),
        (["--init", "no/such/folder"], "no such folder"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--val-examples", "12"], "--val-examples 12"),
    ],
)
def test_bad_flags_are_named(flags, given, says, tmp_path):
    with pytest.raises(UserError, match=says):
        train_ppo.main([*flags, "--out", str(tmp_path / "run"), *given])
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_the_updates_really_are(flags, capsys):
    for rollouts, updates in (
        ("6", "2 passes with 2 updates of 4 (the last: 2), in micro-batches of 2;"),
        ("8", "2 passes with 2 updates of 4, in"),
        ("3", "2 passes with 1 update of 3, in"),
        ("1", "2 passes with 1 update of 1, in micro-batches of 1;"),
    ):
        train_ppo.main([*flags, "--rollouts", rollouts, "--dry-run"])
        out = capsys.readouterr().out
        assert updates in out and "note" not in out


def test_other_held_out_problems_than_the_starts_are_noted(flags, capsys, tmp_path):
    own = flags[flags.index("--data") + 1]
    record = {"args": {"val_examples": 5, "data": own}, "info": {"prompt": data.Prompt().settings()}}
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "run_args.json").write_text(json.dumps(record))
    shutil.copytree(FIXTURES / "gemma3", tmp_path / "sft" / "model")
    argv = [*flags, "--init", str(tmp_path / "sft"), "--dry-run"]
    train_ppo.main(argv)
    assert "held out 5 problems, this run 2" in capsys.readouterr().out
    train_ppo.main([*argv, "--val-examples", "5"])
    assert "note" not in capsys.readouterr().out


def test_a_start_passes_on_what_it_held_out_of_the_same_problems_and_its_longer_answers(tmp_path):
    def parsed(of_data, theirs, limit):
        args = {"val_examples": 5, "data": theirs, "max_new_tokens": limit}
        record = {"args": args, "info": {"prompt": data.Prompt().settings()}}
        (tmp_path / "run_args.json").write_text(json.dumps(record))
        args = train_ppo.parse_args(["--init", str(tmp_path), "--data", of_data, "--device", "cpu"])
        return args.val_examples, args.max_new_tokens

    assert parsed("main", "main", 320) == (5, 320)
    assert parsed("main", "socratic", 512) == (5, 512)
    assert parsed("socratic", "main", 320) == (5, 512)
    assert parsed("mine.jsonl", "main", 320) == (None, 320)
    assert parsed("mine.jsonl", "mine.jsonl", 400) == (5, 400)


def test_tuned_is_the_default_recipe():
    for parse in (train_ppo.parse_args, sft_args):
        for given in ([], ["--lora"], ["--tiny"], ["--tiny", "--lora"]):
            default = vars(parse([*given, "--device", "cpu"]))
            assert default == vars(parse([*given, "--device", "cpu", "--recipe", "tuned"]))
            assert default != vars(parse([*given, "--device", "cpu", "--recipe", "original"]))


@pytest.mark.parametrize("flag", ["--lora-r", "--lora-alpha"])
def test_the_size_of_adapters_is_refused_where_there_are_none(flag):
    with pytest.raises(UserError, match=f"{flag} needs --lora or --critic separate"):
        train_ppo.parse_args(["--tiny", flag, "4"])
    for more in (["--lora"], ["--critic", "separate"]):
        train_ppo.parse_args(["--tiny", flag, "4", *more])


def test_a_run_that_has_begun_keeps_the_start_it_recorded(tmp_path, monkeypatch):
    """Before it had another default: without this the same command would be refused."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/tiny/ppo-lora-main"
    run.mkdir(parents=True)
    args = {"init": "runs/tiny/elsewhere", "val_examples": 3, "data": "tiny"}
    info = {"prompt": data.Prompt().settings()}
    (run / "run_args.json").write_text(json.dumps({"args": args, "info": info}))
    command = ["--tiny", "--lora", "--device", "cpu"]
    assert train_ppo.parse_args(command).init == "runs/tiny/elsewhere"
    assert train_ppo.parse_args([*command, "--init", "other"]).init == "other"
    assert train_ppo.parse_args([*command, "--out", "new"]).init == "runs/tiny/sft-lora-main"
    assert train_ppo.parse_args([*command, "--overwrite"]).init == "runs/tiny/sft-lora-main"


def test_original_is_the_recipe_of_the_original_study():
    args = train_ppo.parse_args(["--recipe", "original", "--device", "cpu"])
    assert (args.lr, args.kl_coef, args.value_coef, args.entropy_coef) == (5e-7, 0.05, 0.1, 0.01)
    assert (args.clip, args.gamma, args.lam, args.epochs, args.steps) == (0.2, 0.99, 0.95, 2, 100)
    assert (args.rollouts, args.rollout_batch) == (512, 32)
    assert (args.micro_batch, args.accumulation) == (2, 8)
    assert (args.optim, args.critic_warmup, args.critic) == ("adamw8bit", 0, "shared")
    assert (args.init, args.out) == ("runs/sft-full-main", "runs/ppo-full-main")
    tiny = train_ppo.parse_args(["--recipe", "original", "--tiny", "--device", "cpu"])
    assert (tiny.init, tiny.out) == ("runs/tiny/sft-full-main", "runs/tiny/ppo-full-main")
    lora = train_ppo.parse_args(["--recipe", "original", "--tiny", "--lora", "--device", "cpu"])
    assert (lora.init, lora.out) == ("runs/tiny/sft-lora-main", "runs/tiny/ppo-lora-main")
    lora = train_ppo.parse_args(["--recipe", "original", "--lora", "--device", "cpu"])
    assert lora.init == "runs/sft-lora-main"
    lora = train_ppo.parse_args(["--recipe", "original", "--tiny", "--lora", "--device", "cpu"])
    assert (lora.lr, lora.gamma, lora.out) == (5e-5, 0.99, "runs/tiny/ppo-lora-main")
    assert lora.micro_batch * lora.accumulation == 16


def test_problems_come_in_fresh_permutations_without_a_gap():
    drawn = [data.problems_of_step(list(range(10)), step, 4, seed=3) for step in range(10)]
    problems = [p for step in drawn for p in step]
    for epoch in range(4):
        assert sorted(problems[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert problems[:10] != problems[10:20]
    assert data.problems_of_step(list(range(10)), 7, 4, seed=3) == drawn[7]


def test_equal_rewards_are_one_warning_not_two():
    """Nothing moves then, for this reason: the learning rate is not to blame."""
    m = {
        "first_ratio_error": 0.0, "truncated": 0.0, "kl_sequence": 1.0, "clipped": 0.0, "step": 9,
        "explained_variance": 0.2, "entropy": 0.3, "reward": 0.0, "reward_std": 0.0, "moved": 0.0,
    }  # fmt: skip
    lines = health(m, critic_warmup=0)
    assert len(lines) == 1 and "every reward is 0" in lines[0]


def test_health_is_said_in_words():
    good = {
        "first_ratio_error": 0.0, "truncated": 0.0, "kl_sequence": 1.0, "clipped": 0.01, "step": 9,
        "explained_variance": 0.2, "entropy": 0.3, "reward": 0.4, "reward_std": 0.5, "moved": 1.0,
    }  # fmt: skip
    assert health(good, critic_warmup=0) == []
    bad = [
        ("first_ratio_error", 0.1, "ratio"), ("truncated", 0.5, "cut"), ("clipped", 0.4, "clip"),
        ("kl_sequence", 99.0, "nats"), ("explained_variance", -3.0, "critic"),
        ("entropy", 0.0, "explore"), ("reward_std", 0.0, "every reward"), ("moved", 0.01, "moved"),
    ]  # fmt: skip
    for name, value, word in bad:
        lines = health(good | {name: value}, critic_warmup=0)
        assert len(lines) == 1 and word in lines[0], name
    # While the critic warms up, it may be bad, and the policy does not move.
    assert health(good | {"moved": 0.0, "explained_variance": -3.0}, critic_warmup=9) == []


def test_an_older_run_is_finished_or_refused(flags, tmp_path, capsys):
    """A folder that an earlier version began has no format. It cannot continue here."""
    run = tmp_path / "run"
    run.mkdir()
    record = {"args": {"val_examples": 2}, "info": {"prompt": data.Prompt().settings()}}
    (run / "run_args.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="started by an earlier version"):
        train_ppo.main([*flags, "--out", str(run)])
    (run / "summary.json").write_text(json.dumps({"steps": 4, "reward": 0.5}))
    assert train_ppo.main([*flags, "--out", str(run)]) == 0
    assert "is already finished (reward 0.5)" in capsys.readouterr().out
    assert json.loads((run / "run_args.json").read_text()) == record
