"""PPO with a critic and GAE for a language model (Schulman et al. 2017, arXiv 1707.06347).

    python train_ppo.py --tiny                       # from runs/tiny/sft-full-main, minutes anywhere
    python train_ppo.py                              # from runs/sft-full-main -> runs/ppo-full-main
    python train_ppo.py --lora --recipe tuned        # adapters on one frozen base; the critic shares them
    python train_ppo.py --init PATH --dry-run        # parameters, memory, steps; loads no weights

A step: the model answers problems by sampling (rollout); every answer is right or wrong (reward);
a critic guesses from each prefix how it will end, and where things went better than guessed, the
tokens just chosen are made likelier (advantage); a KL penalty keeps the model near where it began.

The alignment, drawn once. Tensors about actions have T - 1 columns; column t is about the choice of
token t + 1, made by hidden state t, which has seen tokens 0 to t:

    token       0    1    2    3    4    5    6    7
    ids         p0   p1   p2   r0   r1   r2  eos   .       prompt, response, padding
    column           0    1    2    3    4    5    6
    action           p1   p2   r0   r1   r2  eos   .
    mask             0    0    1    1    1    1    0       what was sampled: the actions
    logp[t]                    log p(token t + 1 | tokens 0 .. t)
    value[t]                   the critic's guess from the same tokens 0 .. t, before the action
    reward[t]                  minus KL at each action; the answer's score at the last, column 5
"""

import argparse
import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanogsm import UserError, data, generate, lora
from nanogsm.fast.checkpointing import CHECKPOINTING
from nanogsm.logprob import token_logprobs
from nanogsm.model import (
    frozen_copy,
    load_model,
    read_config,
    save_adapter,
    save_model,
    set_checkpointing,
    twin,
)
from nanogsm.optim import AdamW
from nanogsm.run import console, plan
from nanogsm.run import folder as runs
from nanogsm.store import files, hub
from nanogsm.transformer import Transformer

