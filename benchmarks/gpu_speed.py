"""The stages of gpu.py that measure time and memory: sft, decode, ppo, the peers, profile, study.

The model has gemma-2b's shape and random weights. Nothing is read from a disk.
"""

import argparse
import math
import random
import time
from types import SimpleNamespace

import torch
from torch import nn

import train_ppo
import train_sft
from benchmarks.generate_speed import by_peer
from benchmarks.gpu_parts import (
    STEP_EXAMPLES,
    Skipped,
    at_least,
    at_most,
    examples,
    free,
    gib,
    new_model,
    peaks,
    peer_of,
    row,
    time_steps,
    trainable,
    trained,
)
from benchmarks.sides import matrices_of, matrix_rate, now, read_rate
from nanogsm import data, generate, lora
from nanogsm.model import set_checkpointing
from nanogsm.optim import AdamW
from nanogsm.run import card, plan
from nanogsm.run.machine import autocast_of

PEAK = 989e12  # NVIDIA's dense bfloat16 FLOP/s of H100 and H200 (SXM)

# --------------------------------------------------------------------------------------------- sft


def sft(work):
    """Whole training steps of 16 examples: speed, utilisation, and memory next to the plan's."""
    rate, start = matrix_rate(work.device, torch.bfloat16), time.perf_counter()
    for method, goal, share in (("full", 0.45, 0.6), ("LoRA", 0.40, 1.0)):
        until = start + share * (work.deadline - start)
        free(work.device)
        model = trainable(work, method)
        optimizer = AdamW(trained(model).items(), 1e-5, bits=8)
        done = {}
        for micro_batch, checkpointing in work.size.settings:
            name = f"{method}, {micro_batch} {checkpointing}"
            if time.perf_counter() > until:
                yield row(name, "left out", note="its share of the stage's time is over")
                continue
            set_checkpointing(model, checkpointing)
            optimizer.zero_grad()
            free(work.device)
            try:
                found = time_sft(work, model, optimizer, micro_batch)
            except torch.OutOfMemoryError:
                found = None  # outside this block, what the failed step held is let go
            if found is None:
                yield row(name, "out of memory")
                continue
            done[micro_batch, checkpointing] = found
            yield speed_row(name, model, found, rate)
            yield memory_row(work, name, model, checkpointing, found)
        fastest = min(done.values(), key=lambda found: found["step_s"], default={})
        yield row(f"{method}: fastest", fastest.get("tokens_per_s"), "tokens/s")
        yield row(f"{method}: fastest step", fastest.get("step_s"), "s")
        shares = [
            needed(model, found) / found["backward_s"] / rate
            for (_, checkpointing), found in done.items()
            if checkpointing == "none"  # else some products are computed twice
        ]
        what = f"{method}: utilisation, forward and backward"
        yield at_least(what, max(shares, default=None), goal, "of the measured matrix rate")
        del model, optimizer


def time_sft(work, model, optimizer, micro_batch: int) -> dict:
    autocast = autocast_of(work.device, "bf16")

    def backward(step) -> None:
        float(train_sft.backward_step(model, step, micro_batch, 0, autocast))

    return time_steps(work, micro_batch, backward, lambda: optimize(optimizer))


def optimize(optimizer) -> None:
    """What train_sft.train does after the backward pass."""
    norm = optimizer.grad_norm()
    norm.item()  # looked at before the update, as there
    optimizer.step(norm, 1.0)
    optimizer.zero_grad()


def needed(model, found: dict) -> float:
    """Operations of a step's products with weights, each done once."""
    return card.update_flops(matrices_of(model), found["tokens"], found["supervised"], "none")


def speed_row(name: str, model, found: dict, rate: float) -> dict:
    speed = needed(model, found) / found["backward_s"]
    milliseconds = f"{1000 * found['backward_s']:.0f} + {1000 * found['optimizer_s']:.0f} ms"
    share = f"{speed / PEAK:.0%} of 989 and {speed / rate:.0%} of {rate / 1e12:.0f} TFLOP/s"
    return row(name, found["tokens_per_s"], "tokens/s", note=f"{milliseconds}, {share}", **found)


def memory_row(work, name: str, model, checkpointing: str, found: dict) -> dict:
    """The peak of what tensors held next to what nanogsm.run.plan expects."""
    allocated, shapes = found["allocated"], [p.shape for p in trained(model).values()]
    args = argparse.Namespace(
        lora=bool(lora.adapters(model)), precision="bf16", optim="adamw8bit", device=work.device,
        checkpointing=checkpointing, micro_batch=1, accumulation=found["micro_batches"],
        shard=1,
    )  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    budget = plan.sft_budget(args, model.config, total, shapes, [found["tokens_at_once"]])
    planned = sum(budget.values())
    met = None if allocated is None else abs(allocated - planned) <= 0.1 * planned
    goal = f"{gib(planned):.1f} +- 10% (the plan)"
    note = f"reserved {gib(found['reserved']):.1f}" if allocated else ""
    what = f"{name}: peak of tensors"
    return row(what, gib(allocated), "GiB", goal, met, note, budget=budget)


