"""What the stages of gpu.py share: sizes, a random Gemma, examples, a clock, rows of results."""

import gc
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.growth import random_model
from nanogsm import data, lora
from nanogsm.data import Example
from nanogsm.transformer import Config, Transformer

ROOT = Path(__file__).parents[1]
GEMMA_2B = Config(
    model_type="gemma", vocab_size=256_000, hidden_size=2048, intermediate_size=16_384,
    num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256,
    rms_norm_eps=1e-6, query_pre_attn_scalar=256, layer_types=("full_attention",) * 18,
    sliding_window=None, rope={"full_attention": (1e4, 1.0)}, attn_logit_softcapping=None,
    final_logit_softcapping=None, dtype=torch.bfloat16,
)  # fmt: skip
TOY = replace(
    GEMMA_2B, vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, head_dim=16, query_pre_attn_scalar=16,
    layer_types=("full_attention",) * 2,
)  # fmt: skip


class Size(NamedTuple):
    """How much the stages compute. REAL is what is measured, DRY only shows that the code runs."""

    config: Config
    lengths: tuple[int, int]  # mean tokens of a prompt and of an answer; these are GSM8K's
    settings: tuple  # of training: (micro-batch, checkpointing)
    steps: tuple[int, int]  # of training: not timed, timed
    prompt: int  # tokens before decoding
    new_tokens: int  # decoded
    batches: tuple  # of decoding
    peer_batches: tuple
    answers: tuple[int, int]  # of a short PPO step and of a whole one


SETTINGS = ((16, "none"), (8, "none"), (8, "light"), (16, "light"), (8, "full"))
REAL = Size(GEMMA_2B, (93, 137), SETTINGS, (3, 5), 100, 96, (1, 8, 32, 64, 256, 512), (1, 64, 256),
            (64, 512))  # fmt: skip
DRY = Size(TOY, (5, 9), ((16, "none"), (8, "light")), (1, 1), 6, 4, (1, 3), (1, 3), (16, 32))
STEP_EXAMPLES = 16  # of an SFT step


class Work(NamedTuple):
    """What a stage is given."""

    device: str
    dry: bool
    deadline: float  # on time.perf_counter's clock
    earlier: dict  # stage -> what the JSON says of it

    @property
    def size(self) -> Size:
        return DRY if self.dry else REAL

    def value(self, stage: str, measure: str):
        """The value of an earlier stage's row; None if there is none."""
        rows = self.earlier.get(stage, {}).get("rows", [])
        return next((row["value"] for row in rows if row["measure"] == measure), None)


class Skipped(Exception):
    """The stage cannot run here. The message says why."""


# ---------------------------------------------------------------------------------------- the rows


def row(measure: str, value, unit: str = "", goal: str = "", met: bool | None = None, note="",
        **more) -> dict:  # fmt: skip
    """One line of the table. value: a number, a text, or None where the device cannot tell. more:
    numbers for the JSON alone."""
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)  # JSON has no NaN
    return {"measure": measure, "value": value, "unit": unit, "goal": goal, "met": met,
            "note": note, **more}  # fmt: skip


def at_most(measure: str, value: float | None, limit: float, unit: str = "", **more) -> dict:
    met = None if value is None else bool(value <= limit)  # False for NaN
    return row(measure, value, unit, f"at most {limit:g}", met, **more)


def at_least(measure: str, value: float | None, limit: float, unit: str = "", **more) -> dict:
    met = None if value is None else bool(value >= limit)
    return row(measure, value, unit, f"at least {limit:g}", met, **more)


def exactly(measure: str, value, wanted) -> dict:
    return row(measure, value, "", f"{wanted}", value == wanted)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of b's largest entry. Computed on the CPU."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).abs().max() / b.abs().max()).item()