# What a recipe sets when the flag is not given. "report" is that of the study behind this
# project, with what it leaves open assumed as said in the README; "tuned" is ours.
RECIPES = {
    "report": {
        "lr": {"full": 5e-7, "lora": 5e-7}, "value_lr": 5e-7, "critic": "shared", "critic_warmup": 0,
        "steps": 100, "rollouts": 512, "rollout_batch": 32,
        "micro_batch": 2, "accumulation": 8, "epochs": 2,
        "gamma": 0.99, "lam": 0.95, "kl_coef": 0.05, "value_coef": 0.1, "entropy_coef": 0.01,
        "clip": 0.2, "value_clip": 0.2,
    },
    "tuned": {
        "lr": {"full": 1e-6, "lora": 2e-5}, "value_lr": 1e-4, "critic": "shared", "critic_warmup": 0,
        "steps": 100, "rollouts": 512, "rollout_batch": 64,
        "micro_batch": 8, "accumulation": 16, "epochs": 1,
        "gamma": 1.0, "lam": 1.0, "kl_coef": 0.001, "value_coef": 1.0, "entropy_coef": 0.0,
        "clip": 0.2, "value_clip": 0.5,
    },
}  # fmt: skip
# The embedded model: rates 20 to 150 times higher, as it is so small, and fewer steps; tuned: twice
# the answers an update, ten times the KL penalty.
FEWER = {"steps": 20, "rollout_batch": 256}
TINY_RECIPES = {
    "report": RECIPES["report"] | FEWER | {
        "lr": {"full": 5e-5, "lora": 5e-5}, "value_lr": 5e-5, "micro_batch": 16, "accumulation": 1,
    },
    "tuned": RECIPES["tuned"] | FEWER | {
        "lr": {"full": 1.5e-4, "lora": 1e-3}, "value_lr": 2e-3,
        "micro_batch": 64, "accumulation": 4, "kl_coef": 0.01,
    },
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = console.Parser("PPO with a critic on GSM8K. With --tiny this page shows the values for it.")
    shown = TINY_RECIPES if "--tiny" in (sys.argv if argv is None else argv) else RECIPES

    def add(flag: str, kind: type, text: str, **kw) -> None:
        """A flag whose value comes from the recipe; its help says which."""
        name = flag.strip("-").replace("-", "_")
        values = [str(recipe[name]).strip("{}").replace("'", "") for recipe in shown.values()]
        said = values[0] if values[0] == values[1] else f"report {values[0]}; tuned {values[1]}"
        p.add_argument(flag, type=kind, help=f"{text} ({said})", **kw)

    p.add_argument("--recipe", choices=RECIPES, default="report", help="where unset values come from")
    # model and adapters
    console.add_tiny_flag(p)
    p.add_argument("--init", help="run or model to start from (runs/sft-full-main; runs/tiny/...)")
    p.add_argument("--lora", action="store_true", help="train adapters on a frozen base")
    p.add_argument("--lora-r", type=int, default=16, help="rank of the adapters, a separate critic's too")
    p.add_argument("--lora-alpha", type=float, default=32.0, help="their change is scaled by alpha/r")
    add("--critic", str, "the actor's trunk, or adapters of its own", choices=("shared", "separate"))
    # data
    p.add_argument("--data", default="main", help="main, socratic or a .jsonl file of your own")
    console.add_data_dir_flag(p)
    p.add_argument("--max-new-tokens", type=int, help="longest answer (320; socratic 512; tiny 128, its "
                   "socratic 160)")  # fmt: skip
    # rollouts
    add("--steps", int, "rollouts with their updates")
    add("--rollouts", int, "answers sampled a step")
    add("--rollout-batch", int, "of them at once: more take more memory")
    p.add_argument("--temperature", type=float, default=1.0, help="of the sampling")
    # advantages
    add("--kl-coef", float, "reward lost per nat of KL from the start")
    add("--gamma", float, "discount per token")
    add("--lam", float, "GAE's lambda")
    # updates
    add("--epochs", int, "passes over a rollout")
    add("--micro-batch", int, "answers at once")
    add("--accumulation", int, "micro-batches an update: their product counts, the split is memory only")
    add("--lr", float, "of the actor, constant")
    add("--value-lr", float, "of the value head and a separate critic")
    add("--value-coef", float, "weight of the value loss in a shared trunk (a critic of its own: Adam "
        "undoes a factor)")  # fmt: skip
    add("--entropy-coef", float, "weight of the entropy bonus")
    add("--clip", float, "of the probability ratio")
    add("--value-clip", float, "of the value's change")
    add("--critic-warmup", int, "first steps that train the critic alone")
    p.add_argument("--clip-grad", type=float, default=1.0, help="limit of the gradient's norm")
    p.add_argument("--optim", choices=("adamw8bit", "adamw"), default="adamw8bit",
                   help="moments in 8 or 32 bits")  # fmt: skip
    p.add_argument("--checkpointing", choices=CHECKPOINTING, help="what backward computes again: nothing, what "
                   "is cheap, or all; more of it takes less memory (light; tiny none)")  # fmt: skip
    # validation, on the slice of train that SFT held out
    p.add_argument("--val-examples", type=int, help="problems held out (as by --init, else as in SFT)")
    p.add_argument("--val-every", type=int, default=10, help="steps between validations; 0: at the end")
    # the run
    p.add_argument("--seed", type=int, default=0, help="of problems, sampling and adapters (0)")
    p.add_argument("--out", help="run folder (default runs/ppo-{full,lora}-{data}; runs/tiny/ppo-...)")
    p.add_argument("--save-every", type=int, default=5, help="steps between checkpoints")
    p.add_argument("--overwrite", action="store_true", help="start anew in a folder that has a run")
    console.add_wandb_flag(p)
    p.add_argument("--dry-run", action="store_true", help="print the plan, load no weights")
    console.add_compute_flags(p)
    args = p.parse_args(argv)
    fill_in(args)
    check_args(args)
    return args


def fill_in(args: argparse.Namespace) -> None:
    """What was not given, from the recipe, the run to start from and the machine."""
    args.init = args.init and os.path.expanduser(args.init)
    args.tiny = args.tiny or bool(args.init and runs.is_tiny(args.init))
    method = "lora" if args.lora else "full"
    for name, value in (TINY_RECIPES if args.tiny else RECIPES)[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value[method] if isinstance(value, dict) else value)
    folder = "runs/tiny" if args.tiny else "runs"
    args.init = f"{folder}/sft-full-main" if args.init is None else args.init
    args.out = args.out or f"{folder}/ppo-{method}-{Path(args.data).stem}"
    args.checkpointing = args.checkpointing or ("none" if args.tiny else "light")
    args.data, args.precision = console.for_tiny(args)
    if args.max_new_tokens is None:
        args.max_new_tokens = runs.answer_limit_of(args.init, args.data)
    args.device, args.precision = console.pick_compute(args.device, args.precision)
    if args.val_examples is None:  # of what is no run it stays None until main has counted the problems
        args.val_examples = runs.held_out_by(args.init, args.data)


def check_args(args: argparse.Namespace) -> None:
    at_least = {"lora_r": 1, "max_new_tokens": 1, "steps": 1, "rollouts": 1, "rollout_batch": 1,
                "epochs": 1, "micro_batch": 1, "accumulation": 1, "critic_warmup": 0,
                "val_examples": 0, "val_every": 0, "save_every": 1, "seed": 0,
                "kl_coef": 0, "value_coef": 0, "entropy_coef": 0}  # fmt: skip
    positive = ("lr", "value_lr", "clip", "value_clip", "clip_grad", "lora_alpha")
    console.check_numbers(args, at_least, positive)
    if not 0.01 <= args.temperature <= 100:
        raise UserError(f"--temperature is {args.temperature}: give 1, or at least 0.01")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} is {getattr(args, name):g}: give a number from 0 to 1")


