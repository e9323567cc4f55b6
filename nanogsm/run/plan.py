"""What a run will do and how much memory it will take: the lines at its start, and --dry-run.

The memory is an estimate from the config alone. It leaves out what kernels, the allocator and the
process itself take.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from nanogsm import data, lora
from nanogsm.fast.cpu import VOCABULARY_BLOCK
from nanogsm.fast.head import KEPT_EXPONENTIALS, block_rows
from nanogsm.model import load_adapter, read_config
from nanogsm.optim import block_size
from nanogsm.run import card, known, past
from nanogsm.run.card import fit_card
from nanogsm.transformer import Config, Transformer

# ------------------------------------------------------------------------------------- the memory


def at_both_ends(c: Config) -> int:
    """Entries of the embedding and, where it is another matrix, of the output head."""
    return c.vocab_size * c.hidden_size * (1 if c.tied else 2)


def model_bytes(c: Config, total: int, trained: int, bf16: bool) -> int:
    """A model's weights during training. If all are trained: float32, plus the bfloat16 copies of
    blocks' linear layers that autocast keeps. With adapters: float32 adapters and a bfloat16 base.
    With float32 products that base has its checkpoint's dtype, and its embedding and output head
    are cast once."""
    ends = at_both_ends(c)
    if trained == total:
        return 4 * total + 2 * (total - ends) * bf16
    base = 2 if bf16 else c.dtype.itemsize
    return (total - trained) * base + ends * (4 - base) * (not bf16) + 4 * trained


def frozen_copy_bytes(c: Config, total: int, bf16: bool) -> int:
    """A copy with linear layers rounded to bfloat16, and the embedding if that is lossless."""
    embedding = c.vocab_size * c.hidden_size
    lossless = bf16 and c.dtype == torch.bfloat16
    return embedding * (2 if lossless else 4) + (total - embedding) * (2 if bf16 else 4)


def activation_bytes(c: Config, tokens: int, frozen: bool, bf16: bool, checkpointing: str) -> int:
    """What a forward over `tokens` keeps for backward. A block keeps gate, up and two products of
    them; q, k and v with their normed and rotated forms; the norms' inputs and outputs. With full
    checkpointing: each block's input, and one whole block. With light: also the matrix products."""
    D, F, N = c.hidden_size, c.intermediate_size, c.head_dim
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    product = 2 if bf16 else 4  # bytes of a number that goes into a matrix product
    stream = 2 if bf16 and frozen else 4  # of one in the residual stream: the weights' dtype
    block = tokens * (4 * F * product + 3 * heads * N * product + 8 * D * stream)
    inputs = tokens * D * stream
    products = tokens * product * (2 * F + 2 * D + (heads + c.num_attention_heads) * N)
    each = {"none": block, "light": inputs + products, "full": inputs}[checkpointing]
    return c.num_hidden_layers * each + block


def head_bytes(
    c: Config, tokens: int, device: str, trained: bool, bf16: bool, entropy: bool = False
) -> int:
    """The vocabulary: a block of logits, its exponentials (more with the entropy) and its rows; the
    gradients of the hidden states; the exponentials kept where the vocabulary is trained."""
    kind = device.partition(":")[0]
    block = min(block_rows(kind, tokens, c.hidden_size), c.vocab_size)
    logits = block * max(tokens, c.hidden_size)
    exponentials = min(KEPT_EXPONENTIALS[kind], (1 + entropy) * tokens * c.vocab_size)
    kept = exponentials * (2 if bf16 else 4) * trained
    return (
        kept + (20 if entropy else 16) * logits + (18 if entropy else 12) * tokens * c.hidden_size
    )


def moments_bytes(shapes: Iterable[tuple[int, ...]], optim: str) -> int:
    """AdamW's moments of parameters of these shapes."""
    total = 0
    for shape in shapes:
        block = block_size(shape) if optim == "adamw8bit" else None
        total += math.prod(shape) * (2 + 8 / block if block else 8)  # two codes, two scales a block
    return int(total)


def cache_bytes(c: Config, rows: int, length: int, bf16: bool) -> int:
    """The KV cache of rows of that many tokens."""
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    return rows * length * per_token * (2 if bf16 else 4)