# ------------------------------------------------------------------------------------------ decode


def decode(work):
    """Tokens after a prompt: time for each step, and share of the memory's bandwidth."""
    free(work.device)
    rate, model = read_rate(work.device), new_model(work, torch.bfloat16)
    seconds = {}
    for batch in work.size.batches:
        seconds[batch] = yield from decode_rows(work, model, batch, 0.0, rate)
    try:
        yield from peer_rows(work, peer_of(model), seconds)
    except Skipped as reason:
        yield row("transformers' generate()", "skipped", note=str(reason))
    for batch in work.size.batches:
        yield from decode_rows(work, model, batch, 1.0, rate)


def decode_rows(work, model, batch: int, temperature: float, rate: float):
    """Two rows. Returns the seconds of all new tokens with their prompts."""
    size = work.size
    whole, step = time_decoding(work, model, batch, temperature)
    cache = plan.cache_bytes(model.config, batch, size.prompt + size.new_tokens // 2, True)
    share = (sum(p.nbytes for p in model.parameters()) + cache) / step / rate
    name = f"{'sampled' if temperature else 'greedy'}, batch {batch}"
    yield row(f"{name}: a step", 1000 * step, "ms", note=f"{batch / step:,.0f} tokens/s")
    what = (f"{name}: bandwidth", share)
    unit = "of what is measured"
    yield at_least(*what, 0.6, unit) if batch <= 64 else row(*what, unit)
    return whole


def peer_rows(work, peer, seconds: dict[int, float]):
    """Greedy answers by transformers' generate(), for the same prompts."""
    new_tokens = work.size.new_tokens
    for batch in work.size.peer_batches:
        asked = prompts(work, batch)
        by_peer(peer, asked, frozenset(), 2, batch)  # not counted
        start = now(work.device)
        made = by_peer(peer, asked, frozenset(), new_tokens, batch)
        theirs, ours, tokens = now(work.device) - start, seconds[batch], sum(map(len, made))
        note = f"{tokens / ours:,.0f} and {tokens / theirs:,.0f} tokens/s"
        goal = {"goal": "at least 5", "met": theirs / ours >= 5} if batch == 256 else {}
        name = f"greedy, batch {batch}: against transformers'"
        yield row(name, theirs / ours, "x", note=note, **goal)


def prompts(work, n: int) -> list[list[int]]:
    draw, vocab = random.Random(n), work.size.config.vocab_size
    return [[draw.randrange(8, vocab) for _ in range(work.size.prompt)] for _ in range(n)]


def time_decoding(work, model, batch: int, temperature: float) -> tuple[float, float]:
    """Seconds of all new tokens with the prompts, and of one token's step."""
    size, asked = work.size, prompts(work, batch)

    def run(tokens: int) -> float:
        start = now(work.device)
        with autocast_of(work.device, "bf16")():
            generate.generate(model, asked, frozenset(), tokens, batch, temperature)
        return now(work.device) - start

    run(size.new_tokens)  # not counted: it may compile, or record a graph
    whole, first = run(size.new_tokens), run(1)  # the first token comes from the prompts
    return whole, max(1e-9, whole - first) / (size.new_tokens - 1)


# --------------------------------------------------------------------------------------------- ppo

PHASES = ("rollout", "score", "update")
LONG = 60  # seconds; a whole step that is expected to take longer is left out


def ppo(work):
    """A PPO step with the recipe `original`, by phase: first a short one, then a whole one."""
    short, whole = work.size.answers
    for method in ("full", "LoRA"):
        free(work.device)
        setup = ppo_setup(work, method)
        time_ppo(work, setup, short)  # not counted
        seconds = time_ppo(work, setup, short)
        note = ", ".join(f"{phase} {seconds[phase]:.2f}" for phase in PHASES)
        yield row(f"{method}, {short} answers", sum(seconds.values()), "s", note=note, **seconds)
        # Rows are decoded together. Everything else grows with the answers.
        times = dict(zip(PHASES, (2, whole / short, whole / short)))
        expected = sum(times[phase] * seconds[phase] for phase in PHASES)
        note = f"not run, expected from {short} answers"
        if expected < min(LONG, work.deadline - time.perf_counter()):
            seconds = time_ppo(work, setup, whole)
            expected = sum(seconds.values())
            note = ", ".join(f"{phase} {seconds[phase]:.2f}" for phase in PHASES)
        measure = f"{method}, whole step of {whole} answers"
        yield at_most(measure, expected, 25, "s", note=note, **seconds)
        yield row(f"{method}: peak of tensors", gib(peaks(work.device)["allocated"]), "GiB")
        del setup


def ppo_setup(work, method: str) -> train_ppo.Setup:
    """train_ppo.set_up without files: a random model, and a tokenizer that only pads."""
    longest = 3 * sum(work.size.lengths) // 2
    args = train_ppo.parse_args([
        "--recipe", "original", "--init", "random", "--val-examples", "0", "--precision", "bf16",
        "--device", work.device, "--micro-batch", "16", "--accumulation", "1",
        "--rollout-batch", "512", "--max-new-tokens", str(longest),
        *["--lora"] * (method == "LoRA"),
    ])  # fmt: skip
    base = new_model(work, torch.float32 if method == "full" else torch.bfloat16)
    models = train_ppo.build(base, args)
    optimizers = [
        AdamW(models.policy_weights().items(), args.lr, bits=8),
        AdamW(models.value_weights().items(), args.value_lr, bits=8),
    ]
    autocast = autocast_of(work.device, "bf16")
    return train_ppo.Setup(models, *optimizers, SimpleNamespace(pad_id=0), None, args, autocast)


def time_ppo(work, setup: train_ppo.Setup, n: int) -> dict[str, float]:
    """Seconds of each phase of a step of n answers, as train_ppo.train goes through them."""
    args, start = setup.args, now(work.device)
    answers = sampled(work, setup, n)
    sampled_at = now(work.device)
    rollout = train_ppo.score(setup, answers)
    mask = rollout.mask
    rewards = train_ppo.token_rewards(
        rollout.scores, rollout.logp, rollout.ref_logp, mask, args.kl_coef
    )
    advantages, returns = train_ppo.gae(rewards, rollout.values, mask, args.gamma, args.lam)
    train_ppo.rollout_metrics(answers, rollout, rewards, returns, args)
    scored_at = now(work.device)
    train_ppo.update(setup, rollout, train_ppo.whiten(advantages, mask), returns, 0)
    done = now(work.device)
    return dict(zip(PHASES, (sampled_at - start, scored_at - sampled_at, done - scored_at)))


def sampled(work, setup: train_ppo.Setup, n: int) -> list[dict]:
    """train_ppo.sample without texts. Random weights never end an answer, so its first token says
    how long it gets: half to one and a half times an ordinary one."""
    usual = work.size.lengths[1]
    is_over = lambda ids: len(ids) >= usual // 2 + ids[0] % usual  # noqa: E731
    asked = [example.ids[: work.size.lengths[0]] for example in examples(work, n)]
    with setup.autocast():
        completions = generate.generate(
            setup.models.actor, asked, frozenset(), setup.args.max_new_tokens,
            setup.args.rollout_batch, setup.args.temperature, is_over=is_over,
        )  # fmt: skip
    return [
        {
            "example": data.Example(ids + done.ids, [0] * len(ids) + [1] * len(done.ids), i),
            "score": float(i % 2), "correct": i % 2 == 1, "truncated": done.truncated,
            "completion": "",
        }
        for i, (ids, done) in enumerate(zip(asked, completions))
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- peers


def peer_lora(work):
    """transformers with peft's adapters."""
    model = peer_of(new_model(work, torch.bfloat16))
    try:
        import peft
    except ImportError as error:
        raise Skipped("peft is not installed") from error
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(lora.TARGETS))
    yield from time_peer(work, peft.get_peft_model(model, config), "LoRA")


def peer_full(work):
    """transformers, all weights."""
    yield from time_peer(work, peer_of(new_model(work, torch.float32)), "full")


def time_peer(work, model, method: str):
    """The peer's training steps on our examples, padded on the right, with PyTorch's fused AdamW
    and bfloat16 autocast. As it comes: the logits of all tokens."""
    model.train()
    optimizer = torch.optim.AdamW(trained(model).values(), 1e-5, fused=True)
    best = 0.0
    for micro_batch, checkpointing in ((16, "none"), (8, "none"), (8, "full")):
        name = f"{method}, {micro_batch} {checkpointing}"
        if checkpointing == "full":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if method == "LoRA":
                model.enable_input_require_grads()
        optimizer.zero_grad()
        free(work.device)
        try:
            found = time_steps(work, micro_batch, *peer_step(work, model, optimizer, micro_batch))
        except torch.OutOfMemoryError:
            found = None
        if found is None:
            yield row(name, "out of memory")
            continue
        best = max(best, found["tokens_per_s"])
        memory = gib(found["allocated"])
        note = "" if memory is None else f"peak of tensors {memory:.1f} GiB"
        yield row(name, found["tokens_per_s"], "tokens/s", note=note, **found)
    ours = work.value("sft", f"{method}: fastest")
    ratio = ours / best if ours and best and not isinstance(ours, str) else None
    yield row(f"{method}: ours against the peer, best of each", ratio, "x")


def peer_step(work, model, optimizer, micro_batch: int):
    """(backward, optimize) as time_steps takes them."""
    autocast = autocast_of(work.device, "bf16")

    def backward(step) -> None:
        for rows in data.micro_batches(step, micro_batch):
            ids, mask, lengths = data.collate(rows, 0, work.device)
            real = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
            with autocast():
                loss = model(
                    input_ids=ids, attention_mask=real.to(work.device),
                    labels=ids.masked_fill(~mask, -100), use_cache=False,
                ).loss  # fmt: skip
            (loss * len(rows) / len(step)).backward()

    def optimize_peer() -> None:
        nn.utils.clip_grad_norm_(trained(model).values(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()

    return backward, optimize_peer


# ----------------------------------------------------------------------------------------- profile

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx",
            "cudaGraphLaunch")  # fmt: skip
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profile(work):
    """The largest kernels of a full training step and of decoding, and how often the host starts
    kernels or waits."""
    for part in (profile_training, profile_decoding):
        free(work.device)
        yield from part(work)


def profile_training(work):
    model, step = trainable(work, "full"), examples(work, STEP_EXAMPLES)
    optimizer = AdamW(trained(model).items(), 1e-5, bits=8)
    autocast = autocast_of(work.device, "bf16")

    def train() -> None:
        train_sft.backward_step(model, step, STEP_EXAMPLES, 0, autocast)
        optimize(optimizer)

    yield from profile_rows(work, "training step", train)


def profile_decoding(work):
    model, asked = new_model(work, torch.bfloat16), prompts(work, 4 if work.dry else 64)

    def answers() -> None:
        with autocast_of(work.device, "bf16")():
            generate.generate(model, asked, frozenset(), 17, len(asked))

    yield from profile_rows(work, f"{len(asked)} prompts and 16 decoding steps", answers)


def profile_rows(work, name: str, function):
    for _ in range(1 if work.dry else 3):
        function()
    kinds = torch.profiler.ProfilerActivity
    cuda = work.device.startswith("cuda")
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * cuda) as profiler:
        function()
        now(work.device)
    events = profiler.key_averages()
    kernels = list(events)
    if cuda:  # kernels and copies, without the spans that somebody named
        kernels = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
    spent = lambda e: e.self_device_time_total if cuda else e.self_cpu_time_total  # noqa: E731
    total = sum(map(spent, kernels))
    largest = [
        {"name": e.key, "calls": e.count, "microseconds": spent(e), "share": spent(e) / total}
        for e in sorted(kernels, key=spent, reverse=True)[:20]
        if total
    ]
    counts = [sum(e.count for e in events if e.key in names) for names in (LAUNCHES, WAITS)]
    yield row(f"{name}: kernels", total / 1000, "ms", kernels=largest)
    yield row(f"{name}: launches", counts[0] if cuda else None, note=f"{counts[1]} waits" * cuda)
    for k in largest[:3]:
        note = f"{k['calls']} calls, {k['microseconds']:.0f} us: {k['name'][:60]}"
        yield row(f"{name}: large kernel", 100 * k["share"], "%", note=note)


# ------------------------------------------------------------------------------------------- study

TRAIN, STEPS = 7473, 100  # GSM8K's examples; steps of PPO


def study(work):
    """How long SFT and PPO with the settings of the original study would take, in full and with
    LoRA, on main answers and without evaluation."""
    seconds = {}
    for method in ("full", "LoRA"):
        step = work.value("sft", f"{method}: fastest step")
        seconds[f"SFT, {method}"] = minutes(step, math.ceil(TRAIN / STEP_EXAMPLES))
        measure = f"{method}, whole step of {work.size.answers[1]} answers"
        seconds[f"PPO, {method}"] = minutes(work.value("ppo", measure), STEPS)
    for name, found in seconds.items():
        yield row(name, found, "min", note="" if found else "its stage has no result")
    known = [found for found in seconds.values() if found]
    total = sum(known) if len(known) == len(seconds) else None
    yield at_most("all four", total, 60, "min")


def minutes(step, steps: int) -> float | None:
    return steps * step / 60 if isinstance(step, (int, float)) else None
