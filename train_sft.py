"""Supervised fine-tuning of Gemma on GSM8K: full weights, or LoRA adapters with --lora.

    python train_sft.py --tiny --lora                # the embedded model, a minute or two anywhere
    python train_sft.py --lora                       # google/gemma-2b-it, runs/sft-lora-main
    python train_sft.py --data socratic              # full fine-tuning, runs/sft-full-socratic
    python train_sft.py --model PATH --dry-run       # parameters, memory, steps; loads no weights

The loop below is the whole method: draw a step's examples, add up the log-probabilities of their
answer tokens, divide by the number of those tokens in the whole step, follow the gradient. The same
command again continues a run that was stopped, and says so of one that is finished.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from nanogsm import UserError, data, generate, lora
from nanogsm.fast.checkpointing import CHECKPOINTING
from nanogsm.logprob import token_logprobs
from nanogsm.model import (
    compute_in_float32,
    load_model,
    read_config,
    save_adapter,
    save_model,
    set_checkpointing,
)
from nanogsm.optim import AdamW, cosine_with_min_lr
from nanogsm.run import console, plan
from nanogsm.run import folder as runs
from nanogsm.store import hub
from nanogsm.transformer import Config, Transformer

# What a recipe sets when the flag is not given. "report" is that of the study behind this project,
# which used one learning rate for both methods; "tuned" has the field's customary rates (README,
# Recipes). The embedded model is so small that it learns at rates 50 to 100 times higher.
RECIPES = {
    "report": {"lr": {"full": 1e-5, "lora": 1e-5}, "min_lr_share": 0.1, "warmup": 0.0},
    "tuned": {"lr": {"full": 2e-5, "lora": 2e-4}, "min_lr_share": 0.1, "warmup": 0.03},
}
TINY_RECIPES = {
    "report": {"lr": {"full": 1e-3, "lora": 1e-3}, "min_lr_share": 0.1, "warmup": 0.0},
    "tuned": {"lr": {"full": 2e-3, "lora": 1e-2}, "min_lr_share": 0.1, "warmup": 0.03},
}
DEFAULTS = {"model": "google/gemma-2b-it", "micro_batch": 8, "accumulation": 2, "checkpointing": "light",
            "lora_r": 16, "lora_alpha": 32.0}  # fmt: skip
TINY_DEFAULTS = DEFAULTS | {"model": "tiny", "micro_batch": 16, "accumulation": 1, "checkpointing": "none"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = console.Parser("Fine-tune Gemma on GSM8K, full or LoRA.")
    p.add_argument("--recipe", choices=RECIPES, default="report", help="where unset values come from")
    # model and adapters
    console.add_tiny_flag(p)
    p.add_argument("--model", help="Hub id, folder or run to start from (google/gemma-2b-it; tiny)")
    p.add_argument("--lora", action="store_true", help="train adapters on a frozen base")
    p.add_argument("--lora-r", type=int, help="rank of the adapters (16)")
    p.add_argument("--lora-alpha", type=float, help="their change is scaled by alpha/r (32)")
    p.add_argument("--merge", action="store_true", help="also save base and adapters as one model/")
    # data
    p.add_argument("--data", default="main", help="main, socratic or a .jsonl file of your own (--tiny: "
                   "also worked, with no terse answer)")  # fmt: skip
    console.add_data_dir_flag(p)
    p.add_argument("--style", choices=("plain", "chat"), default="plain", help="of the prompt")
    p.add_argument("--instruction", action="store_true", help="begin prompts with the instruction")
    p.add_argument("--max-seq-length", type=int, default=768, help="longer examples are left out")
    p.add_argument("--max-examples", type=int, help="train on a fixed sample of that many")
    # optimisation
    p.add_argument("--epochs", type=int, default=1, help="times through the data")
    p.add_argument("--micro-batch", type=int, help="examples at once (8; tiny 16)")
    p.add_argument("--accumulation", type=int, help="micro-batches a step (2; tiny 1): their product counts, "
                   "the split changes memory only")  # fmt: skip
    p.add_argument("--lr", type=float, help="peak learning rate (report recipe: 1e-5; tiny 1e-3)")
    p.add_argument("--min-lr", type=float, help="where the cosine ends (default: a tenth of --lr)")
    p.add_argument("--warmup", type=float, help="share of all steps in which lr rises from 0 (report: 0)")
    p.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW, on matrices only (0)")
    p.add_argument("--clip", type=float, default=1.0, help="limit of the gradient's norm")
    p.add_argument("--optim", choices=("adamw8bit", "adamw"), default="adamw8bit",
                   help="moments in 8 or 32 bits")  # fmt: skip
    p.add_argument("--checkpointing", choices=CHECKPOINTING, help="what backward computes again: nothing, what "
                   "is cheap, or all; more of it takes less memory (light; tiny none)")  # fmt: skip
    # validation, on a slice held out of train
    p.add_argument("--val-examples", type=int, help="training problems held out (64; tiny 256; at most "
                   "a tenth of the file)")  # fmt: skip
    p.add_argument("--val-every", type=int, default=0, help="steps between validations; 0: at the end")
    p.add_argument("--keep", choices=("last", "best"), default="last", help="weights to save: the last, "
                   "or those of the best validation")  # fmt: skip
    p.add_argument("--max-new-tokens", type=int, help="of a validation answer (320; socratic 512; "
                   "tiny 128, its socratic 160)")  # fmt: skip
    # the run
    p.add_argument("--seed", type=int, default=0, help="of the order of examples and the adapters (0)")
    p.add_argument("--out", help="run folder (default runs/sft-{full,lora}-{data}; runs/tiny/sft-...)")
    p.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    p.add_argument("--overwrite", action="store_true", help="start anew in a folder that has a run")
    console.add_wandb_flag(p)
    p.add_argument("--dry-run", action="store_true", help="print the plan, load no weights")
    console.add_compute_flags(p)
    args = p.parse_args(argv)
    fill_in(args)
    check_args(args)
    return args


def fill_in(args: argparse.Namespace) -> None:
    """What was not given, from the recipe and the machine."""
    for name in ("lora_r", "lora_alpha"):
        if getattr(args, name) is not None and not args.lora:
            raise UserError(f"--{name.replace('_', '-')} goes with --lora")
    args.tiny = args.tiny or bool(args.model and runs.is_tiny(args.model))
    for name, value in (TINY_DEFAULTS if args.tiny else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    recipe = (TINY_RECIPES if args.tiny else RECIPES)[args.recipe]
    method = "lora" if args.lora else "full"
    args.lr = args.lr if args.lr is not None else recipe["lr"][method]
    args.min_lr = args.min_lr if args.min_lr is not None else recipe["min_lr_share"] * args.lr
    args.warmup = args.warmup if args.warmup is not None else recipe["warmup"]
    folder = "runs/tiny" if args.tiny else "runs"
    args.out = args.out or f"{folder}/sft-{method}-{Path(args.data).stem}"
    args.data, args.precision = console.for_tiny(args)
    if args.max_new_tokens is None:
        args.max_new_tokens = data.answer_limit(args.data)
    args.device, args.precision = console.pick_compute(args.device, args.precision)


def check_args(args: argparse.Namespace) -> None:
    at_least = {"lora_r": 1, "max_seq_length": 2, "max_examples": 1, "epochs": 1, "micro_batch": 1,
                "accumulation": 1, "val_examples": 0, "val_every": 0, "max_new_tokens": 1,
                "save_every": 1, "seed": 0}  # fmt: skip
    console.check_numbers(args, at_least, positive=("lr", "clip", "lora_alpha"))
    for name, most in (("min_lr", args.lr), ("warmup", 1), ("weight_decay", 10)):
        if not 0 <= getattr(args, name) <= most:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is {getattr(args, name):g}: give a number from 0 to {most:g}")
    if args.merge and not args.lora:
        raise UserError("--merge goes with --lora: full fine-tuning has nothing to merge")
    if args.keep == "best" and args.val_every == 0:
        raise UserError("--keep best needs --val-every: steps between the validations it chooses from")


# ------------------------------------------------------------------------------------- the data


def encode_all(tokenizer, problems, prompt, max_seq_length) -> list[data.Example]:
    """Problems as training examples; those over the limit are left out, never cut: a cut answer
    would lose its #### and teach the model not to give one."""
    examples = [
        data.Example(*data.encode(tokenizer, prompt, p.question, p.answer), p.index) for p in problems
    ]
    kept = [e for e in examples if len(e.ids) <= max_seq_length]
    if examples and not kept:
        shortest = min(len(e.ids) for e in examples)
        raise UserError(f"every example is longer than --max-seq-length {max_seq_length} "
                        f"(the shortest has {shortest} tokens)")  # fmt: skip
    if len(kept) < len(examples):
        print(f"left out {len(examples) - len(kept)} of {len(examples)} examples: "
              f"longer than --max-seq-length {max_seq_length}")  # fmt: skip
    return kept


