"""How much memory a run will want, from the config alone: what --dry-run prints.

Estimates: what kernels, the allocator and the process itself take beside it is not in them.
"""

import math
from collections.abc import Iterable

import torch

from nanogsm.fast.cpu import VOCABULARY_BLOCK
from nanogsm.fast.head import KEPT_EXPONENTIALS, block_rows
from nanogsm.optim import block_size
from nanogsm.transformer import Config


def model_bytes(c: Config, total: int, trained: int, bf16: bool) -> int:
    """Bytes of a model's weights while training. trained == total: float32, and the bfloat16 copies
    that autocast keeps of the linear layers'. Fewer: a bfloat16 base, or where products are in float32
    one as its checkpoint has it, the embedding cast once; and float32 adapters."""
    embedding = c.vocab_size * c.hidden_size
    if trained == total:
        return 4 * total + 2 * (total - embedding) * bf16
    base = 2 if bf16 else c.dtype.itemsize
    return (total - trained) * base + embedding * (4 - base) * (not bf16) + 4 * trained


def frozen_copy_bytes(c: Config, total: int, bf16: bool) -> int:
    """Bytes of a copy whose linear layers are rounded to bfloat16, the embedding if that is exact."""
    embedding = c.vocab_size * c.hidden_size
    exact = bf16 and c.dtype == torch.bfloat16
    return embedding * (2 if exact else 4) + (total - embedding) * (2 if bf16 else 4)


def activation_bytes(c: Config, tokens: int, frozen: bool, bf16: bool, checkpointing: str) -> int:
    """Bytes that a forward over `tokens` keeps for backward: of a block gate, up and
    two products of them; q, k and v with their normed and turned forms; the norms' inputs and
    outputs. A full checkpoint: only each block's input, and one block whole; a light one: what comes out of
    its products as well."""
    D, F, N = c.hidden_size, c.intermediate_size, c.head_dim
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    product = 2 if bf16 else 4  # bytes of a number that goes into a matrix product
    stream = 2 if bf16 and frozen else 4  # of one in the residual stream, as wide as the weights
    block = tokens * (4 * F * product + 3 * heads * N * product + 8 * D * stream)
    inputs = tokens * D * stream
    products = tokens * product * (2 * F + 2 * D + (heads + c.num_attention_heads) * N)
    each = {"none": block, "light": inputs + products, "full": inputs}[checkpointing]
    return c.num_hidden_layers * each + block


def head_bytes(c: Config, tokens: int, device: str, trained: bool, bf16: bool, entropy: bool = False) -> int:
    """Bytes of a block's logits, of what is made of them (more with their entropy) and of the copied rows;
    of the derivatives by the hidden states; and of what is kept for a trained head's."""
    kind = device.partition(":")[0]
    block = min(block_rows(kind, tokens, c.hidden_size), c.vocab_size)
    logits = block * max(tokens, c.hidden_size)
    kept = min(KEPT_EXPONENTIALS[kind], (1 + entropy) * tokens * c.vocab_size) * (2 if bf16 else 4) * trained
    return kept + (20 if entropy else 16) * logits + (18 if entropy else 12) * tokens * c.hidden_size


def moments_bytes(shapes: Iterable[tuple[int, ...]], optim: str) -> int:
    """Bytes of AdamW's moments for parameters of these shapes."""
    total = 0
    for shape in shapes:
        block = block_size(shape) if optim == "adamw8bit" else None
        total += math.prod(shape) * (2 + 8 / block if block else 8)  # two codes, two scales a block
    return int(total)


def cache_bytes(c: Config, rows: int, length: int, bf16: bool) -> int:
    """Bytes of the KV cache for rows of that many tokens."""
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return rows * length * per_token * (2 if bf16 else 4)


def sampling_bytes(c: Config, total: int, rows: int, bf16: bool, device: str) -> int:
    """Bytes that drawing a token for each row takes: logits, and probabilities and sums of them, on a CPU
    (that can pack) of a block of the vocabulary at a time; and a CPU's packed copy of the weights."""
    product = 2 if bf16 else 4
    logit = 4 if c.final_logit_softcapping else product
    if device != "cpu":
        return rows * c.vocab_size * (4 + 4 + 8 + 8)
    block = min(VOCABULARY_BLOCK, c.vocab_size)
    return rows * (c.vocab_size * logit + block * (4 + 4 + 8 + 8)) + total * product


def print_budget(budget: dict[str, float]) -> None:
    total = sum(budget.values())
    scale, unit = (2**30, "GiB") if total >= 2**30 else (2**20, "MiB")
    for name, size in (budget | {"in all": total}).items():
        said = ", an estimate, as if all were held at once" * (name == "in all")
        print(f"  {name:<12} {size / scale:7.2f} {unit}{said}")
