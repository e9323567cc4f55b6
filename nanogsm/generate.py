"""Batched sampling with a KV cache, from prompts to marked answers.

Every row keeps its own length. Prompts start at slot 0 of the cache and each row writes its next
token at its own position. So there is no left padding, and positions are simple:

    slot      0   1   2   3   4   5   6   7
    row 0    p0  p1  p2  p3  r0  r1  .   .      its next token goes to slot 6
    row 1    p0  p1  r0  r1  r2  .   .   .      ... to slot 5; what lies beyond is masked

The idea in four lines; the rest of `generate` keeps many rows busy:

    run the prompt once; its keys and values fill the cache        (_prefill)
    repeat: choose a token from the last hidden state              (choose)
            if it ends the answer, stop
            run that one token; it attends to its row of the cache (KVCache.attend_next)

A row that finishes is given to the next waiting prompt, so a batch waits for a long answer only
when no prompts are left. Sampling has a temperature and nothing else: with top-k or top-p the
tokens would come from another distribution than the one whose log-probs PPO computes.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nanogsm import boxed, data, distributed
from nanogsm.data import Problem, Prompt, Tokenizer
from nanogsm.fast import cpu, cuda  # on other devices their functions do the plain thing
from nanogsm.transformer import Config, Transformer, attend_causally, causal_mask, softmax_attention

# Tokens of prompts, padding included, that go through the model at once.
PREFILL_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 2048}
# How many tokens are decoded before the host looks at them: looking makes it wait for a GPU.
STEPS_PER_LOOK = {"cpu": 1, "cuda": 8, "mps": 8}
# How many rows attend together, over the slots that the longest of them has filled. On a CPU
# smaller groups read fewer slots. A GPU wants one large kernel.
ROWS_PER_GROUP = {"cpu": 32, "cuda": 2**20, "mps": 2**20}
# The share of idle rows at which the batch shrinks. A GPU records each size anew (fast/cuda.py).
SHRINK_AT = {"cpu": 1 / 8, "cuda": 1 / 2, "mps": 1 / 8}


class KVCache:
    """Keys and values of all layers, (L, B, K, S, N). A row's token at position p lies in slot p.

    Its two `attend_...` methods return what Transformer.forward calls in every layer: a function
    that stores the new keys and values and attends to all that the row has so far.
    """

    def __init__(self, config: Config, rows: int, slots: int, dtype, device):
        K, N = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, rows, K, slots, N)
        self.config = config
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.rows = torch.arange(rows, device=device)[:, None]

    def attend_prompts(self, rows: list[int]) -> Callable:
        """For whole prompts (n, T), which start at slot 0 of these rows."""
        rows = torch.tensor(rows, device=self.k.device)

        def attend_and_store(layer: int, q, k, v, scale, cap) -> Tensor:
            T = k.shape[2]
            # Padding writes into slots, too. The answer overwrites them, or a mask hides them.
            self.k[layer][rows, :, :T] = k.to(self.k.dtype)  # (n, K, T, N)
            self.v[layer][rows, :, :T] = v.to(self.v.dtype)
            return attend_causally(q, k, v, self.config.window(layer), scale, cap)

        return attend_and_store

    def attend_next(self, positions: Tensor, used: list[int]) -> Callable:
        """For one new token per row, at positions (B, 1). `used` has, for each of several equal
        groups of rows, how many slots any of its rows has filled: attention looks no further."""
        rows = self.rows[: len(positions)]
        slots = torch.arange(max(used), device=positions.device)[None]
        windows = {self.config.window(layer) for layer in range(self.config.num_hidden_layers)}
        # One mask for each kind of layer, (B, 1, 1, S). It also hides what earlier answers left.
        masks = {window: causal_mask(positions, slots, window) for window in windows}
        if self.config.attn_logit_softcapping is None:
            masks = {w: cuda.added_to_scores(mask, self.k.dtype) for w, mask in masks.items()}
        size = math.ceil(len(positions) / len(used))

        def attend_and_store(layer: int, q, k, v, scale, cap) -> Tensor:
            self.k[layer][rows, :, positions] = k.transpose(1, 2).to(self.k.dtype)  # (B, 1, K, N)
            self.v[layer][rows, :, positions] = v.transpose(1, 2).to(self.v.dtype)
            mask = masks[self.config.window(layer)]
            parts = (x.split(size) for x in (q, self.k[layer], self.v[layer], mask))
            groups = [
                softmax_attention(q, k[:, :, :n], v[:, :, :n], mask[..., :n], scale, cap)
                for n, q, k, v, mask in zip(used, *parts, strict=True)
            ]
            return torch.cat(groups) if len(groups) > 1 else groups[0]

        return attend_and_store

    def keep(self, rows: list[int]) -> None:
        """Keep these rows only, in this order: row i becomes what rows[i] was."""
        # Only rows that change places are copied. No memory is given back.
        new = [i for i, row in enumerate(rows) if row != i]
        old = [rows[i] for i in new]
        for x in (self.k, self.v):
            x[:, new] = x[:, old]
        self.k, self.v = self.k[:, : len(rows)], self.v[:, : len(rows)]


# --------------------------------------------------------------------------------- choosing a token


def choose(model: Transformer, hidden: Tensor, temperature: float, uniform: Tensor | None):
    """The next token of each row (b,): the likeliest, or, given uniform numbers (b,), a sampled
    one. hidden (b, D). On a CPU, fast/cpu.py makes the same choice faster."""
    logits = model.logits(hidden)  # (b, V)
    return logits.argmax(-1) if uniform is None else inverse_cdf(logits, temperature, uniform)


def inverse_cdf(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """The token (b,) at which the cumulative probability passes uniform (b,); logits (b, V)."""
    probability = (logits.float() / temperature).softmax(-1)
    # Trap: summed in float32, the tail of 256,000 small probabilities would be rounded away.
    if logits.device.type != "mps":  # which has no float64
        probability = probability.double()
    cdf = probability.cumsum(-1)
    wanted = uniform.to(cdf.dtype)[:, None] * cdf[:, -1:]  # the sum is 1 only up to rounding
    return torch.searchsorted(cdf, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


# --------------------------------------------------------------------------------------- generation


class Completion(NamedTuple):
    ids: list[int]  # the generated tokens, with the stop token if one came
    truncated: bool  # whether max_new_tokens came first


@torch.no_grad()
def generate(
    model: Transformer, prompts: list[list[int]], stop_ids: frozenset[int], max_new_tokens: int,
    batch_size: int = 64, temperature: float = 0.0, seed: int = 0,
    is_over: Callable[[list[int]], bool] = lambda ids: False,
    progress: Callable[[int, int], None] = lambda finished, tokens: None,
) -> list[Completion]:  # fmt: skip
    """Complete every prompt (a list of ids), in the order given. Temperature 0 is greedy.

    A row ends at a stop id, at max_new_tokens, or where is_over(its new ids) says so, which does
    not count as truncated. progress(finished requests, tokens so far) is called on the way; what it
    raises ends the sampling. On many devices each completes a share, and all get everything.
    """
    device, n = model.device, len(prompts)
    # Longest first, so that prompts of similar length go through the model together.
    mine = [*distributed.deal(sorted(range(n), key=lambda i: -len(prompts[i])))]
    batch = min(batch_size, len(mine))
    slots = max(map(len, prompts), default=0) + max_new_tokens
    cache = KVCache(model.config, batch, slots, model.product_dtype, device)
    if temperature:
        # Token i of request r has its own number, uniform[r, i], whichever row it is decoded in. So
        # a completion does not depend on the other requests in its batch, rounding apart.
        uniform = torch.rand(n, max_new_tokens, generator=torch.Generator().manual_seed(seed))
        uniform = uniform.to(device)

    waiting = deque(mine)
    request = [-1] * batch  # which prompt each row is working on; -1: idle
    token = torch.zeros(batch, dtype=torch.long, device=device)  # the newest, not yet in the cache
    position = torch.zeros(batch, dtype=torch.long, device=device)  # the slot it will go to
    new: list[list[int]] = [[] for _ in prompts]
    done: dict[int, Completion] = {}

    def uniform_numbers(rows: list[int], count: int) -> list[Tensor] | list[None]:
        # For the next `count` tokens of these rows, (b,) each.
        if not temperature:
            return [None] * count
        requests = torch.tensor([request[row] for row in rows])  # an idle row's -1 reads any number
        first = torch.tensor([len(new[r]) for r in requests])
        columns = (first[:, None] + torch.arange(count)).clamp(max=max_new_tokens - 1)
        return list(uniform[requests[:, None].to(device), columns.to(device)].T)

    def accept(row: int, ids: list[int]) -> None:
        # Append a row's newest ids to its answer, and free the row if the answer has ended.
        r = request[row]
        if r < 0:
            return
        for i in ids:
            new[r].append(i)
            over = i in stop_ids or is_over(new[r])
            if over or len(new[r]) == max_new_tokens:
                done[r] = Completion(new[r], truncated=not over)
                request[row] = -1
                break  # tokens decoded since the last look may lie beyond the end

    def decode(used: list[int], u: Tensor | None) -> None:
        # One token for each row, in place: a GPU repeats this as one recording (fast/cuda.py).
        attention = cache.attend_next(position[:, None], used)
        hidden = model(token[:, None], positions=position[:, None], attend=attention)
        token.copy_(choose_token(model, hidden[:, 0], temperature, u))
        position.add_(1).clamp_(max=slots - 1)  # idle rows run on, but not out

    with cuda.recorded(model, cpu.packed(model, choose)) as (choose_token, run):
        # Plainly: choose_token is choose, and run(decode, rows, used, u) is decode(used, u).
        while len(done) < len(mine):
            idle = [row for row, r in enumerate(request) if r < 0]
            if idle and waiting:  # prefill: run whole prompts into the idle rows
                rows = idle[: len(waiting)]
                for row in rows:
                    request[row] = waiting.popleft()
                asked = [prompts[request[row]] for row in rows]
                hidden = _prefill(model, cache, rows, asked)
                first = uniform_numbers(rows, 1)[0]
                token[rows] = choose_token(model, hidden, temperature, first)
                position[rows] = torch.tensor([len(p) for p in asked], device=device)
                for row, i in zip(rows, token[rows].tolist()):
                    accept(row, [i])
                continue  # answers that ended with their first token have freed their rows again
            if not waiting and len(idle) >= len(request) * SHRINK_AT[device.type]:
                # No prompt is left and many rows are idle: the last busy rows move into the gaps,
                # and the batch shrinks.
                busy = [row for row, r in enumerate(request) if r >= 0]
                behind = [row for row in busy if row >= len(busy)]
                keep = [row if request[row] >= 0 else behind.pop() for row in range(len(busy))]
                cache.keep(keep)
                token[: len(keep)], position[: len(keep)] = token[keep], position[keep]
                token, position = token[: len(keep)], position[: len(keep)]
                request = [request[row] for row in keep]

            # Decode one token per row, or several before the host looks at them.
            decoded = []
            groups = math.ceil(len(request) / ROWS_PER_GROUP[device.type])
            size = math.ceil(len(request) / groups)
            filled = [len(prompts[r]) + len(new[r]) if r >= 0 else 1 for r in request]  # 1: idle
            used = [max(filled[i : i + size]) for i in range(0, len(filled), size)]
            numbers = uniform_numbers(list(range(len(request))), STEPS_PER_LOOK[device.type])
            for ahead, u in enumerate(numbers):
                upto = [cuda.slots_read(n + ahead, slots, device) for n in used]
                run(decode, len(request), upto, u)
                decoded.append(token.clone())
            for row, ids in enumerate(torch.stack(decoded, dim=1).tolist()):
                accept(row, ids)
            progress(len(done), sum(map(len, new)))
    done = {r: c for share in distributed.gathered([*done.items()]) for r, c in share}
    return [Completion(*done[r]) for r in range(n)]


def _prefill(model: Transformer, cache: KVCache, rows: list[int], prompts: list) -> Tensor:
    """Run whole prompts into their rows of the cache. Returns the hidden states of their last
    tokens, (b, D), which predict the answers' first tokens."""
    last = []
    while rows:
        # Few at a time: small activations.
        n = max(1, PREFILL_TOKENS[model.device.type] // max(map(len, prompts)))
        group, here, prompts, rows = prompts[:n], rows[:n], prompts[n:], rows[n:]
        T = max(map(len, group))
        ids = torch.tensor([p + [0] * (T - len(p)) for p in group], device=model.device)  # any pad
        hidden = model(ids, attend=cache.attend_prompts(here))  # (n, T, D)
        ends = torch.tensor([len(p) - 1 for p in group], device=model.device)
        last.append(hidden[torch.arange(len(group), device=model.device), ends])
    return torch.cat(last)


# ---------------------------------------------------------------------------- questions and answers


class Answer(NamedTuple):
    prompt: list[int]
    ids: list[int]  # what was generated
    truncated: bool
    text: str  # of the ids, without special tokens


def answer(
    model: Transformer, tokenizer: Tokenizer, questions: list[str], prompt: Prompt,
    max_new_tokens: int, batch_size: int = 64, temperature: float = 0.0, seed: int = 0,
    progress: Callable[[int, int], None] = lambda finished, tokens: None,
) -> list[Answer]:  # fmt: skip
    """`generate` from question to text. An answer also ends where it begins a new question."""
    prompts = [data.encode(tokenizer, prompt, question)[0] for question in questions]
    is_over = lambda ids: data.starts_new_question(tokenizer, ids)  # noqa: E731
    completions = generate(
        model, prompts, tokenizer.stop_ids, max_new_tokens, batch_size, temperature, seed,
        is_over=is_over, progress=progress,
    )  # fmt: skip
    return [Answer(p, *done, tokenizer.decode(done.ids)) for p, done in zip(prompts, completions)]


def answer_and_mark(
    model: Transformer, tokenizer: Tokenizer, problems: list[Problem], prompt: Prompt,
    max_new_tokens: int, batch_size: int = 64, temperature: float = 0.0, samples: int = 1,
    seed: int = 0, progress: Callable[[int, int], None] = lambda finished, tokens: None,
) -> list[dict]:  # fmt: skip
    """Answer every problem `samples` times. Returns one row per completion, ordered by problem,
    with what is needed to count, compare and reread it."""
    asked = [problem for problem in problems for _ in range(samples)]
    answers = answer(
        model, tokenizer, [problem.question for problem in asked], prompt, max_new_tokens,
        batch_size, temperature, seed, progress,
    )  # fmt: skip
    golds = [data.extract_answer(p.answer, p.boxed) for p in asked]  # None if unscored
    return [
        {
            "index": problem.index,
            "question": problem.question,
            "correct": None if gold is None else data.is_correct(done.text, problem),
            **data.beside(done.text, problem),
            "answer": data.extract_answer(data.cut(done.text), problem.boxed),
            "gold": gold,
            "truncated": done.truncated,
            "tokens": len(done.ids),
            "completion": done.text,
        }
        for problem, done, gold in zip(asked, answers, golds)
    ]


def validation_metrics(rows: list[dict]) -> dict:
    """What a validation logs of its rows: the shares that are right and that were cut off."""
    unscored = any(row["gold"] is None for row in rows)
    right = {} if unscored else {"val_exact_match": sum(row["correct"] for row in rows) / len(rows)}
    truncated = {"val_truncated": sum(row["truncated"] for row in rows) / len(rows)}
    return right | truncated | boxed.shares(rows, "val_")