def examples_of_step(examples: list, step: int, size: int, seed: int) -> list[data.Example]:
    """Step's examples (step from 0). Every epoch is a fresh permutation made from (seed, epoch)
    alone, so a continued run draws what the interrupted one would have drawn."""
    steps = math.ceil(len(examples) / size)
    epoch, place = divmod(step, steps)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    return [examples[i] for i in order[place * size : (place + 1) * size]]


# --------------------------------------------------------------------------------- one gradient


def backward_step(model: Transformer, examples: list, micro_batch: int, pad_id: int, autocast) -> float:
    """Add the gradient of one step's loss to .grad and return the loss, in nats a token.

    The loss is a sum over all supervised tokens of the step divided by their number, so it does not
    depend on how the step is cut into micro-batches. (A mean of the micro-batches' means would
    weigh the tokens of short answers more.)
    """
    supervised = sum(sum(e.mask) for e in examples)
    loss = torch.zeros((), device=model.device)
    for rows in data.micro_batches(examples, micro_batch):
        ids, mask, lengths = data.collate(rows, pad_id, model.device)  # (B, T)
        with autocast():
            hidden = model(ids, lengths)  # (B, T, D); position t predicts token t + 1
        with autocast():  # a new one: the first's bfloat16 copies of trained weights, 0.2 GiB, go with it
            logp, _ = token_logprobs(model.vocabulary, hidden[:, :-1], ids[:, 1:], mask[:, 1:])
        part = -logp.sum() / supervised
        part.backward()
        loss += part.detach()
    return loss.item()