def sampling_bytes(c: Config, total: int, rows: int, bf16: bool, device: str) -> int:
    """What drawing a token for each row takes: logits, probabilities and their sums. A CPU handles
    one block of the vocabulary at a time, but has a packed copy of all weights."""
    product = 2 if bf16 else 4
    logit = 4 if c.final_logit_softcapping else product
    if device != "cpu":
        return rows * c.vocab_size * (4 + 4 + 8 + 8)
    block = min(VOCABULARY_BLOCK, c.vocab_size)
    packed = total - (at_both_ends(c) - c.vocab_size * c.hidden_size)  # all but an embedding alone
    return rows * (c.vocab_size * logit + block * (4 + 4 + 8 + 8)) + packed * product


def print_budget(budget: dict[str, float]) -> None:
    # PPO's sampling and its updates take turns: the smaller of the two needs no memory of its own.
    turns = [sum(budget.get(name, 0) for name in names) for names in (card.SAMPLING, card.UPDATING)]
    budget = budget | {"not at once": budget.get("not at once", 0) - min(turns)}
    total = sum(budget.values())
    scale, unit = (2**30, "GiB") if total >= 2**30 else (2**20, "MiB")
    for name, size in (budget | {"in all": total}).items():
        if size:
            note = ", an estimate" * (name == "in all")
            print(f"  {name:<12} {size / scale:7.2f} {unit}{note}")


# -------------------------------------------------------------------------------------- the plans

FEW_STEPS = 20  # of SFT, in which little is learnt


def shapes_of(config: Config, args, continued: Path | None = None) -> tuple[list, list]:
    """Shapes of a model's own weights, and of adapters on it. Nothing is allocated. continued: the
    adapter that is trained further, whose layers count if its weights are on this disk."""
    with torch.device("meta"):
        model = Transformer(config)
    everything = [p.shape for p in model.parameters()]
    if not args.lora and getattr(args, "critic", None) != "separate":
        return everything, []
    if continued and (continued / "adapter_model.safetensors").is_file():
        load_adapter(model, continued)
    else:
        lora.add_lora(model, args.lora_r, args.lora_alpha)
    return everything, [p.shape for p in model.parameters() if p.requires_grad]


def entries(shapes: list) -> int:
    return sum(map(math.prod, shapes))


def say(name: str, text: str) -> None:
    print(f"{name:<12} {text}")


def _devices(args) -> str:
    shared = f", every {args.shard} share one copy" if args.shard > 1 else ""
    count = card.devices(args)
    return f"{count} x {args.device.partition(':')[0]}{shared}" if count > 1 else args.device


def _held_out(args, problems: list) -> str:
    if not problems:
        return "0 held out, so no validation"
    return f"{args.val_examples} held out" + f", {args.val_use} used" * bool(args.val_use)


def _say_patience(args, held_out: list) -> None:
    if args.patience and len(held_out) < 512:
        points = 100 * math.sqrt(0.3 * 0.7 / len(held_out))
        say("patience", f"the standard error of a validation on {len(held_out)} problems is "
            f"{points:.1f} points at 30% right; with --val-examples 512 it is 2.0")  # fmt: skip


def settle_sft(args, found, config: Config, examples: list, held_out: list, steps: int) -> None:
    """Choose what is open on a GPU and print the plan of train_sft.py; with --dry-run also its
    memory."""
    lengths, made = [len(example.ids) for example in examples], {}

    def needs(args) -> tuple[list, list, Callable]:
        """What the shapes are with these args, and a function that returns the memory."""
        if args.lora not in made:
            made[args.lora] = shapes_of(config, args, found.adapter)
        everything, adapters = made[args.lora]
        shapes = adapters if args.lora else everything
        total = entries(everything) + entries(adapters)
        return everything, shapes, lambda: sft_budget(args, config, total, shapes, lengths)

    left_open, (everything, shapes, budget) = args.left_open, needs(args)
    fitted = fit_card(args, budget, card.memory(args))
    total, trained = entries(everything) + entries(shapes) * args.lora, entries(shapes)
    supervised = data.supervised_tokens(examples)
    kind = config.model_type
    say("model", f"{args.model} ({kind}), {total:,} parameters, {trained:,} trained")
    if found.adapter:
        own = f"trained further, with its r {args.lora_r} and alpha {args.lora_alpha:g}"
        say("adapter", own if args.lora else "merged into its base, which is trained in full")
    say("data", f"{len(examples):,} examples, {sum(lengths):,} tokens, {supervised:,} supervised, "
        f"longest {max(lengths)}; {_held_out(args, held_out)}")  # fmt: skip
    _say_patience(args, held_out)
    say("steps", f"{steps:,} of {args.micro_batch} x {args.accumulation} examples, "
        f"{args.epochs} epoch{'s' * (args.epochs > 1)}; lr {args.lr:g} to {args.min_lr:g}, "
        f"warm-up {args.warmup:g} ({args.recipe} recipe); {args.optim}")  # fmt: skip
    if steps < FEW_STEPS:
        say("note", f"{len(examples)} examples make only {steps} step{'s' * (steps > 1)}: more "
            "--epochs, or a smaller --micro-batch x --accumulation, make more")  # fmt: skip
    say("compute", f"{_devices(args)}, {args.precision}{fitted}")
    if args.dry_run:
        print_budget(budget())
    if args.gpu_memory:
        for name, text in card.judge(args, left_open, lambda args: needs(args)[-1]):
            say(name, text)
        weights = card.weights_of(config, everything, shapes if args.lora else [])
        flops = card.update_flops(weights, sum(lengths), supervised, args.checkpointing)
        say("time", card.least_time(args, args.epochs * flops))


