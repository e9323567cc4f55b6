"""LoRA (Hu et al. 2021, arXiv 2106.09685): learn a low-rank change of a frozen weight.

    x (.., in) --+-- W (out, in), frozen ------------------------+-- y = W x + (alpha / r) B A x
                 |                                               |
                 +-- A (r, in) -- B (out, r) -- times alpha / r --+

Only A and B are trained: r (in + out) numbers instead of in * out. A starts random and B at zero,
so training starts exactly at the base model, and A's gradient is 0 until B has moved.
Some libraries merge the adapter inside eval(). Here only `merge` does.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogsm import UserError, distributed

# The linear layers of a block, by the names that PEFT's target_modules uses.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Matrix(nn.Module):
    """One float32 weight, so that its name is PEFT's: lora_A.weight, lora_B.weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.float())


class LoRALinear(nn.Module):
    """A frozen linear layer plus its low-rank change. `base` may already be a LoRALinear."""

    # The adapter is float32 even on a bfloat16 base: many updates of a bfloat16 weight would be
    # rounded away, the more so as the learning rate falls. Adapters are stacked, because merging
    # the first one into a bfloat16 weight would round it.

    def __init__(self, base: "nn.Linear | LoRALinear", a: Tensor, b: Tensor, scale: float):
        """a (r, in) and b (out, r) are the start, drawn or loaded; scale is alpha / r."""
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A = Matrix(a.to(base.weight.device))
        self.lora_B = Matrix(b.to(base.weight.device))

    @property
    def weight(self) -> Tensor:
        """W, below all adapters."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.weight, self.lora_B.weight
        if not torch.is_autocast_enabled(x.device.type):  # under autocast, autocast casts them
            a, b = a.to(x.dtype), b.to(x.dtype)
        low = F.linear(x, a) * self.scale  # (.., r): the scale enters here, where it is cheapest
        return self.base(x) + F.linear(low, b)  # (.., out)

    def delta(self) -> Tensor:
        """What the adapters, this one and those below it, add to the weight: (out, in) float32."""
        own = self.scale * self.lora_B.weight.float() @ self.lora_A.weight.float()
        return own + self.base.delta() if isinstance(self.base, LoRALinear) else own

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of one adapter of scale 1 that equals this adapter and those below it:

        s1 B1 A1 + s2 B2 A2  =  (s1 B1 | s2 B2) (A1 over A2)        its r is r1 + r2
        """
        a, b = self.lora_A.weight, self.scale * self.lora_B.weight
        if isinstance(self.base, LoRALinear):
            below = self.base.factors()
            a, b = torch.cat((below[0], a)), torch.cat((below[1], b), dim=1)
        return a, b


def add_lora(model: nn.Module, r: int, alpha: float, seed: int = 0) -> list[str]:
    """Freeze the model, including adapters it already has, and add a fresh adapter to every linear
    layer of every block. Returns the names of these layers. Raises UserError if r exceeds the rank
    of every matrix."""
    # gemma-2b with r = 16: 126 layers, 19,611,648 trained parameters, 0.8% of the model.
    generator = torch.Generator().manual_seed(seed)
    names = [n for n, m in model.named_modules() if n.split(".")[-1] in TARGETS]
    most = max(min(model.get_submodule(name).weight.shape) for name in names)
    if r > most:
        raise UserError(f"--lora-r {r}: no matrix of this model has a rank above {most}")
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        size_out, size_in = base.weight.shape
        # PEFT's start: Kaiming uniform with a = sqrt(5), which is uniform in +-1/sqrt(in). It is
        # drawn on the CPU, so that every device gets the same numbers.
        a = (torch.rand(r, size_in, generator=generator) * 2 - 1) / math.sqrt(size_in)
        replace_module(model, name, LoRALinear(base, a, torch.zeros(size_out, r), alpha / r))
    return names


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name. Of stacked adapters only the topmost, which holds the others."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    return {name: m for name, m in found.items() if name.rpartition(".")[0] not in found}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add all adapters to their base weights, in float32, rounded to the base's dtype once."""
    # Trap: in bfloat16 the rounding can be as large as a small adapter's change. Keep the adapter
    # where exactness matters.
    for name, layer in adapters(model).items():
        mine = distributed.own(layer.weight)  # all rows, unless --shard has parted them
        mine.copy_(mine.float() + distributed.rows_here(layer.delta(), layer.weight))
        if not mine.sum(dtype=torch.float32).isfinite():
            raise UserError(f"merged, {name} has entries that are NaN or infinite")
        while isinstance(layer, LoRALinear):
            layer = layer.base
        replace_module(model, name, layer)
