"""The network: Gemma 1, 2 and 3 and Llama 3 (text) in one file. It imports torch, nothing of ours.

A Config decides which model is built. Module names are the checkpoint's tensor names, so loading is
a strict `load_state_dict` without a mapping table. What tells the families apart is listed below.
If one point is missed, everything still runs, and the logits are those of another model:

  Gemma    Embeddings are multiplied by sqrt(hidden_size), rounded to the activations' dtype.
           RMSNorm multiplies by (1 + weight), in float32, and rounds last.
           The MLP is gated by GELU in its tanh form, whatever older configs call it.
           head_dim is free: heads * head_dim need not equal hidden_size.
  Gemma 2  Attention scores are soft-capped before the mask: s becomes cap * tanh(s / cap).
           F.scaled_dot_product_attention has no cap. The final logits are soft-capped, too.
           Local (sliding-window) and global layers alternate, starting with a local one.
  2 and 3  A norm follows attention and MLP as well, before the residual addition. The name
           `post_attention_layernorm` means something else in Gemma 1: its norm before the MLP.
  Gemma 3  Queries and keys pass through RMSNorm before rotary. There is one global layer to five
           local ones, and each kind has its own rotary base.
  Llama 3  Embeddings are not scaled. RMSNorm rounds first and then multiplies by the weight. The
           MLP is gated by SiLU. From 8B on the output projection is not the embedding matrix. From
           3.1 on slow rotary channels are slowed further, at short positions as well.

The window of a local layer includes the query. No layer has a bias. Sources: the Gemma reports
(arXiv 2403.08295, 2408.00118, 2503.19786), the Llama 3 report (2407.21783) and the checkpoints.

Shapes   B batch   T tokens   S cached positions   D hidden_size   I intermediate_size
         V vocabulary   H query heads   K key/value heads   N head_dim
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """The fields of config.json that matter here, in one spelling (model.py reads the file)."""

    model_type: str  # gemma, gemma2, gemma3_text or llama
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    query_pre_attn_scalar: float  # attention scores are divided by its square root
    layer_types: tuple[str, ...]  # "full_attention" or "sliding_attention", one per layer
    sliding_window: int | None  # how many tokens a local layer sees, the query included
    rope: dict[str, tuple]  # layer type -> what `rotary` takes: base, factor and perhaps bands
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    dtype: torch.dtype  # of the weights on disk; a trained model is saved in it again
    tied: bool = True  # whether the embedding is also the output projection
    multimodal: bool = False  # the text part of a checkpoint that has a vision part, too

    @property
    def is_gemma(self) -> bool:
        return self.model_type != "llama"

    @property
    def norms_after(self) -> bool:
        return self.model_type in ("gemma2", "gemma3_text")

    @property
    def norms_qk(self) -> bool:
        return self.model_type == "gemma3_text"

    def window(self, layer: int) -> int | None:  # None: itself and all before it
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None


class RMSNorm(nn.Module):
    """Gemma: x / sqrt(mean(x^2) + eps) * (1 + weight), in float32, then rounded to x's dtype.
    Llama: x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, then * weight."""

    def __init__(self, size: int, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))  # in Gemma, 0 means a gain of 1
        self.eps, self.is_gemma = config.rms_norm_eps, config.is_gemma

    def forward(self, x: Tensor) -> Tensor:
        gain = 1.0 + self.weight.float() if self.is_gemma else None
        normed = F.rms_norm(x.float(), self.weight.shape, gain, self.eps).to(x.dtype)
        return normed if self.is_gemma else normed * self.weight.to(x.dtype)


class Linear(nn.Linear):
    """A linear layer without bias whose weight follows the activations' dtype."""

    def __init__(self, size_in: int, size_out: int):
        super().__init__(size_in, size_out, bias=False)

    def reset_parameters(self) -> None:
        pass  # weights come from a checkpoint, and drawing random ones takes time

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _weight_for(x, self.weight))


def _weight_for(x: Tensor, weight: Tensor) -> Tensor:
    # So a bfloat16 base can serve a CPU without bfloat16 arithmetic. Autocast casts by itself.
    return weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype)


class Vocabulary(NamedTuple):
    """The projection onto the vocabulary: hidden (..., D) -> logits (..., V)."""

    weight: Tensor  # (V, D)
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.capped(F.linear(hidden, _weight_for(hidden, self.weight)))

    def capped(self, logits: Tensor) -> Tensor:
        # In float32: near the cap the derivative, 1 - tanh^2, is a small difference.
        return logits if self.cap is None else self.cap * torch.tanh(logits.float() / self.cap)


