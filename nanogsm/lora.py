"""LoRA (Hu et al. 2021, arXiv 2106.09685): learn a low-rank change of a frozen weight.

    x (.., in) --+-- W (out, in), frozen ------------------------+-- y = W x + (alpha / r) B A x
                 |                                               |
                 +-- A (r, in) -- B (out, r) -- times alpha / r --+

A starts random and B at zero, so training starts exactly at the base model. Files are in PEFT's
layout: `peft.PeftModel.from_pretrained(base, folder)` reads what we save, and we read PEFT's.
Merging is a function called by name, never a side effect of eval().
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nanogsm import UserError
from nanogsm.store import files

# All linear layers of a block, by the names that PEFT's target_modules go by.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # what PEFT puts before the base model's own names


class Matrix(nn.Module):
    """One float32 weight under PEFT's name: lora_A.weight, lora_B.weight."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.float())


class LoRALinear(nn.Module):
    """A frozen linear layer plus its low-rank change. The adapter is float32 even on a bfloat16
    base, because updates of a bfloat16 weight at LoRA's learning rates get lost in rounding. The
    layer below may have an adapter itself: folding that one into a bfloat16 weight would round it."""

    def __init__(self, base: "nn.Linear | LoRALinear", a: Tensor, b: Tensor, scale: float):
        """a (r, in) and b (out, r): the start, drawn or loaded."""
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A, self.lora_B = Matrix(a.to(base.weight.device)), Matrix(b.to(base.weight.device))

    @property
    def weight(self) -> Tensor:
        """W, below all adapters."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.weight, self.lora_B.weight
        if not torch.is_autocast_enabled(x.device.type):  # it keeps copies of what is trained
            a, b = a.to(x.dtype), b.to(x.dtype)
        low = F.linear(x, a) * self.scale  # (.., r): scaled where it is cheap
        return self.base(x) + F.linear(low, b)

    def delta(self) -> Tensor:
        """(out, in) float32: what the adapter, and those below it, add to the weight."""
        own = self.scale * self.lora_B.weight.float() @ self.lora_A.weight.float()
        return own + self.base.delta() if isinstance(self.base, LoRALinear) else own

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of scale 1 that are this adapter and those below it. Side by side two are one of the
        sum of their ranks:

            s1 B1 A1 + s2 B2 A2  =  (s1 B1 | s2 B2) (A1 over A2)
        """
        a, b = self.lora_A.weight, self.scale * self.lora_B.weight
        if isinstance(self.base, LoRALinear):
            below = self.base.factors()
            a, b = torch.cat((below[0], a)), torch.cat((below[1], b), dim=1)
        return a, b


def add_lora(model: nn.Module, r: int, alpha: float, seed: int = 0) -> list[str]:
    """Freeze the model, with any adapters it has, and put a fresh one beside every linear layer of every
    block; returns the adapted layers' names. (gemma-2b at r 16: 126 layers, 19,611,648 parameters.)"""
    generator = torch.Generator().manual_seed(seed)
    names = [n for n, m in model.named_modules() if n.split(".")[-1] in TARGETS]
    most = max(min(model.get_submodule(name).weight.shape) for name in names)
    if r > most:
        raise UserError(f"rank {r} of the adapters: no matrix of this model has a rank above {most}")
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        # PEFT's start, Kaiming uniform with a = sqrt(5). Drawn on the CPU: the same on every device.
        size_out, size_in = base.weight.shape
        a = (torch.rand(r, size_in, generator=generator) * 2 - 1) / math.sqrt(size_in)
        _replace(model, name, LoRALinear(base, a, torch.zeros(size_out, r), alpha / r))
    return names


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name; of adapters on top of each other the topmost, which holds the others."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    return {name: m for name, m in found.items() if name.rpartition(".")[0] not in found}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold all adapters into their base weights: computed in float32, rounded to the base's dtype
    once. In bfloat16 the rounding is of the size of a small adapter's change: keep the adapter
    where exactness matters."""
    for name, layer in adapters(model).items():
        layer.weight.copy_(layer.weight.float() + layer.delta())
        while isinstance(layer, LoRALinear):
            layer = layer.base
        _replace(model, name, layer)


def save_adapter(model: nn.Module, folder: Path, base_model: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the folder is whole or absent
    (files.py). base_model: what `load_model` finds the base under again. Adapters on top of each other
    are written as one."""
    layers = adapters(model)
    first = next(iter(layers.values()))
    if any(isinstance(layer.base, LoRALinear) for layer in layers.values()):
        factors, scale = {name: layer.factors() for name, layer in layers.items()}, 1.0
        r = max(len(a) for a, _ in factors.values())
        for name, (a, b) in factors.items():  # PEFT's may leave some layers alone; ranks must be equal
            more = r - len(a)
            factors[name] = F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more))
    else:
        factors = {name: (m.lora_A.weight, m.lora_B.weight) for name, m in layers.items()}
        r, scale = len(first.lora_A.weight), first.scale
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",  # without it PEFT builds no generate()
        "base_model_name_or_path": base_model,
        "revision": None,
        "r": r,
        "lora_alpha": scale * r,
        "target_modules": sorted({name.split(".")[-1] for name in layers}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{name}.{side}.weight": factor
        for name, pair in factors.items()
        for side, factor in zip(("lora_A", "lora_B"), pair)
    }
    with files.replaced_folder(folder) as beside:
        files.write_json(beside / "adapter_config.json", config)
        files.write_tensors(beside / "adapter_model.safetensors", tensors)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a saved adapter, ours or PEFT's, on model. Raises UserError when it is of a kind we do
    not compute, or of another model."""
    file = Path(folder) / "adapter_model.safetensors"
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        r = config["r"]
        scale = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
        tensors = load_file(file)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError, SafetensorError) as e:
        raise UserError(f"cannot use the adapter in {folder}: {e}") from e
    if not (type(r) is int and r > 0 and type(scale) is float and math.isfinite(scale)):
        raise UserError(f"cannot use the adapter in {folder}: r {r!r}, scale {scale!r}")
    kinds = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
    other = [kind for kind in kinds if config.get(kind)]
    if config.get("peft_type") != "LORA" or other or config.get("bias", "none") != "none":
        raise UserError(f"the adapter in {folder} is not plain LoRA ({', '.join(other) or 'see bias'})")

    layers = dict(model.named_modules())
    model.requires_grad_(False)
    while tensors:
        key = next(iter(tensors))
        name = key.removeprefix(PREFIX).rsplit(".lora_", 1)[0]
        a = tensors.pop(f"{PREFIX}{name}.lora_A.weight", None)
        b = tensors.pop(f"{PREFIX}{name}.lora_B.weight", None)
        base = layers.pop(name, None)
        fits = a is not None and b is not None and isinstance(base, nn.Linear)
        if not fits or (a.shape, b.shape) != ((r, base.in_features), (base.out_features, r)):
            raise UserError(f"the adapter in {folder} is for another model: {key} does not fit")
        _replace(model, name, LoRALinear(base, a, b, scale))
    targets = config.get("target_modules")  # in PEFT's files a list of names' ends, or a pattern
    ends = tuple(f".{target}" for target in targets) if isinstance(targets, list) else ()
    absent = [name for name in layers if name.endswith(ends)]  # those replaced above are gone from it
    some_only = config.get("layers_to_transform") or config.get("exclude_modules")
    if not adapters(model) or (absent and not some_only):
        lacks = absent[0] if absent else "any layer"
        raise UserError(f"the adapter in {folder} is incomplete: it has nothing for {lacks}")
