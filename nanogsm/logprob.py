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
    scales it. A trained head (full fine-tuning) wants its gradient as well: the blocks go by again, the
    first of them as they were kept.

SFT's loss, PPO's old, new and reference log-probs and its entropy bonus are all this function.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at a time. On a CPU what becomes of them should stay in its cache: with 8 or 16 MB of them
# the head takes three quarters of the time that it takes with 256 MB. A GPU wants few and large kernels.
LOGITS = {"cpu": 2**21, "cuda": 2**26, "mps": 2**26}
# Exponentials kept from forward to backward, in the dtype of products, for a trained head's gradient: where
# they are kept, a quarter of the head's products need not be made again. 2**27 are those of 512 positions,
# half the answers of 8 problems; to keep all of them would buy another 4% of a full fine-tuning step for
# 0.3 GiB.
KEPT = {"cpu": 2**27, "cuda": 2**29, "mps": 2**27}


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
    ratio compares like with like only then. Memory: a few times LOGITS numbers, a few vectors as long as a
    hidden state for each position and, if the head is trained, up to KEPT numbers until backward; `block`,
    the rows of the vocabulary at a time, is a matter of speed (usual_block). Trap: a trained head's
    gradient is there after backward(), in head.weight.grad; torch.autograd.grad does not see it.
    """
    where = mask.nonzero(as_tuple=True)
    h, t = hidden[where], targets[where]
    block = block or usual_block(h.device.type, *h.shape)
    weight = head.weight if torch.is_grad_enabled() else head.weight.detach()  # _Scores cannot see which
    scores = _Scores.apply(h, weight, t, head.cap, temperature, entropy, block)
    full = [torch.zeros(mask.shape, device=hidden.device).index_put(where, s) for s in scores]
    return full[0], full[1] if entropy else None


def usual_block(kind: str, positions: int, width: int) -> int:
    """Rows of the vocabulary at a time on a kind of device: what makes LOGITS logits, in multiples of
    1,024, which multiply faster. With fewer positions than h is wide, the copy of the block's rows is the
    larger one and bounds it."""
    return 1024 * max(1, LOGITS[kind] // max(positions, width) // 1024)


def grad_of(weight: Tensor) -> Tensor:
    """weight.grad, made if there is none, to be added to in place. Left to autograd, each use of the
    embedding, by the head and by the lookup, makes a matrix of its size before they are added: two at
    the peak, 1.3 GB for Gemma 3 270M and 4 GB for gemma-2b."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """total[ids[i]] += rows[i] for each i, on a CPU and on CUDA in an order that is the same every time:
    each has one of the two ways that promises it."""
    rows = rows.to(total.dtype)
    if total.is_cpu:
        total.index_add_(0, ids, rows)
    else:
        total.index_put_((ids,), rows, accumulate=True)


class _Scores(torch.autograd.Function):
    """h (n, D), weight (V, D), t (n,) -> log p of t and, if asked for, the entropy H, (n,) each.

    With z the logits over the temperature, top the largest of them and u = z - top, two sums over the
    vocabulary give the scores, and two more their derivatives by h; w is the head's row, times the cap's
    derivative if there is one:

        total  = sum e^u        log p_t = u_t - log total        d log p_t / dz_v = (v is t) - p_v
        moment = sum e^u u      H = log total - mean             d H / dz_v       = p_v (mean - u_v)
        pull   = sum e^u w          with mean = moment / total
        tilt   = sum e^u u w

    The head's gradient has h in w's place and factors that only backward knows, so it goes through the
    blocks once more; of the first ones e^u and e^u u are kept. Gradients are over the temperature, as z is.
    Trap: where p_t is nearly 1, 1 - p_t would be what rounding leaves of two equal numbers. So all sums are
    without t, and t is added last.
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
        tops, kept, room = [], [], KEPT[kind]  # of the first blocks
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(weight), block):
                w, z, bend, inside, at = _logits(head, low, t, start, block, temperature)
                chosen = torch.where(inside, z.gather(0, at)[0], chosen)
                higher = torch.maximum(top, z.amax(0))
                _grow(sums, pulls, top - higher)
                top = higher
                for k, x in enumerate(terms := _terms(z, top, inside, at, entropy)):
                    sums[k] += x.sum(0)
                if not (wants_h or wants_weight):
                    continue
                terms = _bent(terms, bend, low.dtype)
                if wants_h:
                    for k, x in enumerate(terms):
                        pulls[k] += x.T @ w
                room -= sum(x.numel() for x in terms)
                if wants_weight and room >= 0:
                    tops.append(top)
                    kept += terms

        u, bend = chosen - top, head.bend(chosen * temperature)  # of t
        total, mean = sums[0] + u.exp(), None
        scores, by_t = [u - total.log()], [sums[0] / total * bend]  # by_t: derivatives by t's logit
        if entropy:
            p = u.exp() / total
            mean = sums[1] / total + p * u
            scores.append(total.log() - mean)
            by_t.append(p * (mean - u) * bend)
        slopes = []  # derivatives by h
        if wants_h:
            w, pulls = weight[t], pulls / total[:, None]
            slopes.append(by_t[0][:, None] * w - pulls[0])
            if entropy:
                slopes.append(by_t[1][:, None] * w + mean[:, None] * pulls[0] - pulls[1])
        for_head = [low, t, top, total, mean, *by_t, *tops, *kept] if wants_weight else []
        ctx.save_for_backward(*(slope.div_(temperature) for slope in slopes), *for_head)
        ctx.head, ctx.temperature, ctx.block, ctx.n_slopes = head, temperature, block, len(slopes)
        return tuple(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        slopes, for_head = ctx.saved_tensors[: ctx.n_slopes], ctx.saved_tensors[ctx.n_slopes :]
        if for_head:
            _add_heads_gradient(ctx.head, ctx.temperature, ctx.block, grads, *for_head)
        by_h = sum(g[:, None] * slope for g, slope in zip(grads, slopes)) if slopes else None
        return by_h, None, None, None, None, None, None


def _add_heads_gradient(head, temperature, block, grads, low, t, top, total, mean, *rest) -> None:
    """Adds the gradient by the head's rows to head.weight.grad: sums over the positions of h times

        (v is t) - p_v    for the log-prob        p_v (mean - u_v)    for the entropy

    times what backward brings for either. What is kept of a block was made with the top of its time,
    top + d with d <= 0: the u of now is the kept one plus d, and e^u is e^d times the kept one."""
    n, grad = len(grads), grad_of(head.weight)  # 1, or 2 with the entropy: so many terms a block has
    by_t, rest = rest[:n], rest[n:]
    n_kept = len(rest) // (1 + n)
    tops, kept = rest[:n_kept], rest[n_kept:]

    with torch.autocast(low.device.type, enabled=False):
        for i, start in enumerate(range(0, len(grad), block)):
            if i < n_kept:
                d, terms = tops[i] - top, kept[n * i : n * (i + 1)]
            else:
                _, z, bend, inside, at = _logits(head, low, t, start, block, temperature)
                d, terms = torch.zeros_like(top), _bent(_terms(z, top, inside, at, n == 2), bend, low.dtype)
            scale = d.exp() / total / temperature  # the kept e^u times e^d / total is p
            if n == 1:  # each position's factor goes onto h: the terms stay as they are
                left, right = terms[0], ((-grads[0] * scale)[:, None] * low).to(low.dtype)
            else:  # two terms have to be added, so the factors go onto them
                left = (grads[1] * (mean - d) - grads[0]) * scale * terms[0] - grads[1] * scale * terms[1]
                left, right = left.to(low.dtype), low
            grad[start : start + block] += left @ right
        by_t = sum(g * by for g, by in zip(grads, by_t)) / temperature
        add_rows(grad, t, by_t[:, None] * low)


def _logits(head, low, t, start, block, temperature) -> tuple[Tensor, ...]:
    """Of the vocabulary's rows from start on: their weights w (block, D); their logits z over the
    temperature in float32 (block, n), and the cap's derivative at them; whether each target is one of
    these rows (n,), and which (1, n): an arbitrary one if it is none. The vocabulary comes first:
    a CPU multiplies into (block, n) a third faster than into (n, block)."""
    w = head.weight[start : start + block].to(low.dtype)
    z = head.capped(w @ low.T).float()
    bend = head.bend(z) if head.cap else None
    if temperature != 1:
        z /= temperature
    at = t - start
    return w, z, bend, (at >= 0) & (at < len(w)), at.clamp(0, len(w) - 1)[None]


def _terms(z, top, inside, at, entropy: bool) -> list[Tensor]:
    """[e^u] or [e^u, e^u u], u = z - top, without the targets' own: in z's memory, which is gone."""
    u = z.sub_(top)
    e = u.exp() if entropy else u.exp_()
    e.scatter_(0, at, e.gather(0, at).masked_fill(inside, 0))
    return [e, u.mul_(e)] if entropy else [e]


def _bent(terms: list[Tensor], bend: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The terms as derivatives want them: times the cap's, in the dtype of products."""
    return [(x if bend is None else x.mul_(bend)).to(dtype) for x in terms]


def _grow(sums: Tensor, pulls: Tensor | None, d: Tensor) -> None:
    """The tops have become larger, by -d (n,): what has been summed up with the old ones becomes sums
    of e^(u + d) and, the second of each pair, of e^(u + d) (u + d)."""
    for x, by in ((sums, d), (pulls, d[:, None])):
        if x is not None:
            if len(x) == 2:
                x[1] += by * x[0]
            x *= by.exp()