@torch.no_grad()
def mean_loss(model: Transformer, examples: list, micro_batch: int, pad_id: int, autocast) -> float:
    """The same loss over examples, without gradients."""
    total, supervised = 0.0, sum(sum(e.mask) for e in examples)
    for rows in data.micro_batches(examples, micro_batch):
        ids, mask, lengths = data.collate(rows, pad_id, model.device)
        with autocast():
            hidden = model(ids, lengths)
            logp, _ = token_logprobs(model.vocabulary, hidden[:, :-1], ids[:, 1:], mask[:, 1:])
        total -= logp.sum().item()
    return total / supervised


# ------------------------------------------------------------------------------------- planning


def print_plan(args, config: Config, examples, held_out, steps: int) -> None:
    with torch.device("meta"):  # counts parameters without allocating one
        model = Transformer(config)
    if args.lora:
        lora.add_lora(model, args.lora_r, args.lora_alpha)
    total = sum(p.numel() for p in model.parameters())
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    trained = sum(map(math.prod, shapes))
    lengths = [len(e.ids) for e in examples]
    print(f"model        {args.model} ({config.model_type}), {total:,} parameters, {trained:,} trained")
    print(f"data         {len(examples):,} examples, {sum(lengths):,} tokens, "
          f"{sum(sum(e.mask) for e in examples):,} supervised, longest {max(lengths)}; "
          f"{len(held_out)} held out")  # fmt: skip
    print(f"steps        {steps:,} of {args.micro_batch} x {args.accumulation} examples, "
          f"{args.epochs} epoch{'s' * (args.epochs > 1)}; lr {args.lr:g} to {args.min_lr:g}, "
          f"warm-up {args.warmup:g} ({args.recipe} recipe); {args.optim}")  # fmt: skip
    print(f"compute      {args.device}, {args.precision}")
    if args.dry_run:
        bf16, tokens = args.precision == "bf16", sum(sorted(lengths)[-args.micro_batch :])  # at worst
        plan.print_budget({
            "weights": plan.model_bytes(config, total, trained, bf16),
            "gradients": 4 * trained,
            "optimizer": plan.moments_bytes(shapes, args.optim),
            "activations": plan.activation_bytes(config, tokens, args.lora, bf16, args.checkpointing),
            "vocabulary": plan.head_bytes(config, tokens, args.device, not args.lora, bf16),
        })  # fmt: skip