# ------------------------------------------------------------------------------------- the reward


def reward(completion: str, problem: data.Problem) -> float:
    """1 for the right number after "####", else 0. Any function of the two may stand here; an
    answer that does not end within --max-new-tokens gets 0 without being asked about."""
    return float(data.is_correct(completion, problem))


# --------------------------------------------------------------------------------------- the math
#
# All tensors are (B, T - 1) float32 as drawn above, `mask` bool.


def masked_mean(x: Tensor, mask: Tensor, count: int | Tensor | None = None) -> Tensor:
    """Mean of x where mask is 1. `count` is given when these are some of an update's rows: the
    number of actions of all of them, so that the parts' means add up to the mean of the whole."""
    return torch.where(mask, x, 0.0).sum() / (mask.sum() if count is None else count)


def token_rewards(score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef (log p_t - log p_ref,t), plus the answer's score (B,) at the last action.

    Summed over an answer, log p - log p_ref is k1, an unbiased estimate of its KL divergence from
    the reference (Ziegler et al. 2019, arXiv 1909.08593). In the reward, not the loss: a number that
    is not differentiated, so that GAE credits a token also with the KL of those it leads to. (In
    the loss k1's gradient would be 0 on the mean: it says nothing about the KL.)
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1).amax(1, keepdim=True)
    rewards = torch.where(mask, -kl_coef * (logp - ref_logp), 0.0)
    return rewards + torch.where(columns == last, score[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), 0 outside the mask (Schulman et al. 2015, arXiv 1506.02438):

        delta_t = r_t + gamma V_{t+1} - V_t        V after the last action is 0, cut off or not
        A_t     = delta_t + gamma lambda A_{t+1}
        R_t     = A_t + V_t                        what the critic is to learn

    lambda trades the critic's errors (0) for the rewards' noise (1). Trap: gamma below 1 punishes
    length; with 0.99 an answer of 140 tokens is worth a quarter of its reward at its start.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = next_advantage = torch.where(mask[:, t], advantage, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the mask: the step size then does not depend on how the rewards
    are scaled. Over all of a rollout's actions at once: a micro-batch's own mean would be noise.
    Trap: where all answers are worth the same, what is blown up to variance 1 is noise."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(loss, whether it is the clipped one) of each action:

        ratio = p / p_old        loss = -min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A)

    Past the clip, in the direction the advantage asks for, the gradient is 0: one rollout moves a
    probability only so far. Against that direction it is not.
    """
    ratio = (logp - old_logp).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.min(free, clipped), clipped < free


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """(loss, whether it is the clipped one) of each guess: (V - R)^2 / 2, or, if that is larger, the
    same with V kept within `clip` of the guess at rollout time."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    free, clipped = 0.5 * (values - returns) ** 2, 0.5 * (near - returns) ** 2
    return torch.max(free, clipped), clipped > free


def kl_estimates(logp: Tensor, other_logp: Tensor) -> tuple[Tensor, Tensor]:
    """(k1, k3) of KL(p || other) at tokens drawn from p, d = log p - log other: k1 = d is unbiased
    and may be negative; k3 = exp(-d) - 1 + d is unbiased, never negative and less noisy
    (Schulman, joschu.net/blog/kl-approx). k1 goes into the reward; k3 is for looking at. Trap: for
    a small d, exp(-d) - 1 in float32 is mostly rounding; expm1 is exact."""
    d = logp - other_logp
    return d, torch.expm1(-d) + d


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1: the critic foresaw everything; 0: no better than a constant; below: worse; NaN where all
    returns are equal and there is nothing to foresee. (Where only the scores are equal, it is about
    the KL penalties.) Trap: the returns must be those of lambda 1; any other lambda mixes the critic's
    own guesses into them, and it agrees with itself."""
    spread = lambda x: masked_mean((x - masked_mean(x, mask)) ** 2, mask).item()  # noqa: E731
    return 1 - spread(returns - values) / spread(returns) if spread(returns) > 1e-12 else math.nan


# ------------------------------------------------------------------------------------- the models


class Models(NamedTuple):
    """Actor, reference, critic and value head, which share what weights they can.

    full: the actor is a model of its own; a frozen copy of its start is the reference.
    LoRA: one frozen base, with the adapter it may have come with, is the reference; the actor is the
    same weights plus adapters.
    A separate critic is the reference's weights plus adapters of its own, in both cases, so that it
    costs a percent of a model. A shared critic is the actor itself with one more output.
    """

    actor: Transformer
    reference: Transformer  # never changes
    critic: Transformer  # the trunk whose hidden states the head reads
    head: nn.Linear  # (D) -> 1: the value

    def value(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T), float32 whatever autocast would have: a sum, not a matrix product."""
        return (hidden.float() * self.head.weight[0]).sum(-1) + self.head.bias

    def policy_weights(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.actor.named_parameters() if p.requires_grad}

    def value_weights(self) -> dict[str, nn.Parameter]:
        """Head and, where the critic is separate, its adapters."""
        own = {} if self.critic is self.actor else dict(self.critic.named_parameters())
        head = {f"head.{n}": p for n, p in self.head.named_parameters()}
        return {n: p for n, p in own.items() if p.requires_grad} | head


def build(base: Transformer, args: argparse.Namespace) -> Models:
    """The models of a run whose policy starts as `base`."""
    bf16 = args.precision == "bf16"
    if args.lora:
        actor, reference = twin(base), base
        lora.add_lora(actor, args.lora_r, args.lora_alpha, args.seed)
    else:
        # Out of the mapped file first: on a CPU a product's last bit depends on where in memory a
        # matrix begins, and actor and reference must start with a KL of 0.
        for p in base.parameters():
            p.data = p.data.clone()
        actor, reference = base, frozen_copy(base, bf16)
    critic = actor
    if args.critic == "separate":
        critic = twin(reference)
        lora.add_lora(critic, args.lora_r, args.lora_alpha, args.seed + 1)
    head = nn.Linear(base.config.hidden_size, 1, device=base.device)
    nn.init.zeros_(head.weight)  # a first guess of 0 everywhere misleads less than a random one
    nn.init.zeros_(head.bias)
    for model in (actor, critic):
        set_checkpointing(model, args.checkpointing)
    return Models(actor, reference, critic, head)


# ------------------------------------------------------------------------------------ the rollout


class Rollout(NamedTuple):
    """Answers to a step's problems and what is known of each action; `updates` says which of them
    make an update together, and which of those a micro-batch."""

    ids: Tensor  # (N, T)
    lengths: list[int]  # (N,), without padding
    mask: Tensor  # (N, T - 1), as are all that follow
    logp: Tensor  # by the actor as it was when it sampled
    values: Tensor
    advantages: Tensor
    returns: Tensor
    updates: list[list[slice]]  # of an update's micro-batches: their rows
    indices: list[int]  # (N,), of the problems


def problems_of_step(problems: list, step: int, n: int, seed: int) -> list[data.Problem]:
    """Step's n problems out of an endless row of permutations, each made from (seed, epoch)."""
    found = []
    for place in range(step * n, (step + 1) * n):
        epoch, i = divmod(place, len(problems))
        if i == 0 or not found:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(problems), generator=generator).tolist()
        found.append(problems[order[i]])
    return found


def answer(models: Models, tokenizer, prompt, problems, args, step: int, watch) -> list[dict]:
    """Sample an answer to each problem, and score it: rows of the ids and mask (`example`), the
    `score`, and what one wants to read of it. Call it within one autocast: that keeps its bfloat16
    copies of float32 weights until it is left, so that they are not made at every token."""
    answers = generate.answer(
        models.actor, tokenizer, [p.question for p in problems], prompt, args.max_new_tokens,
        args.rollout_batch, args.temperature, args.seed * 1_000_003 + step, watch,
    )  # fmt: skip
    rows = []
    for problem, done in zip(problems, answers):
        score = 0.0 if done.truncated else float(reward(data.cut(done.text), problem))
        mask = [0] * len(done.prompt) + [1] * len(done.ids)
        rows.append({
            "example": data.Example(done.prompt + done.ids, mask, problem.index), "score": score,
            "correct": data.is_correct(done.text, problem), "truncated": done.truncated,
            "question": problem.question, "completion": done.text,
        })  # fmt: skip
    return rows


def plan_updates(n: int, micro_batch: int, accumulation: int) -> list[list[slice]]:
    """Which of n rows make an update together, in the order drawn, and which of those a micro-batch."""
    updates, size = [], micro_batch * accumulation
    for start in range(0, n, size):
        end = min(start + size, n)
        updates.append([slice(i, min(i + micro_batch, end)) for i in range(start, end, micro_batch)])
    return updates


@torch.no_grad()
def assess(models: Models, rows: list[dict], pad_id: int, args, autocast) -> tuple[Rollout, dict]:
    """Log-probs, values, rewards, advantages of a rollout, and its figures.

    The old log-probs are computed by the training forward, not kept from sampling, on micro-batches
    that stay the same through all updates: in bfloat16 another grouping of the same rows gives other
    log-probs, and the first ratio would not be 1.
    """
    updates = plan_updates(len(rows), args.micro_batch, args.accumulation)
    ids, mask, lengths = data.collate([row["example"] for row in rows], pad_id, models.actor.device)
    mask = mask[:, 1:]
    logp, ref_logp, values, entropy = (torch.zeros(mask.shape, device=ids.device) for _ in range(4))
    for some in itertools.chain.from_iterable(updates):
        part = ids[some], lengths[some]
        with autocast():
            hidden = models.actor(*part)
            logp[some], entropy[some] = token_logprobs(
                models.actor.vocabulary, hidden[:, :-1], ids[some, 1:], mask[some], args.temperature, True
            )
            before = models.reference(*part)
            ref_logp[some], _ = token_logprobs(
                models.reference.vocabulary, before[:, :-1], ids[some, 1:], mask[some], args.temperature
            )
            if models.critic is not models.actor:
                hidden = models.critic(*part)
        values[some] = torch.where(mask[some], models.value(hidden[:, :-1]), 0.0)

    score = torch.tensor([row["score"] for row in rows], device=ids.device)  # (N,)
    rewards = token_rewards(score, logp, ref_logp, mask, args.kl_coef)
    advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
    # What there was to foresee.
    outcomes = returns if args.lam == 1 else gae(rewards, values, mask, args.gamma, 1.0)[1]
    k1, k3 = kl_estimates(logp, ref_logp)
    n = len(rows)
    figures = {
        "reward": score.mean().item(),
        "reward_std": score.std(correction=0).item(),
        "exact_match": sum(row["correct"] for row in rows) / n,  # of those that were cut, too
        "truncated": sum(row["truncated"] for row in rows) / n,
        "worked": sum("<<" in row["completion"] for row in rows) / n,  # shows a calculation
        "response_tokens": mask.sum().item() / n,
        "kl": masked_mean(k3, mask).item(),  # a token
        "kl_sequence": torch.where(mask, k1, 0.0).sum().item() / n,  # an answer; near 0 of either sign
        "entropy": masked_mean(entropy, mask).item(),
        "explained_variance": explained_variance(values, outcomes, mask),
        "value": masked_mean(values, mask).item(),
        "return": masked_mean(returns, mask).item(),
    }
    indices = [row["example"].index for row in rows]
    whitened = whiten(advantages, mask)
    return Rollout(ids, lengths, mask, logp, values, whitened, returns, updates, indices), figures


# ------------------------------------------------------------------------------------- the update


FIGURES = ("policy_loss", "value_loss", "clipped", "value_clipped", "approx_kl")


def backward_micro(
    models: Models, rollout: Rollout, some: slice, count, args, autocast, warming: bool
) -> tuple[Tensor, Tensor]:
    """Add the share that `some` rows, a micro-batch, have in an update's gradient to .grad; `count` is the
    update's number of actions. Returns their share of FIGURES (approx_kl is k3 from the policy that
    sampled) and the largest |ratio - 1| among them. While the critic warms up alone, nothing of the
    actor gets a gradient.
    """
    ids, lengths = rollout.ids[some], rollout.lengths[some]
    mask, old_logp = rollout.mask[some], rollout.logp[some]
    bonus = args.entropy_coef > 0
    with autocast():
        with torch.set_grad_enabled(not warming):
            hidden = models.actor(ids, lengths)
            logp, entropy = token_logprobs(
                models.actor.vocabulary, hidden[:, :-1], ids[:, 1:], mask, args.temperature, bonus
            )
        if models.critic is not models.actor:
            hidden = models.critic(ids, lengths)
    values = models.value(hidden[:, :-1])

    mean = lambda x: masked_mean(x, mask, count)  # noqa: E731
    p_loss, p_clipped = policy_loss(logp, old_logp, rollout.advantages[some], args.clip)
    v_loss, v_clipped = value_loss(values, rollout.values[some], rollout.returns[some], args.value_clip)
    loss = mean(p_loss) + args.value_coef * mean(v_loss)
    if bonus:
        loss = loss - args.entropy_coef * mean(entropy)
    loss.backward()
    _, k3 = kl_estimates(old_logp, logp)
    figures = torch.stack([mean(x) for x in (p_loss, v_loss, p_clipped.float(), v_clipped.float(), k3)])
    return figures.detach(), torch.where(mask, torch.expm1(logp - old_logp), 0.0).detach().abs().max()


def update(models: Models, rollout: Rollout, optimizers, args, autocast, step: int) -> dict:
    """All gradient steps on one rollout; their mean figures."""
    actor_optimizer, value_optimizer = optimizers
    warming = step < args.critic_warmup
    sums, norms, value_norms, first_ratio = 0.0, [], [], None
    for epoch in range(args.epochs):
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 1009 + epoch)
        for i in torch.randperm(len(rollout.updates), generator=generator).tolist():
            micros = rollout.updates[i]
            count = sum(rollout.mask[some].sum() for some in micros)
            shares = [backward_micro(models, rollout, m, count, args, autocast, warming) for m in micros]
            sums = sums + sum(figures for figures, _ in shares)
            if first_ratio is None:  # nothing has been updated yet: it must be 0
                first_ratio = max(largest.item() for _, largest in shares)
            for optimizer, seen in ((actor_optimizer, norms), (value_optimizer, value_norms)):
                norm = torch.nn.utils.clip_grad_norm_(optimizer.params.values(), args.clip_grad).item()
                if not math.isfinite(norm):
                    answered = rollout.indices[micros[0].start : micros[-1].stop]
                    raise UserError(f"gradient norm {norm} at step {step + 1}; problems {answered}: lower "
                                    "--lr or --value-lr; the last checkpoint, if any, is kept")  # fmt: skip
                seen.append(norm)
            if not warming:
                actor_optimizer.step()
            value_optimizer.step()
            actor_optimizer.zero_grad()
            value_optimizer.zero_grad()
    return dict(zip(FIGURES, (sums / len(norms)).tolist())) | {
        "grad_norm": sum(norms) / len(norms), "value_grad_norm": sum(value_norms) / len(norms),
        "updates": len(norms), "first_ratio_error": first_ratio,
    }  # fmt: skip


