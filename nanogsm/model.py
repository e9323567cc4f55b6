"""Gemma 1, 2 and 3 (text) in one file: config, norm, rotary, attention, MLP, block, model, weights.

The checkpoint's config.json decides which Gemma is built. Module names are the checkpoint's tensor
names, so loading is a strict `load_state_dict` with no mapping table. What a reader who knows
Llama should watch for; with one of them missed everything runs, and the logits are another model's:

  all      embeddings times sqrt(hidden_size), the factor rounded to the activations' dtype
           RMSNorm multiplies by (1 + weight), in float32, and rounds last (Llama rounds first)
           GELU in its tanh form gates the MLP, whatever older configs call it
           head_dim is free: heads * head_dim need not equal hidden_size
           the output head is the embedding matrix; no bias anywhere
  Gemma 2  scores are soft-capped before the mask (so no fused attention), and so are the final logits
           local (sliding window) and global layers alternate, starting local
  2 and 3  a norm after attention and MLP as well, before the residual addition
           (`post_attention_layernorm` in Gemma 1 is the norm *before* the MLP: same name, other place)
  Gemma 3  RMSNorm on queries and keys before rotary; five local layers to one global one, and the
           two kinds have their own rotary base. A window of W counts the query itself.

Sources: the Gemma reports (arXiv 2403.08295, 2408.00118, 2503.19786); logits are tested against
transformers for all three (tests/test_model.py).

Shapes   B batch   T tokens   S cached positions   D hidden_size   F intermediate_size   V vocabulary
         H query heads   K key/value heads   N head_dim

Rows of a batch are padded on the right. If their lengths are given, padding goes through no layer: rows
lie end to end as one of B = 1, and only attention takes them apart again.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanogsm import UserError, lora
from nanogsm.data import Tokenizer
from nanogsm.logprob import Head, add_rows, grad_of
from nanogsm.store import files, hub

# ---------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Config:
    """What config.json says, in one spelling. `layer_types[i]` is "full_attention" or
    "sliding_attention"; `rope[layer_type]` is (theta, factor): positions are divided by factor."""

    model_type: str  # gemma, gemma2 or gemma3_text
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    query_pre_attn_scalar: float
    layer_types: tuple[str, ...]
    sliding_window: int | None
    rope: dict[str, tuple[float, float]]
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    dtype: torch.dtype  # of the weights on disk; what we train is saved in it again

    @property
    def norms_after(self) -> bool:
        return self.model_type != "gemma"

    @property
    def norms_qk(self) -> bool:
        return self.model_type == "gemma3_text"


def read_config(folder: Path) -> Config:
    """Read folder/config.json as transformers 4 or 5 spells it. Raises UserError on anything this
    file cannot run, rather than running something else."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _config_from(raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        problem = f"missing field {e}" if isinstance(e, KeyError) else str(e)
        raise UserError(f"cannot use {folder / 'config.json'}: {problem}") from e


def _config_from(raw: dict) -> Config:
    kind = raw["model_type"]
    if kind not in ("gemma", "gemma2", "gemma3_text"):
        raise ValueError(f"model_type {kind!r} is not gemma, gemma2 or gemma3_text (text only)")
    sizes = {
        "vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 1000,
        "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**12,
    }  # fmt: skip
    for name, limit in sizes.items():  # first of all: what follows counts up to them
        if type(raw[name]) is not int or not 0 < raw[name] <= limit:
            raise ValueError(f"{name} is {raw[name]!r}")
    layers = raw["num_hidden_layers"]
    unsupported = ["attention_bias", "use_bidirectional_attention"]
    if kind != "gemma2":
        unsupported += ["attn_logit_softcapping", "final_logit_softcapping"]
    for name in unsupported:
        if raw.get(name):
            raise ValueError(f"{name} is set, and not supported")
    if raw.get("tie_word_embeddings") is False:
        raise ValueError("an output head of its own (tie_word_embeddings false) is not supported")
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or "gelu_pytorch_tanh"
    if activation not in ("gelu", "gelu_pytorch_tanh"):  # "gelu" in old files means the tanh form
        raise ValueError(f"activation {activation!r} is not supported")

    sliding = {  # layer i (from 0) is local
        "gemma": lambda i: False,
        "gemma2": lambda i: i % 2 == 0,
        "gemma3_text": lambda i: (i + 1) % (raw.get("sliding_window_pattern") or 6) != 0,
    }[kind]
    layer_types = raw.get("layer_types") or [
        "sliding_attention" if sliding(i) else "full_attention" for i in range(layers)
    ]
    if len(layer_types) != layers or set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ValueError("layer_types must name full_attention or sliding_attention per layer")

    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r} is not supported")

    config = Config(
        model_type=kind,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        rms_norm_eps=raw["rms_norm_eps"],
        query_pre_attn_scalar=raw["head_dim" if kind == "gemma" else "query_pre_attn_scalar"],
        layer_types=tuple(layer_types),
        sliding_window=raw.get("sliding_window") if "sliding_attention" in layer_types else None,
        rope=_rope_from(raw),
        # Asked for with [] where a family must have it: without it another model would run.
        attn_logit_softcapping=raw["attn_logit_softcapping"] if kind == "gemma2" else None,
        final_logit_softcapping=raw["final_logit_softcapping"] if kind == "gemma2" else None,
        dtype=getattr(torch, dtype),
    )
    _check(config)
    return config


