"""The stages of gpu.py that ask whether results are right: card, correct, resume, tiny."""

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import evaluate
import train_ppo
import train_sft
from benchmarks.gpu_parts import (
    ROOT,
    Skipped,
    at_most,
    difference,
    exactly,
    free,
    new_model,
    peer_of,
    row,
    worst,
)
from benchmarks.sides import matrix_rate, read_rate
from nanogsm import data, generate
from nanogsm.fast.checkpointing import CHECKPOINTING
from nanogsm.model import load_adapter, load_model, set_checkpointing
from nanogsm.optim import AdamW
from nanogsm.run.machine import autocast_of
from nanogsm.store import files

# -------------------------------------------------------------------------------------------- card

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
           "cuDNN": SDPBackend.CUDNN_ATTENTION}  # fmt: skip
ROUNDING = 0.03  # of the largest entry: what bfloat16 attention and its gradients may be off by


def card(work):
    """The card, its rates, and the error of each of PyTorch's attention kernels."""
    cuda = work.device.startswith("cuda")
    rate = matrix_rate(work.device, torch.bfloat16) / 1e12
    yield row("matrix products, bfloat16", rate, "TFLOP/s")
    yield row("reading memory", read_rate(work.device) / 1e9, "GB/s")
    memory = torch.cuda.get_device_properties(work.device).total_memory / 2**30 if cuda else None
    yield row("memory", memory, "GiB")
    enabled = {"flash": torch.backends.cuda.flash_sdp_enabled(),
               "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
               "cuDNN": torch.backends.cuda.cudnn_sdp_enabled()}  # fmt: skip
    for name, on in enabled.items():
        # cuDNN makes a plan for each new shape, and there are reports of wrong gradients.
        wanted = {"cuDNN": "off"}.get(name, "on")
        yield exactly(f"{name} attention is", "on" if on else "off", wanted)
    for name, kernel in KERNELS.items():
        for what, error in (("causal", causal_error), ("one query", one_query_error)):
            measure = f"{name} attention, {what}: error"
            try:
                with sdpa_kernel(kernel):
                    found = error(work)
            except RuntimeError as problem:  # this kernel does not do this
                yield row(measure, "none", note=str(problem).split("\n")[0][:80])
                continue
            yield at_most(measure, found, ROUNDING) if enabled[name] else row(measure, found)


def slow_attention(q, k, v, mask):
    """Attention in float64, written out."""
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def normal(work, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=work.device, dtype=torch.bfloat16).requires_grad_()


def causal_error(work) -> float:
    """The largest error of causal attention and of its three gradients, over three lengths."""
    errors, heads = [], (2, 2) if work.dry else (8, 8)
    for T in (64, 192, 250):
        tensors = [normal(work, *heads, T, 256) for _ in range(3)]
        weight = normal(work, *heads, T, 256).detach()  # of each output in the sum
        mask = torch.ones(T, T, dtype=torch.bool, device=work.device).tril()
        fast = F.scaled_dot_product_attention(*tensors, is_causal=True)
        slow = slow_attention(*tensors, mask)
        results = [
            (out, *torch.autograd.grad((out * weight).sum(), tensors)) for out in (fast, slow)
        ]
        errors += [difference(a, b) for a, b in zip(*results)]
    return worst(errors)


@torch.no_grad()
def one_query_error(work) -> float:
    """The same for decoding: the eight heads of a row as its queries, and a mask of filled slots.
    There are no gradients."""
    B, S = (2, 64) if work.dry else (8, 250)
    q, k, v = (normal(work, B, 1, n, 256) for n in (8, S, S))
    filled = torch.arange(S - B + 1, S + 1, device=work.device)  # a different number in each row
    mask = (torch.arange(S, device=work.device) < filled[:, None])[:, None, None]  # (B, 1, 1, S)
    return difference(F.scaled_dot_product_attention(q, k, v, mask), slow_attention(q, k, v, mask))


# ----------------------------------------------------------------------------------------- correct

FIXTURES = ROOT / "tests" / "fixtures"
FLOAT32 = 1e-4  # differences allowed in float32, as a share of the largest entry


def correct(work):
    """The device against the CPU, against transformers, and against itself."""
    for name in ("gemma1", "gemma2", "gemma3", "gemma3_peft"):
        yield from check_fixture(work, name)
    yield from check_optimizer(work)
    for precision in ("fp32", "bf16"):
        yield from check_ppo(work, precision)
    try:
        yield from check_transformers(work)
    except Skipped as reason:
        yield row("logits next to transformers", "skipped", note=str(reason))


