"""A GPU's memory and time: what a run chooses for the memory that is free, and what a plan says of
a GPU that is not here (--gpu-memory): whether the run fits, which flags would make it fit, and how
long it takes at least.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from nanogsm import UserError, distributed
from nanogsm.run import machine
from nanogsm.transformer import Config

# -------------------------------------------------------------------------------------- which GPU

MOST_GIB = 10_000


def pick_compute(args) -> tuple[str, str]:
    """machine.pick_compute, or device and precision of the GPU that --gpu-memory is about. That GPU
    need not be here. It is taken to compute in bfloat16, as all do from Ampere on."""
    gib = args.gpu_memory
    if gib is None:
        return machine.pick_compute(args.device, args.precision)
    if not args.dry_run:
        raise UserError("--gpu-memory is for plans: add --dry-run (a run uses what is free on its "
                        "own GPU)")  # fmt: skip
    if not 0 < gib <= MOST_GIB:
        raise UserError(f"--gpu-memory is {gib:g}: give GiB above 0, at most {MOST_GIB:,}")
    if args.device not in ("auto", "cuda"):
        raise UserError(f"--gpu-memory plans for --device cuda, not for {args.device}")
    return "cuda", "bf16" if args.precision == "auto" else args.precision


def memory(args) -> int | None:
    """Bytes of a GPU that a run may use: all that --gpu-memory says, or what is free on the GPU
    here. None for other devices."""
    if args.gpu_memory:
        return int(args.gpu_memory * 2**30)
    # Ranks that split a step differently would wait for each other, so the fullest GPU decides.
    free = distributed.gathered(machine.free_memory(args.device))
    return None if None in free else min(free)


def devices(args) -> int:
    """How many devices run. A plan with --shard N is for N of them, also without torchrun."""
    return max(distributed.COUNT, args.shard)


# ------------------------------------------------------------------------------ what fits into it

RESERVED = 1.3  # PyTorch holds more than it uses, because tensors of changing sizes leave gaps
UPDATING = ("gradients", "activations", "vocabulary", "gathered")  # not there during sampling
SAMPLING = ("cache", "sampling")  # not there while weights are updated
MOST_AT_ONCE = 16  # rows of a micro-batch; more give a large GPU nothing


def fits(budget: dict[str, float], free: int, leave_out: tuple[str, ...]) -> bool:
    return RESERVED * _sum(budget, leave_out) <= free


def needed(budget: dict[str, float]) -> float:
    """Bytes that a GPU must have free for all of a run."""
    return RESERVED * max(_sum(budget, SAMPLING), _sum(budget, UPDATING))


def _sum(budget: dict[str, float], leave_out: tuple[str, ...]) -> float:
    return sum(size for name, size in budget.items() if name not in leave_out)


def fit_card(args, budget: Callable[[], dict[str, float]], free: int | None) -> str:
    """Choose what the command line left open for a GPU with `free` bytes: the fastest split of a
    step that fits. Returns what the plan says about it; "" without a GPU.

    Recomputing is slow, so micro-batches become smaller first, down to 4. Below 4 they are tried
    last, with all of the recomputation. The product micro_batch x accumulation stays as it is.
    budget() is the memory with args as they are.
    """
    choices = vars(args).pop("left_open")
    if free is None or args.tiny:
        return ""
    size = args.micro_batch * args.accumulation
    micro_batches, is_open = [args.micro_batch], {"micro_batch", "accumulation"} <= set(choices)
    if is_open:
        most = min(MOST_AT_ONCE, -(-size // devices(args)))
        divisors = [n for n in range(most, 0, -1) if size % n == 0]
        micro_batches = [n for n in divisors if n >= 4] or divisors
    kinds = ["none", "light", "full"] if "checkpointing" in choices else [args.checkpointing]
    splits = [(n, kind) for kind in kinds for n in micro_batches]
    fewest = micro_batches[-1] if is_open else 1
    splits += [(n, kinds[-1]) for n in (2, 1) if n < fewest and size % n == 0]
    for micro_batch, args.checkpointing in splits:  # if none fits, the last stays
        args.micro_batch, args.accumulation = micro_batch, size // micro_batch
        if fits(budget(), free, SAMPLING):
            break
    if "rollout_batch" in choices:
        for args.rollout_batch in (512, 256, 128, 64, 32):
            if fits(budget(), free, UPDATING):
                break
    tight = "" if needed(budget()) <= free else ", which may be too little"
    sampled = ""
    if "rollout_batch" in choices:
        sampled = f", {min(args.rollout_batch, args.rollouts)} answers sampled at once"
    return f", {free / 2**30:.0f} GiB free{tight}; checkpointing {args.checkpointing}{sampled}"


# ------------------------------------------------------------------------- what would make it fit

Budget = Callable[[], dict[str, float]]


def judge(args, left_open: list[str], budget_of: Callable[..., Budget]) -> Iterator[tuple]:
    """Lines of a plan, (name, text): whether the run fits, and if not, which flags make it fit.

    args: after fit_card. left_open: what the command line had left to fit_card. budget_of(args):
    fit_card's `budget` for other args. Flags are tried in the order of what they change: how a step
    is split, the moments, the critic; only then LoRA or more devices.
    """
    left_open = [] if args.tiny else left_open  # fit_card chooses nothing for the embedded model
    free, budget = memory(args), budget_of(args)()
    enough = needed(budget) <= free
    verdict = "it fits" if enough else "it does NOT fit"
    yield "card", f"{args.gpu_memory:g} GiB: {verdict} (needs {_in_gib(budget)}, an estimate)"
    if enough:
        return

    def tried(changes: dict) -> str | None:
        """What the same command needs with these flags; None if that does not fit."""
        other = argparse.Namespace(**vars(args) | changes | {"left_open": left_open})
        if other.shard > 1 and getattr(other, "critic", "shared") == "separate":
            return None  # flags.fill_in refuses it
        budget = budget_of(other)
        fit_card(other, budget, free)
        return _in_gib(budget()) if needed(budget()) <= free else None

    def search(usual: list[list[dict]], last: list[dict]) -> str | None:
        """A value of `last` that fits, with as few other changes as possible."""
        if not last or not tried(_together(option[-1] for option in [last, *usual])):
            return None  # with all of them it does not
        for count in range(len(usual) + 1):
            for some in itertools.combinations(usual, count):
                for values in itertools.product(last, *some):
                    if need := tried(_together(values)):
                        return f"{_as_flags(_together(values))}: {need}"
        return None

    usual, *others = _changes(args, left_open)
    mild = next(filter(None, (search(usual[:i], last) for i, last in enumerate(usual))), None)
    found = [mild] if mild else list(filter(None, (search(usual, last) for last in others)))
    yield from (("or add" if i else "add", text) for i, text in enumerate(found))
    if not found:
        flags = ", ".join(_as_flags(option[-1]) for option in [*usual, *others] if option)
        yield "add", f"no flag helps (tried, also together: {flags or 'none is left'})"


def _changes(args, left_open: list[str]) -> tuple[list[list[dict]], list[dict], list[dict]]:
    """Flags that save memory and are not given yet: (the usual ones, --lora, --shard). Each flag is
    a list of values, the mildest first. What the plan itself chooses is not among them."""
    size, kinds = args.micro_batch * args.accumulation, ["none", "light", "full"]
    rollout_batch, critic = getattr(args, "rollout_batch", 0), getattr(args, "critic", "shared")
    usual = [
        [{"checkpointing": kind} for kind in kinds[kinds.index(args.checkpointing) + 1 :]],
        [{"micro_batch": n, "accumulation": size // n} for n in _smaller(args.micro_batch, size)],
        [{"rollout_batch": n} for n in (256, 128, 64, 32, 16, 8) if n < rollout_batch],
        [{"optim": "adamw8bit"}] * (args.optim == "adamw"),
        [{"critic": "shared"}] * (critic == "separate"),
    ]  # fmt: skip
    usual = [option for option in usual if option and not set(option[0]) <= set(left_open)]
    lora = [{"lora": True}] * (not args.lora and args.shard == 1)
    shared_by = [n for n in (2, 4, 8, 16) if args.shard < n <= size and not args.lora]
    here = distributed.COUNT  # under torchrun N has to divide it
    parts = [{"shard": n} for n in shared_by if here == 1 or here % n == 0]
    return usual, lora, parts


def _smaller(micro_batch: int, size: int) -> Iterator[int]:
    """The divisors of a step's size that are below micro_batch, the largest first. A size of
    millions has hundreds, and a plan that tried them all would take minutes. So above MOST_AT_ONCE
    each is at most half of the one before."""
    below = micro_batch
    for n in range(micro_batch - 1, 0, -1):
        if size % n == 0 and (n <= MOST_AT_ONCE or 2 * n <= below):
            yield (below := n)


def _together(changes: Iterable[dict]) -> dict:
    return {name: value for change in changes for name, value in change.items()}


def _in_gib(budget: dict[str, float]) -> str:
    need = needed(budget) / 2**30
    return f"{RESERVED} x {need / RESERVED:.1f} = {need:.1f} GiB"


def _as_flags(changes: dict) -> str:
    words = [f"--{name.replace('_', '-')} {value}" for name, value in changes.items()]
    text = " ".join(words).replace(" True", "")
    if n := changes.get("shard"):
        text += f" on {n} such cards (torchrun --nproc-per-node {n})"
    return text


# --------------------------------------------------------------------- the least time it can take

# (bfloat16 TFLOP/s without sparsity, float32 TFLOP/s, memory in GB/s), as NVIDIA's data sheets have
# them: H100 SXM, A100 SXM of 80 GB, GeForce RTX 4090.
CARDS = {
    "an H100": (989, 67, 3350),
    "an A100": (312, 19.5, 2039),
    "an RTX 4090": (165, 82.6, 1008),
}


class Weights(NamedTuple):
    """How many entries the matrices of a model have."""

    layers: int
    vocabulary: int
    adapters: int  # 0 in full fine-tuning


def weights_of(config: Config, everything: list, adapters: list) -> Weights:
    """everything: the shapes of a model's own weights, adapters: of those on it."""
    vocabulary = config.vocab_size * config.hidden_size
    matrices = [s for s in everything if len(s) == 2 and s[0] != config.vocab_size]
    return Weights(sum(map(math.prod, matrices)), vocabulary, sum(map(math.prod, adapters)))