# -------------------------------------------------------------------------------------- the run


def health(figures: dict, args: argparse.Namespace) -> list[str]:
    """What is out of its healthy range, in words, and what usually helps. The limits are lenient:
    a run of gemma-2-2b that gained 12 points on GSM8K (verl's published log, in
    github.com/eric-haibin-lin/verl-data) ended 17 nats an answer from its reference, clipped 0.3% of
    its ratios, and its critic explained next to nothing of the variance from step 6 on."""
    f, said = figures, []
    if f["first_ratio_error"] > 1e-6:
        said.append(f"the first ratio is off by {f['first_ratio_error']:.2g}: scoring and update disagree")
    if f["truncated"] > 0.2:
        said.append(f"{f['truncated']:.0%} of the answers are cut: raise --max-new-tokens, or the "
                    "policy has lost its way to an end")  # fmt: skip
    if f["kl_sequence"] > 30:
        said.append(f"{f['kl_sequence']:.0f} nats an answer from the reference: lower --lr or raise "
                    "--kl-coef")  # fmt: skip
    if f["clipped"] > 0.2:
        said.append(f"{f['clipped']:.0%} of the ratios are clipped: lower --lr or --epochs")
    if f["step"] > args.critic_warmup + 3 and f["explained_variance"] < -0.5:
        said.append(f"the critic explains {f['explained_variance']:.2g} of the variance, worse than a "
                    "constant: raise --value-lr or --critic-warmup")  # fmt: skip
    if f["entropy"] < 0.02:
        said.append(f"entropy is {f['entropy']:.2g} nats: there is next to nothing left to explore")
    if f["reward_std"] == 0:
        said.append(f"every reward is {f['reward']:g}, so that no answer was better than another: take "
                    "more --rollouts a step, or problems that are solved now and then")  # fmt: skip
    if f["moved"] < 0.5 and f["step"] > args.critic_warmup:
        said.append(f"only {f['moved']:.0%} of the weights moved: --lr is below their rounding")
    return said


