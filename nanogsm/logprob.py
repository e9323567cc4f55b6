"""Log-probabilities of chosen tokens, without ever holding the full logits.

Gemma's vocabulary has 256,000 entries: the logits of 8 rows of 300 tokens are 2.5 GB in float32, a
loss written the usual way needs several such copies, and the logits of prompt and padding are asked
for by nobody. So:

  - supervised positions are selected *before* the projection onto the vocabulary;
  - the projection goes in chunks of positions (256 of Gemma's), whose logits live only for a moment;
  - backward never needs those logits again when the head is frozen (LoRA): position i's log-prob
    depends on hidden state i alone, so its derivative, a vector of D numbers, is made at once in
    the forward pass, and backward only scales it. When the head is trained, each chunk but the
    last is recomputed in backward instead.

SFT's loss, PPO's old, new and reference log-probs and its entropy bonus are all this function.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS = 2**26  # held at a time, 256 MB of them: 256 positions of Gemma's vocabulary


def token_logprobs(
    logits_of: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(targets | hidden) and, if asked for, the entropy of the distribution it is taken from.

    hidden (B, T, D) predicts targets (B, T), already shifted against each other by the caller:
    `token_logprobs(model.logits, hidden[:, :-1], ids[:, 1:], mask[:, 1:])`. logits_of maps
    (n, D) -> (n, V). Returns (B, T) float32 in nats, 0 where mask is 0. Logits are divided by
    temperature, as they are when sampling: a PPO ratio compares like with like only then.
    Memory: two or three times chunk * V * 4 bytes, whatever B and T are; chunk defaults to what
    makes that LOGITS numbers.
    """
    where = mask.nonzero(as_tuple=True)
    h, t = hidden[where], targets[where]  # (n, D), (n,)

    def score(h: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        logits = logits_of(h).float()  # (chunk, V)
        return _Scores.apply(logits if temperature == 1 else logits / temperature, t, entropy)

    # Asked of no rows at all, the head still tells its width, and whether its weights are trained.
    nothing = logits_of(h[:0].detach())
    head_is_trained = torch.is_grad_enabled() and nothing.requires_grad
    chunk = chunk or max(1, LOGITS // nothing.shape[-1])
    if torch.is_grad_enabled() and h.requires_grad and not head_is_trained:
        scores = _ScoresAndSlopes.apply(h, t, score, chunk)
    else:
        *early, last = zip(h.split(chunk), t.split(chunk))
        if head_is_trained:  # backward begins with the last chunk: its logits may as well be kept
            parts = [
                checkpoint(score, *part, use_reentrant=False, preserve_rng_state=False)
                for part in early
            ]
        else:
            parts = [score(*part) for part in early]
        parts.append(score(*last))
        scores = [torch.cat(column) for column in zip(*parts)]

    full = [torch.zeros(mask.shape, device=h.device).index_put(where, s) for s in scores]
    return full[0], full[1] if entropy else None


class _Scores(torch.autograd.Function):
    """log softmax(logits)[t] and, with entropy, -sum p log p; logits (n, V) -> (n,) each.

    With z the logits and p = softmax(z):  d logp / dz = onehot(t) - p,  dH / dz = -p (log p + H).
    Trap: works in the memory of `logits`, which the caller must not use again. At 256,000 columns
    every fresh copy costs more than the arithmetic in it.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, t: Tensor, entropy: bool) -> tuple[Tensor, ...]:
        top = logits.amax(-1, keepdim=True)
        chosen = logits.gather(-1, t[:, None]) - top
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        probs = logits.div_(total)
        logp = (chosen - total.log())[:, 0]
        h = -torch.xlogy(probs, probs).sum(-1) if entropy else None
        ctx.save_for_backward(probs, t, h)
        return (logp, h) if entropy else (logp,)

    @staticmethod
    def backward(ctx, g_logp: Tensor, g_h: Tensor | None = None):
        probs, t, h = ctx.saved_tensors
        if h is None:
            grad = probs.mul_(-g_logp[:, None])  # nobody needs the probabilities after this
        else:
            grad = -g_logp[:, None] * probs - g_h[:, None] * (
                torch.xlogy(probs, probs) + probs * h[:, None]
            )
        return grad.scatter_add_(-1, t[:, None], g_logp[:, None]), None, None


class _ScoresAndSlopes(torch.autograd.Function):
    """score() by chunks, with every score's derivative by its own hidden state taken on the spot."""

    @staticmethod
    def forward(ctx, h: Tensor, t: Tensor, score, chunk: int) -> tuple[Tensor, ...]:
        parts, slopes = [], []
        for h_part, t_part in zip(h.split(chunk), t.split(chunk)):
            with torch.enable_grad():
                h_part = h_part.detach().requires_grad_()
                columns = score(h_part, t_part)
                # Rows are independent, so the gradient of the sum holds every row's derivative.
                last = len(columns) - 1
                grads = [
                    torch.autograd.grad(c.sum(), h_part, retain_graph=i < last)[0]
                    for i, c in enumerate(columns)
                ]
            parts.append([c.detach() for c in columns])
            slopes.append(grads)
        ctx.save_for_backward(*(torch.cat(column) for column in zip(*slopes)))  # each (n, D)
        return tuple(torch.cat(column) for column in zip(*parts))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        total = sum(g[:, None] * slope for g, slope in zip(grads, ctx.saved_tensors))
        return total.to(ctx.saved_tensors[0].dtype), None, None, None
