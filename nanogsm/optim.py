"""AdamW with moments of one byte per entry, and the learning-rate schedule.

AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) keeps two moments per weight: running means of
the gradient (m) and of its square (v). In float32 both take 8 bytes, 20 GB for gemma-2b. Here each
takes one byte, plus a float32 scale per block of at most 256 entries, after Dettmers et al. 2021
(arXiv 2110.02861). Four things differ from that paper (results/adam8bit.md has measurements):

- sqrt(v) is stored instead of v, and never as 0 (see `quantise`).
- Blocks have at most 256 entries, not 2048, and end where rows end (see `block_size`).
- Rounding is dithered, because rounding to nearest would freeze v (see `dither`).
- A value is the fourth power of its code, not an entry of a table. The relative step is smallest
  near the block's largest entry, m covers 8 decades, and two square roots are cheap on all devices.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nanogsm import UserError, distributed
from nanogsm.fast import cpu, cuda

MAX_BLOCK = 256  # most entries that share one scale
MIN_BLOCK = 16  # a row of LoRA's B at rank 16; shorter rows keep float32 moments
CHUNK = 2**20  # entries that a CPU updates at a time: temporary tensors stay below 50 MB
MIN_8BIT_SIZE = 4096  # entries; smaller tensors (norms, small value heads) keep float32 moments


class AdamW:
    """AdamW over `named_params`, pairs of name and parameter. Frozen parameters are left out.

    bits=32 computes what torch.optim.AdamW does, except that vectors are not decayed. bits=8 stores
    the moments as bytes. A loop may change `lr` between steps. There are no parameter groups: a
    loop with two learning rates (PPO's value head) makes two objects. Parameters and gradients are
    float32 or bfloat16, the arithmetic is float32. The moments are made on the parameters' device,
    so move the model first. Raises ValueError for repeated names and if nothing is trainable. Trap:
    bfloat16 parameters are rounded after each step. At lr 5e-7 that undoes about 99% of the
    changes, in 8 bits and in 32.
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
            raise ValueError("AdamW needs at least one trainable parameter and unique names")
        if bits not in (8, 32):
            raise ValueError(f"AdamW's moments have 8 or 32 bits, not {bits}")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.step_count = 0
        self.moments = {}  # name -> [m, v] or [m codes, sqrt(v) codes, m scales, sqrt(v) scales]
        for name, p in self.params.items():
            block = block_size(p.shape) if bits == 8 else None
            dtypes = (torch.int8, torch.uint8) if block else (torch.float32, torch.float32)
            self.moments[name] = [torch.zeros_like(p, dtype=dtype) for dtype in dtypes]
            if block:
                scales = p.detach()[..., : p.shape[-1] // block].float()
                self.moments[name] += [torch.zeros_like(scales), torch.zeros_like(scales)]

    def grad_norm(self) -> Tensor:
        """The norm of all gradients as one long vector, before it is scaled down: a 0-d tensor."""
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        if not grads:  # as in PPO's warm-up of the critic
            return torch.zeros((), device=next(iter(self.params.values())).device)
        return distributed.whole(nn.utils.get_total_norm(grads))

    @torch.no_grad()
    def step(self, norm: Tensor | None = None, max_norm: float = math.inf) -> None:
        """Update every parameter that has a gradient, by the equations of `update_block`. Gradients
        whose `norm` exceeds max_norm are scaled down to it: one batch's can be far larger.

        Trap: a gradient that is not finite spoils its block's moments for good, so check the
        gradient norm before this."""
        self.step_count += 1
        beta1, beta2 = self.betas
        # m and v start at 0. c1 = 1 - beta1**t and c2 = 1 - beta2**t correct for that.
        step_size = self.lr / (1 - beta1**self.step_count)
        root_correction = math.sqrt(1 - beta2**self.step_count)
        numbers = self.betas, self.eps, step_size, root_correction
        pieces = []
        for name, p in self.params.items():
            if p.grad is None or not distributed.own(p).numel():
                continue
            # No decay for vectors: norms and biases set a scale, and decay would only shrink it.
            keep = 1 - self.lr * self.weight_decay if p.dim() >= 2 else 1.0
            tensors = [p.detach(), p.grad.contiguous(), *self.moments[name]]
            tensors = [distributed.own(t) for t in tensors]
            # One row for each block, or for each entry where there are no scales.
            tensors = [t.view(tensors[-1].numel(), -1) for t in tensors]
            pieces.append((keep, distributed.first_entry(p), tensors))
        # As torch.nn.utils.clip_grad_norm_ has it.
        shrink = None if norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
        # Both apply update_block to every tensor. A CPU takes CHUNK entries at a time.
        fast = cuda if cuda.compiles(pieces) else cpu
        fast.update_all(pieces, update_block, dither, CHUNK, shrink, self.step_count, numbers)

    def zero_grad(self) -> None:
        """Drop the gradients and free their memory."""
        for p in self.params.values():
            p.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: everything that `step` changes. These are the weights that
        are trained ("weight.<name>"), both moments ("exp_avg.<name>" and "exp_avg_sq.<name>", and
        in 8 bits their scales) and "step_count". Frozen weights are not in it, because a continued
        run loads them from its base model again. Trap: the tensors are live, not copies."""
        kinds = ("weight", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
        state = {
            f"{kind}.{name}": tensor
            for name, p in self.params.items()
            for kind, tensor in zip(kinds, (p.detach(), *self.moments[name]))
        }
        return state | {"step_count": torch.tensor(self.step_count)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy in what `state_tensors` returned. The run then continues bit for bit as if it had
        never stopped. Raises UserError and changes nothing if names, shapes or dtypes differ."""
        state = self.state_tensors()
        layouts = [{(key, t.shape, t.dtype) for key, t in x.items()} for x in (state, tensors)]
        wrong = {key for key, *_ in layouts[0] ^ layouts[1]}
        if wrong:
            raise UserError(
                f"the saved optimizer state does not fit: {min(wrong)} and {len(wrong) - 1} more "
                "tensors differ; continue with the model, adapter and bits it was saved with"
            )
        for key, tensor in state.items():
            distributed.own(tensor).copy_(distributed.rows_here(tensors[key], tensor))
        self.step_count = int(tensors["step_count"])

    def state_bytes(self) -> int:
        """Bytes of the moments and their scales."""
        return sum(distributed.own(t).nbytes for ts in self.moments.values() for t in ts)


def update_block(weight, grad, m_state, v_state, *scales, offset, keep: float, numbers) -> None:
    """AdamW for blocks of entries (blocks, entries), in place:

        m = beta1 * m + (1 - beta1) * g         w = w - lr * weight_decay * w    (matrices)
        v = beta2 * v + (1 - beta2) * g**2      w = w - lr * m / c1 / (sqrt(v / c2) + eps)

    keep is 1 - lr * weight_decay. `scales` and `offset`, of `dither`, are there in 8 bits only.
    """
    (beta1, beta2), eps, step_size, root_correction = numbers
    # 32 bits: m and v are the state itself, updated in place. 8 bits: copies, written back below.
    w, g, m, v = weight.float(), grad.float(), m_state, v_state
    if scales:
        m, v = dequantise(m_state, scales[0]), dequantise(v_state, scales[1]).square_()
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    sqrt_v = v.sqrt()
    if scales:
        m_state[:], scales[0][:] = quantise(m, torch.int8, offset)
        v_state[:], scales[1][:] = quantise(sqrt_v, torch.uint8, offset)
    # This uses m and sqrt(v) from before rounding. What is stored stays uncorrected.
    sqrt_v.div_(root_correction).add_(eps)
    change = m.mul_(-step_size) if scales else m * -step_size
    weight.copy_(w.mul_(keep).addcdiv_(change, sqrt_v))


def block_size(shape: tuple[int, ...]) -> int | None:
    """Entries per scale for a tensor of this shape, or None if its moments stay float32.

    It is the largest divisor of the row length up to 256, so that no block spans two rows: 256 for
    Gemma's width 2048, 192 for 1152, 160 for 640, 16 for LoRA's B of rank 16.
    """
    # A row of the embedding belongs to one token. If a frequent and a rare token shared a scale,
    # the rare token's moments would be rounded away. Vectors stay float32: --shard could cut one
    # of their blocks in two.
    if math.prod(shape) < MIN_8BIT_SIZE or len(shape) < 2:
        return None
    largest = max(n for n in range(1, MAX_BLOCK + 1) if shape[-1] % n == 0)
    return largest if largest >= MIN_BLOCK else None


def dither(entry: Tensor, step: int) -> Tensor:
    """A rounding offset in [0, 1) for each entry. `entry` has the entries' numbers. Offsets are
    spread evenly over the entries and, for each entry, over steps.

    Integer arithmetic gives the same offsets on every device and in a continued run, without a
    random state to save. Evenly spread offsets also leave less noise in v than random ones.
    """
    # A quiet step changes v by at most about 0.1%, but neighbouring codes are 3% or more apart.
    # Rounded to nearest, v would stick: too large in noise, frozen where gradients vanish. With
    # an offset that differs from step to step, rounding is right on average.
    # Roberts' R2 sequence: 2**24 / p and 2**24 / p**2, rounded down, p the plastic number 1.3247.
    return ((entry * 12664745 + step * 9560333) % 2**24).float() / 2**24


def quantise(x: Tensor, dtype: torch.dtype, offset: Tensor) -> tuple[Tensor, Tensor]:
    """x (blocks, entries) as codes of `dtype`, same shape, and float32 scales (blocks, 1).

        |x| = scale * (code / levels)**4        scale = max |x| of the block

    The exact code plus `offset` (shape of x, in [0, 1)) is rounded down. int8 is for m: 127 levels
    and a sign. uint8 is for sqrt(v) >= 0: codes 16 to 255.
    """
    levels = torch.iinfo(dtype).max
    code = x.abs()
    scale = code.amax(-1, keepdim=True)  # (blocks, 1)
    # The lower bound keeps a block of zeros from dividing 0 by 0. Two square roots: a fourth root.
    code = code.div_(scale.clamp_min(torch.finfo(torch.float32).tiny)).sqrt_().sqrt_()
    # If sqrt(v) rounded to 0 and m did not, m / (sqrt(v) + eps) could be thousands of times too
    # large. Codes below 16 are over 25% apart, so they too could be far too small for their m. An
    # entry raised to 16, which is 1.5e-5 of the scale, takes too small a step. That does no harm.
    # The upper bound is needed: in float32 255 + 0.9999999 is 256, which a byte stores as 0.
    code = code.mul_(levels).add_(offset).clamp_(0 if dtype == torch.int8 else 16, levels)
    return code.copysign_(x).to(dtype), scale  # the cast rounds towards zero


def dequantise(code: Tensor, scale: Tensor) -> Tensor:
    """The float32 values (blocks, entries) of codes; all zero in a block with scale 0."""
    x = code.float()
    x = x * x.abs()  # a square that keeps the sign
    return (x * x.abs()).mul_(scale / torch.iinfo(code.dtype).max ** 4)


def cosine_with_min_lr(
    step: int, total_steps: int, lr: float, min_lr: float, warmup_steps: int = 0
) -> float:
    """The learning rate of `step`, counted from 0: a linear warm-up to `lr`, then half a cosine
    down to `min_lr` at `total_steps`, then constant.

    Until `total_steps` it equals transformers' get_cosine_with_min_lr_schedule_with_warmup. Trap:
    with a warm-up the rate of step 0 is 0, so the first update changes nothing.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    # From 0 at the end of the warm-up to 1 at total_steps.
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
