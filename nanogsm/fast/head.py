"""Log-probabilities over a large vocabulary, one block of it at a time. Torch only.

logprob.py has the definition: logits = hidden W', log_softmax, gather. Gemma's vocabulary has
256,000 rows, so the logits of 8 answers of 300 tokens take 2.5 GB in float32, and autograd keeps
several such tensors. `scores` returns the same numbers and holds one block of logits at a time.

The method is FlashAttention's (Dao et al. 2022, arXiv 2205.14135), with the vocabulary in the place
of the keys. For one position let z_v be its logits divided by the temperature, t the target, M the
largest logit seen so far and u_v = z_v - M. Two sums over the vocabulary are enough:

    denominator = sum_v exp(u_v)            log p_t = u_t - log(denominator)
    weighted    = sum_v exp(u_v) u_v        entropy = log(denominator) - mean,
                                            mean    = weighted / denominator

When a block raises M by d, the sums so far are put on the new scale:

    weighted <- exp(-d) (weighted - d denominator)        denominator <- exp(-d) denominator

A log-prob depends on its own hidden state alone, and its gradient is again a sum over the
vocabulary. Let w_v be the row of W, times the slope of the cap where there is one, and
p_v = exp(u_v) / denominator:

    d log p_t / d hidden = w_t - sum_v p_v w_v
    d entropy / d hidden = sum_v p_v (mean - u_v) w_v

These sums are accumulated in the same pass over the blocks; backward only multiplies them by the
incoming gradient. The gradient of W itself (full fine-tuning) has hidden in the place of w_v, and
factors that only backward knows:

    d log p_t / d w_v = ([v = t] - p_v) hidden
    d entropy / d w_v = p_v (mean - u_v) hidden

So backward goes through the blocks once more. The exponentials of the first blocks are kept from
forward, which saves computing their logits again.

Trap: where p_t is close to 1, 1 - p_t is the difference of two nearly equal numbers. All sums
therefore leave the target out, and the target is added last.
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at a time. On a CPU a block should stay in the cache: with blocks of 8 or 16 MB
# `scores` takes three quarters of its time with 256 MB. A GPU is faster with few, large kernels.
BLOCK_LOGITS = {"cpu": 2**21, "cuda": 2**26, "mps": 2**26}
BLOCK_MULTIPLE = 1024  # a block multiplies faster if its number of rows is a multiple of this
# Exponentials kept from forward to backward where W is trained, in the dtype of matrix products.
# With Gemma 3's vocabulary, 2**27 are enough for 512 positions, half of a micro-batch of 8 answers
# of GSM8K. Keeping all would save another 4% of a full fine-tuning step and take 0.3 GiB more.
KEPT_EXPONENTIALS = {"cpu": 2**27, "cuda": 2**29, "mps": 2**27}


def scores(
    vocabulary,
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    block: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(target | hidden) and, if asked for, the entropy, in nats: (n,) float32 each.

    vocabulary is a pair (weight (V, D), cap or None), hidden (n, D), targets (n,). `block` is the
    number of rows of the vocabulary at a time; it changes speed, not results (block_rows). Memory:
    a few times BLOCK_LOGITS numbers, a few vectors of length D per position and, if the weight is
    trained, up to KEPT_EXPONENTIALS numbers until backward. Trap: a trained weight's gradient is
    added to weight.grad in place. torch.autograd.grad does not see it.
    """
    block = block or block_rows(hidden.device.type, *hidden.shape)
    weight, cap = vocabulary
    if not torch.is_grad_enabled():
        weight = weight.detach()  # needs_input_grad would be True for it even under no_grad
    found = _Scores.apply(hidden, weight, targets, cap, temperature, entropy, block)
    return found[0], found[1] if entropy else None


def block_rows(kind: str, positions: int, width: int) -> int:
    """How many rows of the vocabulary make BLOCK_LOGITS logits on a kind of device. With fewer
    positions than hidden is wide, the copy of the block's rows is the larger tensor and sets it."""
    multiples = BLOCK_LOGITS[kind] // max(positions, width) // BLOCK_MULTIPLE
    return BLOCK_MULTIPLE * max(1, multiples)


def lookup(ids: Tensor, weight: Tensor) -> Tensor:
    """F.embedding whose gradient is added to weight.grad in place: ids (B, T), weight (V, D) ->
    (B, T, D)."""
    return _Lookup.apply(weight, ids)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.weight, ctx.ids = weight, ids
        return weight[ids]

    @staticmethod
    def backward(ctx, grad: Tensor):
        add_rows(grad_of(ctx.weight), ctx.ids.flatten(), grad.flatten(0, 1))
        return None, None


