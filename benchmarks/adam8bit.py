"""What 8-bit moments cost in quality, and what each choice in nanogsm/optim.py is worth.

    OMP_NUM_THREADS=1 python -m benchmarks.adam8bit                # 10 minutes on one core
    python -m benchmarks.adam8bit --model google/gemma-3-270m      # real gradients as well
    python -m benchmarks.adam8bit --only speed --device cuda

bytes    of the moments, for the widths of real Gemmas
rare     the largest update of a rare word's row, and of a row whose entries span six decades
updates  every variant gets the gradients of a 32-bit run: how far off is its update?
curves   a small transformer trained on generated text by torch's AdamW, ours and variants
speed    of one step

A variant is optim.py with some functions replaced, so the code under test needs no flags for it.
results/adam8bit.md has the output.
"""

import math
import time
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from nanogsm import optim
from nanogsm.optim import AdamW, cosine_with_min_lr
from nanogsm.run import console, flags

VOCAB, WIDTH, LENGTH, BATCH = 2048, 80, 32, 16  # blocks of 256 do not fit into rows of 80


# ---- variants


def to_nearest(entry, step):
    return torch.full(entry.shape, 0.5, device=entry.device)


def encode_log(x, dtype, offset):
    """Codes at equal ratios over seven decades, in place of fourth powers."""
    levels = torch.iinfo(dtype).max
    scale = x.abs().amax(-1, keepdim=True)
    exponent = torch.log10(x.abs() / scale.clamp_min(1e-37)) / 7  # 0 down to -1
    code = (levels + exponent * (levels - 1) + offset).clamp(int(dtype == torch.uint8), levels)
    return code.copysign(x).to(dtype), scale


def decode_log(code, scale):
    levels = torch.iinfo(code.dtype).max
    x = code.float()
    return 10 ** (7 * (x.abs() - levels) / (levels - 1)) * x.sign() * scale


def dynamic_map(signed):
    """The 256 values of arXiv 2110.02861: every decade is split evenly, into half as many values as
    the decade above it."""
    bits, values = 7, [0.0, 1.0]
    for i in range(bits):
        edges = torch.linspace(0.1, 1, (2**i if signed else 2 ** (i + 1)) + 1)
        middle = (10 ** (i + 1.0 - bits) * (edges[:-1] + edges[1:]) / 2).tolist()
        values += middle + ([-v for v in middle] if signed else [])
    return torch.tensor(sorted(values + [0.0] * (256 - len(values))))


MAPS = {torch.int8: dynamic_map(True), torch.uint8: dynamic_map(False)}


def encode_paper(x, dtype, offset):
    """The nearest value of the dynamic map. v itself is coded, not its root, so a code can be 0."""
    x = x.square() if dtype == torch.uint8 else x
    scale, values = x.abs().amax(-1, keepdim=True), MAPS[dtype].to(x.device)
    code = torch.bucketize(x / scale.clamp_min(1e-37), (values[1:] + values[:-1]) / 2)
    return (code - 128).to(dtype) if dtype == torch.int8 else code.to(dtype), scale


def decode_paper(code, scale):
    index = code.int() + (128 if code.dtype == torch.int8 else 0)
    x = MAPS[code.dtype].to(code.device)[index] * scale
    return x.sqrt() if code.dtype == torch.uint8 else x


DITHER, NEAREST = {"dither": optim.dither}, {"dither": to_nearest}
LOG = {"quantise": encode_log, "dequantise": decode_log}
PAPER = {"quantise": encode_paper, "dequantise": decode_paper}
VARIANTS = {  # name: (bits, whether blocks may cross rows, functions of optim.py to replace)
    "32 bits": (32, False, DITHER),
    "8 bits": (8, False, DITHER),
    "8 bits, blocks across rows": (8, True, DITHER),
    "8 bits, to nearest": (8, False, NEAREST),
    "log codes": (8, False, LOG | DITHER),
    "log codes, to nearest": (8, False, LOG | NEAREST),
    "paper's map of v": (8, False, PAPER | NEAREST),
    "paper's map of v, across rows": (8, True, PAPER | NEAREST),
}


class Variant:
    """AdamW of one variant, for a dict of parameters."""

    def __init__(self, name, params, lr=1.0):
        bits, across, self.replaced = VARIANTS[name]
        self.params, self.views = params, dict(params)
        if across:  # the same memory, seen as rows of 256 that cross the real rows
            for n, p in params.items():
                if p.numel() % 256 == 0:
                    self.views[n] = nn.Parameter(p.data.view(-1, 256))
        self.adamw = AdamW(self.views.items(), lr, bits=bits)

    def step(self, lr=1.0):
        for n, p in self.params.items():
            self.views[n].grad = p.grad.view_as(self.views[n])
        self.adamw.lr = lr
        with patch.multiple(optim, **self.replaced):
            self.adamw.step()