def fixture(name: str, device: str):
    model, _ = load_model(FIXTURES / name.removesuffix("_peft"), torch.float32, device)
    if name.endswith("_peft"):
        load_adapter(model, FIXTURES / name)
    return model


def gradients(model, ids) -> torch.Tensor:
    """The gradient of all trained weights as one vector. The second half of each row counts."""
    half = ids.shape[1] // 2
    rows = [data.Example(r, [0] * half + [1] * (len(r) - half), 0) for r in ids.tolist()]
    model.zero_grad()
    train_sft.backward_step(model, rows, len(rows), 0, autocast_of(str(model.device), "fp32"))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def check_fixture(work, name: str):
    wanted = load_file(FIXTURES / name / "expected.safetensors")
    here, cpu = fixture(name, work.device), fixture(name, "cpu")
    ids = wanted["ids"]
    with torch.no_grad():
        logits = here.logits(here(ids.to(work.device)))
    error = difference(logits, wanted["logits"])
    yield at_most(f"{name}: logits, to transformers'", error, FLOAT32)
    base = gradients(cpu, ids)
    found = {}
    for kind in CHECKPOINTING:
        set_checkpointing(here, kind)
        found[kind] = gradients(here, ids)
    error = difference(found["none"], base)
    yield at_most(f"{name}: gradients, to the CPU's", error, FLOAT32)
    error = worst(difference(found[kind], found["none"]) for kind in found)
    yield at_most(f"{name}: gradients, light and full to none", error, FLOAT32)
    if "continuation" in wanted:
        prompt, answer = wanted["prompt"].tolist(), wanted["continuation"].tolist()
        same = all(
            generate.generate(model, [prompt], frozenset(), len(answer))[0].ids == answer
            for model in (here, cpu)
        )
        yield exactly(f"{name}: greedy tokens are the CPU's and transformers'", same, True)


def check_optimizer(work):
    """Three AdamW steps from the same weights and gradients, on both devices."""
    for bits in (32, 8):
        cpu, here = (adam_state(device, bits) for device in ("cpu", work.device))
        moved = worst((here[k] - cpu[k]).abs().max().item() for k in cpu if k.startswith("weight"))
        # A code at the border of two may differ, which moves a weight by a few percent of a step.
        limit = 1e-3 if bits == 32 else 0.2
        yield at_most(f"AdamW, {bits} bits: weights, to the CPU's", moved / LR, limit, "of lr")
        if bits == 8:
            codes = [k for k in cpu if not cpu[k].is_floating_point() and cpu[k].dim()]
            differ = sum((here[k] != cpu[k]).sum().item() for k in codes)
            share = differ / sum(cpu[k].numel() for k in codes)
            yield at_most("AdamW, 8 bits: share of codes that differ from the CPU's", share, 1e-3)


LR = 1e-3


def adam_state(device: str, bits: int) -> dict[str, torch.Tensor]:
    """The optimizer's state on the CPU, after three steps with gradients that the seed decides."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device)  # noqa: E731
    weights = {"matrix": draw(512, 2048), "narrow": draw(512, 16), "vector": draw(2048)}
    weights = {name: torch.nn.Parameter(0.02 * w) for name, w in weights.items()}
    optimizer = AdamW(weights.items(), LR, weight_decay=0.1, bits=bits)
    for _ in range(3):
        for p in weights.values():
            p.grad = draw(*p.shape)
        optimizer.step()
    return {name: t.detach().cpu() for name, t in optimizer.state_tensors().items()}


def check_ppo(work, precision: str):
    """A PPO step of the embedded model. Before the first update nothing has changed: the policy is
    the reference and the sampler, to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        train_ppo.main([
            "--tiny", "--init", "tiny", "--steps", "1", "--rollouts", "16", "--micro-batch", "4",
            "--accumulation", "2", "--max-new-tokens", "8" if work.dry else "48",
            "--val-examples", "0", "--precision", precision, "--device", work.device,
            "--out", folder + "/run",
        ])  # fmt: skip
        metrics = json.loads(Path(folder, "run", "metrics.jsonl").read_text().splitlines()[0])
    for name in ("first_ratio_error", "kl", "kl_sequence"):
        yield exactly(f"first PPO step, {precision}: {name}", metrics[name], 0.0)


