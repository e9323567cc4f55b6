"""train_ppo.py: its math against slow loops and numbers worked by hand, the promises about actor,
reference and critic, a task that must be learnt, and whole runs."""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import train_ppo
from nanogsm import UserError, data
from nanogsm.lora import adapters, add_lora
from nanogsm.model import load_model, save_adapter, save_model, set_checkpointing
from nanogsm.optim import AdamW
from train_ppo import (
    build,
    gae,
    kl_estimates,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)

ROUNDING = 1e-6  # of float32


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


# ------------------------------------------------------------------------------------ the rewards


def test_the_score_stands_on_the_last_action_only_and_kl_on_every_action():
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
    assert train_ppo.reward("so 72.\n#### 72", problem) == 1.0
    assert train_ppo.reward("so 72.\n#### 7", problem) == train_ppo.reward("72", problem) == 0.0


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
            assert returns[b, t].item() == pytest.approx((want + v[t]) if mask[b, t] else 0.0, abs=1e-5)


def test_without_discount_every_action_of_an_answer_has_the_answers_reward_as_return():
    mask, values = random_mask(5, 8), noise(5, 8)
    score = noise(5, seed=3)
    rewards = token_rewards(score, values, values, mask, 0.5)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    assert torch.allclose(returns[mask], score[:, None].expand(5, 8)[mask], atol=1e-5)
    assert torch.allclose(advantages[mask], (returns - values)[mask], atol=1e-5)


def test_what_stands_outside_the_mask_and_more_padding_change_nothing():
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
        (1.5, 2.0, -2.4, 0.0),  # as far as it may go up
        (0.5, 2.0, -1.0, -1.0),  # on the wrong side: pushed back
        (0.5, -2.0, 1.6, 0.0),  # as far as it may go down
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_clipped_objective_by_hand(ratio, advantage, loss, slope):
    """d loss / d logp = -ratio A where the clip does not hold."""
    logp = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    got, held = policy_loss(logp, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), 0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-5) and held.item() == (slope == 0)
    assert logp.grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    "value, old, target, loss, slope",
    [
        (0.5, 0.5, 1.0, 0.125, -0.5),
        (0.9, 0.5, 1.0, 0.5 * 0.3**2, 0.0),  # further than 0.2 towards the target: held at 0.7
        (0.1, 0.5, 1.0, 0.5 * 0.9**2, -0.9),  # away from it: pushed back in full
    ],
)
def test_the_clipped_value_loss_by_hand(value, old, target, loss, slope):
    v = torch.tensor([[value]], requires_grad=True)
    got, held = value_loss(v, torch.tensor([[old]]), torch.tensor([[target]]), 0.2)
    got.sum().backward()
    assert got.item() == pytest.approx(loss, rel=1e-5) and held.item() == (slope == 0)
    assert v.grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


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


def test_parts_means_add_up_to_the_mean_of_the_whole():
    mask, x = random_mask(7, 9), noise(7, 9)
    want = sum(x[mask].tolist()) / int(mask.sum())
    assert masked_mean(x, mask).item() == pytest.approx(want, rel=1e-5)
    parts = [masked_mean(x[r], mask[r], mask.sum()) for r in (slice(0, 1), slice(1, 5), slice(5, 7))]
    assert sum(parts).item() == pytest.approx(want, rel=1e-5)
    assert masked_mean(x.where(mask, math.nan), mask).isfinite()


def test_explained_variance_of_a_perfect_a_constant_and_a_wrong_guess():
    mask, returns = random_mask(6, 9), noise(6, 9)
    score = lambda values: train_ppo.explained_variance(values, returns, mask)  # noqa: E731
    assert score(returns) == pytest.approx(1.0)
    assert score(torch.full_like(returns, 3.0)) == pytest.approx(0.0, abs=1e-5)
    assert score(-returns) == pytest.approx(-3.0, rel=1e-4)


# ----------------------------------------------------------------------- actor, reference, critic


def settings(**changes):
    """The fields of parse_args' result that the functions below read."""
    args = train_ppo.parse_args(["--device", "cpu", "--precision", "fp32"])
    args.__dict__.update(micro_batch=3, accumulation=2, checkpointing="none", lora_r=4, val_examples=2)
    args.__dict__.update(changes)
    return args


