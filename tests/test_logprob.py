"""logprob.py and fast/head.py against log_softmax written out in float64, values and gradients."""

import contextlib
import weakref
from unittest.mock import patch

import pytest
import torch

from nanogsm import logprob
from nanogsm.fast import head as fast_head
from nanogsm.logprob import definition, next_token_logprobs
from nanogsm.transformer import Vocabulary

B, T, D, V = 3, 7, 8, 50
TIGHT = 2e-6


def token_logprobs(*args, block=None, **kwargs):
    """logprob.token_logprobs, with `block` rows of the vocabulary at a time if it is given."""
    small = patch.object(fast_head, "block_rows", lambda *sizes: block)
    with small if block else contextlib.nullcontext():
        return logprob.token_logprobs(*args, **kwargs)


def setting(head_is_trained):
    torch.manual_seed(0)
    head = torch.randn(V, D, requires_grad=head_is_trained)
    hidden = torch.randn(B, T, D, requires_grad=True)
    mask = torch.rand(B, T) > 0.4
    assert V % 4 != 0  # with blocks of 4 the last one is short
    return head, hidden, torch.randint(V, (B, T)), mask


def by_hand(head, hidden, targets, mask, temperature, cap=3.0):
    """(logp, entropy) the plain way: full logits, float64."""
    logits = hidden.double() @ head.double().T
    logits = cap * torch.tanh(logits / cap) if cap else logits
    logp = torch.log_softmax(logits / temperature, -1)
    chosen = logp.gather(-1, targets[..., None])[..., 0]
    return chosen * mask, -(logp.exp() * logp).sum(-1) * mask


@pytest.mark.parametrize("head_is_trained", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("block", [4, 1000])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("kept", ["nothing", "some", "all"])
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients_equal_those_of_the_full_logits(
    monkeypatch, head_is_trained, temperature, block, cap, kept, entropy
):
    head, hidden, targets, mask = setting(head_is_trained)
    some = int(mask.sum()) * 4 * (1 + entropy) * 3  # three blocks of 4
    monkeypatch.setitem(
        fast_head.KEPT_EXPONENTIALS, "cpu", {"nothing": 0, "some": some, "all": 2**20}[kept]
    )
    weight = torch.randn(1 + entropy, B, T)  # any upstream gradient, different for every position
    leaves = (hidden, head) if head_is_trained else (hidden,)

    args = Vocabulary(head, cap), hidden, targets, mask, temperature, entropy
    got = token_logprobs(*args, block=block)[: 1 + entropy]
    want = by_hand(head, hidden, targets, mask, temperature, cap)
    for ours, theirs in zip(got, want):
        assert ours.shape == (B, T) and ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= (TIGHT if cap else 3 * TIGHT)  # without, logits of 20
    theirs = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weight, want)), leaves)
    for times in (1, 2):  # the second backward adds as much again
        sum((w * x).sum() for w, x in zip(weight, got)).backward(retain_graph=True)
        for leaf, grad in zip(leaves, theirs):
            assert (leaf.grad - times * grad).abs().max() <= times * 10 * TIGHT


@pytest.mark.parametrize("head_is_trained", [False, True])
def test_without_entropy_the_gradient_is_that_of_the_log_probs_alone(head_is_trained):
    head, hidden, targets, mask = setting(head_is_trained)
    leaves = (hidden, head) if head_is_trained else (hidden,)
    logp, entropy = token_logprobs(Vocabulary(head, 3.0), hidden, targets, mask, block=4)
    assert entropy is None
    want, _ = by_hand(head, hidden, targets, mask, 1.0)
    weight = torch.randn(B, T)
    theirs = torch.autograd.grad((weight * want).sum(), leaves)
    (weight * logp).sum().backward()
    for leaf, grad in zip(leaves, theirs):
        assert (leaf.grad - grad).abs().max() <= 10 * TIGHT


def test_a_trained_heads_gradient_is_added_to_what_is_there():
    """In place, where autograd would make a matrix for each use."""
    head, hidden, targets, mask = setting(True)
    there = head.grad = torch.ones_like(head)
    logp, _ = token_logprobs(Vocabulary(head), hidden, targets, mask, block=4)
    logp.sum().backward()
    want = torch.autograd.grad(by_hand(head, hidden, targets, mask, 1.0, None)[0].sum(), head)[0]
    assert head.grad is there and (there - 1 - want).abs().max() <= 10 * TIGHT


