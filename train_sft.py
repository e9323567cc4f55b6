"""Supervised fine-tuning on GSM8K: full weights, or LoRA adapters with --lora.

    python train_sft.py --tiny --lora                # the embedded model, a minute or two anywhere
    python train_sft.py --lora                       # google/gemma-2b-it -> runs/sft-lora-main
    python train_sft.py --data socratic              # full fine-tuning -> runs/sft-full-socratic
    python train_sft.py --model PATH --dry-run       # parameters, memory, steps; loads no weights

The loop in `train` is the whole method: draw a step's examples, add up the log-probabilities of
their answer tokens, divide by the number of those tokens in the whole step, follow the gradient.
The same command again continues a run that was stopped.
"""

import math

import torch
from torch import Tensor

from nanogsm import data, distributed, generate, lora
from nanogsm.logprob import next_token_logprobs
from nanogsm.model import (
    compute_in_float32,
    load_model,
    read_config,
    sampler_of,
    save_trained,
    set_checkpointing,
)
from nanogsm.optim import AdamW, cosine_with_min_lr
from nanogsm.run import console, known, past, plan, start
from nanogsm.run.flags import sft_args as parse_args
from nanogsm.run.loop import Run, check_finite
from nanogsm.run.machine import autocast_of
from nanogsm.transformer import Transformer

# --------------------------------------------------------------------------------------- the loss


def examples_of_step(examples: list, step: int, size: int, seed: int) -> list[data.Example]:
    """The examples of a step, counted from 0. Every epoch is a new permutation of all of them."""
    steps_per_epoch = math.ceil(len(examples) / size)  # the last step of an epoch may be short
    epoch, place = divmod(step, steps_per_epoch)
    order = data.permutation(len(examples), seed, epoch)
    return [examples[i] for i in order[place * size : (place + 1) * size]]


def answer_logprobs(model: Transformer, examples: list, pad_id: int, autocast) -> Tensor:
    """log p of every supervised token of a micro-batch, 0 elsewhere: (B, T - 1)."""
    ids, mask, lengths = data.collate(examples, pad_id, model.device)  # (B, T)
    with autocast():
        hidden = model(ids, lengths)  # (B, T, D)
    # Autocast keeps bfloat16 copies of trained weights until its context ends. A second context
    # lets go of the first one's, which for Gemma 3 270M saves 0.2 GiB.
    with autocast():
        logp, _ = next_token_logprobs(model.vocabulary, hidden, ids, mask)
    return logp  # column t is about token t + 1, predicted by hidden state t


def backward_step(
    model: Transformer, examples: list, micro_batch: int, pad_id: int, autocast
) -> Tensor:
    """Add the gradient of one step's loss to .grad. Returns the loss, in nats per token."""
    # What the loss is divided by: the supervised tokens of the whole step. So the loss does not
    # depend on how the step is cut into micro-batches. Trap: the mean of the micro-batches' means
    # depends on it, and gives the tokens of short answers a larger weight.
    supervised = data.supervised_tokens(examples)
    loss = torch.zeros((), device=model.device)
    micro_batches = data.micro_batches(examples, micro_batch)
    for rows in distributed.deal(micro_batches, model, backward=True):  # one device: all of them
        share = -answer_logprobs(model, rows, pad_id, autocast).sum() / supervised
        share.backward()  # the gradients of the shares add up in .grad
        loss += share.detach()
    distributed.add_up(loss)
    return loss


@torch.no_grad()
def mean_loss(model: Transformer, examples: list, micro_batch: int, pad_id: int, autocast) -> float:
    """The same loss over examples, without gradients; NaN for no examples."""
    supervised = data.supervised_tokens(examples)
    total = torch.zeros((), dtype=torch.float64)
    for rows in distributed.deal(data.micro_batches(examples, micro_batch), model):
        total -= answer_logprobs(model, rows, pad_id, autocast).sum().item()
    distributed.add_up(total)
    return total.item() / supervised if examples else math.nan


# ---------------------------------------------------------------------------------------- the run


def load_trainable(args, found) -> tuple[Transformer, data.Tokenizer]:
    """The model to train, whose trained weights are float32."""
    # At these learning rates most updates of a bfloat16 weight are smaller than its rounding. A
    # frozen base is never updated, so it can be bfloat16: a float32 one would be cast at every use.
    bf16 = args.precision == "bf16"
    frozen = torch.bfloat16 if bf16 else None  # None: as the checkpoint has it
    dtype = frozen if args.lora else torch.float32
    # Full fine-tuning merges an adapter into its base. LoRA trains it further.
    model, tokenizer = load_model(found, dtype, args.device, merge=not args.lora, shard=args.shard)
    set_checkpointing(model, args.checkpointing)
    if not bf16:
        compute_in_float32(model)
    if args.lora:
        if not found.adapter:
            lora.add_lora(model, args.lora_r, args.lora_alpha, args.seed)
        print(f"adapters on {len(lora.adapters(model))} layers")
    return model, tokenizer


