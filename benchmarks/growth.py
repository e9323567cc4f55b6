"""How time and memory grow with batch, length, vocabulary and model size: a table and a picture.

    python -m benchmarks.growth --out results/growth/growth

Weights and tokens are random, which does not change the times. One quantity at a time is varied
around a middle point. There are three jobs: a LoRA step, a full step, and decoding. A step is
forward and backward with light checkpointing, half of the tokens supervised, and the update.
Decoding makes 16 tokens for every row after a prompt of half the length.

Every measurement has its own process, one after the other, and the faster of two runs counts.
Memory is the process's peak on a CPU and that of tensors on CUDA.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import train_sft
from benchmarks.sides import now
from nanogsm import UserError, data, generate, lora
from nanogsm.model import set_checkpointing, use_fast_forms
from nanogsm.optim import AdamW
from nanogsm.report import charts
from nanogsm.run import console, flags, machine
from nanogsm.store import files
from nanogsm.transformer import Config, Transformer

JOBS = ("LoRA", "full", "decoding")
NEW_TOKENS = 16  # decoded per row
# Gemma 3's shapes: hidden_size, intermediate_size, layers, heads, key heads, head_dim.
SIZES = {
    "tiny": (128, 384, 3, 4, 1, 32),
    "small": (384, 1024, 6, 4, 1, 96),
    "270M": (640, 2048, 18, 4, 1, 256),
    "1B": (1152, 6912, 26, 4, 1, 256),
}
MIDDLE = {"size": "small", "batch": 8, "length": 256, "vocab": 32_768}
VARIED = {
    "batch": (2, 4, 8, 16, 32),
    "length": (64, 128, 256, 512, 1024),
    "vocab": (8_192, 32_768, 65_536, 131_072, 262_144),
    "size": ("tiny", "small", "270M", "1B"),
}
AT_SIZE = {"batch": 2, "length": 128, "vocab": 262_144}  # where the sizes are compared


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser("Seconds and memory against batch, length, vocabulary and model size.")
    what = "Quantities to vary. Default: all."
    p.add_argument("--vary", nargs="+", choices=VARIED, help=what)
    where = "Path of the .json, .md and .svg, without ending."
    p.add_argument("--out", default="runs/growth", help=where)
    p.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    flags.add_compute_flags(p)
    args = p.parse_args(argv)
    args.vary = args.vary or list(VARIED)
    args.device, args.precision = machine.pick_compute(args.device, args.precision)
    return args


def gemma3(size: str, vocab: int) -> Config:
    """The config of a Gemma 3 of that size, with global layers only."""
    D, F, layers, heads, kv, N = SIZES[size]
    return Config(
        model_type="gemma3_text", vocab_size=vocab, hidden_size=D, intermediate_size=F,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, head_dim=N,
        rms_norm_eps=1e-6, query_pre_attn_scalar=N, layer_types=("full_attention",) * layers,
        sliding_window=None, rope={"full_attention": (1e6, 1.0)}, attn_logit_softcapping=None,
        final_logit_softcapping=None, dtype=torch.float32,
    )  # fmt: skip


def random_model(config: Config, device: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """A Gemma on the shipped fast paths, with weights that mean nothing, drawn on the device."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=config.hidden_size**-0.5)  # so that every layer matters
    use_fast_forms(model)
    return model


def measure(args) -> dict:
    """Seconds, peak memory and number of parameters of one point."""
    point, autocast = args.point, machine.autocast_of(args.device, args.precision)
    model = random_model(gemma3(point["size"], point["vocab"]), args.device)
    total = sum(p.numel() for p in model.parameters())
    B, T = point["batch"], point["length"]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(8, point["vocab"], (B, T), generator=generator).tolist()
    mask = [0] * (T // 2) + [1] * (T - T // 2)
    examples = [data.Example(row, mask, i) for i, row in enumerate(rows)]
    set_checkpointing(model, "light")
    if point["job"] == "LoRA":
        lora.add_lora(model, 16, 32.0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = None if point["job"] == "decoding" else AdamW(trained.items(), 1e-5)

    def step() -> None:
        if optimizer is None:
            with autocast():
                prompts = [row[: T // 2] for row in rows]
                generate.generate(model, prompts, frozenset(), NEW_TOKENS, B)
        else:
            train_sft.backward_step(model, examples, B, 0, autocast)
            optimizer.step()
            optimizer.zero_grad()

    best = float("inf")
    for _ in range(2):
        start = now(args.device)
        step()
        best = min(best, now(args.device) - start)
    memory = machine.peak_memory(args.device)
    return point | {"parameters": total, "seconds": best, "memory": memory}


def points(vary: list[str]) -> list[dict]:
    """What to measure: one dict per value of each varied quantity, and job."""
    found = []
    for name in vary:
        rest = MIDDLE | (AT_SIZE if name == "size" else {})
        for value in VARIED[name]:
            found += [{"vary": name, **rest, name: value, "job": job} for job in JOBS]
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.point:
        print(json.dumps(measure(args)))
        return 0
    rows, out = [], Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for point in points(args.vary):
        command = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps(point),
                   "--device", args.device, "--precision", args.precision]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{point} failed: {done.stderr[-500:]}")
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        said = ", ".join(f"{name} {row[name]}" for name in ("vary", "job", *MIDDLE))
        print(f"{said}: {row['seconds']:.2f} s, {row['memory'] / 2**30:.2f} GiB", flush=True)
        found = {"environment": machine.environment(), "rows": rows}
        files.write_json(Path(f"{out}.json"), found)  # after each: a later one may fail
    files.replace_file(Path(f"{out}.md"), table(rows).encode())
    files.replace_file(Path(f"{out}.svg"), picture(rows).encode())
    return 0


def table(rows: list[dict]) -> str:
    """Markdown: one table per varied quantity, with seconds and GiB of the three jobs."""
    lines = []
    for vary in dict.fromkeys(row["vary"] for row in rows):
        mine = [row for row in rows if row["vary"] == vary]
        heads = "".join(f" {job}, s | GiB |" for job in JOBS)
        lines += [f"| {vary} |{heads}", "|---" * (1 + 2 * len(JOBS)) + "|"]
        for x in dict.fromkeys(row[vary] for row in mine):
            cells = {row["job"]: row for row in mine if row[vary] == x}
            millions = f"{cells['full']['parameters'] / 1e6:,.1f} M"
            shown = f"{x:,}" if isinstance(x, int) else f"{x} ({millions})"
            values = "".join(
                f" {cells[job]['seconds']:.2f} | {cells[job]['memory'] / 2**30:.2f} |"
                for job in JOBS
            )
            lines.append(f"| {shown} |{values}")
        lines.append("")
    return "\n".join(lines)


def picture(rows: list[dict]) -> str:
    """SVG: for each varied quantity a panel of seconds and one of memory."""
    panels = []
    for vary in dict.fromkeys(row["vary"] for row in rows):
        name = "parameters, millions" if vary == "size" else vary
        for key, unit, scale in (("seconds", "seconds", 1), ("memory", "GiB", 2**30)):
            lines = {job: [] for job in JOBS}
            for row in rows:
                if row["vary"] == vary:
                    x = row["parameters"] / 1e6 if vary == "size" else row[vary]
                    lines[row["job"]].append((x, row[key] / scale))
            panels.append(charts.Panel(f"{unit} against {name}", list(lines.items())))
    return charts.page(panels, list(JOBS))


if __name__ == "__main__":
    console.entry(main)