def grad_of(weight: Tensor) -> Tensor:
    """weight.grad, created if there is none, to be added to in place.

    The embedding is used twice, by the lookup and by the output projection. Autograd would make one
    matrix of its size for each use before adding them: 1.3 GB for Gemma 3 270M, 4 GB for gemma-2b.
    """
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """total[ids[i]] += rows[i] for each i, in an order that is the same every time. The CPU
    promises this for one of the two functions below, CUDA for the other."""
    rows = rows.to(total.dtype)
    if total.is_cpu:
        total.index_add_(0, ids, rows)
    else:
        total.index_put_((ids,), rows, accumulate=True)


class _Scores(torch.autograd.Function):
    """hidden (n, D), weight (V, D), targets (n,) -> log-probs and entropies (n,). The names are
    those of the derivation above; a tensor "per term" has one entry for exp(u) and, with the
    entropy, a second one for exp(u) u."""

    @staticmethod
    def forward(
        ctx, hidden, weight, targets, cap, temperature, entropy, block
    ) -> tuple[Tensor, ...]:
        kind, (n, D) = hidden.device.type, hidden.shape
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
        low = hidden.to(dtype)  # hidden in the dtype of matrix products
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=hidden.device)
        running_max = zeros(n) + torch.finfo(torch.float32).min
        target_logit = zeros(n)
        sums = zeros(1 + entropy, n)  # per term: denominator, weighted
        row_sums = zeros(1 + entropy, n, D) if wants_hidden else None  # per term: sum of term * w_v
        kept_max, kept_terms, left_to_keep = [], [], KEPT_EXPONENTIALS[kind]
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(weight), block):
                w, logits, slope, is_here, at = _block(
                    weight, cap, low, targets, start, block, temperature
                )
                target_logit = torch.where(is_here, logits.gather(0, at)[0], target_logit)
                new_max = torch.maximum(running_max, logits.amax(0))
                _rescale(sums, row_sums, running_max - new_max)
                running_max = new_max
                terms = _terms(logits, running_max, is_here, at, entropy)
                for k, term in enumerate(terms):
                    sums[k].add_(term.sum(0))  # sums[k] += ... would also copy sums[k] onto itself
                if not (wants_hidden or wants_weight):
                    continue
                terms = _for_gradient(terms, slope, low.dtype)
                if wants_hidden:
                    for k, term in enumerate(terms):
                        row_sums[k].add_(term.T @ w)
                left_to_keep -= sum(term.numel() for term in terms)
                if wants_weight and left_to_keep >= 0:
                    kept_max.append(running_max)
                    kept_terms += terms

        u = target_logit - running_max  # of the target, which all sums have left out
        slope = cap_slope(target_logit * temperature, cap)
        denominator, mean = sums[0] + u.exp(), None
        outputs = [u - denominator.log()]
        target_slopes = [sums[0] / denominator * slope]  # derivatives by the target's own logit
        if entropy:
            p = u.exp() / denominator
            mean = sums[1] / denominator + p * u
            outputs.append(denominator.log() - mean)
            target_slopes.append(p * (mean - u) * slope)
        grad_hidden = []  # d output / d hidden
        if wants_hidden:
            w, row_sums = weight[targets], row_sums / denominator[:, None]
            grad_hidden.append(target_slopes[0][:, None] * w - row_sums[0])
            if entropy:
                with_target = target_slopes[1][:, None] * w + mean[:, None] * row_sums[0]
                grad_hidden.append(with_target - row_sums[1])
        for_weight = []
        if wants_weight:
            for_weight = [low, targets, running_max, denominator, mean]
            for_weight += [*target_slopes, *kept_max, *kept_terms]
        # Gradients are by z = logits / temperature; the chain rule divides by it once more.
        ctx.save_for_backward(*(grad.div_(temperature) for grad in grad_hidden), *for_weight)
        ctx.weight, ctx.cap, ctx.temperature, ctx.block = weight, cap, temperature, block
        ctx.n_hidden = len(grad_hidden)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        grad_hidden = ctx.saved_tensors[: ctx.n_hidden]
        for_weight = ctx.saved_tensors[ctx.n_hidden :]
        if for_weight:
            _add_weight_gradient(
                ctx.weight, ctx.cap, ctx.temperature, ctx.block, grads, *for_weight
            )
        total = None
        if grad_hidden:
            total = sum(g[:, None] * by_hidden for g, by_hidden in zip(grads, grad_hidden))
        return total, None, None, None, None, None, None


