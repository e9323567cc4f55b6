"""How seconds and memory grow with batch, length, vocabulary and model: a table and a picture.

    python -m benchmarks.growth --out results/growth

Weights are random and so are the tokens: times are the same. From one middle point, one thing at a
time is varied. Three jobs: a LoRA step and a full step (forward and backward with checkpointing, half
of the tokens supervised; then the update), and decoding, 16 tokens for every row after a prompt of
half the length. Each point is a process of its own; the faster of two runs counts. Memory is the
process's peak on a CPU, the tensors' on CUDA. On the CPU the processes go one after the other.
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
from nanogsm.model import set_checkpointing
from nanogsm.optim import AdamW
from nanogsm.report import charts
from nanogsm.run import console
from nanogsm.store import files
from nanogsm.transformer import Config, Transformer

JOBS = ("LoRA", "full", "decoding")
NEW = 16  # tokens decoded
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
AT_SIZE = {"batch": 2, "length": 128, "vocab": 262_144}  # beside which models are compared


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = console.Parser("Seconds and memory against batch, length, vocabulary and model size.")
    p.add_argument("--vary", nargs="+", choices=VARIED, default=list(VARIED), help="all of them if not said")
    p.add_argument("--out", default="runs/growth", help="path of the .json, .md and .svg, without ending")
    p.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    console.add_compute_flags(p)
    args = p.parse_args(argv)
    args.device, args.precision = console.pick_compute(args.device, args.precision)
    return args


def random_model(size: str, vocab: int, device: str) -> Transformer:
    D, F, layers, heads, kv, N = SIZES[size]
    config = Config(
        model_type="gemma3_text", vocab_size=vocab, hidden_size=D, intermediate_size=F,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, head_dim=N,
        rms_norm_eps=1e-6, query_pre_attn_scalar=N, layer_types=("full_attention",) * layers,
        sliding_window=None, rope={"full_attention": (1e6, 1.0)}, attn_logit_softcapping=None,
        final_logit_softcapping=None, dtype=torch.float32,
    )  # fmt: skip
    with torch.device(device):
        model = Transformer(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02)
    return model


def measure(args) -> dict:
    """Seconds, peak memory and parameters of one point."""
    point, bf16 = args.point, args.precision == "bf16"
    kind = torch.device(args.device).type
    autocast = lambda: torch.autocast(kind, torch.bfloat16, enabled=bf16)  # noqa: E731
    model = random_model(point["size"], point["vocab"], args.device)
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
                generate.generate(model, [row[: T // 2] for row in rows], frozenset(), NEW, B)
        else:
            train_sft.backward_step(model, examples, B, 0, autocast)
            optimizer.step()
            optimizer.zero_grad()

    best = float("inf")
    for _ in range(2):
        start = now(args.device)
        step()
        best = min(best, now(args.device) - start)
    return point | {"parameters": total, "seconds": best, "memory": console.peak_memory(args.device)}


def points(vary: list[str]) -> list[dict]:
    found = []
    for name in vary:
        around = MIDDLE | (AT_SIZE if name == "size" else {})
        found += [{"vary": name, **around, name: x, "job": job} for x in VARIED[name] for job in JOBS]
    return found


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.point:
        print(json.dumps(measure(args)))
        return 0
    rows = []
    for point in points(args.vary):
        command = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps(point),
                   "--device", args.device, "--precision", args.precision]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{point} failed: {done.stderr[-500:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        said = ", ".join(f"{k} {rows[-1][k]}" for k in ("vary", "job", *MIDDLE))
        print(f"{said}: {rows[-1]['seconds']:.2f} s, {rows[-1]['memory'] / 2**30:.2f} GiB", flush=True)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(out.with_suffix(".json"), {"environment": console.environment(), "rows": rows})
    files.replace_file(out.with_suffix(".md"), table(rows).encode())
    files.replace_file(out.with_suffix(".svg"), picture(rows).encode())
    return 0


def table(rows: list[dict]) -> str:
    """Markdown: a block per varied thing, seconds and GiB of the three jobs."""
    lines = []
    for vary in dict.fromkeys(row["vary"] for row in rows):
        mine = [row for row in rows if row["vary"] == vary]
        heads = "".join(f" {job}, s | GiB |" for job in JOBS)
        lines += [f"| {vary} |{heads}", "|---" * (1 + 2 * len(JOBS)) + "|"]
        for x in dict.fromkeys(row[vary] for row in mine):
            cells = {row["job"]: row for row in mine if row[vary] == x}
            shown = f"{x:,}" if isinstance(x, int) else f"{x} ({cells['full']['parameters'] / 1e6:,.1f} M)"
            values = "".join(f" {c['seconds']:.2f} | {c['memory'] / 2**30:.2f} |"
                             for c in (cells[job] for job in JOBS))  # fmt: skip
            lines.append(f"| {shown} |{values}")
        lines.append("")
    return "\n".join(lines)


def picture(rows: list[dict]) -> str:
    panels = []
    for vary in dict.fromkeys(row["vary"] for row in rows):
        along = (lambda row: row["parameters"] / 1e6) if vary == "size" else (lambda row: row[vary])  # noqa: B023
        name = "parameters, millions" if vary == "size" else vary
        for key, unit, scale in (("seconds", "seconds", 1), ("memory", "GiB", 2**30)):
            lines = [
                (job, [(along(r), r[key] / scale) for r in rows if (r["vary"], r["job"]) == (vary, job)])
                for job in JOBS
            ]
            panels.append(charts.Panel(f"{unit} against {name}", lines))
    return charts.page(panels, list(JOBS))


if __name__ == "__main__":
    console.entry(main)
