"""PPO with a critic and GAE for a language model (Schulman et al. 2017, arXiv 1707.06347).

    python train_ppo.py --tiny                  # from runs/tiny/sft-full-main, minutes anywhere
    python train_ppo.py                         # from runs/sft-full-main -> runs/ppo-full-main
    python train_ppo.py --lora                  # adapters, from runs/sft-lora-main
    python train_ppo.py --advantage rloo        # or grpo: group_advantages in place of 4 and 5
    python train_ppo.py --init PATH --dry-run   # parameters, memory, steps; loads no weights

One step (the loop in `train` has the same numbers):

    1 sample an answer to each problem; it is right or wrong               sample
    2 log-probs by the policy and the reference, the critic's values       score
    3 rewards: right or wrong at the end, minus a KL penalty everywhere    token_rewards
    4 where did things go better than the critic predicted?                gae
    5 put that on one scale                                                whiten
    6 make those tokens more likely, and teach the critic                  update

The alignment, drawn once. Tensors about actions have T - 1 columns. Column t is about the choice of
token t + 1, made by hidden state t, which has seen tokens 0 to t:

    token       0    1    2    3    4    5    6    7
    ids         p0   p1   p2   r0   r1   r2  eos   .       prompt, response, padding
    column           0    1    2    3    4    5    6
    action           p1   p2   r0   r1   r2  eos   .
    mask             0    0    1    1    1    1    0       1 where the token was sampled
    logp[t]                    log p(token t + 1 | tokens 0 .. t)
    value[t]                   the critic's prediction from the same tokens, before the action
    reward[t]                  minus KL at each action, plus the answer's score at the last, 5
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanogsm import boxed, data, distributed, generate, lora
from nanogsm.logprob import next_token_logprobs
from nanogsm.model import frozen_copy, load_model, sampler_of, save_trained, set_checkpointing, twin
from nanogsm.optim import AdamW
from nanogsm.rewards import add_terms, figures, terms_of
from nanogsm.run import console, past, plan, start
from nanogsm.run.critic import save_critic
from nanogsm.run.flags import ppo_args as parse_args
from nanogsm.run.health import Moved, health
from nanogsm.run.loop import Run, check_finite
from nanogsm.run.machine import autocast_of
from nanogsm.run.reward import mean_reward
from nanogsm.transformer import Transformer

# ------------------------------------------------------------------------------------- the reward


def reward(completion: str, problem: data.Problem, truncated: bool) -> float:
    """1 for the right answer, 0 otherwise. `--reward FILE.py` puts another function in its place
    (nanogsm/run/reward.py); flags add terms to it (nanogsm/rewards.py)."""
    # A truncated answer never ended, so it earns nothing: the policy has to learn to end. Trap: one
    # that was stopped at "Question:" has ended, and the tokens of "Question:" become likelier, too.
    right = not truncated and data.is_correct(completion, problem)
    return float(right and not boxed.restates(completion, problem.answer))  # MATH: not 2+2 for 4


# --------------------------------------------------------------------------------------- the math
# All tensors are (B, T - 1) float32 as drawn above, `mask` is bool. Trap: a mean that also counts
# prompts or padding looks fine and is wrong, so every mean is over a mask.

Pair = tuple[Tensor, Tensor]


def masked_share(x: Tensor, mask: Tensor, count: int | Tensor) -> Tensor:
    """What these rows contribute to a mean over `count` actions."""
    # The shares of an update's micro-batches add up to the mean over the whole update.
    return torch.where(mask, x, 0.0).sum() / count


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return masked_share(x, mask, mask.sum())


def token_rewards(scores: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, kl_coef: float):
    """r_t = -kl_coef (log p_t - log p_ref,t), plus the answer's score (B,) at the last action.

    Summed over an answer, log p - log p_ref (k1) is an unbiased estimate of the policy's KL
    divergence from the reference (Ziegler et al. 2019, arXiv 1909.08593).
    """
    # No gradient flows through the penalty: it is part of the reward. GAE credits it backwards, so
    # a token also pays for the KL of the tokens after it. As a term of the loss k1 would do
    # nothing: on-policy, its expected gradient is zero.
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1).amax(1, keepdim=True)  # (B, 1)
    rewards = torch.where(mask, -kl_coef * (logp - ref_logp), 0.0)
    return rewards + torch.where(columns == last, scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Pair:
    """(advantages, returns), 0 outside the mask (Schulman et al. 2015, arXiv 1506.02438):

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lambda A_{t+1}
        R_t     = A_t + V_t                            what the critic should have predicted

    After the last action V and A are 0. So at the last action A = r - V and R = r. lambda trades
    the critic's errors (0) for the rewards' noise (1). Trap: gamma below 1 punishes length. With
    0.99 an answer of 140 tokens is worth a quarter of its reward at its first token.
    """
    # From right to left. For a truncated answer, too, V after its last action counts as 0.
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = next_advantage = torch.where(mask[:, t], advantage, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def group_advantages(rewards: Tensor, mask: Tensor, group: int, method: str) -> Tensor:
    """Advantages without a critic: an answer's total reward R against the mean m and the standard
    deviation s of its group, the k answers to one problem. They are rows next to each other.

        PPO       whitened GAE: a critic says which tokens made the answer better than expected
        RLOO      R - mean of the others' R = k / (k - 1) (R - m)           arXiv 2402.14740
        GRPO      (R - m) / s: groups of little spread weigh more           arXiv 2402.03300
        Dr. GRPO  R - m: RLOO up to a constant factor, which Adam undoes    arXiv 2503.20783
        Here R always contains the KL penalty (GRPO's paper: the loss does; Dr. GRPO's: no penalty),
        and every token weighs the same (GRPO's: every answer does, however long).

    They are not whitened: the fewer groups have spread, the smaller is the gradient of this step.
    Trap: where all scores of a group are equal, GRPO scales its KL penalties up to full size.
    """
    total = rewards.sum(1).view(-1, group)  # (N / k, k)
    total = total - total[:, :1]  # so that equal rewards give 0 and not a rounding error
    better = total - total.mean(1, keepdim=True)
    scale = 1 / (total.std(1, keepdim=True) + 1e-6) if method == "grpo" else group / (group - 1)
    return torch.where(mask, (better * scale).view(-1, 1), 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the mask, so that the size of a step does not depend on the scale
    of the rewards. Trap: if all answers are worth the same, it is noise that gets variance 1."""
    # Once over a whole rollout: a micro-batch's own mean would be noise.
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float, high=None) -> Pair:
    """(loss, whether the clipped form is the loss) of each action:

        ratio = p / p_old        loss = -min(ratio A, clamp(ratio, 1 - clip, 1 + high) A)
        high = clip if not given; a larger one lets rare tokens grow (DAPO, arXiv 2503.14476)"""
    # Past the clip, in the direction that the advantage asks for, the gradient is 0: this action
    # asks for no more. (A large step, or other actions, can still move its probability further.)
    # In the other direction the gradient stays.
    ratio = (logp - old_logp).exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + (high or clip)) * advantages
    return -torch.min(free, clipped), clipped < free


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Pair:
    """(loss, whether the clipped form is the loss) of each value: the larger of (V - R)^2 / 2 and
    the same with V kept within `clip` of the value at rollout time."""
    moved = values - old_values
    near = old_values + moved.clamp(-clip, clip)
    free, clipped = 0.5 * (values - returns) ** 2, 0.5 * (near - returns) ** 2
    # Inside the clip `near` can differ from `values` by rounding, which is no clipping.
    return torch.max(free, clipped), (clipped > free) & (moved.abs() > clip)


