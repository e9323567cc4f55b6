"""Batched sampling with a KV cache, and exact match on a list of problems.

Every row keeps its own length. Prompts start at slot 0 of the cache and each row writes its next
token at its own position, so there is no left padding and positions are plain:

    slot      0   1   2   3   4   5   6   7
    row 0    p0  p1  p2  p3  r0  r1  .   .      the next token goes to 6
    row 1    p0  p1  r0  r1  r2  .   .   .      ... to 5; what lies beyond is masked

A row that finishes gives its place to the next waiting prompt, so a batch never waits for its
longest answer. Sampling is by temperature only: with top-k or top-p, PPO could not say how probable
the sampled token was. Token i of request n is drawn with a uniform number fixed beforehand for
(n, i), so that a completion does not depend on which others share the batch (rounding apart).
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from nanogsm.data import (
    Problem,
    Prompt,
    Tokenizer,
    cut,
    encode,
    extract_answer,
    is_correct,
    is_correct_flexible,
    starts_new_question,
)
from nanogsm.model import Gemma, KVCache

# Decode steps between two looks at the new tokens: looking makes the host wait for a GPU.
LOOK_EVERY = {"cpu": 1, "cuda": 8, "mps": 8}
PREFILL = 2048  # tokens of prompts, padding included, that go through the model at once
# Rows that attend together, over the slots that the longest of them has used. A GPU wants one large kernel.
TOGETHER = {"cpu": 32, "cuda": 2**20, "mps": 2**20}


class Completion(NamedTuple):
    ids: list[int]  # generated tokens, with the stop token if one came
    truncated: bool  # max_new_tokens came first


@torch.no_grad()
def generate(
    model: Gemma,
    prompts: list[list[int]],
    stop_ids: frozenset[int],
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    is_over: Callable[[list[int]], bool] = lambda ids: False,
    progress: Callable[[int, int], None] = lambda finished, tokens: None,
) -> list[Completion]:
    """Complete every prompt (a list of ids), temperature 0 being greedy; in the order given.

    A row ends at a stop id, at max_new_tokens, or where is_over(its new ids) says so, which is not
    a truncation. progress is told how many requests are finished and how many tokens have been made.
    """
    device, n = model.device, len(prompts)
    batch = min(batch_size, n)
    room = max(map(len, prompts), default=0) + max_new_tokens
    cache = KVCache(model.config, batch, room, model.product_dtype, device)
    if temperature:
        uniform = torch.rand(n, max_new_tokens, generator=torch.Generator().manual_seed(seed))
        uniform = uniform.to(device)  # row n, column i: of request n's token i

    # The longest first, so that like lengths are prefilled together.
    waiting = deque(sorted(range(n), key=lambda i: -len(prompts[i])))
    request = [-1] * batch  # which prompt a place is working on; -1: none
    token = torch.zeros(batch, dtype=torch.long, device=device)  # the newest, not yet in the cache
    position = torch.zeros(batch, dtype=torch.long, device=device)  # ... and where it will go
    new: list[list[int]] = [[] for _ in prompts]
    done: dict[int, Completion] = {}

    def numbers(places: list[int], count: int) -> list[Tensor] | list[None]:
        """The uniform numbers of the next `count` tokens of these places, (b,) each."""
        if not temperature:
            return [None] * count
        rows = torch.tensor([request[s] for s in places])  # -1, idle: the last request's, to no purpose
        first = torch.tensor([len(new[r]) for r in rows])
        columns = (first[:, None] + torch.arange(count)).clamp(max=max_new_tokens - 1)
        return list(uniform[rows[:, None].to(device), columns.to(device)].T)

    def draw(hidden: Tensor, u: Tensor | None) -> Tensor:
        blocks = model.logit_blocks(hidden)  # (b, width) each
        return most_likely(blocks) if u is None else inverse_cdf(list(blocks), temperature, u)

    def take_in(place: int, ids: list[int]) -> None:
        """A place's newest ids; it is freed if its request is over."""
        r = request[place]
        if r < 0:
            return
        for i in ids:
            new[r].append(i)
            over = i in stop_ids or is_over(new[r])
            if over or len(new[r]) == max_new_tokens:
                done[r] = Completion(new[r], truncated=not over)
                request[place] = -1
                break  # steps since the last look may have run past the end

    with model.packed():
        while len(done) < n:
            free = [s for s in range(len(request)) if request[s] < 0]
            if free and waiting:
                places = free[: len(waiting)]
                for s in places:
                    request[s] = waiting.popleft()
                lengths = [len(prompts[request[s]]) for s in places]
                hidden = _prefill(model, cache, places, [prompts[request[s]] for s in places])
                token[places] = draw(hidden, numbers(places, 1)[0])
                position[places] = torch.tensor(lengths, device=device)
                for s, i in zip(places, token[places].tolist()):
                    take_in(s, [i])
                continue  # an answer of one token has freed its place already
            if not waiting and len(free) >= len(request) / 8:  # the tail: the last rows fill the gaps
                busy = [s for s in range(len(request)) if request[s] >= 0]
                behind = [s for s in busy if s >= len(busy)]
                keep = [s if request[s] >= 0 else behind.pop() for s in range(len(busy))]
                cache.keep(keep)
                token, position, request = token[keep], position[keep], [request[s] for s in keep]

            drawn = []
            # Groups as equal as can be, of at most TOGETHER rows: attend_cached divides in the same way.
            size = math.ceil(len(request) / math.ceil(len(request) / TOGETHER[device.type]))
            used = [len(prompts[r]) + len(new[r]) if r >= 0 else 1 for r in request]  # 1: idle, not looked at
            used = [max(used[i : i + size]) for i in range(0, len(used), size)]
            for ahead, u in enumerate(numbers(list(range(len(request))), LOOK_EVERY[device.type])):
                cache.used = [min(slots + ahead, room) for slots in used]
                hidden = model(token[:, None], positions=position[:, None], cache=cache)  # (b, 1, D)
                token = draw(hidden[:, 0], u)
                position = (position + 1).clamp(max=room - 1)  # idle places run on, but not out
                drawn.append(token)
            for s, ids in enumerate(torch.stack(drawn, dim=1).tolist()):
                take_in(s, ids)
            progress(len(done), sum(map(len, new)))
    return [done[i] for i in range(n)]