def rows_at_once(args) -> int:
    """Rows of a micro-batch: fewer than --micro-batch if a step has too few for all devices."""
    each = -(-args.micro_batch * args.accumulation // card.devices(args))
    return min(args.micro_batch, each)


def sft_budget(args, config: Config, total: int, shapes: list, lengths: list) -> dict[str, float]:
    """Bytes by purpose. total: all parameters, adapters included; shapes: those of the trained
    ones; lengths: tokens of the examples."""
    bf16, trained = args.precision == "bf16", entries(shapes)
    tokens = sum(sorted(lengths)[-rows_at_once(args) :])  # the longest micro-batch
    activations = activation_bytes(config, tokens, args.lora, bf16, args.checkpointing)
    # With one micro-batch, activations go as gradients come. (The embedding's gradient, which is
    # the output projection's, comes first.) With several, earlier gradients are there.
    later = 4 * (trained - config.vocab_size * config.hidden_size) * (not args.lora)
    return in_parts(args.shard, config, total, {
        "weights": model_bytes(config, total, trained, bf16),
        "gradients": 4 * trained,
        "optimizer": moments_bytes(shapes, args.optim),
        "activations": activations,
        "vocabulary": head_bytes(config, tokens, args.device, not args.lora, bf16),
        "not at once": -min(activations, later) if args.accumulation == 1 else 0,
    })  # fmt: skip


def disk_bytes(args, config: Config) -> tuple[float, float]:
    """(a checkpoint, the saved weights) of a run, in bytes. A value head is too small to count."""
    everything, adapters = shapes_of(config, args)
    policy = adapters if args.lora else everything
    critic = adapters if getattr(args, "critic", None) == "separate" else []
    trained = policy + critic
    saved = (4 if args.lora else config.dtype.itemsize) * entries(policy) + 4 * entries(critic)
    return 4 * entries(trained) + moments_bytes(trained, args.optim), saved


def in_parts(n: int, c: Config, total: int, budget: dict[str, float]) -> dict[str, float]:
    """A budget for each of n devices that share one copy of everything (--shard). What runs is
    gathered for its time: two blocks, the embedding (and the output head), its gradient, and that
    once more to be dealt out. Sampling has a whole copy."""
    if n == 1:
        return budget
    embedding, ends = c.vocab_size * c.hidden_size, at_both_ends(c)
    block = (total - ends) / c.num_hidden_layers
    parts = {"weights": 4 * total / n, "not at once": 0}
    parts |= {k: budget[k] / n for k in ("gradients", "optimizer", "reference") if k in budget}
    if "sampling" in budget:
        parts["sampling"] = budget["sampling"] + 2 * (total - embedding) + 4 * embedding
    return budget | parts | {"gathered": 4 * (3 * ends + 2 * block)}


def settle_ppo(args, found, prompt: data.Prompt, problems: list, held_out: list) -> None:
    """Choose what is open on a GPU and print the plan of train_ppo.py; with --dry-run also its
    memory."""
    config, tokenizer = read_config(found.base), known.tokenizer(found)
    prompts = [known.encode(tokenizer, prompt, p.question)[0] for p in problems]
    longest, made = max(map(len, prompts)) + args.max_new_tokens, {}

    def needs(args) -> tuple[list, list, list, Callable]:
        """What the shapes are with these args, and a function that returns the memory."""
        kind = args.lora, args.critic
        if kind not in made:
            made[kind] = shapes_of(config, args)
        everything, adapters = made[kind]
        policy = adapters if args.lora else everything
        head = [(1, config.hidden_size), (1,)] * (args.group is None)
        critic = adapters * (args.critic == "separate") + head
        budget = lambda: ppo_budget(args, config, everything, policy, critic, longest)  # noqa: E731
        return everything, policy, critic, budget

    left_open, (everything, policy, critic, budget) = args.left_open, needs(args)
    fitted = fit_card(args, budget, card.memory(args))
    size = min(args.rollouts, args.micro_batch * args.accumulation)
    updates, rest = math.ceil(args.rollouts / size), args.rollouts % size
    last = f" (the last: {rest})" if rest else ""
    total, earlier = entries(everything), past.held_out_by(args.init, args.data)
    say("start", f"{args.init} ({config.model_type}), {total:,} parameters; {prompt}")
    instead = f"no critic: {args.advantage}, groups of {args.group} answers"
    other = instead if args.group else f"{entries(critic):,} of the critic ({args.critic})"
    say("trained", f"{entries(policy):,} of the policy, {other}")
    say("data", f"{len(problems):,} problems, {_held_out(args, held_out)}; prompt and answer up "
        f"to {longest} tokens")  # fmt: skip
    _say_patience(args, held_out)
    if earlier not in (None, args.val_examples):
        say("note", f"{args.init} held out {earlier} problems, this run {args.val_examples}: some "
            "are held out by one and trained on by the other")  # fmt: skip
    if found.adapter and args.lora:
        say("note", "base and adapter together are the start and the reference; the result is one "
            "adapter with both changes")  # fmt: skip
    passes = f"{args.epochs} passes with " * (args.epochs > 1)
    say("steps", f"{args.steps} of {args.rollouts} answers; {passes}{updates} "
        f"update{'s' * (updates > 1)} of {size}{last}, in micro-batches of "
        f"{min(args.micro_batch, size)}; lr {args.lr:g}"
        f"{'' if args.group else f', critic {args.value_lr:g}'} ({args.recipe} recipe); "
        f"{args.optim}")  # fmt: skip
    if args.reward:
        say("reward", args.reward + "; exact match is logged beside it" * (not args.unscored))
    if args.advantage == "grpo" and args.kl_coef:
        say("note", "GRPO scales up the KL penalties of groups whose scores are equal: "
            "--kl-coef 0 avoids that")  # fmt: skip
    if args.critic_warmup:
        whole = ": the policy will not change" * (args.critic_warmup >= args.steps)
        say("warm-up", f"the first {args.critic_warmup} steps train the critic alone{whole}")
    say("compute", f"{_devices(args)}, {args.precision}{fitted}")
    if args.dry_run:
        print_budget(budget())
    if args.gpu_memory:
        for name, text in card.judge(args, left_open, lambda args: needs(args)[-1]):
            say(name, text)
        answers = [known.encode(tokenizer, prompt, "", p.answer)[1] for p in problems]
        answer = min(sum(map(sum, answers)) / len(answers), args.max_new_tokens)
        asked = sum(map(len, prompts)) / len(prompts)
        weights = card.weights_of(config, everything, policy if args.lora else [])
        slot = cache_bytes(config, 1, 1, args.precision == "bf16")
        least = card.least_time(args, *card.ppo_work(args, weights, asked, answer, slot))
        say("time", f"{least}, if answers have {answer:.0f} tokens, as in the data")


def ppo_budget(args, config: Config, everything, policy, critic, longest: int) -> dict[str, float]:
    bf16, frozen, separate = args.precision == "bf16", args.lora, args.critic == "separate"
    total, policy_size, critic_size = map(entries, (everything, policy, critic))
    weights = model_bytes(config, total + policy_size * frozen, policy_size, bf16)
    if frozen and not bf16:
        weights = 4 * (total + policy_size)
    tokens = rows_at_once(args) * longest
    at_once = min(-(-args.rollouts // card.devices(args)), args.rollout_batch)
    activations = activation_bytes(config, tokens, frozen, bf16, args.checkpointing)
    return in_parts(args.shard, config, total, {
        "weights": weights + 4 * critic_size,
        "reference": 0 if frozen else frozen_copy_bytes(config, total, bf16),
        "gradients": 4 * (policy_size + critic_size),
        "optimizer": moments_bytes(policy + critic, args.optim),
        "activations": (1 + separate) * activations,
        "vocabulary": head_bytes(config, tokens, args.device, not frozen, bf16, entropy=True),
        "cache": cache_bytes(config, at_once, longest, bf16),
        "sampling": sampling_bytes(config, total, at_once, bf16, args.device),
    })  # fmt: skip