def kl_estimates(logp: Tensor, other_logp: Tensor) -> Pair:
    """(k1, k3) of KL(p || other) at tokens drawn from p, with d = log p - log other (Schulman,
    joschu.net/blog/kl-approx). k1 = d is unbiased and may be negative. k3 = exp(-d) - 1 + d is
    unbiased, never negative and less noisy. k1 goes into the reward, k3 is for looking at."""
    d = logp - other_logp
    # Trap: for a small d, exp(-d) - 1 in float32 is mostly rounding. expm1 keeps the digits.
    return d, torch.expm1(-d) + d


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """The share of the returns' variance that the values predict. 1 is perfect up to a constant, 0
    is no better than a constant, below 0 is worse. NaN if all returns are equal."""
    # Trap: give it the returns of lambda 1. Any other lambda mixes the critic's own values into
    # them, and the critic then agrees with itself.
    variance = lambda x: masked_mean((x - masked_mean(x, mask)) ** 2, mask).item()  # noqa: E731
    spread = variance(returns)
    return 1 - variance(returns - values) / spread if spread > 1e-12 else math.nan


# ------------------------------------------------------------------------------------- the models


class Models(NamedTuple):
    """Policy (actor), reference, critic and value head. They share all the weights they can."""

    # full: the actor is a model of its own, and the reference is a frozen copy of its start.
    # LoRA: the reference is the frozen base, with the adapter it may have come with. The actor is
    # the same weights plus new adapters.
    # A shared critic is the actor with one more output: its value loss trains the actor's trunk,
    # too, weighted by value_coef. A separate critic is the reference's weights plus adapters of its
    # own: about a percent more weights, but the activations and the time of a second model.
    actor: Transformer
    reference: Transformer  # never changes
    critic: Transformer  # the trunk whose hidden states the value head reads
    value_head: nn.Linear | None  # (D) -> 1; None for RLOO and GRPO

    def value(self, hidden: Tensor) -> Tensor:
        # (B, T, D) -> (B, T). A sum, not a matrix product, so that it is float32 under autocast.
        return (hidden.float() * self.value_head.weight[0]).sum(-1) + self.value_head.bias

    def policy_weights(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.actor.named_parameters() if p.requires_grad}

    def value_weights(self) -> dict[str, nn.Parameter]:
        """The value head and, where the critic is separate, its adapters."""
        own = {} if self.critic is self.actor else dict(self.critic.named_parameters())
        head = dict(self.value_head.named_parameters("head")) if self.value_head else {}
        return {n: p for n, p in own.items() if p.requires_grad} | head