def forward_flops(w: Weights, tokens: float, predicted: float) -> float:
    """2 for each weight and token, and the vocabulary for the tokens that are predicted."""
    return 2 * ((w.layers + w.adapters) * tokens + w.vocabulary * predicted)


def update_flops(w: Weights, tokens: float, predicted: float, checkpointing: str) -> float:
    """Operations of forward and backward over `tokens`, of which `predicted` are supervised.

    A weight takes 2 a token forward, 2 for the gradient of its input and 2 for its own, which a
    frozen one does not need. Full checkpointing computes the layers forward once more. Attention's
    scores, norms and the optimizer are left out.
    """
    again = checkpointing == "full"
    passes = 2 if w.adapters else 3
    layers = (passes + again) * w.layers + (3 + again) * w.adapters
    return 2 * (layers * tokens + passes * w.vocabulary * predicted)


def ppo_work(args, w: Weights, asked: float, answer: float, slot: float) -> tuple[float, float]:
    """(operations, bytes that each device reads while it samples) of a run of PPO.

    asked, answer: mean tokens of a prompt and of an answer. slot: bytes of the KV cache for each
    token. To sample one token for each row of a batch, all weights are read, and what each row's
    cache has so far. Prompts, scoring by policy and reference, and updates are operations. While
    only the critic is trained, the policy's update is a forward pass.
    """
    tokens, actions = args.rollouts * (asked + answer), args.rollouts * answer
    prompts = forward_flops(w, args.rollouts * asked, 0)
    of_policy = forward_flops(w, tokens, actions)
    of_reference = forward_flops(w._replace(adapters=0), tokens, actions)
    update = update_flops(w, tokens, actions, args.checkpointing)
    warming = min(args.critic_warmup, args.steps)
    updates = args.epochs * (warming * of_policy + (args.steps - warming) * update)
    rows = -(-args.rollouts // devices(args))  # of each device
    weights = (w.layers + w.vocabulary) * (2 if args.precision == "bf16" else 4)
    batches = -(-rows // args.rollout_batch)
    read = batches * answer * weights + rows * answer * (asked + answer / 2) * slot
    return args.steps * (prompts + of_policy + of_reference) + updates, args.steps * read


def least_time(args, flops: float, read: float = 0) -> str:
    """A lower bound of the time for so many operations (of all devices) and bytes (of each)."""
    times = []
    for name, (bf16, fp32, bandwidth) in CARDS.items():
        rate = bf16 if args.precision == "bf16" else fp32
        seconds = flops / (rate * 1e12 * devices(args)) + read / (bandwidth * 1e9)
        bytes_read = f", {bandwidth:,} GB/s" * (read > 0)
        times.append(f"{_duration(seconds)} on {name} ({rate:g} TFLOP/s{bytes_read})")
    return f"lower bound at peak rates: {', '.join(times)}"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
