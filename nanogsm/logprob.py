"""Log-probabilities of chosen tokens, without ever holding the full logits.

Gemma's vocabulary has 256,000 entries: the logits of 8 rows of 300 tokens are 2.5 GB in float32, a
loss written the usual way needs several such copies, and the logits of prompt and padding are asked
for by nobody. So:

  - supervised positions are selected *before* the projection onto the vocabulary;
  - the vocabulary goes by in blocks, whose logits live only for a moment. What is wanted of all of them
    are sums, such as the softmax's denominator, and sums can be kept from block to block: attention
    over the vocabulary, done as FlashAttention does it (Dao et al. 2022, arXiv 2205.14135);
  - the derivative is such a sum, too. A log-prob depends on its own hidden state h alone,

        d log p_t / dh = w_t - sum over v of p_v w_v            w_v: the head's row for token v

    which is a vector as long as h: it is made in the forward pass with the rest, and backward only
    scales it. A trained head (full fine-tuning) wants its gradient as well: the blocks go by again.

SFT's loss, PPO's old, new and reference log-probs and its entropy bonus are all this function.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits held at a time. On a CPU what becomes of them should stay in its cache: with 16 MB of them the
# head takes three quarters of the time that it takes with 256 MB. A GPU wants few and large kernels.
LOGITS = {"cpu": 2**22, "cuda": 2**26, "mps": 2**26}


class Head(NamedTuple):
    """The projection onto the vocabulary: h (..., D) -> logits (..., V), h weight' or, with a cap,
    cap * tanh(h weight' / cap)."""

    weight: Tensor  # (V, D)
    cap: float | None = None

    def __call__(self, h: Tensor) -> Tensor:
        return self.capped(F.linear(h, self.weight))

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def bend(self, logits: Tensor) -> Tensor:
        """The cap's derivative where it made these logits."""
        return torch.ones_like(logits) if self.cap is None else 1 - (logits / self.cap) ** 2


def token_logprobs(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    block: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(targets | hidden) and, if asked for, the entropy of the distribution it is taken from.

    hidden (B, T, D) predicts targets (B, T), already shifted against each other by the caller:
    `token_logprobs(model.head, hidden[:, :-1], ids[:, 1:], mask[:, 1:])`. Returns (B, T) float32 in
    nats, 0 where mask is 0. Logits are divided by temperature, as they are when sampling: a PPO
    ratio compares like with like only then. Memory: a few times LOGITS numbers, whatever B, T and V
    are; `block`, the rows of the vocabulary at a time, defaults to what makes that many logits. Trap:
    a trained head's gradient is there after backward(), in head.weight.grad; torch.autograd.grad
    does not see it.
    """
    where = mask.nonzero(as_tuple=True)
    h, t = hidden[where], targets[where]
    block = block or max(1, LOGITS[h.device.type] // max(1, len(t)) // 1024) * 1024  # even sizes are faster
    scores = _Scores.apply(h, head.weight, t, head.cap, temperature, entropy, block)
    full = [torch.zeros(mask.shape, device=hidden.device).index_put(where, s) for s in scores]
    return full[0], full[1] if entropy else None


def grad_of(weight: Tensor) -> Tensor:
    """weight.grad, made if there is none, to be added to in place. Left to autograd, each use of the
    embedding, by the head and by the lookup, makes a matrix of its size before they are added: two at
    the peak, 1.3 GB for Gemma 3 270M and 4 GB for gemma-2b."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class _Scores(torch.autograd.Function):
    """h (n, D), weight (V, D), t (n,) -> log p of t and, if asked for, the entropy H, (n,) each.

    With z the logits over the temperature, top the largest of them and u = z - top, four sums over
    the vocabulary say it all; w is the head's row, times the cap's derivative if there is one:

        total  = sum e^u            log p_t = u_t - log total
        moment = sum e^u u          H       = -sum p log p = log total - moment / total
        pull   = sum e^u w          d log p_t / dh = ((total - e^u_t) w_t - rest of pull) / total
        tilt   = sum e^u u w        d H / dh       = (moment / total pull - tilt) / total

    Gradients are over the temperature, as z is. Trap: where p_t is nearly 1, w_t - pull / total would
    be what rounding leaves of two equal numbers. So t itself is left out of the sums until the end.
    """

    @staticmethod
    def forward(ctx, h, weight, t, cap, temperature, entropy, block) -> tuple[Tensor, ...]:
        kind, (n, D) = h.device.type, h.shape
        low = h.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype)
        head, wants_h = Head(weight, cap), ctx.needs_input_grad[0]
        new = lambda *shape: torch.zeros(*shape, dtype=torch.float32, device=h.device)  # noqa: E731
        top, chosen = new(n) + torch.finfo(torch.float32).min, new(n)
        sums, pulls = new(1 + entropy, n), new(1 + entropy, n, D)  # total and moment; pull and tilt
        with torch.autocast(kind, enabled=False):
            for rows, w, z in _blocks(head, low, block):
                inside, at = _place(t, rows)
                chosen = torch.where(inside, z.gather(0, at)[0], chosen)
                bend = head.bend(z) if cap and wants_h else None
                if temperature != 1:
                    z /= temperature
                higher = torch.maximum(top, z.amax(0))
                d, top = top - higher, higher
                # What has been summed up so far becomes sums of e^(u + d) and of e^(u + d) (u + d).
                if entropy:
                    sums[1] += d * sums[0]
                    pulls[1] += d[:, None] * pulls[0]
                sums *= d.exp()
                pulls *= d.exp()[:, None]
                u = z.sub_(top)
                e = u.exp() if entropy else u.exp_()
                e.scatter_(0, at, e.gather(0, at).masked_fill(inside, 0))
                for k, x in enumerate((e, u.mul_(e)) if entropy else (e,)):
                    sums[k] += x.sum(0)
                    if wants_h:
                        x = x if bend is None else x.mul_(bend)
                        pulls[k] += x.to(w.dtype).T @ w

            u = chosen / temperature - top
            e, w = u.exp(), head.bend(chosen)[:, None] * weight[t]
            total = sums[0] + e
            scores = [u - total.log()]
            slopes = [(sums[0][:, None] * w - pulls[0]) / total[:, None]]
            if entropy:
                mean = (sums[1] + e * u) / total
                scores.append(total.log() - mean)
                pull, tilt = pulls[0] + e[:, None] * w, pulls[1] + (e * u)[:, None] * w
                slopes.append((mean[:, None] * pull - tilt) / total[:, None])
        if wants_h:
            ctx.save_for_backward(*(slope.div_(temperature) for slope in slopes))
        if ctx.needs_input_grad[1]:
            ctx.again = head, low, t, temperature, block, chosen, scores
        return tuple(scores)

    @staticmethod
    def backward(ctx, g_logp: Tensor, g_entropy: Tensor | None = None):
        grad = g_logp[:, None] * ctx.saved_tensors[0]
        if g_entropy is not None:
            grad += g_entropy[:, None] * ctx.saved_tensors[1]
        if ctx.needs_input_grad[1]:
            _add_heads_gradient(*ctx.again, g_logp, g_entropy)
        return grad, None, None, None, None, None, None


def _blocks(head: Head, low: Tensor, block: int) -> Iterator[tuple[range, Tensor, Tensor]]:
    """(rows of the vocabulary, their weights, their logits in float32), block by block. The vocabulary
    comes first, (block, n): a CPU multiplies into it a third faster than into (n, block)."""
    for start in range(0, len(head.weight), block):
        w = head.weight[start : start + block].to(low.dtype)
        yield range(start, start + len(w)), w, head.capped(w @ low.T).float()


def _place(t: Tensor, rows: range) -> tuple[Tensor, Tensor]:
    """Which targets are among the rows, (n,), and in which of them, (1, n): any, if not."""
    at = t - rows.start
    return (at >= 0) & (at < len(rows)), at.clamp(0, len(rows) - 1)[None]


def _add_heads_gradient(head, low, t, temperature, block, chosen, scores, g_logp, g_entropy) -> None:
    """Adds, with z the logits over the temperature,

        d log p_t / dz_v = (v is t) - p_v          d H / dz_v = -p_v (log p_v + H)

    times z's derivative by the head's rows, to head.weight.grad; t itself, as above, by itself."""
    grad, H = grad_of(head.weight), scores[-1]
    log_sum = chosen / temperature - scores[0]
    with torch.autocast(low.device.type, enabled=False):
        for rows, _, z in _blocks(head, low, block):
            inside, at = _place(t, rows)
            bend = head.bend(z) if head.cap else None
            logp = z.div_(temperature).sub_(log_sum)
            if g_entropy is None:
                slope = logp.exp_().mul_(-g_logp / temperature)
            else:
                slope = logp.exp() * (logp + H).mul_(-g_entropy).sub_(g_logp).div_(temperature)
            slope.scatter_(0, at, slope.gather(0, at).masked_fill(inside, 0))
            slope = slope if bend is None else slope.mul_(bend)
            grad[rows.start : rows.stop] += slope.to(low.dtype) @ low
        slope = -torch.expm1(scores[0]) * g_logp
        if g_entropy is not None:
            slope -= scores[0].exp() * (scores[0] + H) * g_entropy
        grad.index_add_(0, t, (slope * head.bend(chosen) / temperature)[:, None] * low)