def test_unmasked_positions_cost_nothing_and_get_no_gradient(monkeypatch):
    head, hidden, targets, mask = setting(False)
    shapes, real = [], fast_head._terms
    seen = lambda z, *rest: shapes.append(tuple(z.shape)) or real(z, *rest)  # noqa: E731
    monkeypatch.setattr(fast_head, "_terms", seen)
    logp, _ = token_logprobs(Vocabulary(head, 3.0), hidden, targets, mask)
    assert shapes == [(V, mask.sum())]
    assert (logp[~mask] == 0).all() and (logp[mask] < 0).all()
    logp.sum().backward()
    assert (hidden.grad[~mask] == 0).all() and (hidden.grad[mask] != 0).any(-1).all()


def test_garbage_at_unmasked_positions_changes_nothing():
    head, hidden, targets, mask = setting(False)
    before, _ = token_logprobs(Vocabulary(head, 3.0), hidden, targets, mask)
    spoilt = hidden.detach().masked_fill(~mask[..., None], float("nan"))
    after, _ = token_logprobs(
        Vocabulary(head, 3.0), spoilt, targets.masked_fill(~mask, V + 1000), mask
    )
    assert torch.equal(before, after)


def test_nothing_is_made_for_a_gradient_under_no_grad(monkeypatch):
    head, hidden, targets, mask = setting(True)
    monkeypatch.setattr(
        fast_head, "_for_gradient", None
    )  # by which all that a derivative needs has to pass
    with torch.no_grad():
        logp, entropy = token_logprobs(Vocabulary(head, 3.0), hidden, targets, mask, entropy=True)
    want = by_hand(head, hidden, targets, mask, 1.0)
    assert (logp - want[0]).abs().max() <= TIGHT and (entropy - want[1]).abs().max() <= TIGHT


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("head_is_trained", [False, True])
def test_nothing_is_held_once_the_scores_are_gone(head_is_trained, entropy):
    """Outputs that the graph's node holds and that hold the node would stay for ever, step by
    step."""
    head, hidden, targets, mask = setting(head_is_trained)
    logp, _ = token_logprobs(Vocabulary(head), hidden, targets, mask, entropy=entropy)
    node = weakref.ref(next(node for node, _ in logp.grad_fn.next_functions if node))
    logp.sum().backward()
    del logp, _
    assert node() is None


@pytest.mark.parametrize("on_cpu", [False, True])
def test_rows_are_added_at_places_that_repeat(on_cpu):
    """Both ways, into a matrix of another dtype."""

    class Matrix(torch.Tensor):
        is_cpu = on_cpu

    total = torch.ones(3, 2, dtype=torch.bfloat16).as_subclass(Matrix)
    fast_head.add_rows(
        total, torch.tensor([2, 0, 2]), torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])
    )
    assert total.tolist() == [[5, 9], [1, 1], [18, 35]]


def test_a_head_in_bfloat16_learns_without_autocast():
    head, hidden, targets, mask = setting(True)
    half = head.detach().bfloat16().requires_grad_()
    token_logprobs(Vocabulary(half), hidden.bfloat16(), targets, mask)[0].sum().backward()
    want = torch.autograd.grad(
        by_hand(half, hidden.bfloat16(), targets, mask, 1.0, None)[0].sum(), half
    )[0]
    assert (half.grad - want).abs().max() <= 0.02 * want.abs().max()


def test_a_head_learns_from_hidden_states_that_do_not():
    head, hidden, targets, mask = setting(True)
    token_logprobs(Vocabulary(head), hidden.detach(), targets, mask)[0].sum().backward()
    want = torch.autograd.grad(by_hand(head, hidden, targets, mask, 1.0, None)[0].sum(), head)[0]
    assert (head.grad - want).abs().max() <= 10 * TIGHT


@pytest.mark.parametrize("head_is_trained", [False, True])
def test_no_supervised_position_is_no_trouble(head_is_trained):
    head, hidden, targets, mask = setting(head_is_trained)
    logp, entropy = token_logprobs(Vocabulary(head), hidden, targets, mask & False, entropy=True)
    (logp + entropy).sum().backward()
    assert not logp.any() and not entropy.any() and not hidden.grad.any()


@pytest.mark.parametrize("block", [None, 1])
def test_logits_that_are_all_far_below_zero(block):
    hidden, head = (
        torch.full((1, 1, 2), -100.0),
        torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.01]]),
    )
    args = torch.tensor([[1]]), torch.tensor([[True]])
    logp, entropy = token_logprobs(Vocabulary(head), hidden, *args, entropy=True, block=block)
    want = by_hand(head, hidden, *args, 1.0, None)  # -200, -200 and -201
    assert torch.allclose(logp.double(), want[0]) and torch.allclose(entropy.double(), want[1])


