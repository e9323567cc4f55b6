"""How the embedded model was made: a tokenizer, then half a million parameters taught to reckon.

    python -m experiments.pretrain_tiny        # ten minutes on one core -> runs/tiny-pretrain/model

What comes out was copied to nanogsm/tiny/gemma. (Whoever replaces it makes the logits that
tests/test_tiny.py compares with anew, see tests/fixtures/README.md.)

The text is made up as it is read: sums, word problems told with their working as plain prose, and
questions that somebody answered with a bare number.

    #### Sums         A hall has 6 rows with 8 seats in each row. If 30 seats    Question: Tom is 9
    48/2 = 24         are taken, how many seats are empty? There are 6*8 = 48    years old. How ...
    17+25 = 42        seats in the hall. There are 48-30 = 18 empty seats.       Answer: 22

None of it has the form that fine-tuning will ask for: after "Answer:" nothing is worked out, and
"####" only opens headings, as it does on the Web. So the model comes out like the Gemma it stands
for: it can calculate, and when asked it does neither show its work nor end with "#### 18". No
question of the test split is in the text (of the training split there are).

Everything follows from --seed, step by step: a stopped run continues where it was and ends, on the
same machine, with the same bits.
"""

import argparse
import json
import math
import random
import re
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from nanogsm import UserError, data
from nanogsm.model import read_config, save_model
from nanogsm.optim import AdamW, cosine_with_min_lr
from nanogsm.run import console
from nanogsm.run import folder as runs
from nanogsm.store import files
from nanogsm.tiny import problems
from nanogsm.transformer import Transformer

CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 64,
    "rope_theta": 10_000.0,
    "rope_local_base_freq": 10_000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "torch_dtype": "float32",
}
SAVE_EVERY = 200  # steps
ROWS, ROW = 16, 256  # a step's rows, and the tokens of a row: documents one after the other

# ------------------------------------------------------------------------------------------- text


def document(rng: random.Random, left_out: set[str]) -> str:
    """A page of sums, of worked problems told as prose, or of questions with bare answers."""
    kind = rng.choices(("sums", "stories", "questions"), (30, 50, 20))[0]
    if kind == "sums":
        lines = [_sum(rng) for _ in range(rng.randint(4, 10))]
        if rng.random() < 0.5:  # as in a calculator's log: <<48/2=24>>24
            lines = [re.sub(r"(.*) = (.*)", r"<<\1=\2>>\2", line) for line in lines]
        return "#### Sums\n" * (rng.random() < 0.2) + "\n".join(lines)
    told = [_problem(rng, left_out) for _ in range(rng.choice((1, 1, 2, 3)))]
    if kind == "stories":
        plain = [[re.sub("<<.*?>>", "", step) for step in worked.steps] for worked in told]
        lines = [" ".join([worked.question, *steps]) for worked, steps in zip(told, plain)]
        return "#### Stories\n" * (rng.random() < 0.2) + "\n".join(lines)
    lead = f"{data.INSTRUCTION}\n\n" * (rng.random() < 0.3)
    return lead + "\n\n".join(f"Question: {w.question}\nAnswer: {w.answer}" for w in told)


def _sum(rng: random.Random) -> str:
    operation, largest = rng.choice("+-*/"), problems.LIMIT
    while True:
        a, b = rng.randint(2, largest), rng.randint(2, largest)
        if operation == "*":
            a, b = rng.randint(2, largest // 2), rng.randint(2, 20)
        if operation == "/":  # a product is taken apart: most pairs of numbers would leave a rest
            b = rng.randint(2, 20)
            a = b * rng.randint(2, largest // 2)
        result = problems.OPERATIONS[operation](a, b)
        if a <= largest and 2 <= result <= largest:
            return f"{a}{operation}{b} = {result}"


def _problem(rng: random.Random, left_out: set[str]) -> problems.Worked:
    worked = problems.sample(rng)
    while worked.question in left_out:
        worked = problems.sample(rng)
    return worked


# -------------------------------------------------------------------------------------- tokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]  # ids from 0
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Text is first cut into these pieces, and no token spans two: a word or mark with the space before
# it, a single digit, ends of lines.
PIECES = r"▁?([A-Za-z]+|<<|#+|\*\*|[^A-Za-z0-9\s])|[0-9]|\n+"


def make_tokenizer(file: Path) -> None:
    """Write a tokenizer.json that works as Gemma's does: byte-pair encoding in which the space
    before a word (written U+2581) is part of it, digits stand alone, and a character without a
    token of its own is spelt in bytes. Its words are those of the problems and of the prompts."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(  # for others: we put it in ourselves
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    texts = [data.INSTRUCTION, "user model Question: Answer: The answer is #### Sums\n#### Stories\n\n"]
    for style in ("main", "socratic"):
        texts += [f" {p.question} {p.answer}" for p in problems.problems("train", style, worked_only=True)]
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL + BYTES,
        initial_alphabet=[*map(chr, range(33, 127)), "▁", "\n"],
        vocab_size=10_000,  # more than there are words: every word ends up as one token
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    # Byte tokens are there for spelling. As special tokens they would not be decoded.
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in SPECIAL]
    files.replace_file(file, json.dumps(content, ensure_ascii=False, indent=1).encode())


# ------------------------------------------------------------------------------------------ model


def make_base(folder: Path) -> None:
    """Everything of a checkpoint in the Hub's layout but the weights."""
    make_tokenizer(folder / "tokenizer.json")
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    files.write_json(folder / "config.json", CONFIG | {"vocab_size": size})
    stops = [SPECIAL.index("<eos>"), SPECIAL.index("<end_of_turn>")]
    files.write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": stops})
    files.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
        "unk_token": "<unk>", "pad_token": "<pad>", "clean_up_tokenization_spaces": False,
    })  # fmt: skip