def print_plan(args, found: hub.ModelFiles, prompt, problems, held_out) -> None:
    config, tokenizer = read_config(found.base), data.Tokenizer(found.base)
    with torch.device("meta"):  # counts parameters without allocating one
        model = Transformer(config)
    everything = [p.shape for p in model.parameters()]
    total = sum(map(math.prod, everything))
    lora.add_lora(model, args.lora_r, args.lora_alpha)
    adapters = [p.shape for p in model.parameters() if p.requires_grad]
    separate = args.critic == "separate"
    head = [(1, config.hidden_size), (1,)]
    policy, critic = adapters if args.lora else everything, adapters * separate + head
    policy_size, critic_size = (sum(map(math.prod, shapes)) for shapes in (policy, critic))
    longest = max(len(data.encode(tokenizer, prompt, p.question)[0]) for p in problems)
    longest += args.max_new_tokens
    size = min(args.rollouts, args.micro_batch * args.accumulation)
    updates, rest = math.ceil(args.rollouts / size), args.rollouts % size
    last = f" (the last: {rest})" if rest else ""
    print(f"start        {args.init} ({config.model_type}), {total:,} parameters; {prompt}")
    print(f"trained      {policy_size:,} of the policy, {critic_size:,} of the critic ({args.critic})")
    print(f"data         {len(problems):,} problems, {len(held_out)} held out; prompt and answer up to "
          f"{longest} tokens")  # fmt: skip
    before = runs.held_out_by(args.init, args.data)
    if before not in (None, len(held_out)):
        print(f"note         {args.init} held out {before} problems, this run {len(held_out)}: some are "
              "held out by one and trained on by the other")  # fmt: skip
    if found.adapter and args.lora:
        print("note         base and adapter together are the start and the reference; what comes out is "
              "one adapter of both changes")  # fmt: skip
    print(f"steps        {args.steps} of {args.rollouts} answers; {args.epochs} x {updates} updates of {size}"
          f"{last}, in micro-batches of {args.micro_batch}; lr {args.lr:g}, critic {args.value_lr:g} "
          f"({args.recipe} recipe); {args.optim}")  # fmt: skip
    if args.critic_warmup:
        all_of_it = ": nothing of the policy will change" * (args.critic_warmup >= args.steps)
        print(f"warm-up      the first {args.critic_warmup} steps train the critic alone{all_of_it}")
    print(f"compute      {args.device}, {args.precision}")
    if args.dry_run:
        bf16, frozen = args.precision == "bf16", args.lora
        tokens, forwards = args.micro_batch * longest, 1 + separate
        weights = plan.model_bytes(config, total + policy_size * frozen, policy_size, bf16)
        if frozen and not bf16:
            weights = 4 * (total + policy_size)
        at_once = min(args.rollouts, args.rollout_batch)
        activations = plan.activation_bytes(config, tokens, frozen, bf16, args.checkpointing)
        plan.print_budget({
            "weights": weights + 4 * critic_size,
            "reference": 0 if frozen else plan.frozen_copy_bytes(config, total, bf16),
            "gradients": 4 * (policy_size + critic_size),
            "optimizer": plan.moments_bytes(policy + critic, args.optim),
            "activations": forwards * activations,
            "vocabulary": plan.head_bytes(config, tokens, args.device, not args.lora, bf16, entropy=True),
            "cache": plan.cache_bytes(config, at_once, longest, bf16),
            "sampling": plan.sampling_bytes(config, total, at_once, bf16, args.device),
        })  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not os.path.isdir(args.init) and args.init.startswith("runs/"):
        sft = "python train_sft.py" + " --tiny" * args.tiny
        raise UserError(f"no {args.init} yet: PPO starts from a fine-tuned model; {sft} makes "
                        "the default one, --init names another (for --dry-run any model)")  # fmt: skip
    trained = runs.run_of(args.init)
    prompt = data.Prompt(**trained[1]["info"]["prompt"]) if trained else data.Prompt()
    found = hub.find_model(args.init, weights=not args.dry_run)
    out = Path(args.out).resolve()
    if any(path and path.resolve().is_relative_to(out) for path in (found.base, found.adapter)):
        raise UserError(f"--init lies in the run folder {args.out}: choose another --out")
    problems = data.load_problems(args.data, "train", args.data_dir)
    if args.val_examples is None:
        args.val_examples = data.usual_held_out(len(problems), args.tiny)
    problems, held_out = data.split_validation(problems, args.val_examples)
    print_plan(args, found, prompt, problems, held_out)
    if args.dry_run:
        return 0

    settings = {k: v for k, v in vars(args).items() if k not in ("dry_run", "overwrite", "out")}
    settings["data_sha256"] = data.digest(problems + held_out)
    settings |= {"init_sha256": hub.fingerprint(found), "prompt": prompt._asdict(),
                 "answers_an_update": args.micro_batch * args.accumulation}  # fmt: skip
    info = console.environment() | {"prompt": prompt._asdict(), "base": str(found.base)}
    # What takes less memory may change on the way: of the two factors of an update their product counts.
    # A file may move: its content is compared, as data_sha256.
    may_differ = ("save_every", "data_dir", "device", "wandb", "checkpointing", "micro_batch",
                  "accumulation", "rollout_batch", "data")  # fmt: skip
    with runs.Run(args.out, settings, info, args.overwrite, may_differ) as run:
        if run.finished:
            print(run.already_finished())
        elif status := train(args, run, found, prompt, problems, held_out):
            return status
    print(runs.what_next(args.out, args.data, len(held_out)))
    return 0