@pytest.mark.parametrize("block", [None, 1])
def test_huge_logits_do_not_overflow(block):
    hidden = torch.tensor([[[300.0, -300.0]]], requires_grad=True)
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    target, mask = torch.tensor([[1]]), torch.tensor([[True]])
    logp, entropy = token_logprobs(
        Vocabulary(head), hidden, target, mask, entropy=True, block=block
    )
    assert logp.item() == -600 and entropy.item() == 0
    (logp + entropy).sum().backward()
    assert torch.equal(hidden.grad, torch.tensor([[[-1.0, 1.0]]]))


@pytest.mark.parametrize("head_is_trained", [False, True])
def test_bfloat16_autocast_keeps_the_scores_in_float32(head_is_trained):
    head, hidden, targets, mask = setting(head_is_trained)
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = token_logprobs(Vocabulary(head), hidden, targets, mask, block=4)
    assert logp.dtype == torch.float32
    logp.sum().backward()
    exact = torch.log_softmax(hidden.detach() @ head.detach().T, -1).gather(-1, targets[..., None])
    assert (logp - exact[..., 0] * mask).abs().max() < 0.2  # the head's product is bfloat16
    assert hidden.grad is not None and (head.grad is not None) == head_is_trained


@pytest.mark.parametrize("head_is_trained", [False, True])
def test_a_confident_tokens_gradient_is_not_lost_to_rounding(head_is_trained):
    """p_t = 0.999: of two equal numbers in bfloat16, w_t and the mean of all w, rounding leaves
    0.4%, four times what is left in truth. The errors allowed are those of bfloat16's roundings, a
    few of 2^-8."""
    torch.manual_seed(1)
    head = torch.randn(V, 64).bfloat16().float().requires_grad_(head_is_trained)
    target = torch.tensor([[7]])
    hidden = (
        (head[7] / head[7].norm() ** 2 * 10)
        .detach()
        .bfloat16()
        .float()[None, None]
        .requires_grad_(True)
    )
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = token_logprobs(Vocabulary(head), hidden, target, torch.tensor([[True]]))
    assert 0.99 < logp.exp().item() < 0.9999
    logp.sum().backward()
    leaves = (hidden, head) if head_is_trained else (hidden,)
    wanted = torch.autograd.grad(by_hand(head, hidden, target, 1, 1.0, None)[0].sum(), leaves)
    for leaf, want in zip(leaves, wanted):
        assert (leaf.grad - want).norm() < 2**-6 * want.norm()


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_definition_is_log_softmax_and_the_blocks_equal_it(cap, temperature, entropy):
    """Values of both against float64, and the gradients of one against the other's."""
    head, hidden, targets, mask = setting(True)
    want = by_hand(head, hidden, targets, mask, temperature, cap)
    args = Vocabulary(head, cap), hidden[mask], targets[mask], temperature, entropy
    plain, in_blocks = definition(*args), fast_head.scores(*args, block=4)
    slopes = torch.randn(2, int(mask.sum()))
    total = lambda scores: sum((w * x).sum() for w, x in zip(slopes, scores) if x is not None)  # noqa: E731
    grads = torch.autograd.grad(total(plain), (hidden, head), retain_graph=True)
    total(in_blocks).backward()
    for k in range(1 + entropy):
        assert (plain[k] - want[k][mask]).abs().max() <= 3 * TIGHT
        assert (in_blocks[k] - plain[k]).abs().max() <= 3 * TIGHT
    assert (plain[1] is None) == (in_blocks[1] is None) == (not entropy)
    for leaf, grad in zip((hidden, head), grads):
        assert (leaf.grad - grad).abs().max() <= 10 * TIGHT


@pytest.mark.parametrize("form", [definition, fast_head.scores])
def test_the_seam_takes_either_form(monkeypatch, form):
    head, hidden, targets, mask = setting(False)
    monkeypatch.setattr(logprob, "scores", form)
    got = token_logprobs(Vocabulary(head, 3.0), hidden, targets, mask, 0.7, True)
    want = by_hand(head, hidden, targets, mask, 0.7)
    for ours, theirs in zip(got, want):
        assert ours.dtype == torch.float32 and (ours - theirs).abs().max() <= TIGHT


def test_hidden_state_t_is_scored_against_token_t_plus_one():
    head, hidden, ids, mask = setting(False)
    logp, entropy = next_token_logprobs(Vocabulary(head), hidden, ids, mask, 0.7, True)
    assert logp.shape == entropy.shape == (B, T - 1)
    all_logp = (hidden @ head.T / 0.7).log_softmax(-1)
    for b in range(B):
        for t in range(T - 1):
            want = all_logp[b, t, ids[b, t + 1]] if mask[b, t + 1] else torch.zeros(())
            assert (logp[b, t] - want).abs() <= 3 * TIGHT