def build(base: Transformer, args) -> Models:
    """The models of a run whose policy starts as `base`."""
    if args.lora:
        actor, reference = twin(base), base
        lora.add_lora(actor, args.lora_r, args.lora_alpha, args.seed)
    else:
        actor, reference = base, frozen_copy(base, args.precision == "bf16")
    critic, value_head = actor, None
    if args.critic == "separate":
        critic = twin(reference)
        lora.add_lora(critic, args.lora_r, args.lora_alpha, args.seed + 1)
    if not args.advantage:  # None is gae, which needs a critic
        value_head = nn.Linear(base.config.hidden_size, 1, device=base.device)
        nn.init.zeros_(value_head.weight)  # predicting 0 misleads less than a random start
        nn.init.zeros_(value_head.bias)
    for model in (actor, critic):
        set_checkpointing(model, args.checkpointing)
    return Models(actor, reference, critic, value_head)


class Setup(NamedTuple):
    """What every step needs besides its problems."""

    models: Models
    policy_optimizer: AdamW
    value_optimizer: AdamW | None  # None without a critic
    tokenizer: data.Tokenizer
    prompt: data.Prompt
    args: object  # the flags
    autocast: Callable  # `with setup.autocast():` makes matrix products bfloat16, if they are to be
    reward: Callable[[str, data.Problem, bool], float] = reward