# -------------------------------------------------------------------------------------- the run


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    prompt = data.Prompt(args.style, 0, args.instruction)
    found = hub.find_model(args.model, weights=not args.dry_run)
    if args.lora and found.adapter:
        raise UserError(f"{args.model} is an adapter: start from its merged model (--merge makes one)")
    out = Path(args.out).resolve()
    if any(path and path.resolve().is_relative_to(out) for path in (found.base, found.adapter)):
        raise UserError(f"--model lies in the run folder {args.out}: choose another --out")
    config, tokenizer = read_config(found.base), data.Tokenizer(found.base)

    problems = data.load_problems(args.data, "train", args.data_dir)
    if args.val_examples is None:
        args.val_examples = data.usual_held_out(len(problems), args.tiny)
    problems, held_out = data.split_validation(problems, args.val_examples)
    if args.keep == "best" and not held_out:
        raise UserError("--keep best has nothing to choose by: no problems are held out (--val-examples)")
    if args.max_examples:
        problems = data.subset(problems, args.max_examples)
    examples = encode_all(tokenizer, problems, prompt, args.max_seq_length)
    held_out_examples = encode_all(tokenizer, held_out, prompt, args.max_seq_length)
    size = args.micro_batch * args.accumulation
    steps = math.ceil(len(examples) / size) * args.epochs
    print_plan(args, config, examples, held_out, steps)
    if args.dry_run:
        return 0

    settings = {k: v for k, v in vars(args).items() if k not in ("dry_run", "overwrite", "out")}
    settings["data_sha256"] = data.digest(problems + held_out)
    settings |= {"model_sha256": hub.fingerprint(found), "examples_a_step": size}
    info = console.environment() | {"prompt": prompt._asdict(), "base": str(found.base)}
    # What takes less memory may change on the way: of the two factors of a step their product counts. A
    # file may move: its content is compared, as data_sha256.
    may_differ = ("save_every", "data_dir", "device", "merge", "wandb", "checkpointing", "micro_batch",
                  "accumulation", "data")  # fmt: skip
    with runs.Run(args.out, settings, info, args.overwrite, may_differ) as run:
        if run.finished:
            print(run.already_finished())
        else:
            status = train(args, run, found, prompt, examples, size, steps, held_out_examples, held_out)
            if status:
                return status
        if args.merge and not (run.folder / "model").exists():
            merged, tokenizer = load_model(found._replace(adapter=run.folder / "adapter"), merge=True)
            save_model(merged, tokenizer, run.folder / "model")
            print(f"merged into {run.folder / 'model'}")
    print(runs.what_next(args.out, args.data, len(held_out)))
    return 0