def one_step(
    models, optimizers, tokenizer, prompt, problems, args, autocast, step: int, watch, say
) -> tuple[dict, list[dict]]:
    """Rollout, rewards and advantages, updates: what the loop repeats. Returns the step's figures and
    its answers. Raises what `watch` raises, which only sampling calls: nothing is changed by then."""
    times = [time.perf_counter()]
    with autocast():
        rows = answer(models, tokenizer, prompt, problems, args, step, watch)
    times.append(time.perf_counter())
    say("scoring")
    rollout, figures = assess(models, rows, tokenizer.pad_id, args, autocast)
    times.append(time.perf_counter())
    say("updating")
    # Of one matrix, the largest that is cheap to copy: rounding treats the weights of all alike.
    probe = max(models.policy_weights().values(), key=lambda p: (p.numel() <= 2**22, p.numel()))
    before = probe.detach().clone()
    figures |= update(models, rollout, optimizers, args, autocast, step)
    times.append(time.perf_counter())
    phases = ("seconds_rollout", "seconds_score", "seconds_update")
    figures |= {phase: end - start for phase, start, end in zip(phases, times, times[1:])}
    figures |= {
        "step": step + 1,
        "moved": (probe.detach() != before).float().mean().item(),
        "seconds": times[-1] - times[0],
        "tokens": sum(len(row["example"].ids) for row in rows),
        "peak_memory": console.peak_memory(args.device),
    }
    return figures, rows


