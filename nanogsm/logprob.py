"""Log-probabilities of chosen tokens, without ever holding the full logits.

Gemma's vocabulary has 256,000 entries: the logits of 8 rows of 300 tokens are 2.5 GB in float32, a
loss written the usual way needs several such copies, and the logits of prompt and padding are asked
for by nobody. So:

  - supervised positions are selected *before* the projection onto the vocabulary;
  - the projection goes in chunks of positions (256 of Gemma's), whose logits live only for a moment;
  - backward never needs those logits again when the head is frozen (LoRA): position i's log-prob
    depends on hidden state i alone, so its derivative, a vector of D numbers, is made at once in
    the forward pass, and backward only scales it. When the head is trained, each chunk but the
    last is computed again in backward instead, and its gradient goes straight into the weight's.

SFT's loss, PPO's old, new and reference log-probs and its entropy bonus are all this function.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 2**26  # held at a time, 256 MB of them: 256 positions of Gemma's vocabulary


class Head(NamedTuple):
    """The projection onto the vocabulary: h (..., D) -> logits (..., V), h weight' or, with a cap,
    cap * tanh(h weight' / cap)."""

    weight: Tensor  # (V, D)
    cap: float | None = None

    def __call__(self, h: Tensor) -> Tensor:
        return self.capped(F.linear(h, self.weight))

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def token_logprobs(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(targets | hidden) and, if asked for, the entropy of the distribution it is taken from.

    hidden (B, T, D) predicts targets (B, T), already shifted against each other by the caller:
    `token_logprobs(model.head, hidden[:, :-1], ids[:, 1:], mask[:, 1:])`. Returns (B, T) float32 in
    nats, 0 where mask is 0. Logits are divided by temperature, as they are when sampling: a PPO
    ratio compares like with like only then. Memory: two or three times chunk * V * 4 bytes, whatever
    B and T are; chunk defaults to what makes that LOGITS numbers. Trap: a trained head's gradient is
    there after backward(), in head.weight.grad; torch.autograd.grad does not see it.
    """
    where = mask.nonzero(as_tuple=True)
    chunk = chunk or max(1, LOGITS // len(head.weight))
    scores = _Scores.apply(hidden[where], head.weight, targets[where], head.cap, temperature, entropy, chunk)
    full = [torch.zeros(mask.shape, device=hidden.device).index_put(where, s) for s in scores]
    return full[0], full[1] if entropy else None


def grad_of(weight: Tensor) -> Tensor:
    """weight.grad, made if there is none, to be added to in place. Left to autograd, each use of the
    embedding, by every chunk and by the lookup, makes a matrix of its size before they are added: two at
    the peak, 1.3 GB for Gemma 3 270M and 4 GB for gemma-2b."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class _Softmax(NamedTuple):
    """Of one chunk of n positions. The vocabulary comes first: a CPU multiplies into (V, n) a third faster
    than into (n, V), which takes 14% off a chunk, forward and derivative."""

    probs: Tensor  # (V, n)
    bend: Tensor | None  # (V, n), the derivative of the cap
    logp: Tensor  # (n,), of the targets
    entropy: Tensor | None  # (n,)


def _softmax(head: Head, h: Tensor, t: Tensor, temperature: float, entropy: bool) -> _Softmax:
    """In the memory of the logits: at 256,000 rows every copy costs more than the arithmetic in it."""
    logits = head.capped(head.weight @ h.T).float()
    bend = None if head.cap is None else 1 - (logits / head.cap) ** 2
    if temperature != 1:
        logits.div_(temperature)
    top = logits.amax(0)
    chosen = logits.gather(0, t[None])[0] - top
    total = logits.sub_(top).exp_().sum(0)
    probs = logits.div_(total)
    return _Softmax(probs, bend, chosen - total.log(), -torch.xlogy(probs, probs).sum(0) if entropy else None)


def _slope(s: _Softmax, t: Tensor, temperature: float, g_logp: Tensor, g_entropy: Tensor | None) -> Tensor:
    """(V, n): the gradient of sum(g_logp log p + g_entropy H) by weight h'. With z the logits, p their
    softmax:  d log p_t / dz = onehot(t) - p,  dH / dz = -p (log p + H).

    Trap: without entropy it is made in the memory of s.probs.
    """
    p = s.probs
    if g_entropy is None:
        grad = p.mul_(-g_logp)
    else:
        grad = -g_logp * p - g_entropy * (torch.xlogy(p, p) + p * s.entropy)
    grad.scatter_add_(0, t[None], g_logp[None])
    if temperature != 1:
        grad.div_(temperature)
    return grad if s.bend is None else grad.mul_(s.bend)


class _Scores(torch.autograd.Function):
    """h (n, D), weight (V, D), t (n,) -> log p of t and, if asked for, the entropy, (n,) each."""

    @staticmethod
    def forward(ctx, h, weight, t, cap, temperature, entropy, chunk) -> tuple[Tensor, ...]:
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        head = Head(weight.to(dtype), cap)  # rounded once: autocast would do it for every chunk
        wants_h, wants_weight, *_ = ctx.needs_input_grad
        scores, slopes = [], []
        with torch.autocast(kind, enabled=False):
            for h_part, t_part in zip(h.to(dtype).split(chunk), t.split(chunk)):
                s = None  # or two chunks would be held at a time
                s = _softmax(head, h_part, t_part, temperature, entropy)
                scores.append((s.logp, s.entropy) if entropy else (s.logp,))
                if wants_h and not wants_weight:
                    one, zero = torch.ones_like(s.logp), torch.zeros_like(s.logp)
                    ups = ((one, zero), (zero, one)) if entropy else ((one, None),)
                    made = (_slope(s, t_part, temperature, *up).to(dtype) for up in ups)
                    slopes.append([slope.T @ head.weight for slope in made])
        if wants_weight:  # backward begins with the last chunk: its softmax may as well be kept
            ctx.save_for_backward(h, t, head.weight)
            ctx.weight, ctx.last, ctx.settings = weight, s, (cap, temperature, entropy, chunk)
        else:
            ctx.save_for_backward(*(torch.cat(column) for column in zip(*slopes)))  # each (n, D)
        ctx.trained = wants_weight
        return tuple(torch.cat(column) for column in zip(*scores))

    @staticmethod
    def backward(ctx, g_logp: Tensor, g_entropy: Tensor | None = None):
        if ctx.trained:
            grad = _Scores.backward_trained(ctx, g_logp, g_entropy)
        else:
            pairs = zip((g_logp, g_entropy), ctx.saved_tensors)
            grad = sum(g[:, None] * slope for g, slope in pairs).to(ctx.saved_tensors[0].dtype)
        return grad, None, None, None, None, None, None

    @staticmethod
    def backward_trained(ctx, g_logp: Tensor, g_entropy: Tensor | None) -> Tensor:
        """The gradient by h; that by the weight is added to its .grad."""
        h, t, weight = ctx.saved_tensors
        cap, temperature, entropy, chunk = ctx.settings
        grad, total = torch.empty_like(h), grad_of(ctx.weight)
        s, ctx.last = ctx.last, None  # used up: a second backward computes it again
        for start in reversed(range(0, len(h), chunk)):
            part = slice(start, start + chunk)
            low = h[part].to(weight.dtype)
            s = s or _softmax(Head(weight, cap), low, t[part], temperature, entropy)
            slope = _slope(s, t[part], temperature, g_logp[part], g_entropy[part] if entropy else None)
            slope = slope.to(weight.dtype)
            grad[part] = slope.T @ weight
            if weight.dtype == total.dtype:
                total.addmm_(slope, low)
            else:
                total.add_(slope @ low)
            slope = s = None
        return grad
