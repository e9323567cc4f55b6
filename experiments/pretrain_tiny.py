"""How the embedded model was made: a tokenizer, and half a million parameters trained from scratch.

    python -m experiments.pretrain_tiny        # ten minutes on one core -> runs/tiny-pretrain/model

The result was copied to nanogsm/tiny/gemma. Whoever replaces it must also renew the logits that
tests/test_tiny.py compares with (tests/fixtures/README.md).

The text is generated while it is read. It has sums, word problems whose solution is told in plain
prose, and questions with a bare number as their answer:

    #### Sums         A hall has 6 rows with 8 seats in each row. If 30 seats    Question: Tom is 9
    48/2 = 24         are taken, how many seats are empty? There are 6*8 = 48    years old. How ...
    17+25 = 42        seats in the hall. There are 48-30 = 18 empty seats.       Answer: 22

Nothing has the form that fine-tuning will ask for. No working follows "Answer:", and "####" only
opens headings, as it does on the Web. So the model is in the state of an untuned Gemma: it can
calculate, but when asked it neither shows its work nor ends with "#### 18". Questions of the
training split occur in the text. Questions of the test split never do.

The text of a step follows from --seed and the step alone. So a stopped run can continue, and it
ends with the same bits as an uninterrupted one on the same machine.
"""

import argparse
import json
import random
import re
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from nanogsm import UserError, data
from nanogsm.model import read_config, save_model, use_fast_forms
from nanogsm.optim import AdamW, cosine_with_min_lr
from nanogsm.run import console, flags, machine
from nanogsm.run.folder import RunFolder
from nanogsm.run.loop import Run
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
SAVE_EVERY = 200  # steps between checkpoints
ROWS = 16  # rows per step
ROW_TOKENS = 256  # a row is a sequence of whole documents, cut off at this length

# --------------------------------------------------------------------------------------- the text