PLAIN = contextlib.nullcontext
HALF = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
MODES = [
    pytest.param(PLAIN, False, id="full, float32"),
    pytest.param(HALF, False, id="full, bfloat16"),
    pytest.param(PLAIN, True, id="LoRA, float32"),
    pytest.param(HALF, True, id="LoRA, bfloat16"),
]


def answers(n=8, seed=0):
    """Made-up answers of 1 to 12 tokens to prompts of 2 to 6, about half of them right."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda low, high, size=(): torch.randint(low, high, size, generator=rng).tolist()  # noqa: E731
    rows = []
    for i in range(n):
        prompt, response = draw(7, 300, (draw(2, 7),)), draw(7, 300, (draw(1, 13),))
        example = data.Example(prompt + response, [0] * len(prompt) + [1] * len(response), i)
        right = bool(draw(0, 2))
        rows.append({"example": example, "score": float(right), "correct": right, "truncated": False,
                     "completion": "<<1+1=2>>2" if i == 0 else "2"})  # fmt: skip
    return rows


def models_and_rollout(gemma, autocast=PLAIN, **changes):
    args = settings(**changes)
    args.precision = "bf16" if autocast is HALF else "fp32"
    base, _ = gemma("gemma3", torch.bfloat16 if args.lora and autocast is HALF else torch.float32)
    models = build(base, args)
    rollout, figures = train_ppo.assess(models, answers(), 0, args, autocast)
    return args, models, rollout, figures


def micro_batches_of(rollout):
    return [micro_batch for update in rollout.updates for micro_batch in update]


def gradients(models, rollout, args, autocast=PLAIN, warming=False):
    """(figures by name, largest |ratio - 1|, gradients by name) of all rows as one update."""
    weights = models.policy_weights() | {f"critic.{n}": p for n, p in models.value_weights().items()}
    for p in weights.values():
        p.grad = None
    shares = [
        train_ppo.backward_micro(models, rollout, part, rollout.mask.sum(), args, autocast, warming)
        for part in micro_batches_of(rollout)
    ]
    figures = dict(zip(train_ppo.FIGURES, sum(share[0] for share in shares).tolist()))
    grads = {n: p.grad for n, p in weights.items() if p.grad is not None}
    return figures, max(share[1].item() for share in shares), grads


def optimizers_of(models, lr=1e-2):
    return AdamW(models.policy_weights().items(), lr), AdamW(models.value_weights().items(), lr)


def shake(models, scale=0.05):
    """Move everything that is trained off its start, so that nothing is zero by chance."""
    for i, p in enumerate([*models.policy_weights().values(), *models.value_weights().values()]):
        p.data += scale * noise(*p.shape, seed=i)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("autocast, lora", MODES)
def test_the_first_ratio_is_exactly_one_and_kl_exactly_zero(gemma, autocast, lora, critic):
    """With rows of uneven length, cut into micro-batches; and the critic's first guess is 0."""
    args, models, rollout, figures = models_and_rollout(gemma, autocast, lora=lora, critic=critic)
    assert len({len(row["example"].ids) for row in answers()}) > 4
    assert figures["kl"] == figures["kl_sequence"] == 0 and figures["value"] == 0
    assert (rollout.logp[rollout.mask] < 0).all()
    figures, largest, _ = gradients(models, rollout, args, autocast)
    assert largest == figures["clipped"] == figures["approx_kl"] == 0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_first_value_loss_is_that_of_the_rollouts_own_guesses(gemma, critic):
    """An action's value is read at the token before it, in the rollout and in the update alike."""
    args = settings(critic=critic)
    args.precision = "fp32"
    models = build(gemma("gemma3")[0], args)
    shake(models)
    rollout, _ = train_ppo.assess(models, answers(), 0, args, PLAIN)
    with torch.no_grad():
        hidden = models.critic(rollout.ids)
    by_hand = hidden @ models.head.weight[0] + models.head.bias  # (N, T); of action t the value stands at t
    assert torch.allclose(rollout.values, by_hand[:, :-1] * rollout.mask, atol=1e-5)
    late = by_hand[:, 1:][rollout.mask]
    assert (late - rollout.values[rollout.mask]).abs().max() > 0.01  # one token on it is another
    figures, *_ = gradients(models, rollout, args)
    want = (0.5 * (rollout.values - rollout.returns) ** 2)[rollout.mask].mean().item()
    assert figures["value_loss"] == pytest.approx(want, rel=1e-4) and figures["value_clipped"] == 0