def set_up(args, found, prompt: data.Prompt, scored_by: Callable) -> Setup:
    # As in SFT: weights that are trained are float32, a frozen base is bfloat16. Without bfloat16
    # products the base is float32, or sampling would cast all of it for every token. An adapter to
    # start from stays below the new one: merged into a bfloat16 base, it would be rounded.
    bf16 = args.precision == "bf16"
    dtype = torch.bfloat16 if args.lora and bf16 else torch.float32
    base, tokenizer = load_model(found, dtype, args.device, merge=not args.lora, shard=args.shard)
    models = build(base, args)
    bits = 8 if args.optim == "adamw8bit" else 32
    policy = AdamW(models.policy_weights().items(), args.lr, bits=bits)
    value = args.value_lr and AdamW(models.value_weights().items(), args.value_lr, bits=bits)
    autocast = autocast_of(args.device, args.precision)
    return Setup(models, policy, value, tokenizer, prompt, args, autocast, scored_by)


# ------------------------------------------------------------------------------------ the rollout


def sample(setup: Setup, problems: list[data.Problem], step: int, watch) -> list[dict]:
    """Sample an answer to each problem and mark it: one dict per answer, with its ids and mask
    (`example`), its `score` and its text. Raises what `watch` raises."""
    args, seed = setup.args, setup.args.seed * 1_000_003 + step
    questions = [problem.question for problem in problems]
    sampling = sampler_of(setup.models.actor, args.precision == "bf16")
    # One context: autocast then casts the weights once, and not at every token.
    with setup.autocast(), sampling as sampler:
        completions = generate.answer(
            sampler, setup.tokenizer, questions, setup.prompt, args.max_new_tokens,
            args.rollout_batch, args.temperature, seed, watch,
        )  # fmt: skip
    pairs = list(zip(problems, completions))
    # Only rank 0 asks: a reward of one's own may not give the same answer twice.
    scores = distributed.on_rank_0(
        lambda: [setup.reward(data.cut(done.text), p, done.truncated) for p, done in pairs]
    )
    marked = []
    for (problem, done), score in zip(pairs, scores):
        mask = [0] * len(done.prompt) + [1] * len(done.ids)  # the end token is an action, too
        marked.append({
            "example": data.Example(done.prompt + done.ids, mask, problem.index),
            "score": score,
            "correct": data.is_correct(done.text, problem),
            **(data.beside(done.text, problem) if problem.boxed else {}),
            "truncated": done.truncated,
            "question": problem.question,
            "completion": done.text,
            **terms_of(setup.tokenizer, done, args, problem.boxed),
        })  # fmt: skip
    return marked


class Rollout(NamedTuple):
    """The answers of a step, and what the models said of each action before the first update."""

    batch: data.Batch  # ids (N, T), mask (N, T), lengths (N,)
    mask: Tensor  # (N, T - 1), batch.mask[:, 1:] on the device; of this shape are the next four
    logp: Tensor  # by the policy that sampled them
    ref_logp: Tensor  # by the reference
    entropy: Tensor
    values: Tensor  # 0 without a critic
    scores: Tensor  # (N,) of the answers
    indices: list[int]  # (N,) of the problems


def micro_batches_of(n: int, micro_batch: int, accumulation: int) -> list[list[slice]]:
    """n rows in the order drawn, cut into updates, and each update into its micro-batches."""
    size = micro_batch * accumulation
    updates = [range(n)[first : first + size] for first in range(0, n, size)]
    cut = [data.micro_batches(update, micro_batch) for update in updates]
    return [[slice(rows.start, rows.stop) for rows in update] for update in cut]


