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
from torch.autograd.function import once_differentiable

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
        """In float32: near the cap its derivative is a small difference of two numbers."""
        return logits if self.cap is None else self.cap * torch.tanh(logits.float() / self.cap)

    def bend(self, logits: Tensor) -> Tensor:
        """d capped / d raw logits, from the capped ones."""
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
    ratio compares like with like only then. Memory: a few times LOGITS numbers, and a few vectors as
    long as a hidden state for each position; `block`, the rows of the vocabulary at a time, defaults to
    what makes that many logits, though 1,024 at least. Trap: a trained head's gradient is there after
    backward(), in head.weight.grad; torch.autograd.grad does not see it.
    """
    where = mask.nonzero(as_tuple=True)
    h, t = hidden[where], targets[where]
    # A multiple of 1,024 multiplies faster. With fewer positions than h is wide, the copy of the block's rows
    # is the larger one and bounds it.
    if block is None:
        block = 1024 * max(1, LOGITS[h.device.type] // max(h.shape) // 1024)
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
    be what rounding leaves of two equal numbers. So while the blocks go by, the sums are without t.
    """

    @staticmethod
    def forward(ctx, h, weight, t, cap, temperature, entropy, block) -> tuple[Tensor, ...]:
        kind, (n, D) = h.device.type, h.shape
        low = h.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype)
        head, (wants_h, wants_weight) = Head(weight, cap), ctx.needs_input_grad[:2]
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float32, device=h.device)  # noqa: E731
        top, chosen = zeros(n) + torch.finfo(torch.float32).min, zeros(n)
        sums = zeros(1 + entropy, n)  # total and moment
        pulls = zeros(1 + entropy, n, D) if wants_h else None  # pull and tilt
        with torch.autocast(kind, enabled=False):
            for rows, w, z in _blocks(head, low, block):
                inside, at = _place(t, rows)
                chosen = torch.where(inside, z.gather(0, at)[0], chosen)
                bend = head.bend(z) if cap and wants_h else None
                if temperature != 1:
                    z /= temperature
                higher = torch.maximum(top, z.amax(0))
                _grow(sums, pulls, top - higher)
                top = higher
                u = z.sub_(top)
                e = u.exp() if entropy else u.exp_()
                e.scatter_(0, at, e.gather(0, at).masked_fill(inside, 0))
                for k, x in enumerate((e, u.mul_(e)) if entropy else (e,)):
                    sums[k] += x.sum(0)
                    if wants_h:
                        x = x if bend is None else x.mul_(bend)
                        pulls[k] += x.to(w.dtype).T @ w

        u = chosen / temperature - top
        e = u.exp()
        total = sums[0] + e
        scores, slopes = [u - total.log()], []
        if entropy:
            mean = (sums[1] + e * u) / total
            scores.append(total.log() - mean)
        if wants_h:
            w = head.bend(chosen)[:, None] * weight[t]
            slopes.append((sums[0][:, None] * w - pulls[0]) / total[:, None])
            if entropy:
                pull, tilt = pulls[0] + e[:, None] * w, pulls[1] + (e * u)[:, None] * w
                slopes.append((mean[:, None] * pull - tilt) / total[:, None])
        again = [low, t, top + total.log(), *scores[1:]] if wants_weight else []
        ctx.save_for_backward(*again, *(slope.div_(temperature) for slope in slopes))
        ctx.head, ctx.temperature, ctx.block, ctx.n_again = head, temperature, block, len(again)
        return tuple(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp: Tensor, g_entropy: Tensor | None = None):
        again, slopes = ctx.saved_tensors[: ctx.n_again], ctx.saved_tensors[ctx.n_again :]
        if again:
            _add_heads_gradient(ctx.head, ctx.temperature, ctx.block, g_logp, g_entropy, *again)
        grad = sum(g[:, None] * slope for g, slope in zip((g_logp, g_entropy), slopes)) if slopes else None
        return grad, None, None, None, None, None, None


def _grow(sums: Tensor, pulls: Tensor | None, d: Tensor) -> None:
    """The tops have become larger, by -d (n,): what has been summed up with the old ones becomes sums
    of e^(u + d) and, the second of each pair, of e^(u + d) (u + d)."""
    for x, by in ((sums, d), (pulls, d[:, None])):
        if x is not None:
            if len(x) == 2:
                x[1] += by * x[0]
            x *= by.exp()


def _blocks(head: Head, low: Tensor, block: int) -> Iterator[tuple[range, Tensor, Tensor]]:
    """(rows of the vocabulary, their weights, their logits in float32), block by block. The vocabulary
    comes first, (block, n): a CPU multiplies into it a third faster than into (n, block)."""
    for start in range(0, len(head.weight), block):
        w = head.weight[start : start + block].to(low.dtype)
        yield range(start, start + len(w)), w, head.capped(w @ low.T).float()


def _place(t: Tensor, rows: range) -> tuple[Tensor, Tensor]:
    """Whether each target is one of these rows, (n,), and which, (1, n): an arbitrary one if it is none."""
    at = t - rows.start
    return (at >= 0) & (at < len(rows)), at.clamp(0, len(rows) - 1)[None]


def _add_heads_gradient(head, temperature, block, g_logp, g_entropy, low, t, log_sum, H=None) -> None:
    """Adds, with z the logits over the temperature and log_sum the log of their e^z's sum,

        d log p_t / dz_v = (v is t) - p_v          d H / dz_v = -p_v (log p_v + H)

    times z's derivative by the head's rows, to head.weight.grad."""
    grad = grad_of(head.weight)
    with torch.autocast(low.device.type, enabled=False):
        for rows, _, z in _blocks(head, low, block):
            inside, at = _place(t, rows)
            bend = head.bend(z) if head.cap else None
            logp = z.div_(temperature).sub_(log_sum)
            if H is None:
                slope = logp.exp_().mul_(-g_logp)
            else:
                slope = logp.exp() * (logp + H).mul_(-g_entropy).sub_(g_logp)
            slope.scatter_add_(0, at, torch.where(inside, g_logp, 0.0)[None]).div_(temperature)
            slope = slope if bend is None else slope.mul_(bend)
            grad[rows.start : rows.stop] += slope.to(low.dtype) @ low
