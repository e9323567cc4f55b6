"""AdamW whose moments cost one byte an entry, and the learning-rate schedule.

AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) keeps a running mean of each weight's gradient
(m) and of its square (v): 8 bytes a weight in float32, 20 GB for Gemma 2B. Here each is one byte,
plus one float32 scale per block of at most 256 entries, after Dettmers et al. 2021 (arXiv
2110.02861). Four things differ from that paper; results/adam8bit.md shows what each is worth:

- sqrt(v) is stored, not v, and never as 0: where v rounds to 0 and m does not, the update
  m / (sqrt(v) + eps) can then be thousands of times too large.
- Blocks end where rows end. A row of the embedding is a word; in a block shared by a frequent and
  a rare word the rare word's moments drown.
- Rounding is dithered. v changes by at most about 0.1% in a quiet step and its codes are 3% or
  more apart: rounded to nearest it sticks, too large in noise and frozen where gradients vanish.
  An offset that differs in every step makes the rounding right on average.
- Values are fourth powers of the codes, not a table: steps are finest near the block's largest
  entry, 8 decades of m fit, and two square roots are cheap on every device.

    optimizer = AdamW(model.named_parameters(), lr=1e-5)
    for step in range(steps):
        optimizer.lr = cosine_with_min_lr(step, steps, lr=1e-5, min_lr=1e-6)
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nanogsm import UserError

MAX_BLOCK = 256  # entries that share one scale
MIN_BLOCK = 16  # the rows of LoRA's B; for shorter blocks the scales eat what the bytes save
MIN_8BIT_SIZE = 4096  # smaller tensors (norms, a value head) keep float32: nothing to save there
CHUNK = 1 << 20  # entries updated at a time: bounds the temporaries to about 50 MB


def cosine_with_min_lr(
    step: int, total_steps: int, lr: float, min_lr: float, warmup_steps: int = 0
) -> float:
    """The learning rate of `step`, counted from 0: linear warm-up to `lr`, then half a cosine
    down to `min_lr` at `total_steps`, constant after it.

    Up to there it equals transformers' get_cosine_with_min_lr_schedule_with_warmup. Trap: with a
    warm-up the rate of step 0 is 0, so the first update changes nothing.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def block_size(shape: tuple[int, ...]) -> int | None:
    """Entries per scale for a tensor of this shape, or None where its moments stay float32.

    The largest divisor of the row length up to 256, so no block straddles two rows: 256 for
    Gemma's width 2048, 192 for 1152, 160 for 640, 16 for LoRA's B of rank 16.
    """
    if math.prod(shape) < MIN_8BIT_SIZE:
        return None
    largest = max(n for n in range(1, MAX_BLOCK + 1) if shape[-1] % n == 0)
    return largest if largest >= MIN_BLOCK else None


def dither(n: int, step: int, device: torch.device | None = None) -> Tensor:
    """(n,) rounding offsets in [0, 1), spread evenly over the entries and, per entry, over steps.

    Integer arithmetic, so the same on every device and in a continued run, with no random state
    to save; and evenly spread offsets leave less noise in v than random ones.
    """
    i = torch.arange(n, device=device)
    # 2**24/p and 2**24/p**2, p the plastic number: Roberts' R2 low-discrepancy sequence.
    return ((i * 12664745 + step * 9560333) % 2**24).float() / 2**24


def quantise(x: Tensor, dtype: torch.dtype, offset: Tensor) -> tuple[Tensor, Tensor]:
    """x (blocks, entries) as codes of `dtype`, same shape, and float32 scales (blocks, 1).

    |x| = scale * (code / levels)**4 with scale = max|x|; the exact code plus `offset` (shape of x,
    in [0, 1)) is rounded down. int8 has 127 levels and a sign, for m. uint8 has 255 and wants
    x >= 0, for sqrt(v); its smallest code is 16, 1.5e-5 of the scale. Below that codes lie over 25%
    apart, so sqrt(v) could dip far under |m|; entries raised to it take smaller steps than exact
    ones, the harmless side. In Gemma-3-270m on GSM8K fewer than one entry in 100,000 is.
    """
    levels = torch.iinfo(dtype).max
    code = x.abs()
    scale = code.amax(-1, keepdim=True)
    # A block of zeros must not divide 0 by 0.
    code = code.div_(scale.clamp_min(torch.finfo(torch.float32).tiny)).sqrt_().sqrt_()
    # The upper bound is needed: in float32 255 + 0.9999999 is 256, which wraps round to 0.
    code = code.mul_(levels).add_(offset).clamp_(0 if dtype == torch.int8 else 16, levels)
    return code.copysign_(x).to(dtype), scale  # the cast rounds towards zero


def dequantise(code: Tensor, scale: Tensor) -> Tensor:
    """The float32 values (blocks, entries) `quantise` rounded to; all zero where the scale is 0."""
    x = code.float()
    x = x * x.abs()
    return (x * x.abs()).mul_(scale / torch.iinfo(code.dtype).max ** 4)