@torch.no_grad()
def check_transformers(work):
    """Random gemma-2b, the same weights on both sides."""
    model = new_model(work, torch.bfloat16)
    ids = torch.randint(8, work.size.config.vocab_size, (2, 64), device=work.device)
    low = model.logits(model(ids)).double(), peer_of(model)(ids).logits.double()
    model.float()
    exact = model.logits(model(ids)).double()
    theirs = peer_of(model)(ids).logits.double()
    name = "gemma-2b, random: logits"
    yield at_most(f"{name} in float32, to transformers'", difference(exact, theirs), FLOAT32)
    # In bfloat16 both round. Ours may be off from float32 by as much as theirs is.
    ours, peer = ((x - theirs).square().mean().sqrt().item() for x in low)
    ratio = ours / peer if peer else math.nan
    yield at_most(f"{name} in bfloat16, error against transformers'", ratio, 1.2, "x")
    free(work.device)


# ------------------------------------------------------------------------------------------ resume


def resume(work):
    """A run that was stopped by SIGTERM and continued, against two that were not stopped. On a GPU
    two equal runs may differ, because sums are added in no fixed order."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--tiny", "--max-examples", "40" if work.dry else "960", "--micro-batch",
                "2" if work.dry else "16", "--save-every", "5", "--val-examples", "0",
                "--device", work.device, "--out"]  # fmt: skip
        for name in ("a", "b"):
            train_sft.main([*argv, f"{folder}/{name}"])
        status = stopped_run([*argv, f"{folder}/c"], Path(folder, "c", "metrics.jsonl"))
        yield exactly("status of the stopped run", status, 128 + signal.SIGTERM)
        train_sft.main([*argv, f"{folder}/c"])
        a, b, c = (load_file(f"{folder}/{name}/model/model.safetensors") for name in "abc")
    apart, continued = (worst(difference(x[name], a[name]) for name in a) for x in (b, c))
    yield row("weights of two equal runs differ by", apart)
    limit = max(3 * apart, 1e-3 * work.device.startswith("cuda"))
    yield at_most("weights of the continued run differ by", continued, limit)


def stopped_run(argv: list[str], metrics: Path) -> int:
    """Start train_sft.py and stop it after a few steps. Returns its exit status."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train_sft.py"), *argv])
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 7:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.005)
    return process.wait()


# -------------------------------------------------------------------------------------------- tiny

STUDY = ROOT / "results" / "tiny" / "study-1.json"  # of a CPU
ROWS = {"full": "full-main", "PPO": "ppo-tuned", "LoRA": "lora-main"}  # the quick ones


def tiny(work):
    """Train and evaluate three rows of the embedded model's study. Rounding moves a score, so its
    interval has to meet that of the CPU's score."""
    of_cpu = {row["row"]: row for row in files.read_json(STUDY)["rows"]}
    few = ["--max-examples", "32", "--val-examples", "0"] if work.dry else []
    fewer = ["--steps", "1", "--rollouts", "8"] if work.dry else []
    short = ["--max-new-tokens", "8"] if work.dry else []
    n = 8 if work.dry else 1319
    with tempfile.TemporaryDirectory() as folder:
        full, runs = f"{folder}/full", {}
        runs["full"] = train_sft.main, [*few, "--recipe", "original"]
        ppo = ["--init", full, "--recipe", "tuned", "--val-every", "0"]
        runs["PPO"] = train_ppo.main, [*fewer, *ppo]
        runs["LoRA"] = train_sft.main, [*few, "--recipe", "original", "--lora"]
        for name, (train, flags) in runs.items():
            start = time.perf_counter()
            out = f"{folder}/{name}"
            common = ["--device", work.device, "--out", out]
            train(["--tiny", *flags, "--seed", "1", *short, *common])
            trained = time.perf_counter()
            evaluate.main(["--model", out, "--n", str(n), *short, *common])
            found = files.read_json(next(Path(out).glob("eval-test-*.json")))
            took = f"{trained - start:.0f} s + {time.perf_counter() - trained:.0f} s to evaluate"
            low, high = (of_cpu[ROWS[name]][end] for end in ("ci_low", "ci_high"))
            yield row(
                f"{name}: exact match", 100 * found["accuracy"], "%",
                f"an interval that meets {100 * low:.1f} to {100 * high:.1f}",
                found["ci_low"] <= high and found["ci_high"] >= low,
                f"[{100 * found['ci_low']:.1f}, {100 * found['ci_high']:.1f}], {took}",
            )  # fmt: skip
