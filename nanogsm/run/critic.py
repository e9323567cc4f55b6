"""value_head.safetensors: the critic that train_ppo.py saves, and how it is found and built again.

The file has the value head (head.weight, head.bias) and, where the critic is separate, its
adapters. The rest of the critic, its trunk, is in other files: a shared critic's is the run's own
result, a separate critic's is the run's --init. The file's metadata say what it is (`kind`) and
which trunk it belongs to (`trunk_sha256`, of hub.fingerprint).

A process reward model of train_prm.py is saved in the same way, as a shared critic is. Its kind is
"prm". The head of a process reward model gives logits; rerank.py turns them into probabilities.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from nanogsm import UserError, data, distributed, lora
from nanogsm.model import load_model, read_config
from nanogsm.run import past
from nanogsm.store import hub
from nanogsm.transformer import Transformer

NAME = "value_head.safetensors"


def save_critic(folder, models, found: hub.ModelFiles) -> None:
    """Write the critic of train_ppo.Models to a run folder that has the run's result already.
    found: the run's --init. Without a critic nothing is written."""
    weights = {name: p.detach() for name, p in models.value_weights().items()}
    if not weights:
        return
    trunk = found
    if models.critic is models.actor:  # the trunk was trained, too
        adapter = folder.path / "adapter" if lora.adapters(models.actor) else None
        trunk = hub.ModelFiles(found.base if adapter else folder.path / "model", adapter, "")
    save_head(folder, weights, trunk, "critic")


def save_head(folder, weights: dict, trunk: hub.ModelFiles, kind: str) -> None:
    """Write the file. trunk: what the head reads, saved already."""
    if not distributed.RANK:
        folder.write(NAME, weights, {"kind": kind, "trunk_sha256": hub.fingerprint(trunk)})


class Critic(NamedTuple):
    """A critic that has been found and checked, and is not loaded yet."""

    file: Path
    trunk: hub.ModelFiles
    prompt: data.Prompt  # that it was trained with
    args: dict  # of its run
    separate: bool
    kind: str  # "critic" or "prm"

    def digest(self) -> str:
        """SHA-256 over its file and its trunk."""
        trunk = hub.fingerprint(self.trunk).encode()
        return hashlib.sha256(self.file.read_bytes() + trunk).hexdigest()


def find_critic(run: str) -> Critic:
    """The critic of a PPO run, or a run of train_prm.py. Reads no weights. UserError says why there
    is none, or that it and its trunk do not belong together."""
    known = past.run_of(run)
    if known is None:
        raise UserError(f"{run} is not a run folder: give a run of train_ppo.py, with a critic, or "
                        "of train_prm.py")  # fmt: skip
    folder, args = known[0], known[1]["args"]
    if args.get("advantage"):
        raise UserError(f"{run} was trained by {args['advantage']}, which has no critic: give a "
                        "run of PPO")  # fmt: skip
    file = folder / NAME
    if not file.is_file():
        raise UserError(f"{run} has no {NAME}: give a run of train_ppo.py or train_prm.py that has "
                        "ended")  # fmt: skip
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata, names = tensors.metadata() or {}, set(tensors.keys())
            shapes = {name: tensors.get_slice(name).get_shape() for name in names}
            damaged = [name for name in names if not _finite(tensors.get_tensor(name))]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if damaged:
        raise UserError(f"{file} is damaged: {min(damaged)} is not made of finite numbers")
    kind = metadata.get("kind", "critic")  # files of earlier versions do not say
    if kind not in ("critic", "prm"):
        raise UserError(f"{file} is of kind {kind!r}: only critic and prm are supported")
    separate = names != {"head.weight", "head.bias"}
    try:
        if kind == "prm":
            trunk = hub.find_trunk(folder, base=args.get("base"))
        elif separate:
            trunk = hub.find_model(args["init"], True, args.get("base"))
        else:
            trunk = hub.find_model(run)
    except UserError as error:
        raise UserError(f"{run}: the rest of its critic is not there: {error}") from error
    if metadata.get("trunk_sha256") not in (None, hub.fingerprint(trunk)):
        which = f"its --init, {args['init']}" if separate else "its model"
        raise UserError(f"{run}: {which}, has changed since the critic was trained on it")
    size = read_config(trunk.base).hidden_size
    if shapes.get("head.weight") != [1, size] or shapes.get("head.bias") != [1]:
        raise UserError(f"{file} has a head of shape {shapes.get('head.weight')}; the model needs "
                        f"{[1, size]}")  # fmt: skip
    return Critic(file, trunk, past.prompt_of(run), args, separate, kind)


def _finite(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def load_critic(critic: Critic, dtype: torch.dtype, device: str):
    """(trunk, value head, tokenizer). The trunk has weights of that dtype, as for inference."""
    merge = not critic.args["lora"] if critic.separate else dtype == torch.float32
    trunk, tokenizer = load_model(critic.trunk, dtype, device, merge)
    tensors = load_file(critic.file, device)
    head = nn.Linear(trunk.config.hidden_size, 1, device=device)
    head.weight.data, head.bias.data = tensors.pop("head.weight"), tensors.pop("head.bias")
    if critic.separate:
        _add_adapters(trunk, tensors, critic)
    return trunk, head, tokenizer


def _add_adapters(trunk: Transformer, tensors: dict, critic: Critic) -> None:
    lora.add_lora(trunk, critic.args["lora_r"], critic.args["lora_alpha"])
    new = {name: p for name, p in trunk.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in new.items()} != {n: t.shape for n, t in tensors.items()}:
        raise UserError(f"{critic.file}: its adapters do not fit {critic.trunk.base}")
    for name, p in new.items():
        p.data = tensors[name]