def rotary(positions: Tensor, head_dim: int, dtype, base: float, factor=1.0, bands=None) -> tuple:
    """cos and sin of the rotations, computed in float32: positions (B, T) -> (B, 1, T, N) each.
    The factor divides positions. With bands = (low, high, length) it does so in slow channels."""
    channels = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / base ** (channels / head_dim)  # (N/2,)
    if bands:
        # Llama 3.1 exempts a channel that makes `high` full turns or more in `length` positions.
        # One that makes `low` or fewer is slowed by the whole factor, in between by a part of it.
        low, high, length = bands
        exempt = ((length * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (1 + exempt * (factor - 1))
    angle = positions[:, None, :, None].float() / factor * frequency  # (B, 1, T, N/2)
    # Channel i is paired with channel i + N/2. (Other models interleave: 2i with 2i + 1.) A pair
    # (a, b) becomes (a cos - b sin, b cos + a sin). The minus is made here: sin(-x) is -sin(x).
    angle = torch.cat((-angle, angle), dim=-1)  # (B, 1, T, N)
    return angle.cos().to(dtype), angle.sin().to(dtype)  # the dtype of q and k


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x (B, H, T, N)
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # roll: the halves change places


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap):
    """softmax(q k^T * scale) v: q (B, H, T, N); k, v (B, K, S, N) -> (B, H, T, N). mask (B or 1, 1,
    T, S): True where a query may look, or (no cap) 0, else -inf. None: causal, S = T, no cap."""
    (B, H, T, N), K = q.shape, k.shape[1]
    if cap is None and T == 1 and mask is not None:
        # One new token per row. The H/K query heads that share a key head take the place of the
        # query axis, so that keys and values are read once and not copied H/K times.
        out = F.scaled_dot_product_attention(q.view(B, K, H // K, N), k, v, mask, scale=scale)
        return out.reshape(B, H, T, N)  # a GPU's kernel may return its axes in another order
    if K != H:  # a view when K is 1 (Gemma 1 2B, Gemma 3 270M and 1B), otherwise a copy
        k = k[:, :, None].expand(-1, -1, H // K, -1, -1).reshape(B, H, -1, N)
        v = v[:, :, None].expand(-1, -1, H // K, -1, -1).reshape(B, H, -1, N)
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    # Gemma 2 squeezes scores into (-cap, cap) before the mask, so attention is written out.
    scores = cap * torch.tanh(q @ k.transpose(2, 3) * (scale / cap))  # (B, H, T, S)
    scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def causal_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys a query may see, by positions: queries (B, T), keys (1, S) -> (B, 1, T, S) bool.

        no window  1 0 0 0    window 2  1 0 0 0
                   1 1 0 0              1 1 0 0
                   1 1 1 0              0 1 1 0
                   1 1 1 1              0 0 1 1
    """
    distance = queries[:, None, :, None] - keys[:, None, None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def attend_causally(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale, cap) -> Tensor:
    """For rows that start at position 0, where queries and keys are the same tokens."""
    T = q.shape[2]
    mask = None  # plain causal attention needs no mask, and the fused kernels want none
    if cap is not None or (window is not None and T > window):
        positions = torch.arange(T, device=q.device)[None]
        mask = causal_mask(positions, positions, window)
    return softmax_attention(q, k, v, mask, scale, cap)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window, scale, cap) -> Tensor:
    """For rows laid end to end, q (1, H, sum of lengths, N). Each row sees only itself."""
    rows = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    return torch.cat([attend_causally(*row, window, scale, cap) for row in rows], 2)


def end_to_end(ids: Tensor, lengths: list[int], model: "Transformer") -> tuple:
    """Take the padding out of ids (B, T): the rows become one long row of their real tokens.

    Returns (ids (1, sum of lengths), their positions, an attention that keeps the rows apart, and a
    function that puts the padding back, as 0: hidden (1, sum of lengths, D) -> (B, T, D)).
    """
    B, T = ids.shape
    is_real = torch.arange(T) < torch.tensor(lengths)[:, None]  # (B, T)
    # nonzero() runs on the host. On a GPU it would make the host wait for all work before it.
    row, position = is_real.nonzero().to(ids.device, non_blocking=True).unbind(1)

    def attend_each(layer: int, q, k, v, scale, cap) -> Tensor:
        return model.attend_rows(q, k, v, lengths, model.config.window(layer), scale, cap)

    def put_back(hidden: Tensor) -> Tensor:
        padded = hidden.new_zeros(B, T, hidden.shape[-1])
        return padded.index_put((row, position), hidden[0])  # --shard (FSDP) allows no view

    return ids[row, position][None], position[None], attend_each, put_back


class Attention(nn.Module):
    """x (B, T, D) -> (B, T, D). `attend(layer, q, k, v, scale, cap)` decides who sees whom."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.config = layer, config
        D, N = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj, self.o_proj = Linear(D, H * N), Linear(H * N, D)
        self.k_proj, self.v_proj = Linear(D, K * N), Linear(D, K * N)
        if config.norms_qk:
            self.q_norm, self.k_norm = RMSNorm(N, config), RMSNorm(N, config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        q = self.q_proj(x).view(B, T, -1, c.head_dim).transpose(1, 2)  # (B, H, T, N)
        k = self.k_proj(x).view(B, T, -1, c.head_dim).transpose(1, 2)  # (B, K, T, N)
        v = self.v_proj(x).view(B, T, -1, c.head_dim).transpose(1, 2)  # (B, K, T, N)
        if c.norms_qk:
            q, k = self.q_norm(q), self.k_norm(k)
        # Position enters here and in the mask. (Turned together, q and k take half the kernels.)
        q, k = rotate(torch.cat((q, k), 1), *angles).split((q.shape[1], k.shape[1]), 1)
        scale = c.query_pre_attn_scalar**-0.5
        # In training a row's own tokens are attended to, in generation the KV cache.
        out = attend(self.layer, q, k, v, scale, c.attn_logit_softcapping)  # (B, H, T, N)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = Linear(D, inner), Linear(D, inner)
        self.down_proj, self.is_gemma = Linear(inner, D), config.is_gemma

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)  # (B, T, I)
        gate = F.gelu(gate, approximate="tanh") if self.is_gemma else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))  # (B, T, D)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        norm = lambda: RMSNorm(config.hidden_size, config)  # noqa: E731
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.norms_after = config.norms_after
        if config.norms_after:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), angles, attend)
        if not self.norms_after:  # Gemma 1 and Llama: a norm before each half
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)  # Gemma 2 and 3: before and after each half
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