class AdamW:
    """AdamW over `named_params`, pairs of name and parameter, without the frozen ones.

    bits=32 computes what torch.optim.AdamW does; bits=8 keeps the moments as bytes, see above.
    The loop sets `lr` before each step. One object has one learning rate: a loop that wants two
    (PPO's value head) makes two objects, which is plainer than parameter groups. Weight decay is
    decoupled and only for tensors of two or more dimensions: a norm's gain or a bias is there to
    set a scale, and decay would only pull at it. The moments are made on the parameters' device
    (one for all), so move the model first. Parameters and gradients are float32 or bfloat16, the
    arithmetic float32. Raises ValueError for repeated names and if nothing is trainable. Trap:
    bfloat16 parameters are rounded after each step; at lr 5e-7 that undoes about 99% of the
    changes, whatever the moments' precision.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: int = 8,
    ):
        named_params = [(name, p) for name, p in named_params if p.requires_grad]
        self.params = dict(named_params)
        if not self.params or len(self.params) < len(named_params):
            raise ValueError("AdamW needs at least one trainable parameter, and unique names")
        if bits not in (8, 32):
            raise ValueError(f"AdamW's moments have 8 or 32 bits, not {bits}")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.step_count = 0
        self.moments = {}  # name -> [m, v] or [codes of m, of sqrt(v), scales of m, of sqrt(v)]
        for name, p in self.params.items():
            block = block_size(p.shape) if bits == 8 else None
            dtypes = (torch.int8, torch.uint8) if block else (torch.float32, torch.float32)
            self.moments[name] = [torch.zeros_like(p, dtype=dtype) for dtype in dtypes]
            if block:
                shape = (*p.shape[:-1], p.shape[-1] // block)
                self.moments[name] += [torch.zeros(shape, device=p.device) for _ in dtypes]

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter that has a gradient. Trap: a gradient that is not finite
        poisons its block's moments for good, so check the gradient norm before this."""
        self.step_count += 1
        beta1, beta2 = self.betas
        step_size = self.lr / (1 - beta1**self.step_count)
        root_correction = math.sqrt(1 - beta2**self.step_count)
        sizes = [t[0].numel() for t in self.moments.values() if t[0].dtype == torch.int8]
        device = next(iter(self.params.values())).device
        offsets = dither(min(CHUNK, max(sizes, default=0)), self.step_count, device)
        for name, p in self.params.items():
            if p.grad is None:
                continue
            keep = 1 - self.lr * self.weight_decay if p.dim() >= 2 else 1.0
            tensors = [p.detach(), p.grad.contiguous(), *self.moments[name]]
            blocks = tensors[-1].numel()  # one a scale; without scales every entry is its own
            rows = max(1, CHUNK * blocks // p.numel())
            chunks = zip(*(t.view(blocks, -1).split(rows) for t in tensors))
            for weight, g, m_state, v_state, *scales in chunks:
                w, g, m, v = weight.float(), g.float(), m_state, v_state
                if scales:
                    m, v = dequantise(m_state, scales[0]), dequantise(v_state, scales[1]).square_()
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                root = v.sqrt()
                if scales:
                    offset = offsets[: g.numel()].view_as(g)
                    m_state[:], scales[0][:] = quantise(m, torch.int8, offset)
                    v_state[:], scales[1][:] = quantise(root, torch.uint8, offset)
                # The update reads m and v before they were rounded: only their past is inexact.
                root.div_(root_correction).add_(self.eps)  # only now: what is stored is uncorrected
                weight.copy_(w.mul_(keep).addcdiv_(m, root, value=-step_size))

    def zero_grad(self) -> None:
        """Drops the gradients and their memory."""
        for p in self.params.values():
            p.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """All that `step` changes, live, as safetensors can save it: the parameters ("weight.<name>"),
        the moments ("exp_avg.<name>", ...) and "step_count"."""
        kinds = ("weight", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
        state = {
            f"{kind}.{name}": tensor
            for name, p in self.params.items()
            for kind, tensor in zip(kinds, (p.detach(), *self.moments[name]))
        }
        return state | {"step_count": torch.tensor(self.step_count)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copies in what `state_tensors` gave: the run then goes on bit for bit as if never stopped.
        Raises UserError, changing nothing, where it misfits."""
        state = self.state_tensors()
        layouts = [{(key, t.shape, t.dtype) for key, t in x.items()} for x in (state, tensors)]
        wrong = {key for key, *_ in layouts[0] ^ layouts[1]}
        if wrong:
            raise UserError(
                f"the saved optimizer state does not fit: {min(wrong)} and {len(wrong) - 1} more "
                "tensors differ; continue with the model, adapter and bits it was saved with"
            )
        for key, tensor in state.items():
            tensor.copy_(tensors[key])
        self.step_count = int(tensors["step_count"])

    def state_bytes(self) -> int:
        """Bytes held by the moments and their scales."""
        return sum(t.nbytes for tensors in self.moments.values() for t in tensors)