def document(rng: random.Random, left_out: set[str]) -> str:
    """A page of sums, of problems solved in prose, or of questions with bare answers. No question
    of `left_out` is used."""
    kind = rng.choices(("sums", "stories", "questions"), (30, 50, 20))[0]
    if kind == "sums":
        lines = [_sum(rng) for _ in range(rng.randint(4, 10))]
        if rng.random() < 0.5:  # with calculator annotations: <<48/2=24>>24
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
    """Such as "48/2 = 24". Operands and result are whole numbers from 2 to LIMIT."""
    operation, largest = rng.choice("+-*/"), problems.LIMIT
    while True:
        a, b = rng.randint(2, largest), rng.randint(2, largest)
        if operation == "*":
            a, b = rng.randint(2, largest // 2), rng.randint(2, 20)
        if operation == "/":  # start from a product, because most pairs leave a remainder
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


# ---------------------------------------------------------------------------------- the tokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]  # ids from 0
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Text is first split into these pieces, and no token spans two of them: a word or a mark with the
# space before it, a single digit, line feeds.
PIECES = r"▁?([A-Za-z]+|<<|#+|\*\*|[^A-Za-z0-9\s])|[0-9]|\n+"


def make_tokenizer(file: Path) -> None:
    """Write a tokenizer.json that works as Gemma's does, by byte-pair encoding. The space before a
    word (written U+2581) belongs to the word, every digit is a token, and a character that has no
    token is spelt in bytes. Its words are those of the problems and the prompts."""
    bpe = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(  # for other tools: data.py adds BOS
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    headings = "#### Sums\n#### Stories\n\n"
    texts = [data.INSTRUCTION, f"user model Question: Answer: The answer is {headings}"]
    for style in ("main", "socratic"):
        pairs = problems.problems("train", style, worked_only=True)
        texts += [f" {question} {answer}" for question, answer in pairs]
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL + BYTES,
        initial_alphabet=[*map(chr, range(33, 127)), "▁", "\n"],
        vocab_size=10_000,  # more than there are words, so every word becomes one token
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    # Bytes must not be special tokens: those are left out when ids are decoded.
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in SPECIAL]
    files.replace_file(file, json.dumps(content, ensure_ascii=False, indent=1).encode())


# -------------------------------------------------------------------------------------- the model


def make_base(folder: Path) -> None:
    """Write a checkpoint in the Hub's layout, without weights."""
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
    """Draw the weights. A matrix preserves the size of its input. The two matrices of a block that
    add to the residual stream start smaller, so that the stream does not grow with depth. Norms
    keep a gain of 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            scale = 0.02 if "embed" in name else p.shape[1] ** -0.5
            torch.nn.init.normal_(p, 0.0, scale, generator=generator)
            if "o_proj" in name or "down_proj" in name:
                p.data *= (2 * model.config.num_hidden_layers) ** -0.5


def rows_of_step(tokenizer: data.Tokenizer, seed: int, step: int, left_out: set[str]) -> Tensor:
    """The ids of a step, (ROWS, ROW_TOKENS + 1): `<bos>document<eos><bos>document ...`. There is
    one more than ROW_TOKENS because the last token is only predicted."""
    rng = random.Random(f"{seed} {step}")
    rows = []
    for _ in range(ROWS):
        ids: list[int] = []
        while len(ids) <= ROW_TOKENS:
            ids += [tokenizer.bos_id, *tokenizer.encode(document(rng, left_out)), tokenizer.eos_id]
        rows.append(ids[: ROW_TOKENS + 1])
    return torch.tensor(rows)


# ------------------------------------------------------------------------------------ the training


def train(args: argparse.Namespace, folder: RunFolder) -> int:
    """Train from the start or from the last checkpoint to the end. Returns the exit status."""
    base = folder.path / "base"
    base.mkdir(exist_ok=True)
    make_base(base)
    tokenizer, model = data.Tokenizer(base), Transformer(read_config(base))
    use_fast_forms(model)
    random_start(model, args.seed)
    left_out = {question for question, _ in problems.problems("test")}
    weights = dict(model.named_parameters())
    optimizer = AdamW(weights.items(), args.lr, betas=(0.9, 0.95), weight_decay=0.1, bits=32)
    parameters = sum(p.numel() for p in weights.values())
    print(f"{parameters:,} parameters, {args.steps * ROWS * ROW_TOKENS:,} tokens to read")

    run = Run(folder, args.steps, {"": optimizer}, args, show={"loss": "loss"})
    with run:
        for step in range(run.first, args.steps):
            ids = rows_of_step(tokenizer, args.seed, step, left_out)
            optimizer.lr = cosine_with_min_lr(step, args.steps, args.lr, 0.0, args.steps // 10)
            logits = model.logits(model(ids[:, :-1]))  # (ROWS, ROW_TOKENS, V): V is small here
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.end_step({"loss": loss.item(), "lr": optimizer.lr, "tokens": ids.numel()})
        save_model(model, tokenizer, folder.path / "model")
        run.finish({"loss": run.metrics["loss"]})
        print(f"the model is in {folder.path / 'model'}")
    return run.status or 0


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser("Train the embedded model again, from scratch.")
    add = p.add_argument
    add("--steps", type=int, default=1000, help=f"Steps of {ROWS * ROW_TOKENS:,} tokens.")
    add("--lr", type=float, default=4e-3, help="Peak learning rate.")
    add("--seed", type=int, default=0, help="Seed of the weights and the text. Default: 0.")
    add("--out", default="runs/tiny-pretrain", help="Run folder. Its model/ is the result.")
    add("--overwrite", action="store_true", help="Start over in a folder that has a run.")
    p.set_defaults(save_every=SAVE_EVERY, val_every=0, device="cpu", wandb=None)  # for Run
    args = p.parse_args(argv)
    if args.steps < 1 or not 0 < args.lr < 1 or args.seed < 0:
        raise UserError("give --steps of at least 1, 0 < --lr < 1 and --seed of at least 0")

    settings = {"steps": args.steps, "lr": args.lr, "seed": args.seed, "config": CONFIG}
    with RunFolder(args.out, settings, machine.environment(), args.overwrite) as folder:
        if folder.finished:
            print(folder.already_finished())
            return 0
        return train(args, folder)


if __name__ == "__main__":
    console.entry(main)