def _add_weight_gradient(
    weight, cap, temperature, block, grads, low, targets, running_max, denominator, mean, *rest
) -> None:
    """Add the gradient of the vocabulary's rows to weight.grad: a second pass over the blocks.

    Trap: a kept term was computed with the maximum of its time, M_then = M + d with d <= 0. Its u
    is the final u plus -d, so the final exp(u) is exp(d) times the kept one.
    """
    n_terms, grad = len(grads), grad_of(weight)  # 1, or 2 with the entropy
    target_slopes, rest = rest[:n_terms], rest[n_terms:]
    n_kept = len(rest) // (1 + n_terms)
    kept_max, kept_terms = rest[:n_kept], rest[n_kept:]

    with torch.autocast(low.device.type, enabled=False):
        for i, start in enumerate(range(0, len(grad), block)):
            if i < n_kept:
                d = kept_max[i] - running_max
                terms = kept_terms[n_terms * i : n_terms * (i + 1)]
            else:
                _, logits, slope, is_here, at = _block(
                    weight, cap, low, targets, start, block, temperature
                )
                d = torch.zeros_like(running_max)
                terms = _terms(logits, running_max, is_here, at, n_terms == 2)
                terms = _for_gradient(terms, slope, low.dtype)
            scale = d.exp() / denominator / temperature  # turns a term into p, over the temperature
            if n_terms == 1:  # the position's factor goes onto hidden, and the term stays as it is
                left = terms[0]
                right = ((-grads[0] * scale)[:, None] * low).to(low.dtype)
            else:  # two terms must be added, so the factors go onto them
                by_exp = (grads[1] * (mean - d) - grads[0]) * scale * terms[0]
                left = (by_exp - grads[1] * scale * terms[1]).to(low.dtype)
                right = low
            grad[start : start + block].add_(left @ right)  # (block, n) (n, D)
        by_target = sum(g * slope for g, slope in zip(grads, target_slopes)) / temperature
        add_rows(grad, targets, by_target[:, None] * low)


def _block(weight, cap, low, targets, start, block, temperature) -> tuple[Tensor, ...]:
    """The block of the vocabulary that begins at row `start`: its rows w (block, D); their logits /
    temperature in float32 (block, n); the cap's slope at these logits, or None; whether each
    target is one of the rows (n,), and which one (1, n), arbitrary if it is none.

    The vocabulary is the first dimension because a CPU multiplies into (block, n) a third faster
    than into (n, block).
    """
    w = weight[start : start + block].to(low.dtype)
    logits = w @ low.T
    if cap is not None:
        logits = cap * torch.tanh(logits.float() / cap)
    logits = logits.float()
    slope = cap_slope(logits, cap) if cap else None
    if temperature != 1:
        logits /= temperature
    at = targets - start
    return w, logits, slope, (at >= 0) & (at < len(w)), at.clamp(0, len(w) - 1)[None]


def cap_slope(capped: Tensor, cap: float | None) -> Tensor:
    """The derivative of cap * tanh(logits / cap), from the capped logits."""
    return torch.ones_like(capped) if cap is None else 1 - (capped / cap) ** 2


def _terms(logits, running_max, is_here, at, entropy: bool) -> list[Tensor]:
    """[exp(u)] or [exp(u), exp(u) u], without the targets' own. Overwrites the logits."""
    u = logits.sub_(running_max)
    exp = u.exp() if entropy else u.exp_()
    exp.scatter_(0, at, exp.gather(0, at).masked_fill(is_here, 0))
    return [exp, u.mul_(exp)] if entropy else [exp]


def _for_gradient(terms: list[Tensor], slope: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The terms times the cap's slope, in the dtype of matrix products."""
    return [(term if slope is None else term.mul_(slope)).to(dtype) for term in terms]


def _rescale(sums: Tensor, row_sums: Tensor | None, d: Tensor) -> None:
    """Put sums of exp(u) and exp(u) u on the scale of a new maximum; d (n,) is old minus new."""
    for totals, by in ((sums, d), (row_sums, d[:, None])):
        if totals is not None:
            if len(totals) == 2:
                totals[1].add_(by * totals[0])
            totals *= by.exp()