def _check(config: Config) -> None:
    """ValueError for numbers with which the model would fail, or be another one."""
    floats = "rms_norm_eps query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping"
    for name in floats.split():
        value = getattr(config, name)
        if not (_positive(value) or (value is None and name.endswith("capping"))):
            raise ValueError(f"{name} is {value!r}")
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError("heads must divide by key/value heads, and head_dim by 2")
    window = config.sliding_window
    if "sliding_attention" in config.layer_types and not (type(window) is int and 0 < window < 2**31):
        raise ValueError(f"there are local layers, and sliding_window is {window!r}")
    if not set(config.layer_types) <= config.rope.keys():
        raise ValueError("rope_parameters lack a kind of layer that layer_types names")


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < 2**62  # what an integer tensor can take


def _rope_from(raw: dict) -> dict[str, tuple[float, float]]:
    def theta_and_factor(r: dict, theta: float) -> tuple[float, float]:
        rope_type = r.get("rope_type") or r.get("type") or "default"
        if rope_type not in ("default", "linear"):
            raise ValueError(f"rope type {rope_type!r} is not supported")
        found = r.get("rope_theta") or theta, r.get("factor") or 1.0
        if not all(map(_positive, found)):
            raise ValueError(f"rope theta and factor are {found!r}")
        return float(found[0]), float(found[1])

    new = raw.get("rope_parameters")
    if new and "full_attention" in new:  # transformers 5, a table per kind of layer
        return {kind: theta_and_factor(r, 10_000.0) for kind, r in new.items() if r}
    everywhere = theta_and_factor(new or raw.get("rope_scaling") or {}, raw.get("rope_theta") or 1e4)
    local = (float(raw.get("rope_local_base_freq") or 1e4), 1.0)  # old: scaling is for global layers
    return {
        "full_attention": everywhere,
        "sliding_attention": local if raw["model_type"] == "gemma3_text" else everywhere,
    }


# ----------------------------------------------------------------------------------------- model


# Gradient checkpointing. Not reentrant: the other kind needs an input that requires grad, which a frozen
# embedding's output does not, and then trains nothing. No random state: there is no dropout to repeat.
FULL = {"use_reentrant": False, "preserve_rng_state": False}
CHEAP = 128  # a product with a smaller inner size is made again, not kept: LoRA's with B, of size r


def _keep(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """What a light checkpoint keeps of a block: products with its weights, and fused attention (not Gemma
    2's). They take most of the time and little of the memory; the rest is made again from them. Trap: they
    are gone after one backward, and retain_graph does not keep them."""
    product = op is torch.ops.aten.mm.default and args[0].shape[1] >= CHEAP
    attention = "scaled_dot_product" in str(op)
    return CheckpointPolicy.MUST_SAVE if product or attention else CheckpointPolicy.PREFER_RECOMPUTE


LIGHT = FULL | {"context_fn": lambda: create_selective_checkpoint_contexts(_keep)}
CHECKPOINTS = {"none": None, "light": LIGHT, "full": FULL}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), in float32, rounded to x's dtype last."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        gain = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), gain.shape, gain, self.eps).to(x.dtype)