# -------------------------------------------------------------------------------------- the model


class Transformer(nn.Module):
    """`model(ids, lengths) -> hidden` (B, T, D), after the final norm.

    Rows are padded on the right. With `lengths`, padding goes through no layer and comes out as 0.
    Without, the causal mask hides it from real tokens, and what comes out there means nothing.
    """

    # Three parts that can be replaced. Each default is right by itself.
    lookup = staticmethod(F.embedding)  # load_model sets one that adds to weight.grad in place
    attend_rows = staticmethod(attend_rows)  # for a kernel that takes all rows in one launch
    recompute: dict | None = None  # keywords of torch's checkpoint(): less memory, more time

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        V, D = config.vocab_size, config.hidden_size
        # nn.Embedding draws random weights unless it is given some. Even on the meta device that
        # would import PyTorch's compiler and cost 3 seconds at every start.
        embedding = nn.Embedding(V, D, _weight=torch.empty(V, D))
        layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        norm = RMSNorm(D, config)
        # Called "model" because the checkpoint's tensor names begin with "model.".
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "norm": norm})
        if not config.tied:
            self.lm_head = Linear(D, V)
        self.activation_dtype: torch.dtype | None = None  # None: that of the weights

    def forward(
        self, ids: Tensor, lengths: list[int] | None = None, positions: Tensor | None = None,
        attend: Callable | None = None,
    ) -> Tensor:  # fmt: skip
        """ids (B, T), with lengths[b] real tokens in row b -> hidden (B, T, D). Generation passes
        an `attend` that uses the KV cache, and the positions (B, 1) of new tokens."""
        c, dtype, put_back = self.config, self.product_dtype, None
        if lengths is not None:
            ids, positions, attend, put_back = end_to_end(ids, lengths, self)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        if attend is None:  # each row sees itself

            def attend(layer: int, q, k, v, scale, cap) -> Tensor:
                return attend_causally(q, k, v, c.window(layer), scale, cap)

        angles = {k: rotary(positions, c.head_dim, dtype, *c.rope[k]) for k in set(c.layer_types)}
        weight = self.model.embed_tokens.weight
        x = self.lookup(ids, weight).to(self.activation_dtype or weight.dtype)  # (B, T, D)
        if c.is_gemma:
            # The scale is rounded as x is: for gemma-2b sqrt(2048) = 45.2548, and 45.25 in
            # bfloat16. Under full fine-tuning x is float32 even with autocast: there it is 45.2548.
            x = x * torch.tensor(c.hidden_size**0.5, dtype=x.dtype).item()
        for block, kind in zip(self.model.layers, c.layer_types, strict=True):
            if self.recompute and torch.is_grad_enabled():
                # Backward computes this block again instead of reading what forward kept.
                x = checkpoint(block, x, angles[kind], attend, **self.recompute)
            else:
                x = block(x, angles[kind], attend)
        hidden = self.model.norm(x)
        return put_back(hidden) if put_back else hidden

    @property
    def vocabulary(self) -> Vocabulary:
        # Row v's product with a hidden state is token v's logit. Tied, it also embeds token v.
        weight = self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight
        return Vocabulary(weight, self.config.final_logit_softcapping)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V). Trap: for a training batch these are gigabytes; see logprob.py."""
        return self.vocabulary(hidden)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def product_dtype(self) -> torch.dtype:  # of matrix products now: autocast's, if it is on
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return self.activation_dtype or self.model.embed_tokens.weight.dtype