def train(args, run, found, prompt, problems, held_out) -> int:
    """Train from scratch or from the last checkpoint to the end; 0, or the status of a stop."""
    bf16 = args.precision == "bf16"
    kind = torch.device(args.device).type
    autocast = lambda: torch.autocast(kind, torch.bfloat16, enabled=bf16)  # noqa: E731

    # As in SFT: float32 weights if they are all trained, a bfloat16 base if it is frozen; but not where
    # products are in float32, or sampling would cast all of it for every token. An adapter to start
    # from makes the reference together with its base: it stays below the new one, since folded into a
    # bfloat16 base what is small of it would be rounded away.
    dtype = torch.bfloat16 if args.lora and bf16 else torch.float32
    base, tokenizer = load_model(found, dtype, args.device, merge=not args.lora)
    models = build(base, args)
    policy, critic = models.policy_weights(), models.value_weights()
    bits = 8 if args.optim == "adamw8bit" else 32
    optimizers = AdamW(policy.items(), args.lr, bits=bits), AdamW(critic.items(), args.value_lr, bits=bits)
    figures, validated = {}, {}

    def save_checkpoint(step: int) -> None:
        tensors = {}
        for part, optimizer in zip(("policy/", "critic/"), optimizers):
            tensors |= {part + n: t for n, t in optimizer.state_tensors().items()}
        run.save_checkpoint(step, tensors, {"validated": validated, "figures": figures})

    def save_result() -> None:
        if args.lora:
            save_adapter(models.actor, run.folder / "adapter", found.name)
        else:
            save_model(models.actor, tokenizer, run.folder / "model")
        weights = {n: p.detach() for n, p in critic.items()}
        files.replace_file(run.folder / "value_head.safetensors", files.safetensors_bytes(weights))

    first = 0
    if (checkpoint := run.load_checkpoint()) is not None:
        first, tensors, state = checkpoint
        for part, optimizer in zip(("policy/", "critic/"), optimizers):
            mine = {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)}
            optimizer.load_state_tensors(mine)
        validated, figures = state["validated"], state["figures"]
        del checkpoint, tensors, mine  # mapped from the file, and memory of it while they live
        print(f"continuing {run.folder} from step {first}")

    if args.wandb:
        run.start_wandb(args.wandb, vars(args))
    with console.graceful_stop() as stop, console.Progress(args.steps) as progress:

        def watch(finished: int, tokens: int) -> None:
            progress.update(step, answered=finished)
            if stop.requested:
                raise console.Stopped

        def validate() -> dict:
            with autocast():
                rows = generate.answer_and_mark(
                    models.actor, tokenizer, held_out, prompt, args.max_new_tokens, args.rollout_batch,
                    progress=watch,
                )  # fmt: skip
            return {"step": step, "val_exact_match": sum(r["correct"] for r in rows) / len(rows),
                    "val_truncated": sum(r["truncated"] for r in rows) / len(rows)}  # fmt: skip

        def leave() -> int:
            save_checkpoint(step)
            progress.note(stop.message(step))
            return stop.exit_code

        for step in range(first, args.steps + 1):  # with `step` of them behind us
            try:
                due = step == args.steps or (args.val_every and step % args.val_every == 0)
                if held_out and due and validated.get("step") != step:
                    validated = validate()
                    run.log(validated)
                    progress.note(", ".join(f"{k} {v:.4g}" for k, v in validated.items()))
                if step == args.steps:
                    break
                if stop.requested:
                    return leave()
                chosen = problems_of_step(problems, step, args.rollouts, args.seed)
                figures, rows = one_step(models, optimizers, tokenizer, prompt, chosen, args, autocast, step,
                                         watch, lambda now: progress.update(step, now=now))  # fmt: skip
            except console.Stopped:
                return leave()
            run.log(figures)
            for row in rows[:4]:
                run.sample({"step": step + 1} | {k: v for k, v in row.items() if k != "example"})
            for warning in health(figures, args):
                progress.note(f"step {step + 1}: {warning}")
            if step % (args.val_every or args.steps) == 0:
                progress.note(preview(rows[0]))
            progress.update(step + 1, reward=figures["reward"], kl_sequence=figures["kl_sequence"],
                            length=figures["response_tokens"], memory=figures["peak_memory"],
                            tokens_per_s=figures["tokens"] / figures["seconds"])  # fmt: skip
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                save_checkpoint(step + 1)

    save_result()
    keep = ("reward", "kl_sequence", "explained_variance", "response_tokens")
    run.finish({"steps": args.steps} | {k: figures[k] for k in keep} | validated)
    return 0


def preview(row: dict) -> str:
    """One of a step's sampled answers for the console, indented."""
    text = f"{row['question']}\n{row['completion'].strip()}\n-> reward {row['score']:g}"
    return "\n".join(["a sampled answer:", *("    " + line for line in text.split("\n"))])


if __name__ == "__main__":
    console.entry(main)