def train(args, run, found, prompt, examples, size, steps, held_out_examples, held_out) -> int:
    """Train from scratch or from the last checkpoint to the end; 0, or the status of a stop."""
    bf16 = args.precision == "bf16"
    kind = torch.device(args.device).type  # "cuda:1" is a place, "cuda" a kind
    autocast = lambda: torch.autocast(kind, torch.bfloat16, enabled=bf16)  # noqa: E731

    # Full fine-tuning keeps float32 weights: at these learning rates most updates of a bfloat16
    # weight are smaller than its rounding. A frozen base has no such need; autocast would cast one in
    # float32 anew at every use.
    dtype = torch.float32 if not args.lora else torch.bfloat16 if bf16 else None
    model, tokenizer = load_model(found, dtype, args.device, merge=True)
    set_checkpointing(model, args.checkpointing)
    if not bf16:
        compute_in_float32(model)
    if args.lora:
        adapted = lora.add_lora(model, args.lora_r, args.lora_alpha, args.seed)
        print(f"adapters on {len(adapted)} layers")
    optimizer = AdamW(model.named_parameters(), lr=args.lr, weight_decay=args.weight_decay,
                      bits=8 if args.optim == "adamw8bit" else 32)  # fmt: skip
    warmup = round(args.warmup * steps)
    loss, validated, best = math.nan, {}, {}  # of the last step; the last validation; the best

    def save_weights() -> None:
        if args.lora:
            save_adapter(model, run.folder / "adapter", found.name)
        else:
            save_model(model, tokenizer, run.folder / "model")

    def save_checkpoint(step: int) -> None:
        state = {"loss": loss, "validated": validated, "best": best}
        run.save_checkpoint(step, optimizer.state_tensors(), state)

    def leave(step: int) -> int:
        save_checkpoint(step)
        progress.note(stop.message(step))
        return stop.exit_code

    def validate(step: int) -> dict:
        """Loss and exact match on the held-out slice; its first answers go to samples.jsonl."""

        def watch(finished: int, tokens: int) -> None:
            progress.update(step, validating=f"{finished}/{len(held_out)}")
            if stop.requested:
                raise console.Stopped

        with autocast():
            rows = generate.answer_and_mark(model, tokenizer, held_out, prompt, args.max_new_tokens,
                                            4 * args.micro_batch, progress=watch)  # fmt: skip
        for row in rows[:3]:
            run.sample({"step": step} | row)
        return {
            "step": step,
            "val_loss": mean_loss(model, held_out_examples, args.micro_batch, tokenizer.pad_id, autocast),
            "val_exact_match": sum(r["correct"] for r in rows) / len(rows),
            "val_truncated": sum(r["truncated"] for r in rows) / len(rows),
        }

    first = 0
    if (checkpoint := run.load_checkpoint()) is not None:
        first, tensors, state = checkpoint
        optimizer.load_state_tensors(tensors)
        loss, validated, best = state["loss"], state["validated"], state["best"]
        del checkpoint, tensors  # mapped from the file: memory, and disk space once it is deleted
        print(f"continuing {run.folder} from step {first}")

    if args.wandb:
        run.start_wandb(args.wandb, vars(args))
    with console.graceful_stop() as stop, console.Progress(steps) as progress:
        for step in range(first, steps + 1):  # with `step` updates behind us
            if step == steps and args.keep == "last":
                save_weights()  # before validating: what is trained is safe
            due = step == steps or (args.val_every and step % args.val_every == 0)
            if held_out and due and validated.get("step") != step:
                try:
                    validated = validate(step)
                except console.Stopped:
                    return leave(step)
                run.log(validated)
                progress.note(", ".join(f"{k} {v:.4g}" for k, v in validated.items()))
                better = score(validated) > score(best)
                best = validated if better else best
                if better and args.keep == "best":
                    save_weights()
            if step == steps:
                break
            if stop.requested:
                return leave(step)

            began = time.perf_counter()
            chosen = examples_of_step(examples, step, size, args.seed)
            optimizer.lr = cosine_with_min_lr(step, steps, args.lr, args.min_lr, warmup)
            loss = backward_step(model, chosen, args.micro_batch, tokenizer.pad_id, autocast)
            norm = torch.nn.utils.clip_grad_norm_(optimizer.params.values(), args.clip).item()
            if not math.isfinite(loss + norm):
                raise UserError(
                    f"loss {loss}, gradient norm {norm} at step {step + 1}; problems "
                    f"{[e.index for e in chosen]}: lower --lr, with --overwrite or another --out; the last "
                    "checkpoint, if any, is kept"
                )
            optimizer.step()
            optimizer.zero_grad()

            seconds = time.perf_counter() - began
            tokens = sum(len(e.ids) for e in chosen)
            memory = console.peak_memory(args.device)
            run.log({
                "step": step + 1, "loss": loss, "lr": optimizer.lr, "grad_norm": norm,
                "supervised_tokens": sum(sum(e.mask) for e in chosen), "tokens": tokens,
                "seconds": seconds, "peak_memory": memory,
            })  # fmt: skip
            progress.update(step + 1, loss=loss, lr=optimizer.lr, tokens_per_s=tokens / seconds,
                            memory=memory)  # fmt: skip
            if (step + 1) % args.save_every == 0 or (step + 1 == steps and held_out):
                save_checkpoint(step + 1)

    run.finish({"steps": steps, "loss": loss, "kept": args.keep}
               | (best if args.keep == "best" else validated))  # fmt: skip
    return 0


def score(validated: dict) -> tuple[float, float]:
    """What --keep best goes by: exact match, then loss."""
    return validated.get("val_exact_match", -1.0), -validated.get("val_loss", math.inf)


if __name__ == "__main__":
    console.entry(main)