def train(args, folder, found, prompt, examples, steps, held_out, held_out_examples) -> int | None:
    """Train from the start or the last checkpoint. Returns the exit status if it stops early."""
    model, tokenizer = load_trainable(args, found)
    autocast = autocast_of(args.device, args.precision)
    bits = 8 if args.optim == "adamw8bit" else 32
    named = model.named_parameters()
    optimizer = AdamW(named, args.lr, weight_decay=args.weight_decay, bits=bits)
    optimizers = {"": optimizer}  # prefix of its tensors' names in a checkpoint: optimizer
    run = Run(folder, steps, optimizers, args, len(held_out), {"loss": "loss", "lr": "lr"})

    def save() -> None:
        save_trained(model, tokenizer, folder.path, found.name)

    def validate() -> None:
        with autocast(), sampler_of(model, args.precision == "bf16") as sampler:
            rows = generate.answer_and_mark(
                sampler, tokenizer, held_out, prompt, args.max_new_tokens, 4 * args.micro_batch,
                progress=run.watch,
            )  # fmt: skip
        loss = mean_loss(model, held_out_examples, args.micro_batch, tokenizer.pad_id, autocast)
        metrics = {"val_loss": loss} | generate.validation_metrics(rows)
        better = run.record_validation(metrics, rows[:3])
        if args.keep == "best" and better:
            save()

    # How a step is split into micro-batches changes memory and rounding only.
    size, warmup = args.micro_batch * args.accumulation, round(args.warmup * steps)
    with run:  # continues from the last checkpoint; Ctrl-C saves the last whole step
        for step in range(run.first, steps):
            if run.validation_due():
                validate()
            if run.ends_early():  # --patience
                break
            batch = examples_of_step(examples, step, size, args.seed)
            optimizer.lr = cosine_with_min_lr(step, steps, args.lr, args.min_lr, warmup)
            loss = backward_step(model, batch, args.micro_batch, tokenizer.pad_id, autocast)
            distributed.add_up_gradients(optimizer.params.values())
            gradient_norm = optimizer.grad_norm()
            # In a whole step the host waits for the GPU only here.
            loss, norm = torch.stack((loss, gradient_norm)).tolist()
            check_finite(step, [e.index for e in batch], "--lr", loss=loss, gradient_norm=norm)
            # One batch's gradient can be far larger than others. It is scaled down to this norm.
            optimizer.step(gradient_norm, args.max_grad_norm)
            optimizer.zero_grad()
            run.end_step({
                "loss": loss,
                "lr": optimizer.lr,
                "grad_norm": norm,  # before it was scaled down
                "supervised_tokens": data.supervised_tokens(batch),
                "tokens": sum(len(example.ids) for example in batch),
            })  # fmt: skip

        if args.keep == "last":
            save()  # before the last validation: what is trained is safe
        if run.validation_due():
            validate()
        kept = run.best if args.keep == "best" else run.validated
        run.finish({"loss": run.metrics["loss"], "kept": args.keep} | kept)
    return run.status


def main(argv: list[str] | None = None) -> int:
    args = console.same_command(parse_args(argv))
    found = start.find_start(args, "model")
    start.set_rank(args, found)
    config, tokenizer = read_config(found.base), known.tokenizer(found)
    problems, held_out = start.split_problems(args, found)
    prompt = past.prompt_about(data.Prompt(args.style, 0, args.instruction), problems)
    if args.max_examples:
        problems = data.subset(problems, args.max_examples)
    limit = args.max_seq_length
    examples = start.encode_all(tokenizer, problems, prompt, limit)
    held_out_examples = start.encode_all(tokenizer, held_out, prompt, limit, held_out=True)
    # A step does not reach into the next epoch, so an epoch's last step may be smaller.
    steps = math.ceil(len(examples) / (args.micro_batch * args.accumulation)) * args.epochs
    plan.settle_sft(args, found, config, examples, held_out, steps)
    if args.dry_run:
        return 0

    with start.open_folder(args, "model", found, prompt, problems + held_out) as folder:
        if folder.finished:
            print(folder.already_finished())
        else:
            status = train(args, folder, found, prompt, examples, steps, held_out,
                           held_out_examples)  # fmt: skip
            if status is not None:
                return status
        if args.merge:
            start.merge_result(folder.path, found)
    print(past.what_next(args))
    return 0


if __name__ == "__main__":
    console.entry(main)