# ---- a small language model and its text


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.05)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 5, 4 * WIDTH, dropout=0, activation="gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)

    def forward(self, ids):
        causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        x = self.embed(ids) * 5 + self.place.weight
        return self.layers(x, mask=causal, is_causal=True) @ self.embed.weight.T


def make_text(n):
    """n word ids with frequencies of 1/rank, so few rows of the embedding are frequent and most are
    rare. 70% of the words are one of four successors of the word before."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(3.0, VOCAB + 3)
    follow = torch.multinomial(frequency, VOCAB * 4, True, generator=generator).view(VOCAB, 4)
    follow = follow.tolist()
    free = torch.multinomial(frequency, n, True, generator=generator).tolist()
    choice = torch.multinomial(torch.tensor([28.0, 21, 14, 7, 30]), n, True, generator=generator)
    words = [0]
    for word, c in zip(free, choice.tolist()):
        words.append(word if c == 4 else follow[words[-1]][c])
    return torch.tensor(words)


def small_model(seed=0):
    """(model, loss). loss(step) is the loss of that step's batch, loss(None) that of 1,024 held-out
    rows."""
    torch.manual_seed(seed)
    model, text = LM(), make_text(300_000)

    def loss(step):
        source, rows = (text[-30_000:], 1024) if step is None else (text[:-30_000], BATCH)
        generator = torch.Generator().manual_seed(10_000 * seed + (step or 0))
        start = torch.randint(len(source) - LENGTH, (rows, 1), generator=generator)
        ids = source[start + torch.arange(LENGTH + 1)]
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    return model, loss


def real_model(name, data_dir):
    """The same for a Gemma on GSM8K, with one problem per step."""
    from nanogsm import data, logprob, model

    gemma, tokenizer = model.load_model(name, dtype=torch.float32)
    problems = data.load_problems("main", "train", data_dir)

    def loss(step):
        problem = problems[step]
        ids, mask = data.encode(tokenizer, data.Prompt(), problem.question, problem.answer)
        ids, mask = torch.tensor([ids]), torch.tensor([mask]).bool()
        logp, _ = logprob.next_token_logprobs(gemma.vocabulary, gemma(ids), ids, mask)
        return -logp.sum() / mask.sum()

    return gemma, loss


# ---- the measurements


def show_bytes():
    print("\nbytes of the moments per entry (float32 moments: 8)")
    shapes = {f"width {width}": (64, width) for width in (2048, 1152, 640)}
    for what, shape in {**shapes, "LoRA B, rank 16": (2048, 16), "norm": (2048,)}.items():
        adamw = AdamW([("p", nn.Parameter(torch.zeros(shape)))], 1.0)
        print(f"  {what:16} {adamw.state_bytes() / math.prod(shape):.4f}")


def show_rare():
    shape = (16, 640)
    spread = 10 ** (-6 * torch.rand(640, generator=torch.Generator().manual_seed(3)))

    def rare_row(step):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        g[5] *= 1e-4 if step % 40 == 20 else 0
        return g

    def six_decades(step):
        return torch.randn(shape, generator=torch.Generator().manual_seed(step)) * spread

    print("\nlargest |update| / lr in 400 steps: median and largest of the entries (exact: < 7.3)")
    print(f"  {'':32} {'rare row':>18} {'six decades':>18}")
    for name in VARIANTS:
        line = f"  {name:32}"
        for gradient, rows in ((rare_row, [5]), (six_decades, slice(None))):
            params = {"p": nn.Parameter(torch.zeros(shape))}
            optimizer, largest = Variant(name, params), torch.zeros(shape)
            for step in range(400):
                params["p"].data.zero_()
                params["p"].grad = gradient(step)
                optimizer.step()
                largest = torch.maximum(largest, params["p"].data.abs())
            line += f" {largest[rows].median():8.2f} {largest[rows].max():9.2f}"
        print(line, flush=True)


def show_updates(model, loss, steps, lr, names):
    """Print |update - exact| / |exact| at each third of the run. At the end also the length of the
    update over that of the exact one, and the update's largest entry."""
    named = dict(model.named_parameters())
    scratch = {n: nn.Parameter(torch.zeros_like(p)) for n, p in named.items()}
    optimizers = {name: Variant(name, scratch) for name in ["32 bits", *names]}
    errors = {name: [] for name in optimizers}
    for step in range(1, steps + 1):
        loss(step).backward()
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        for name, optimizer in optimizers.items():
            for n, p in scratch.items():
                p.data.zero_()
                p.grad = named[n].grad
            optimizer.step()
            if name == "32 bits":
                exact = {n: p.data.clone() for n, p in scratch.items()}
            if step % (steps // 3) == 0:
                size = math.sqrt(sum(x.square().sum().item() for x in exact.values()))
                off = sum((p.data - exact[n]).square().sum().item() for n, p in scratch.items())
                length = sum(p.data.square().sum().item() for p in scratch.values())
                largest = max(p.data.abs().max().item() for p in scratch.values())
                errors[name].append(f"{100 * math.sqrt(off) / size:6.1f}%")
                last = f"{math.sqrt(length) / size:8.3f} {largest:8.2f}"
                if step == steps // 3 * 3:
                    print(f"  {name:32}{' '.join(errors[name])} {last}", flush=True)
        for n, p in named.items():
            p.data.add_(exact[n], alpha=lr)
        model.zero_grad()


def show_spread(model, loss, steps):
    """How far sqrt(v) lies below the largest of its block. The floor and the power of the codes
    must cover this range."""
    optimizer = AdamW(model.named_parameters(), lr=0.0, bits=32)
    for step in range(steps):
        loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    print("\nsqrt(v) over the largest of its block: quantiles 0.01% 1% 50%; share below the floor")
    kinds = {}
    for name, (_, v) in optimizer.moments.items():
        if block := optim.block_size(v.shape):
            root = v.sqrt().view(-1, block)
            ratio = root / root.amax(-1, keepdim=True).clamp_min(1e-37)
            sample = ratio.flatten()[torch.randint(ratio.numel(), (50_000,))]
            kinds.setdefault(name.split(".")[-2], []).append(sample)
    for kind, parts in kinds.items():
        ratio = torch.cat(parts)
        q = torch.quantile(ratio, torch.tensor([1e-4, 0.01, 0.5])).tolist()
        below = (ratio < (16 / 255) ** 4).float().mean()
        print(f"  {kind:14} {q[0]:.1e} {q[1]:.1e} {q[2]:.1e}; {below:.0e}")


def show_curves(steps, seeds):
    print(f"\ntraining loss, mean of every {steps // 6} steps (seed 0) | held-out loss by seed")
    names = ["32 bits", "8 bits", "8 bits, to nearest", "log codes, to nearest"]
    for name in ["torch.optim.AdamW", *names, "paper's map of v, across rows"]:
        curve, final = [], []
        for seed in range(seeds):
            model, loss = small_model(seed)
            params = dict(model.named_parameters())
            theirs = torch.optim.AdamW(params.values(), weight_decay=0.0)
            ours = None if name == "torch.optim.AdamW" else Variant(name, params)
            for step in range(steps):
                lr = cosine_with_min_lr(step, steps, 3e-3, 3e-4, warmup_steps=30)
                theirs.param_groups[0]["lr"] = lr
                batch_loss = loss(step)
                batch_loss.backward()
                ours.step(lr) if ours else theirs.step()
                model.zero_grad()
                curve.append(batch_loss.item())
            with torch.no_grad():
                final.append(f"{loss(None).item():.4f}")
        means = torch.tensor(curve[: steps // 6 * 6]).view(6, -1).mean(1).tolist()
        print(f"  {name:32}{' '.join(f'{x:.3f}' for x in means)} | {' '.join(final)}", flush=True)


def show_speed(device):
    print(f"\nspeed on {device}: ms per million entries of a (16384, 1024) matrix")
    p = nn.Parameter(torch.zeros(16384, 1024, device=device))
    p.grad = torch.randn_like(p)
    for name, optimizer in {
        "torch.optim.AdamW": torch.optim.AdamW([p]),
        "32 bits": AdamW([("p", p)], 1e-3, bits=32),
        "8 bits": AdamW([("p", p)], 1e-3),
    }.items():
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            optimizer.step()
            p[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        print(f"  {name:18} {min(seconds) * 1e9 / p.numel():.2f}")


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser(__doc__)
    parts = ["bytes", "rare", "updates", "curves", "speed"]
    add = parser.add_argument
    add("--only", nargs="+", choices=parts, default=parts, help="Parts to run.")
    add("--steps", type=int, default=600, help="Training steps of the small transformer.")
    add("--seeds", type=int, default=2, help="Number of seeds for the curves.")
    add("--device", default="cpu", help="Device for the part speed.")
    add("--model", help="A Gemma (Hub id or folder) whose gradients are used as well.")
    flags.add_data_dir_flag(parser)
    args = parser.parse_args(argv)
    flags.check_numbers(args, {"steps": 6, "seeds": 1})
    if "bytes" in args.only:
        show_bytes()
    if "rare" in args.only:
        show_rare()
    columns = "error at thirds of the run, then length / exact length and largest |update| / lr"
    if "updates" in args.only:
        print(f"\nupdates, small transformer, {args.steps} steps: {columns}")
        show_updates(*small_model(), args.steps, 3e-3, list(VARIANTS)[1:])
    if "updates" in args.only and args.model:
        print(f"\nupdates, {args.model} on GSM8K, 9 steps: {columns}")
        model, loss = real_model(args.model, args.data_dir)
        names = ["8 bits", "8 bits, to nearest", "paper's map of v, across rows"]
        show_updates(model, loss, 9, 1e-5, names)
        show_spread(model, loss, 9)
    if "curves" in args.only:
        show_curves(args.steps, args.seeds)
    if "speed" in args.only:
        show_speed(args.device)


if __name__ == "__main__":
    console.entry(main)