@pytest.mark.parametrize("autocast, lora", MODES)
def test_the_first_gradient_is_that_of_reinforce(gemma, autocast, lora):
    args, models, rollout, _ = models_and_rollout(
        gemma, autocast, lora=lora, critic="separate", entropy_coef=0.0
    )
    *_, got = gradients(models, rollout, args, autocast)
    weights = models.policy_weights()
    for p in weights.values():
        p.grad = None
    for rows in micro_batches_of(rollout):
        ids = rollout.ids[rows]
        with autocast():
            logits = models.actor.logits(models.actor(ids)[:, :-1]).float()
        logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        weighted = logp * rollout.advantages[rows] * rollout.mask[rows]
        (-weighted.sum() / rollout.mask.sum()).backward()
    for name, p in weights.items():
        if p.grad is not None:
            off = 1e-5 if autocast is PLAIN else 0.06  # roundings of 2^-9 on the way through all layers
            assert (got[name] - p.grad).norm() <= off * p.grad.norm() + 1e-6, name


def test_the_reference_is_what_the_actor_was_and_stays_so(gemma):
    for lora in (False, True):
        args, models, rollout, _ = models_and_rollout(gemma, lora=lora, critic="separate", lr=1e-2)
        before = {n: p.clone() for n, p in models.reference.named_parameters()}
        figures = train_ppo.update(models, rollout, optimizers_of(models), args, PLAIN, step=5)
        after = dict(models.reference.named_parameters())
        assert before.keys() == after.keys() and all(torch.equal(p, after[n]) for n, p in before.items())
        assert figures["updates"] == 2 * 2 and figures["first_ratio_error"] == 0
        _, figures = train_ppo.assess(models, answers(), 0, args, PLAIN)
        assert figures["kl"] > 1e-4


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_critics_warm_up_leaves_the_actor_as_it_was_to_the_bit(gemma, lora, critic):
    args, models, rollout, _ = models_and_rollout(gemma, lora=lora, critic=critic, critic_warmup=3)
    actor = {n: p.clone() for n, p in models.actor.named_parameters()}
    value = {n: p.clone() for n, p in models.value_weights().items()}
    optimizers = optimizers_of(models)
    train_ppo.update(models, rollout, optimizers, args, PLAIN, step=2)
    assert all(torch.equal(p, actor[n]) for n, p in models.actor.named_parameters())
    assert optimizers[0].step_count == 0  # its bias correction starts with its first real step
    # Head, then B, then A: each has a gradient once the one before it is no longer zero.
    assert all(not torch.equal(p, value[n]) for n, p in models.value_weights().items())
    train_ppo.update(models, rollout, optimizers, args, PLAIN, step=3)
    assert any(not torch.equal(p, actor[n]) for n, p in models.actor.named_parameters())


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("how", ["light", "full"])
def test_checkpointing_changes_no_gradient_of_actor_or_critic(gemma, lora, critic, how):
    """Both forwards come before the one backward: with one set of weights whose adapters are
    switched, backward would recompute the actor with the critic's."""
    args, models, rollout, _ = models_and_rollout(gemma, lora=lora, critic=critic)
    shake(models)
    *_, want = gradients(models, rollout, args)
    for model in (models.actor, models.critic):
        set_checkpointing(model, how)
    *_, got = gradients(models, rollout, args)
    assert got.keys() == want.keys() and len(want) >= len(models.policy_weights())
    for name in want:
        assert want[name].abs().max() > 0 and (got[name] - want[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_micro_batches_row_order_and_padding_change_neither_gradient_nor_figures(gemma, critic):
    found = []
    for micro_batch, order in ((1, 1), (3, 1), (8, -1)):
        args = settings(micro_batch=micro_batch, accumulation=9, critic=critic, lora=True)
        models = build(gemma("gemma3")[0], args)
        shake(models)
        rollout, figures = train_ppo.assess(models, answers()[::order], 0, args, PLAIN)
        more, _, grads = gradients(models, rollout, args)
        found.append((figures | more, grads))
    for figures, grads in found[1:]:
        for key, value in figures.items():
            assert value == pytest.approx(found[0][0][key], abs=1e-4), key
        for name, grad in grads.items():
            assert (grad - found[0][1][name]).abs().max() < 1e-5, name


def test_an_update_is_the_same_however_it_is_cut(gemma):
    """Two updates of eight answers: 8 x 1, 4 x 2, 1 x 8. (SGD would show it as well; AdamW's first
    steps are nearly signs, so weights with tiny gradients may differ.)"""
    moved = []
    for micro_batch in (8, 4, 1):
        args = settings(micro_batch=micro_batch, accumulation=8 // micro_batch, epochs=1)
        models = build(gemma("gemma3")[0], args)
        rollout, _ = train_ppo.assess(models, answers(16), 0, args, PLAIN)
        assert [len(update) for update in rollout.updates] == [8 // micro_batch] * 2
        figures = train_ppo.update(models, rollout, optimizers_of(models, 1e-3), args, PLAIN, 0)
        moved.append((figures, torch.cat([p.detach().flatten() for p in models.actor.parameters()])))
    for figures, weights in moved[1:]:
        assert figures["grad_norm"] == pytest.approx(moved[0][0]["grad_norm"], rel=1e-3)
        assert figures["policy_loss"] == pytest.approx(moved[0][0]["policy_loss"], abs=1e-4)
        assert ((weights - moved[0][1]).abs() < 1e-4).float().mean() > 0.99


def test_rows_are_cut_within_their_update_and_each_once(gemma):
    args, models, *_ = models_and_rollout(gemma, micro_batch=2, accumulation=2)
    rows = answers(11)
    rollout, _ = train_ppo.assess(models, rows, 0, args, PLAIN)
    assert [len(update) for update in rollout.updates] == [2, 2, 2]
    assert micro_batches_of(rollout) == [slice(i, min(i + 2, 11)) for i in range(0, 11, 2)]
    ids = [row[:n].tolist() for row, n in zip(rollout.ids, rollout.lengths, strict=True)]
    assert ids == [row["example"].ids for row in rows]  # in the order drawn, nothing cut off


def test_the_drawing_at_the_top(gemma):
    """Three prompt tokens, three of the answer and the end: the columns of mask, reward, log-prob."""
    args, models, *_ = models_and_rollout(gemma, kl_coef=0.0, gamma=1.0, lam=0.0)
    example = data.Example([2, 11, 12, 13, 14, 15, 1], [0, 0, 0, 1, 1, 1, 1], 0)
    longer = data.Example([2, 11, 12, 13, 14, 15, 16, 1], [0, 0, 0, 1, 1, 1, 1, 1], 1)
    row = {"score": 1.0, "correct": True, "truncated": False, "completion": ""}
    rows = [row | {"example": e} for e in (longer, example)]
    models.head.bias.data += 0.25  # so lambda 0 leaves an advantage at the last action only
    rollout, _ = train_ppo.assess(models, rows, 0, args, PLAIN)
    assert rollout.mask[1].tolist() == [False, False, True, True, True, True, False]
    assert rollout.returns[1].tolist() == [0, 0, 0.25, 0.25, 0.25, 1.0, 0]
    assert rollout.values[1].tolist() == [0, 0, 0.25, 0.25, 0.25, 0.25, 0]
    with torch.no_grad():
        logits = models.actor.logits(models.actor(torch.tensor([example.ids])))[0].log_softmax(-1)
    for column in range(2, 6):
        want = logits[column, example.ids[column + 1]].item()
        assert rollout.logp[1, column].item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_the_entropy_bonus_pushes_towards_entropy(gemma, lora):
    """Its gradient alone, against one written out with all logits."""
    grads = []
    for coef in (0.0, 0.5):
        args, models, rollout, _ = models_and_rollout(gemma, lora=lora, entropy_coef=coef)
        grads.append(gradients(models, rollout, args)[2])
    for p in models.policy_weights().values():
        p.grad = None
    logp = models.actor.logits(models.actor(rollout.ids)[:, :-1]).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    (-0.5 * entropy[rollout.mask].mean()).backward()
    for name, p in models.policy_weights().items():
        assert (grads[1][name] - grads[0][name] - p.grad).abs().max() < 1e-5, name


def test_the_value_loss_is_weighted_by_its_coefficient(gemma):
    """In the shared trunk, whose head no longer is at zero."""
    grads = []
    for coef in (0.0, 1.0, 3.0):
        args, models, rollout, _ = models_and_rollout(gemma, value_coef=coef)
        models.head.weight.data += 0.1
        grads.append(gradients(models, rollout, args)[2])
    for name, plain in grads[0].items():
        once, thrice = grads[1][name] - plain, grads[2][name] - plain
        assert (thrice - 3 * once).abs().max() < 1e-5, name
    assert sum(float((g - grads[0][n]).abs().sum()) for n, g in grads[1].items()) > 1e-3


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_critic_learns_what_the_answers_were_worth(gemma, lora, critic):
    args, models, rollout, before = models_and_rollout(
        gemma, lora=lora, critic=critic, gamma=1.0, lam=1.0, kl_coef=0.0, value_clip=9.0, value_coef=5.0,
        epochs=12, clip=1e-6,
    )  # fmt: skip
    rollout = rollout._replace(advantages=torch.zeros_like(rollout.advantages))  # the critic alone
    train_ppo.update(models, rollout, optimizers_of(models, 1e-2), args, PLAIN, step=9)
    _, after = train_ppo.assess(models, answers(), 0, args, PLAIN)
    assert before["explained_variance"] == pytest.approx(0.0, abs=1e-5)
    assert after["explained_variance"] > 0.5


def test_the_temperature_of_sampling_is_that_of_every_logprob(gemma):
    args, models, rollout, figures = models_and_rollout(gemma, temperature=0.5)
    with torch.no_grad():
        logits = models.actor.logits(models.actor(rollout.ids)[:, :-1]) / 0.5
    want = logits.log_softmax(-1).gather(-1, rollout.ids[:, 1:, None])[..., 0]
    assert (rollout.logp - want)[rollout.mask].abs().max() < 1e-5
    _, largest, _ = gradients(models, rollout, args)
    assert largest == 0 and figures["kl"] == 0


def test_sampling_in_bfloat16_rounds_a_weight_once_and_not_at_every_token(gemma):
    """The head among them: float32, and read anew for each token."""
    args, models, *_ = models_and_rollout(gemma, HALF)
    _, tokenizer = gemma("gemma3")
    tokenizer.stop_ids = frozenset()
    weights = {p.data_ptr(): 0 for p in models.actor.parameters() if p.dim() == 2}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, given=(), kw=None):
            if operation is torch.ops.aten._to_copy.default and given[0].data_ptr() in weights:
                weights[given[0].data_ptr()] += 1
            return operation(*given, **(kw or {}))

    args.max_new_tokens = 6
    with HALF(), Casts():
        train_ppo.answer(models, tokenizer, data.Prompt(), [data.Problem("2?", "#### 2", 0)], args, 0,
                         lambda *_: None)  # fmt: skip
    assert set(weights.values()) == {1}


def test_an_answer_that_was_cut_gets_nothing_whatever_the_reward_says(gemma, monkeypatch):
    monkeypatch.setattr(train_ppo, "reward", lambda text, problem: 1)
    args, models, *_ = models_and_rollout(gemma)
    _, tokenizer = gemma("gemma3")
    tokenizer.stop_ids = frozenset(range(0, 384, 3))
    args.max_new_tokens = 3
    problems = [data.Problem(f"{i}?", "#### 2", i) for i in range(20)]
    rows = train_ppo.answer(models, tokenizer, data.Prompt(), problems, args, 0, lambda *_: None)
    cut = [row for row in rows if row["truncated"]]
    assert 0 < len(cut) < 20 and all(row["score"] == (not row["truncated"]) for row in rows)
    for row in rows:
        e = row["example"]
        assert (e.ids[-1] in tokenizer.stop_ids) == (not row["truncated"]) and e.mask[-1] == 1


def test_at_the_reports_rate_bfloat16_weights_hardly_move_and_float32_ones_do():
    """recipes: lr 5e-7 is below the rounding of nearly every weight of a bfloat16 matrix."""
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


def learn(gemma, monkeypatch, steps=40, spoil=None, **changes):
    """Reward for an answer that begins with a letter up to m: the share that does, after some steps."""
    monkeypatch.setattr(train_ppo, "reward", lambda text, _: float(text.strip()[:1].lower() in LETTERS))
    if spoil:
        monkeypatch.setattr(train_ppo, *spoil)
    args = settings(rollouts=64, rollout_batch=64, micro_batch=64, accumulation=1, epochs=2, seed=1,
                    max_new_tokens=1, lr=2e-2, value_lr=1e-2, gamma=1.0, lam=1.0, kl_coef=0.0,
                    entropy_coef=0.0, critic="shared", value_coef=0.1, **changes)  # fmt: skip
    base, tokenizer = gemma("gemma3")
    tokenizer.stop_ids = frozenset(range(base.config.vocab_size))  # every token ends its answer
    base.model.embed_tokens.weight.data *= 0.3  # a flatter start: something to explore
    models = build(base, args)
    optimizers = optimizers_of(models, args.lr)
    problems = [data.Problem(f"{i} + {i}?", "#### 7", i) for i in range(8)]
    for step in range(steps):
        chosen = train_ppo.problems_of_step(problems, step, args.rollouts, 0)
        rows = train_ppo.answer(models, tokenizer, data.Prompt(), chosen, args, step, lambda *_: None)
        rollout, figures = train_ppo.assess(models, rows, tokenizer.pad_id, args, PLAIN)
        train_ppo.update(models, rollout, optimizers, args, PLAIN, step)
        if figures["reward"] > 0.97:
            break
    return figures["reward"]


def test_a_simple_task_is_learnt(gemma, monkeypatch):
    assert learn(gemma, monkeypatch) > 0.95


def test_and_it_is_not_learnt_with_the_advantages_turned_round(gemma, monkeypatch):
    whitened = train_ppo.whiten
    turned = lambda x, mask: -whitened(x, mask)  # noqa: E731
    assert learn(gemma, monkeypatch, steps=15, spoil=("whiten", turned)) < 0.2


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def flags(tmp_path):
    """Arguments of a short run on a dozen problems and the random fixture model."""
    rows = [{"question": f"{i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(12)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "--init", str(FIXTURES / "gemma3"), "--data", str(tmp_path / "sums.jsonl"), "--steps", "4",
        "--rollouts", "6", "--rollout-batch", "4", "--micro-batch", "2", "--accumulation", "2",
        "--max-new-tokens", "5", "--val-examples", "2", "--val-every", "2", "--save-every", "1",
        "--lr", "1e-3", "--value-lr", "1e-2", "--device", "cpu", "--precision", "fp32",
        "--checkpointing", "none",
    ]  # fmt: skip


@pytest.fixture
def rewarding(monkeypatch):
    """A reward that a random model earns now and then, an odd number of characters, and an end that
    it comes upon: every third token."""
    monkeypatch.setattr(train_ppo, "reward", lambda text, _: len(text) % 2)
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


KINDS = [[], ["--lora", "--critic", "separate"], ["--critic", "separate", "--critic-warmup", "2"]]


@pytest.mark.parametrize("kind", KINDS, ids=["full", "LoRA", "full, critic apart"])
def test_a_stopped_run_continues_bit_for_bit(flags, rewarding, kind, tmp_path, monkeypatch, capsys):
    assert train_ppo.main([*flags, *kind, "--out", str(tmp_path / "whole")]) == 0
    real = train_ppo.update

    def interrupted(*args, **kw):
        if args[-1] == 1:  # in the second step's updates
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kw)

    monkeypatch.setattr(train_ppo, "update", interrupted)
    assert train_ppo.main([*flags, *kind, "--out", str(tmp_path / "cut")]) == 143
    monkeypatch.setattr(train_ppo, "update", real)
    assert "continue from step 2" in capsys.readouterr().out
    assert train_ppo.main([*flags, *kind, "--out", str(tmp_path / "cut")]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    want, got = result(tmp_path / "whole"), result(tmp_path / "cut")
    assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
    samples = [(tmp_path / run / "samples.jsonl").read_text() for run in ("whole", "cut")]
    assert samples[0] == samples[1]
    steps = [row["step"] for row in metrics(tmp_path / "cut") if "reward" in row]
    assert steps == [1, 2, 3, 4]


def test_how_an_update_is_cut_and_where_the_data_lie_may_change_on_the_way(
    flags, rewarding, tmp_path, monkeypatch
):
    """And the size of an update may not. Answers and rewards stay the same, weights but for rounding."""
    flags = [*flags, "--optim", "adamw"]
    assert train_ppo.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    real = train_ppo.update

    def interrupted(*args, **kw):
        if args[-1] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kw)

    monkeypatch.setattr(train_ppo, "update", interrupted)
    assert train_ppo.main([*flags, "--out", str(tmp_path / "cut")]) == 143
    monkeypatch.setattr(train_ppo, "update", real)
    at = flags.index("--data") + 1
    flags[at] = str(shutil.move(flags[at], tmp_path / "moved.jsonl"))
    flags += ["--out", str(tmp_path / "cut"), "--rollout-batch", "3"]
    with pytest.raises(UserError, match=r"\(answers_an_update was 4, now 2\)"):
        train_ppo.main([*flags, "--micro-batch", "1"])
    assert train_ppo.main([*flags, "--micro-batch", "1", "--accumulation", "4"]) == 0
    whole, cut = ([r["reward"] for r in metrics(tmp_path / k) if "reward" in r] for k in ("whole", "cut"))
    assert whole == cut and len(cut) == 4
    want, got = result(tmp_path / "whole"), result(tmp_path / "cut")
    start = load_file(FIXTURES / "gemma3" / "model.safetensors")
    for key in want:
        moved = (want[key] - start.get(key[1], 0)).abs().max()
        assert 0 < moved and (want[key] - got[key]).abs().max() <= 0.02 * moved, key


def test_a_stop_while_answers_are_sampled_saves_and_continues(flags, rewarding, tmp_path, monkeypatch):
    assert train_ppo.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    real, calls = train_ppo.generate.generate, []

    def interrupted(*args, progress, **kw):
        calls.append(None)
        if len(calls) == 3:  # the first is the validation at step 0
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, progress=progress, **kw)

    monkeypatch.setattr(train_ppo.generate, "generate", interrupted)
    assert train_ppo.main([*flags, "--out", str(tmp_path / "cut")]) == 143
    assert [row["step"] for row in metrics(tmp_path / "cut") if "reward" in row] == [1]
    assert train_ppo.main([*flags, "--out", str(tmp_path / "cut")]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_problems(
    flags, rewarding, tmp_path, monkeypatch
):
    real, calls = train_ppo.reward, []
    monkeypatch.setattr(  # six answers a step: the seventh is of step 2
        train_ppo, "reward", lambda *given: calls.append(1) or (math.inf if len(calls) > 6 else real(*given))
    )
    monkeypatch.setattr(data.Tokenizer, "_configured_stops", lambda _: set(range(1, 384)))  # none is cut
    with pytest.raises(UserError, match=r"norm nan at step 2; problems \[\d+, \d+.*: lower --lr"):
        train_ppo.main([*flags, "--out", str(tmp_path / "run")])
    assert [p.name for p in (tmp_path / "run/checkpoint").iterdir()] == ["step-1"]
    assert not (tmp_path / "run/model").exists()


def test_a_run_does_not_go_on_from_another_start(flags, rewarding, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(FIXTURES / "gemma3", start)
    argv = [*flags, "--init", str(start), "--out", str(tmp_path / "run")]
    assert train_ppo.main(argv) == 0
    model, tokenizer = load_model(start)
    model.model.layers[2].mlp.up_proj.weight.data += 0.01
    save_model(model, tokenizer, tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", start)
    with pytest.raises(UserError, match="what --init names changed"):
        train_ppo.main(argv)


def test_a_dry_run_says_what_is_trained_and_how_much_memory_it_wants(flags, tmp_path, capsys):
    train_ppo.main([*flags, "--lora", "--critic", "separate", "--dry-run", "--out", str(tmp_path / "run")])
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
    argv = ["--model", out, "--data", problems, "--n", "4", "--max-new-tokens", "4", "--device", "cpu"]
    assert evaluate.main(argv) == 0
    rows = [row for row in metrics(tmp_path / "run") if "reward" in row]
    varied = next(row for row in rows if row["reward_std"])  # else the variance explained is undefined
    for name in ("reward", "exact_match", "kl", "kl_sequence", "approx_kl", "entropy", "policy_loss",
                 "value_loss", "clipped", "value_clipped", "explained_variance", "grad_norm",
                 "response_tokens", "truncated", "worked", "moved", "tokens",
                 "first_ratio_error"):  # fmt: skip
        assert math.isfinite(varied[name]), name
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
    """Folded into a bfloat16 base a change below half its last bit would be gone, and PPO would start
    somewhere else than where fine-tuning ended and evaluation measures."""
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
        tuned, start = logits(load_model(tmp_path / "sft", torch.bfloat16)[0]), logits(started[0])
        merged = logits(load_model(tmp_path / "sft", torch.bfloat16, merge=True)[0])
    assert torch.equal(start, tuned) and not torch.equal(merged, tuned)


def test_a_missing_start_says_what_to_do_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no runs/sft-full-main yet.*python train_sft.py makes"):
        train_ppo.main([])
    with pytest.raises(UserError, match=r"runs/tiny/sft-full-main yet.*train_sft.py --tiny"):
        train_ppo.main(["--tiny"])
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
    for rollouts, said in (("6", "2 x 2 updates of 4 (the last: 2), in"), ("8", "2 x 2 updates of 4, in"),
                           ("3", "2 x 1 updates of 3, in")):  # fmt: skip
        train_ppo.main([*flags, "--rollouts", rollouts, "--dry-run"])
        out = capsys.readouterr().out
        assert said in out and "note" not in out


def test_other_held_out_problems_than_the_starts_are_noted(flags, capsys, tmp_path):
    own = flags[flags.index("--data") + 1]
    record = {"args": {"val_examples": 5, "data": own}, "info": {"prompt": data.Prompt()._asdict()}}
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "run_args.json").write_text(json.dumps(record))
    shutil.copytree(FIXTURES / "gemma3", tmp_path / "sft" / "model")
    argv = [*flags, "--init", str(tmp_path / "sft"), "--dry-run"]
    train_ppo.main(argv)
    assert "held out 5 problems, this run 2" in capsys.readouterr().out
    train_ppo.main([*argv, "--val-examples", "5"])
    assert "note" not in capsys.readouterr().out


def test_a_start_hands_on_what_it_held_out_of_the_same_problems_and_its_longer_answers(tmp_path):
    def parsed(of_data, theirs, limit):
        args = {"val_examples": 5, "data": theirs, "max_new_tokens": limit}
        record = {"args": args, "info": {"prompt": data.Prompt()._asdict()}}
        (tmp_path / "run_args.json").write_text(json.dumps(record))
        args = train_ppo.parse_args(["--init", str(tmp_path), "--data", of_data, "--device", "cpu"])
        return args.val_examples, args.max_new_tokens

    assert parsed("main", "main", 320) == (5, 320)
    assert parsed("main", "socratic", 512) == (5, 512)
    assert parsed("socratic", "main", 320) == (5, 512)
    assert parsed("mine.jsonl", "main", 320) == (None, 320)
    assert parsed("mine.jsonl", "mine.jsonl", 400) == (5, 400)


def test_seed_is_the_reports_recipe():
    args = train_ppo.parse_args(["--device", "cpu"])
    assert (args.lr, args.kl_coef, args.value_coef, args.entropy_coef) == (5e-7, 0.05, 0.1, 0.01)
    assert (args.clip, args.gamma, args.lam, args.epochs, args.steps) == (0.2, 0.99, 0.95, 2, 100)
    assert (args.rollouts, args.rollout_batch, args.micro_batch, args.accumulation) == (512, 32, 2, 8)
    assert (args.optim, args.critic_warmup, args.init) == ("adamw8bit", 0, "runs/sft-full-main")
    assert (args.out, args.critic) == ("runs/ppo-full-main", "shared")
    tiny = train_ppo.parse_args(["--tiny", "--lora", "--device", "cpu"])
    assert (tiny.lr, tiny.gamma, tiny.init) == (5e-5, 0.99, "runs/tiny/sft-full-main")
    assert tiny.micro_batch * tiny.accumulation == 16 and tiny.out == "runs/tiny/ppo-lora-main"


def test_problems_come_in_fresh_permutations_without_a_gap():
    drawn = [train_ppo.problems_of_step(list(range(10)), step, 4, seed=3) for step in range(10)]
    row = [p for step in drawn for p in step]
    for epoch in range(4):
        assert sorted(row[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert row[:10] != row[10:20]
    assert train_ppo.problems_of_step(list(range(10)), 7, 4, seed=3) == drawn[7]


def test_health_is_said_in_words():
    args = argparse.Namespace(critic_warmup=0)
    good = {
        "first_ratio_error": 0.0, "truncated": 0.0, "kl_sequence": 1.0, "clipped": 0.01, "step": 9,
        "explained_variance": 0.2, "entropy": 0.3, "reward": 0.4, "reward_std": 0.5, "moved": 1.0,
    }  # fmt: skip
    assert train_ppo.health(good, args) == []
    bad = [
        ("first_ratio_error", 0.1, "ratio"), ("truncated", 0.5, "cut"), ("clipped", 0.4, "clip"),
        ("kl_sequence", 99.0, "nats"), ("explained_variance", -3.0, "critic"),
        ("entropy", 0.0, "explore"), ("reward_std", 0.0, "every reward"), ("moved", 0.01, "moved"),
    ]  # fmt: skip
    for name, value, word in bad:
        said = train_ppo.health(good | {name: value}, args)
        assert len(said) == 1 and word in said[0], name