def worst(values) -> float:
    """The largest, or NaN if one is NaN, which max() can pass over."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)


# ------------------------------------------------------------------------------ models and examples


def new_model(work: Work, dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    return random_model(work.size.config, work.device, dtype)


def trainable(work: Work, method: str) -> Transformer:
    """As train_sft has it in bfloat16: float32 weights, or adapters on a bfloat16 base."""
    model = new_model(work, torch.float32 if method == "full" else torch.bfloat16)
    if method == "LoRA":
        lora.add_lora(model, 16, 32.0)
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def examples(work: Work, n: int, seed: int = 0) -> list[Example]:
    """Random ids with about the lengths of GSM8K's problems and answers."""
    draw, found = random.Random(seed), []
    for i in range(n):
        prompt, answer = (
            max(mean // 3, round(draw.gauss(mean, mean / 3))) for mean in work.size.lengths
        )
        ids = [draw.randrange(8, work.size.config.vocab_size) for _ in range(prompt + answer)]
        found.append(Example(ids, [0] * prompt + [1] * answer, i))
    return found


def peer_of(model: Transformer):
    """transformers' Gemma with the very same weights: they share the memory."""
    try:
        import transformers
    except ImportError as error:
        raise Skipped("transformers is not installed") from error
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
             "num_attention_heads", "num_key_value_heads", "rms_norm_eps")  # fmt: skip
    config = transformers.GemmaConfig(**{name: getattr(model.config, name) for name in names})
    dtype = next(model.parameters()).dtype
    with model.device:
        peer = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    left = peer.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert left.missing_keys in ([], ["lm_head.weight"]) and not left.unexpected_keys, left
    peer.tie_weights()
    peer.generation_config.eos_token_id = None  # answers do not end early
    return peer.eval()


# --------------------------------------------------------------------------------- time and memory


class Stopwatch:
    """Marks on the device's own time line. They are read after all work is done, so the clock adds
    no wait to what it times."""

    def __init__(self, device: str):
        self.cuda, self.marks = device.startswith("cuda"), []
        self.mark()

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """The seconds between each mark and the next."""
        pairs = zip(self.marks, self.marks[1:])
        if not self.cuda:
            return [max(1e-9, end - start) for start, end in pairs]
        torch.cuda.synchronize()
        return [max(1e-9, start.elapsed_time(end) / 1000) for start, end in pairs]


def free(device: str) -> None:
    """Give unused memory back, and start to look for a new peak."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(device: str) -> dict[str, int | None]:
    """The most bytes of tensors, and of what the allocator held for them; None on a CPU."""
    if not device.startswith("cuda"):
        return {"allocated": None, "reserved": None}
    found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return dict(zip(("allocated", "reserved"), found))


def gib(size: int | None) -> float | None:
    return None if size is None else size / 2**30


def time_steps(work: Work, micro_batch: int, backward, optimize) -> dict:
    """Means of training steps: seconds of backward(micro-batches) (and forward) and of optimize(),
    and tokens; the tokens of the longest micro-batch; the peak of memory."""
    not_timed, timed = work.size.steps
    steps = [examples(work, STEP_EXAMPLES, seed) for seed in range(not_timed + timed)]
    for step in steps[:not_timed]:
        backward(step)
        optimize()
    steps = steps[not_timed:]
    if work.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    watch = Stopwatch(work.device)
    for step in steps:
        backward(step)
        watch.mark()
        optimize()
        watch.mark()
    spans = watch.spans()
    rows = [rows for step in steps for rows in data.micro_batches(step, micro_batch)]
    tokens = [sum(len(example.ids) for example in some) for some in rows]
    return {
        "backward_s": sum(spans[::2]) / timed, "optimizer_s": sum(spans[1::2]) / timed,
        "step_s": sum(spans) / timed, "tokens_per_s": sum(tokens) / sum(spans),
        "tokens": sum(tokens) / timed, "tokens_at_once": max(tokens),
        "micro_batches": len(rows) / timed,
        "supervised": sum(map(data.supervised_tokens, steps)) / timed, **peaks(work.device),
    }  # fmt: skip