def random_start(model: Transformer, seed: int) -> None:
    """Matrices that keep the size of what passes through them; each block's two additions to the
    residual stream are made small, so that the stream does not grow with depth. Norms stay at one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            scale = 0.02 if "embed" in name else p.shape[1] ** -0.5
            torch.nn.init.normal_(p, 0.0, scale, generator=generator)
            if "o_proj" in name or "down_proj" in name:
                p.data *= (2 * model.config.num_hidden_layers) ** -0.5


def rows_of_step(tokenizer: data.Tokenizer, seed: int, step: int, left_out: set[str]) -> Tensor:
    """(ROWS, ROW + 1) ids, `<bos>document<eos><bos>document ...`, cut where a row is full."""
    rng = random.Random(f"{seed} {step}")
    rows = []
    for _ in range(ROWS):
        ids: list[int] = []
        while len(ids) <= ROW:
            ids += [tokenizer.bos_id, *tokenizer.encode(document(rng, left_out)), tokenizer.eos_id]
        rows.append(ids[: ROW + 1])
    return torch.tensor(rows)


# --------------------------------------------------------------------------------------- training


def main(argv: list[str] | None = None) -> int:
    p = console.Parser("Make the embedded model again, from nothing.")
    p.add_argument("--steps", type=int, default=1000, help=f"of {ROWS * ROW:,} tokens")
    p.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0, help="of the weights and the text (0)")
    p.add_argument("--out", default="runs/tiny-pretrain", help="run folder; its model/ is the result")
    p.add_argument("--overwrite", action="store_true", help="start anew in a folder that has a run")
    args = p.parse_args(argv)
    if args.steps < 1 or not 0 < args.lr < 1 or args.seed < 0:
        raise UserError("give --steps of at least 1, 0 < --lr < 1 and --seed of at least 0")

    settings = {"steps": args.steps, "lr": args.lr, "seed": args.seed, "config": CONFIG}
    with runs.Run(args.out, settings, console.environment(), args.overwrite) as run:
        if run.finished:
            print(f"{args.out} is already finished; to train again give --overwrite or --out")
            return 0
        return train(args, run)


def train(args: argparse.Namespace, run: runs.Run) -> int:
    base = run.folder / "base"
    base.mkdir(exist_ok=True)
    make_base(base)
    tokenizer, model = data.Tokenizer(base), Transformer(read_config(base))
    random_start(model, args.seed)
    left_out = {problem.question for problem in problems.problems("test")}
    weights = dict(model.named_parameters())
    optimizer = AdamW(weights.items(), args.lr, betas=(0.9, 0.95), weight_decay=0.1, bits=32)
    print(f"{sum(p.numel() for p in weights.values()):,} parameters, "
          f"{args.steps * ROWS * ROW:,} tokens to read")  # fmt: skip

    first, loss = 0, math.nan
    if (checkpoint := run.load_checkpoint()) is not None:
        first, tensors, state = checkpoint
        optimizer.load_state_tensors(tensors)
        loss = state["loss"]
        print(f"continuing {run.folder} from step {first}")

    def save_checkpoint(step: int) -> None:
        run.save_checkpoint(step, optimizer.state_tensors(), {"loss": loss})

    with console.graceful_stop() as stop, console.Progress(args.steps) as progress:
        for step in range(first, args.steps):
            if stop.requested:
                save_checkpoint(step)
                progress.note(stop.message(step))
                return stop.exit_code
            began = time.perf_counter()
            ids = rows_of_step(tokenizer, args.seed, step, left_out)
            optimizer.lr = cosine_with_min_lr(step, args.steps, args.lr, 0.0, args.steps // 10)
            logits = model.logits(model(ids[:, :-1]))  # (ROWS, ROW, V): small enough to be held
            mean = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            mean.backward()
            loss = mean.item()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - began
            run.log({"step": step + 1, "loss": loss, "lr": optimizer.lr, "seconds": seconds})
            progress.update(step + 1, loss=loss, tokens_per_s=ids.numel() / seconds)
            if (step + 1) % SAVE_EVERY == 0:
                save_checkpoint(step + 1)

    save_model(model, tokenizer, run.folder / "model")
    run.finish({"steps": args.steps, "loss": loss})
    print(f"the model is in {run.folder / 'model'}")
    return 0


if __name__ == "__main__":
    console.entry(main)