@torch.no_grad()
def score(setup: Setup, answers: list[dict]) -> Rollout:
    """Log-probs by the policy and the reference, and values, of every action of the answers."""
    # The old log-probs are computed here and not kept from sampling. They come from the same
    # forward, weights and micro-batches as the first update's, so its ratio p / p_old is exactly 1.
    # (In bfloat16 other micro-batches of the same rows round differently.)
    args, models = setup.args, setup.models
    examples = [answer["example"] for answer in answers]
    batch = data.collate(examples, setup.tokenizer.pad_id, models.actor.device)
    mask = batch.mask[:, 1:].to(batch.ids.device)  # column t is about token t + 1
    logp, ref_logp, entropy, values = torch.zeros(4, *mask.shape, device=mask.device)
    updates = micro_batches_of(len(answers), args.micro_batch, args.accumulation)
    for rows in distributed.deal(sum(updates, []), models.actor, models.reference):
        ids, token_mask, lengths = (x[rows] for x in batch)
        with setup.autocast():
            hidden = models.actor(ids, lengths)  # (b, T, D)
            logp[rows], entropy[rows] = next_token_logprobs(
                models.actor.vocabulary, hidden, ids, token_mask, args.temperature, entropy=True
            )
            ref_hidden = models.reference(ids, lengths)
            ref_logp[rows], _ = next_token_logprobs(
                models.reference.vocabulary, ref_hidden, ids, token_mask, args.temperature
            )
            if models.critic is not models.actor:
                hidden = models.critic(ids, lengths)
        if models.value_head:
            values[rows] = torch.where(mask[rows], models.value(hidden[:, :-1]), 0.0)
    distributed.add_up(logp, ref_logp, entropy, values)  # others' rows are 0 here
    distributed.reshard(models.reference)  # no backward will do it
    scores = torch.tensor([answer["score"] for answer in answers], device=mask.device)
    indices = [example.index for example in examples]
    return Rollout(batch, mask, logp, ref_logp, entropy, values, scores, indices)


def rollout_metrics(answers: list[dict], rollout: Rollout, rewards, returns, args) -> dict:
    """What metrics.jsonl says of a rollout (docs/metrics.md)."""
    n, mask, values = len(answers), rollout.mask, rollout.values
    k1, k3 = kl_estimates(rollout.logp, rollout.ref_logp)
    metrics = {
        **figures(rollout.scores, answers, args),
        # Truncated ones included; NaN if there is nothing to compare with.
        "exact_match": math.nan if args.unscored else sum(a["correct"] for a in answers) / n,
        "truncated": sum(answer["truncated"] for answer in answers) / n,
        "worked": sum("<<" in answer["completion"] for answer in answers) / n,
        "response_tokens": mask.sum().item() / n,
        "tokens": sum(rollout.batch.lengths),
        "kl": masked_mean(k3, mask).item(),  # per token
        "kl_sequence": torch.where(mask, k1, 0.0).sum().item() / n,  # per answer; may be negative
        "entropy": masked_mean(rollout.entropy, mask).item(),
    } | boxed.shares(answers)  # of MATH's grader
    if args.advantage:  # no critic
        return metrics
    outcomes = returns if args.lam == 1 else gae(rewards, values, mask, args.gamma, 1.0)[1]
    return metrics | {
        "explained_variance": explained_variance(values, outcomes, mask),
        "value": masked_mean(values, mask).item(),
        "return": masked_mean(returns, mask).item(),
    }


# ------------------------------------------------------------------------------------- the update


SHARES = ("policy_loss", "clipped", "approx_kl", "value_loss", "value_clipped")  # critic: last 2