def _prefill(model: Gemma, cache: KVCache, places: list[int], prompts: list[list[int]]) -> Tensor:
    """Run whole prompts, alike lengths side by side, into their places in the cache, PREFILL tokens at
    a time (less padding, and bounded activations); the last tokens' hidden states (b, D)."""
    last = []
    while places:
        n = max(1, PREFILL // max(map(len, prompts)))
        group, rows, places, prompts = prompts[:n], places[:n], places[n:], prompts[n:]
        T = max(map(len, group))
        ids = torch.tensor([p + [0] * (T - len(p)) for p in group], device=model.device)  # any id will do
        own = KVCache(model.config, len(group), T, cache.k.dtype, model.device)
        own.used = [T]
        hidden = model(ids, cache=own)  # (n, T, D)
        cache.k[:, rows, :, :T], cache.v[:, rows, :, :T] = own.k, own.v
        ends = torch.tensor([len(p) - 1 for p in group], device=model.device)
        last.append(hidden[torch.arange(len(group), device=model.device), ends])
    return torch.cat(last)


def most_likely(blocks: Iterable[Tensor]) -> Tensor:
    """The token (b,) with the largest logit, the first of several."""
    start = 0  # of the block, in the vocabulary
    for z in blocks:
        if start == 0:
            top, token = z.max(-1)  # on a CPU four times as fast as argmax, for bfloat16
        else:
            largest = z.amax(-1)  # and this five times as fast as that: where it lies is asked only of
            better = (largest > top).nonzero()[:, 0]  # the rows that have not had a larger one
            token[better] = z[better].max(-1).indices + start
            top[better] = largest[better]
        start += z.shape[-1]
    return token


def inverse_cdf(blocks: list[Tensor], temperature: float, uniform: Tensor) -> Tensor:
    """The token (b,) at which the cumulative probability passes uniform (b,). The logits come in blocks of
    the vocabulary (b, width): first the block is looked for, by the blocks' sums, and then the token in it.
    If there are several, nothing but the logits is ever held for all of the vocabulary."""

    def exponentials(z: Tensor, top: Tensor) -> Tensor:
        return (z.float() / temperature).sub_(top[:, None]).exp_()

    tops = torch.stack([z.amax(-1).float() / temperature for z in blocks])  # (number of blocks, b)
    tops = tops.clamp(min=torch.finfo(torch.float32).min)  # a block may be impossible, all -inf
    sums = torch.stack([exponentials(z, top).sum(-1) for z, top in zip(blocks, tops)])
    block, rest = _where_it_passes((sums * (tops - tops.amax(0)).exp()).T.contiguous(), uniform)
    width, z = blocks[0].shape[-1], blocks[0]
    if len(blocks) > 1:
        z = torch.full_like(z, -math.inf)  # the last block may be narrower
        for k, other in enumerate(blocks):
            rows = (block == k).nonzero()[:, 0]
            z[rows, : other.shape[-1]] = other[rows]
    token, _ = _where_it_passes(exponentials(z, tops.gather(0, block[None])[0]), rest)
    return (block * width + token).clamp(max=sum(z.shape[-1] for z in blocks) - 1)  # even if all are NaN


def _where_it_passes(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where the sum of weights (b, n) from the left passes uniform (b,) of the whole, and how far into
    that entry it does, in [0, 1)."""
    if weights.device.type != "mps":  # MPS has no float64. Summed in float32, the tail of 256,000
        weights = weights.double()  # small probabilities would be rounded away
    cdf = weights.cumsum(-1)
    wanted = uniform.to(cdf.dtype)[:, None] * cdf[:, -1:]
    at = torch.searchsorted(cdf, wanted, right=True).clamp(max=weights.shape[-1] - 1)
    into = 1 - (cdf.gather(-1, at) - wanted) / weights.gather(-1, at)
    return at[:, 0], into[:, 0].clamp(0, 1 - torch.finfo(cdf.dtype).eps)


# ------------------------------------------------------------------------- questions and answers


class Answer(NamedTuple):
    prompt: list[int]
    ids: list[int]  # what was generated
    truncated: bool
    text: str  # of the ids, special tokens left out


def answer(
    model: Gemma,
    tokenizer: Tokenizer,
    questions: list[str],
    prompt: Prompt,
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda finished, tokens: None,
) -> list[Answer]:
    """`generate` from question to text; an answer also ends where it asks itself a new question."""
    prompts = [encode(tokenizer, prompt, question)[0] for question in questions]
    is_over = lambda ids: starts_new_question(tokenizer, ids)  # noqa: E731
    completions = generate(model, prompts, tokenizer.stop_ids, max_new_tokens, batch_size, temperature,
                           seed, is_over=is_over, progress=progress)  # fmt: skip
    return [Answer(ids, *done, tokenizer.decode(done.ids)) for ids, done in zip(prompts, completions)]


def answer_and_mark(
    model: Gemma,
    tokenizer: Tokenizer,
    problems: list[Problem],
    prompt: Prompt,
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda finished, tokens: None,
) -> list[dict]:
    """Answer every problem `samples` times; one row a completion, ordered by problem, with what is
    needed to count, compare and reread it."""
    asked = [problem for problem in problems for _ in range(samples)]
    answers = answer(model, tokenizer, [problem.question for problem in asked], prompt, max_new_tokens,
                     batch_size, temperature, seed, progress)  # fmt: skip
    return [
        {
            "index": problem.index,
            "question": problem.question,
            "correct": is_correct(done.text, problem),
            "flexible": is_correct_flexible(done.text, problem),
            "answer": extract_answer(cut(done.text)),
            "gold": extract_answer(problem.answer),
            "truncated": done.truncated,
            "tokens": len(done.ids),
            "completion": done.text,
        }
        for problem, done in zip(asked, answers)
    ]