HEAD_BLOCK = 2**13  # rows of the vocabulary whose logits a CPU makes at a time while answering


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (out, in) as a CPU's matrix kernels (oneDNN) read it: in blocks, an opaque tensor. They bring
    every weight into this order anyway, at every product; with few rows that takes longer than
    multiplying. (PyTorch's compiler has these two operators for the same purpose.)"""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))


def multiply_packed(x: Tensor, packed: Tensor) -> Tensor:
    """x weight', (..., in) -> (..., out), in the dtype that weight was packed in."""
    return torch.ops.mkldnn._linear_pointwise(x.to(packed.dtype), packed, None, "none", [], "")


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class Linear(nn.Linear):
    """Without bias; the weight follows the activations' dtype, so that a frozen bfloat16 base can
    serve a CPU that has no bfloat16 arithmetic. Under autocast the cast is left to autocast, which
    keeps the copy for the next use. `packed`, while there is one, stands for the weight."""

    def __init__(self, size_in: int, size_out: int):
        super().__init__(size_in, size_out, bias=False)
        self.packed: Tensor | None = None

    def reset_parameters(self) -> None:
        """Nothing: weights come from a checkpoint, and PyTorch's random start takes time."""

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return multiply_packed(x, self.packed)
        automatic = torch.is_autocast_enabled(x.device.type)
        return F.linear(x, self.weight if automatic else self.weight.to(x.dtype))


def rotary(positions: Tensor, head_dim: int, theta: float, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin, (B, 1, T, N) float32, of the rotation of each (position, channel); positions
    (B, T). Channel i is paired with i + N/2 (half-split, not interleaved)."""
    channels = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / theta ** (channels / head_dim)  # (N/2,)
    angle = positions[:, None, :, None].float() / factor * frequency  # (B, 1, T, N/2)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each channel pair of x (B, H, T, N) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None):
    """softmax(q k' * scale) v: q (B, H, T, N); k, v (B, K, S, N) -> (B, H, T, N).

    mask (B or 1, 1, T, S) is True where a query may look; None means causal with S = T. With
    `cap`, scores become cap * tanh(scores / cap) before the mask, which no fused kernel does.
    """
    (B, H, T, N), K = q.shape, k.shape[1]
    if cap is None and T == 1 and mask is not None:
        # One new token a row: the G = H/K query heads that share a key head become the query axis,
        # so keys and values are read once instead of being copied G times.
        out = F.scaled_dot_product_attention(q.view(B, K, H // K, N), k, v, mask, scale=scale)
        return out.view(B, H, T, N)
    if K != H:  # a view when K is 1 (Gemma 1 2B, Gemma 3 270M and 1B), else a copy
        k = k[:, :, None].expand(-1, -1, H // K, -1, -1).reshape(B, H, -1, N)
        v = v[:, :, None].expand(-1, -1, H // K, -1, -1).reshape(B, H, -1, N)
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    scores = cap * torch.tanh(q @ k.transpose(2, 3) * (scale / cap))  # (B, H, T, S)
    scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def attend_each(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], masks: list, scale, cap) -> Tensor:
    """`attend` for rows that lie end to end, q (1, H, sum of lengths, N): each sees itself alone."""
    rows = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), masks, strict=True)
    return torch.cat([attend(*row, scale, cap) for row in rows], 2)


def attend_cached(q: Tensor, k: Tensor, v: Tensor, used: list[int], mask: Tensor | None, scale, cap):
    """`attend` for queries (B, H, T, N) of rows whose keys and values lie in a cache, (B, K, S, N). used: how
    many of the S slots any row can have filled, for each of some equal groups of rows (the last may be
    smaller)."""
    if len(used) == 1:
        return attend(q, k[:, :, : used[0]], v[:, :, : used[0]], mask, scale, cap)
    size = -(-len(q) // len(used))
    groups = zip(used, q.split(size), k.split(size), v.split(size), mask.split(size), strict=True)
    return torch.cat(
        [attend(q, k[:, :, :n], v[:, :, :n], mask[..., :n], scale, cap) for n, q, k, v, mask in groups]
    )


class Attention(nn.Module):
    """x (B, T, D) -> (B, T, D). cos, sin (B or 1, 1, T, N) turn queries and keys by their positions
    (B or 1, T); mask as in `attend`; with a cache, keys and values of earlier tokens come from it. With
    lengths, x is rows end to end, (1, sum of lengths, D), and mask a list of theirs."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.config = layer, config
        D, N = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj, self.o_proj = Linear(D, H * N), Linear(H * N, D)
        self.k_proj, self.v_proj = Linear(D, K * N), Linear(D, K * N)
        if config.norms_qk:
            self.q_norm = RMSNorm(N, config.rms_norm_eps)
            self.k_norm = RMSNorm(N, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, positions, cache, lengths):
        c, (B, T, _) = self.config, x.shape
        q = self.q_proj(x).view(B, T, -1, c.head_dim).transpose(1, 2)  # (B, H, T, N)
        k = self.k_proj(x).view(B, T, -1, c.head_dim).transpose(1, 2)  # (B, K, T, N)
        v = self.v_proj(x).view(B, T, -1, c.head_dim).transpose(1, 2)
        if c.norms_qk:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scale, cap = c.query_pre_attn_scalar**-0.5, c.attn_logit_softcapping
        if cache is not None:
            k, v = cache.append(self.layer, k, v, positions)  # (B, K, S, N)
            out = attend_cached(q, k, v, cache.used, mask, scale, cap)  # (B, H, T, N)
        elif lengths is None:
            out = attend(q, k, v, mask, scale, cap)
        else:
            out = attend_each(q, k, v, lengths, mask, scale, cap)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = Linear(D, hidden), Linear(D, hidden)
        self.down_proj = Linear(hidden, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        norm = lambda: RMSNorm(config.hidden_size, config.rms_norm_eps)  # noqa: E731
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.norms_after = config.norms_after
        if config.norms_after:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(self, x, cos, sin, mask, positions, cache, lengths):
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, positions, cache, lengths)
        if not self.norms_after:  # Gemma 1: a norm before each half
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)  # Gemma 2, 3: before and after each half
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class KVCache:
    """Keys and values of all layers, (L, B, K, S, N). Row b's token at position p lies in slot p,
    so rows of different lengths share a batch without padding between their tokens. The caller sets
    `used`, the number of slots any row can have filled, or several, one for each of as many equal groups of
    rows: attention looks no further."""

    def __init__(self, config: Config, batch: int, length: int, dtype, device):
        K, N = config.num_key_value_heads, config.head_dim
        self.k = torch.zeros(config.num_hidden_layers, batch, K, length, N, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.used = [0]

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, K, T, N) at positions (B or 1, T); return all slots."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[layer][rows, :, positions] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer][rows, :, positions] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer], self.v[layer]

    def keep(self, rows: list[int]) -> None:
        """Keep these rows only, in this order: row i becomes what rows[i] was. Only those that change
        places are copied; no memory is given back."""
        new = [i for i, r in enumerate(rows) if r != i]
        old = [rows[i] for i in new]
        for x in (self.k, self.v):
            x[:, new] = x[:, old]
        self.k, self.v = self.k[:, : len(rows)], self.v[:, : len(rows)]


class _Lookup(torch.autograd.Function):
    """weight (V, D), ids (B, T) -> (B, T, D). The gradient is added to weight.grad in place: see grad_of."""

    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.weight, ctx.ids = weight, ids
        return weight[ids]

    @staticmethod
    def backward(ctx, grad: Tensor):
        add_rows(grad_of(ctx.weight), ctx.ids.flatten(), grad.flatten(0, 1))
        return None, None


class Gemma(nn.Module):
    """`model(ids, lengths) -> hidden` (B, T, D), already final-normed; `model.logits(hidden)` (..., V),
    capped; `model.head` is what `token_logprobs` takes.

    Rows are padded on the right. With their lengths padding is left out and comes out as 0; without, the
    causal mask hides it from real tokens, and what comes out there means nothing. `activations` (a dtype,
    None for the weights') and `checkpointing` are set by the caller: "full" recomputes each block in the
    backward pass, "light" only what is cheap in it, "none" nothing.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.hidden_size
        self.model = nn.ModuleDict(  # called so because the checkpoint's names begin with "model."
            dict(
                # Given a weight, nn.Embedding draws none: even on the meta device that would
                # import PyTorch's compiler, 3 seconds of every start.
                embed_tokens=nn.Embedding(V, D, _weight=torch.empty(V, D)),
                layers=nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
                norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
            )
        )
        self.activations: torch.dtype | None = None
        self.checkpointing = "none"
        self.packed_head: list[Tensor] = []  # blocks of HEAD_BLOCK rows

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def product_dtype(self) -> torch.dtype:
        """Of matrix products, here and now."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.activations or self.model.embed_tokens.weight.dtype

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Within it a CPU has a second copy of all matrices, packed (see pack). Trap: a change of a weight
        is not seen in there, and none gets a gradient. For 32 rows of Gemma 3 270M a product takes 0.6
        (bfloat16) or 0.4 (float32) of the time it takes unpacked."""
        layers = [m for m in self.modules() if isinstance(m, Linear)]
        dtype = self.product_dtype
        try:
            if can_pack(self.device, dtype):
                for layer in layers:
                    layer.packed = pack(layer.weight, dtype)
                blocks = self.model.embed_tokens.weight.split(HEAD_BLOCK)
                self.packed_head = [pack(block, dtype) for block in blocks]
            yield
        finally:
            self.packed_head = []
            for layer in layers:
                layer.packed = None

    def compute_in_float32(self) -> None:
        """Whatever the weights' dtype, for machines without bfloat16 arithmetic: the embedding, which
        is needed all the time, is cast once, and other weights as they are used. All are copied out of the
        checkpoint's mapped file, or all of it would stay in memory beside them."""
        self.activations = torch.float32
        embedding = self.model.embed_tokens.weight
        for p in self.parameters():
            p.data = p.data.to(torch.float32 if p is embedding else p.dtype, copy=True)

    def forward(
        self,
        ids: Tensor,
        lengths: list[int] | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """ids (B, T) -> hidden (B, T, D). Without positions the rows start at 0. With a cache, set
        `cache.used` to the highest positions + 1 first; positions are (B, T) when decoding. lengths, of
        the rows without their padding: what comes out at padding is 0, and none of it is computed.
        They go without positions and cache."""
        c, (B, T), kinds = self.config, ids.shape, set(self.config.layer_types)
        count = torch.arange(T, device=ids.device)[None]  # (1, T)
        if lengths is not None:
            is_real = torch.arange(T) < torch.tensor(lengths)[:, None]  # (B, T)
            real = is_real.flatten().nonzero()[:, 0].to(ids.device)  # found on the host: no GPU is waited for
            ids = ids.flatten()[real][None]  # (1, sum of lengths)
            positions = count.expand(B, T).flatten()[real][None]
            rows = [count[:, :n] for n in lengths]
            masks = {kind: [self._mask(kind, row, row, True) for row in rows] for kind in kinds}
        else:
            from_start = positions is None  # then queries and keys stand at the same positions
            positions = count if from_start else positions
            keys_at = count if from_start else torch.arange(max(cache.used), device=ids.device)[None]
            masks = {kind: self._mask(kind, positions, keys_at, from_start) for kind in kinds}
        angles = {kind: rotary(positions, c.head_dim, *c.rope[kind]) for kind in kinds}

        weight = self.model.embed_tokens.weight
        x = _Lookup.apply(weight, ids).to(self.activations or weight.dtype)
        x = x * torch.tensor(c.hidden_size**0.5, dtype=x.dtype).item()  # rounded as x is
        how = CHECKPOINTS[self.checkpointing] if torch.is_grad_enabled() and cache is None else None
        for block, kind in zip(self.model.layers, c.layer_types, strict=True):
            args = (x, *angles[kind], masks[kind], positions, cache, lengths)
            x = checkpoint(block, *args, **how) if how else block(*args)
        hidden = self.model.norm(x)
        if lengths is None:
            return hidden
        return hidden.new_zeros(B * T, c.hidden_size).index_copy(0, real, hidden[0]).view(B, T, -1)

    def _mask(self, kind: str, queries: Tensor, keys: Tensor, from_start: bool) -> Tensor | None:
        """True where the query at a position may see the key at a position, (B or 1, 1, T, S):

            full   1 0 0 0    sliding, window 2   1 0 0 0
                   1 1 0 0                        1 1 0 0
                   1 1 1 0                        0 1 1 0
                   1 1 1 1                        0 0 1 1

        None where plain causal attention says the same, so that the fast kernels apply.
        """
        window = self.config.sliding_window if kind == "sliding_attention" else None
        plain = window is None or queries.shape[1] <= window
        if from_start and plain and self.config.attn_logit_softcapping is None:
            return None
        distance = queries[:, None, :, None] - keys[:, None, None, :]
        return (distance >= 0) if window is None else (distance >= 0) & (distance < window)

    @property
    def head(self) -> Head:
        """The embedding matrix once more; Gemma 2 caps what comes out."""
        return Head(self.model.embed_tokens.weight, self.config.final_logit_softcapping)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), all of them. Training asks for fewer: logprob.py."""
        blocks = list(self.logit_blocks(hidden))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)

    def logit_blocks(self, hidden: Tensor) -> Iterator[Tensor]:
        """The logits, side by side in blocks of the vocabulary, as wide as the first but for the last. Where
        weights are packed a block's logits are few enough for the processor's cache; else there is one."""
        for block in self.packed_head:
            yield self.head.capped(multiply_packed(hidden, block))
        if not self.packed_head:
            weight, cap = self.head
            automatic = torch.is_autocast_enabled(hidden.device.type)
            yield Head(weight if automatic else weight.to(hidden.dtype), cap)(hidden)  # as in Linear


# --------------------------------------------------------------------------------------- weights


def load_model(
    name: str | Path | hub.ModelFiles,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    merge: bool = False,
) -> tuple[Gemma, Tokenizer]:
    """A model and its tokenizer from a Hub id, a folder in the Hub's layout, a run folder, or what
    `hub.find_model` found.

    dtype: of the weights, None for what the checkpoint has. A run that trained adapters comes back
    as base plus adapters (float32); `merge` folds them into the base, which in a 16-bit dtype
    rounds. Raises UserError for everything a user can cause.
    """
    found = name if isinstance(name, hub.ModelFiles) else hub.find_model(str(name))
    tokenizer = Tokenizer(found.base)
    with torch.device("meta"):  # no memory is touched until the weights arrive
        model = Gemma(read_config(found.base))
    if max(tokenizer.stop_ids | {tokenizer.bos_id}) >= model.config.vocab_size:
        raise UserError(f"{found.base}: the tokenizer's ids exceed the model's vocabulary")
    _load_weights(model, found.base, dtype or model.config.dtype, device)
    if found.adapter:
        lora.load_adapter(model, found.adapter)
        if merge:
            lora.merge(model)
            model.requires_grad_(True)  # a whole model again: nothing in it is frozen
    return model, tokenizer


def _load_weights(model: Gemma, folder: Path, dtype: torch.dtype, device: str) -> None:
    """Strict: every tensor the model has, none it does not have, each of the right shape."""
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    loaded: dict[str, Tensor] = {}
    for file, named in hub.weight_files(folder).items():
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for key in tensors.keys() if named is None else named & set(tensors.keys()):
                    if key == "lm_head.weight":  # some exporters repeat the tied embedding
                        continue
                    shape = tuple(tensors.get_slice(key).get_shape())
                    if wanted.get(key) != shape:
                        need = f"the model needs {wanted[key]}" if key in wanted else "unknown to it"
                        raise UserError(f"{file}: tensor {key} has shape {shape}, {need}")
                    loaded[key] = tensors.get_tensor(key).to(dtype)
        except SafetensorError as e:
            raise UserError(f"{file} is damaged or incomplete ({e}): fetch it again") from e
    missing = sorted(wanted.keys() - loaded.keys())
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    model.load_state_dict(loaded, strict=True, assign=True)


def save_model(model: Gemma, tokenizer: Tokenizer, folder: Path | str) -> None:
    """Write folder in the Hub's layout, for transformers and for us; weights in the dtype the base
    came in. The folder is whole or absent (files.py). Merge adapters first."""
    if lora.adapters(model):
        raise ValueError("merge the adapters, or save them alone with lora.save_adapter")
    with files.replaced_folder(folder) as beside:
        # Gemma's own small files go along unchanged: other tools read them as they read the original.
        for name in (*hub.REQUIRED, *hub.OPTIONAL):
            if (tokenizer.folder / name).exists():
                files.write(beside / name, [(tokenizer.folder / name).read_bytes()])
        weights = {name: p.detach() for name, p in model.named_parameters()}
        files.write_tensors(beside / "model.safetensors", weights, model.config.dtype)