def backward_micro(
    setup: Setup, rollout: Rollout, advantages, returns, rows: slice, count: Tensor, warming: bool
) -> tuple[Tensor, Tensor]:
    """Add to .grad what the micro-batch `rows` contributes to an update of `count` actions. Returns
    its share of the update's metrics, in the order of SHARES, and the largest |ratio - 1|."""
    args, models = setup.args, setup.models
    ids, token_mask, lengths = (x[rows] for x in rollout.batch)
    mask, old_logp = rollout.mask[rows], rollout.logp[rows]
    bonus = args.entropy_coef > 0
    with setup.autocast():
        with torch.set_grad_enabled(not warming):  # during warm-up the policy gets no gradient
            hidden = models.actor(ids, lengths)  # (b, T, D)
            logp, entropy = next_token_logprobs(
                models.actor.vocabulary, hidden, ids, token_mask, args.temperature, bonus
            )
        if models.critic is not models.actor:
            hidden = models.critic(ids, lengths)

    part = lambda x: masked_share(x, mask, count)  # noqa: E731
    policy = policy_loss(logp, old_logp, advantages[rows], args.clip, args.clip_high)
    loss, of_critic = part(policy[0]), ()
    if models.value_head:
        values = models.value(hidden[:, :-1])  # (b, T - 1), aligned with logp
        of_critic = value_loss(values, rollout.values[rows], returns[rows], args.value_clip)
        loss = loss + args.value_coef * part(of_critic[0])
    if bonus:
        loss = loss - args.entropy_coef * part(entropy)
    loss.backward()
    with torch.no_grad():
        k3 = kl_estimates(old_logp, logp)[1]  # from the policy that sampled
        shares = [part(x.float()) for x in (*policy, k3, *of_critic)]
        return torch.stack(shares), torch.where(mask, torch.expm1(logp - old_logp), 0.0).abs().max()


def update(setup: Setup, rollout: Rollout, advantages: Tensor, returns: Tensor, step: int) -> dict:
    """All gradient steps on one rollout. Returns their metrics: means, and what `health` reads."""
    args, models = setup.args, setup.models
    optimizers = [o for o in (setup.policy_optimizer, setup.value_optimizer) if o]
    warming = step < args.critic_warmup  # optimizer 0, the policy's, waits for the critic
    updates = micro_batches_of(len(rollout.indices), args.micro_batch, args.accumulation)
    moved = Moved(setup.policy_optimizer.params.values())
    sums = torch.zeros(3 + 2 * (models.value_head is not None), device=rollout.mask.device)
    norms, first_ratio_error = [], None
    for epoch in range(args.epochs):
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 1009 + epoch)
        for i in torch.randperm(len(updates), generator=generator).tolist():
            # Only the order of updates is drawn. Which answers share a micro-batch stays as scored.
            # Means are over all actions of the update.
            count = sum(rollout.mask[rows].sum() for rows in updates[i])
            shares, error = torch.zeros_like(sums), torch.zeros((), device=sums.device)
            for rows in distributed.deal(updates[i], models.actor, backward=not warming):
                found = backward_micro(setup, rollout, advantages, returns, rows, count, warming)
                shares, error = shares + found[0], torch.maximum(error, found[1])
            distributed.add_up(shares)
            sums += shares
            if first_ratio_error is None:  # no weight has changed yet, so every ratio must be 1
                first_ratio_error = distributed.largest(error).item()
            for optimizer in optimizers[int(warming) :]:
                distributed.add_up_gradients(optimizer.params.values())
            both = torch.stack([optimizer.grad_norm() for optimizer in optimizers])
            norms.append(both.tolist())  # the host waits for the GPU only here and in .item() above
            answered = rollout.indices[updates[i][0].start : updates[i][-1].stop]
            lower = "--lr or --value-lr" if models.value_head else "--lr"
            named = dict(zip(("gradient_norm", "value_gradient_norm"), norms[-1]))
            check_finite(step, answered, lower, **named)
            for optimizer, norm in [*zip(optimizers, both)][int(warming) :]:
                optimizer.step(norm, args.max_grad_norm)
            for optimizer in optimizers:
                optimizer.zero_grad()
    n = len(norms)
    means = [sum(column) / n for column in zip(*norms)]  # before gradients were scaled down
    return dict(zip(SHARES, (sums / n).tolist())) | {
        **dict(zip(("grad_norm", "value_grad_norm"), means)),
        "updates": n,
        "first_ratio_error": first_ratio_error,
        "moved": moved.share(),
    }


# --------------------------------------------------------------------------------------- the loop


def train(args, folder, found, prompt, problems, held_out, scored_by) -> int | None:
    """Train from the start or the last checkpoint. Returns the exit status if it stops early."""
    setup = set_up(args, found, prompt, scored_by)
    actor, tokenizer = setup.models.actor, setup.tokenizer
    optimizers = {"policy/": setup.policy_optimizer, "critic/": setup.value_optimizer}
    optimizers = {prefix: optimizer for prefix, optimizer in optimizers.items() if optimizer}
    show = {"reward": "reward", "kl": "kl_sequence", "length": "response_tokens"}
    warn = lambda metrics: health(metrics, args.critic_warmup)  # noqa: E731
    run = Run(folder, args.steps, optimizers, args, len(held_out), show, warn)

    def save() -> None:
        save_trained(actor, tokenizer, folder.path, found.name)
        save_critic(folder, setup.models, found)

    def validate() -> None:
        with setup.autocast(), sampler_of(actor, args.precision == "bf16") as sampler:
            rows = generate.answer_and_mark(
                sampler, tokenizer, held_out, prompt, args.max_new_tokens, args.rollout_batch,
                progress=run.watch,
            )  # fmt: skip
        metrics = generate.validation_metrics(rows)
        if args.reward:
            metrics["val_reward"] = mean_reward(scored_by, held_out, rows)
        better = run.record_validation(metrics)
        if args.keep == "best" and better:
            save()

    with run:  # continues from the last checkpoint; Ctrl-C saves the last whole step
        for step in range(run.first, args.steps):
            if run.validation_due():
                validate()
            if run.ends_early():  # --patience
                break
            run.phase("rollout")
            asked = data.problems_of_step(problems, step, args.rollouts, args.seed, args.group or 1)
            answers = sample(setup, asked, step, run.watch)  # 1 text, ids, right or wrong
            run.phase("score")
            rollout = score(setup, answers)  # 2 log-probs and values, without gradient
            mask = rollout.mask
            rewards = token_rewards(  # 3 the score at the last action, minus KL at every action
                rollout.scores, rollout.logp, rollout.ref_logp, mask, args.kl_coef
            )
            rewards = add_terms(rewards, answers)
            if args.advantage:  # instead of 4 and 5
                returns = None
                advantages = group_advantages(rewards, mask, args.group, args.advantage)
            else:
                advantages, returns = gae(rewards, rollout.values, mask, args.gamma, args.lam)  # 4
                advantages = whiten(advantages, mask)  # 5
            metrics = rollout_metrics(answers, rollout, rewards, returns, args)
            run.phase("update")
            metrics |= update(setup, rollout, advantages, returns, step)  # 6
            run.end_step(metrics, answers[:4])

        if args.keep != "best":
            save()  # before the last validation: what is trained is safe
        if run.validation_due():
            validate()
        kept = {"kept": "best"} | run.best if args.keep == "best" else run.validated
        shown = ("reward", "kl_sequence", "explained_variance", "response_tokens")
        run.finish({name: run.metrics[name] for name in shown if name in run.metrics} | kept)
    return run.status


def main(argv: list[str] | None = None) -> int:
    args = console.same_command(parse_args(argv))
    scored_by = start.own_reward(args) or reward
    prompt = start.prompt_of_init(args)
    found = start.find_start(args, "init")
    problems, held_out = start.split_problems(args, found)
    prompt = past.prompt_about(prompt, problems)
    plan.settle_ppo(args, found, prompt, problems, held_out)
    if args.dry_run:
        return 0
    with start.open_folder(args, "init", found, prompt, problems + held_out) as folder:
        if folder.finished:
            print(folder.already_finished())
        else:
            status = train(args, folder, found, prompt, problems, held_out, scored_by)
            if status is not None:
                return status
    print(past.what_next(args))
    return 0


if __name__ == "__main__":
    console.entry(main)
