"""Fine-tuning by nanogsm and by transformers' Trainer or trl's SFTTrainer, with peft: seconds and
memory for the same work.

    python -m benchmarks.sft_speed --model google/gemma-3-270m --base fp32
    python -m benchmarks.sft_speed --model PATH --data-dir DIR --full --rounds 5 --json OUT.json

Both sides have the same weights, the same start of the adapters (ours, read by peft), the same
examples in every step, micro-batch and accumulation, rank 16 and alpha 32 on the seven linear
layers of every block, float32 adapters, gradient checkpointing (not reentrant), AdamW with 32-bit
moments at the same learning rate, and gradients clipped to a norm of 1. So the losses must agree.
Both are printed. Nothing is evaluated, logged or saved while the clock runs.

- The two take turns, each in a process of its own (sides.py). Peak memory is the process's on a CPU
  and that of tensors on CUDA. Loading is timed separately, and the first round of each side is a
  warm-up. Rates are compared round by round.
- The peer runs one trainer.train() from start to end. Its on_step_begin callback waits for its
  turn, so its start-up does not count. Nor do its few milliseconds of collating, because it fetches
  a step's batches before that callback. Our collating counts.
- Our phases are timed as they happen: forward, vocabulary (log-probs and, if it is frozen, their
  derivatives), backward, optimizer. On CUDA this waits for the GPU at the end of each phase, which
  only we pay for.
- The peer is used as it comes: a step's examples in the order drawn, padded on the right to the
  longest of each micro-batch, with an attention mask. --lend helps it: the examples of a step are
  sorted by length, which saves part of the padding, and there is no mask, which right padding does
  not need.
- --base is the dtype of the frozen base. Where the hardware computes in bfloat16, both sides run a
  bfloat16 base under bfloat16 autocast. On a CPU that does not, we cast the base to float32 layer
  by layer, and the peer still computes in bfloat16, slowly: compare with --base fp32 there. With
  --full both sides keep float32 weights, and --base says whether they use bfloat16 autocast.
"""

import argparse
import importlib.metadata
import statistics
import sys
from pathlib import Path

import torch

import train_sft
from benchmarks.sides import Side, Turns, check, compete, matrices_of, matrix_rate
from nanogsm import UserError, data, lora
from nanogsm.fast.checkpointing import CHECKPOINTING
from nanogsm.fast.head import KEPT_EXPONENTIALS
from nanogsm.model import compute_in_float32, load_model, save_adapter, set_checkpointing
from nanogsm.optim import AdamW
from nanogsm.run import card, console, flags, machine
from nanogsm.run.start import encode_all
from nanogsm.store import files, hub

R, ALPHA, SEED, MAX_GRAD_NORM, MAX_SEQ_LENGTH = 16, 32, 0, 1.0, 768
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser("Time fine-tuning: nanogsm against transformers + peft.")
    add = p.add_argument
    # fmt: off
    add("--model", default="google/gemma-3-270m", help="Hub id or folder.")
    add("--data", default="main", help="main, socratic, tiny or a .jsonl file of your own.")
    flags.add_data_dir_flag(p)
    add("--full", action="store_true", help="Train all weights and not adapters.")
    add("--base", choices=("bf16", "fp32"), default="bf16", help="Dtype of the base: see the file.")
    add("--checkpointing", choices=CHECKPOINTING, default="light",
        help="Gradient checkpointing of our side. The peer's is full.")
    add("--steps", type=int, default=1, help="Optimizer steps per round.")
    add("--rounds", type=int, default=3, help="Rounds of each side that count.")
    add("--micro-batch", type=int, default=8, help="Examples that go through the model at once.")
    add("--accumulation", type=int, default=2, help="Micro-batches per step.")
    add("--peer", choices=("trainer", "trl"), default="trainer",
        help="transformers' Trainer or trl's SFTTrainer.")
    add("--lend", action="store_true", help="Give the peer sorted batches without a mask.")
    add("--device", default="auto", help="cuda or cpu. auto takes the first that is there.")
    add("--json", help="File to write all results to.")
    add("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    add("--scratch", help=argparse.SUPPRESS)
    # fmt: on
    args = p.parse_args(argv)
    if min(args.steps, args.rounds, args.micro_batch, args.accumulation) < 1:
        raise UserError("--steps, --rounds, --micro-batch and --accumulation are at least 1")
    args.total = args.steps * (args.rounds + 1)
    args.device, args.precision = machine.pick_compute(
        args.device, "auto" if args.base == "bf16" else "fp32"
    )
    args.dtype = torch.bfloat16 if args.base == "bf16" and not args.full else torch.float32
    args.lr = 1e-5 if args.full else 2e-4
    return args


def steps_of(args, tokenizer) -> list[list[data.Example]]:
    """The examples of every step, as train_sft draws them."""
    problems = data.load_problems(args.data, "train", args.data_dir)
    prompt = data.Prompt()
    examples = encode_all(tokenizer, problems, prompt, MAX_SEQ_LENGTH)
    size = args.micro_batch * args.accumulation
    if len(examples) < size:
        raise UserError(f"{args.data} has {len(examples)} examples; a step takes {size}")
    examples = examples[: len(examples) // size * size]  # every step is a whole one
    return [train_sft.examples_of_step(examples, s, size, SEED) for s in range(args.total)]


# ----------------------------------------------------------------------------------- the workers


def ours(args, turns: Turns) -> None:
    """What train_sft.train does, without its run folder."""
    bf16 = args.precision == "bf16"
    autocast = machine.autocast_of(args.device, args.precision)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    if not bf16:
        compute_in_float32(model)
    set_checkpointing(model, args.checkpointing)
    if not args.full:
        lora.add_lora(model, R, ALPHA, SEED)
        save_adapter(model, Path(args.scratch) / "adapter", args.model)  # the peer's start
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamW(trained.items(), lr=args.lr, bits=32)
    steps = steps_of(args, tokenizer)
    model.forward = turns.timed("forward", model.forward)
    scored = turns.timed("vocabulary", train_sft.next_token_logprobs)
    train_sft.next_token_logprobs = scored
    backward_step = turns.timed("gradient", train_sft.backward_step)

    turns.ready(
        arithmetic="bfloat16 (autocast)" if bf16 else "float32",
        flops=[flops_of(args, model, examples) for examples in steps],
        needed=[flops_of(args, model, examples, needed=True) for examples in steps],
        tokens=[sum(len(e.ids) for e in examples) for examples in steps],
        matrix_rate=matrix_rate(args.device, torch.bfloat16 if bf16 else torch.float32),
        trained=sum(p.numel() for p in trained.values()),
    )
    for step, examples in enumerate(steps):
        if step % args.steps == 0:
            turns.begin()
            losses = []
        loss = backward_step(model, examples, args.micro_batch, tokenizer.pad_id, autocast)
        norm = optimizer.grad_norm()
        losses.append(torch.stack((loss, norm)).tolist()[0])
        optimizer.step(norm, MAX_GRAD_NORM)
        optimizer.zero_grad()
        if (step + 1) % args.steps == 0:
            turns.end(losses=losses)
    turns.rest()


def flops_of(args, model, examples: list, needed: bool = False) -> float:
    """Floating-point operations in the matrix products of one of our steps (card.update_flops).
    Logits of a trained vocabulary are computed twice where their exponentials are not kept. needed:
    without recomputation, as model FLOPs utilisation counts."""
    weights, tokens = matrices_of(model), sum(len(e.ids) for e in examples)
    micro_batches = data.micro_batches(examples, args.micro_batch)
    supervised = [sum(sum(e.mask) for e in rows) for rows in micro_batches]
    if needed:
        return card.update_flops(weights, tokens, sum(supervised), "none")
    kept = KEPT_EXPONENTIALS[torch.device(args.device).type] // model.config.vocab_size
    again = args.full * sum(max(0, n - kept) for n in supervised)
    return (card.update_flops(weights, tokens, sum(supervised), args.checkpointing)
            + card.forward_flops(weights, 0, again))  # fmt: skip


def peer(args, turns: Turns) -> None:
    import transformers

    folder, bf16 = hub.find_model(args.model).base, args.precision == "bf16"
    tokenizer = data.Tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=args.dtype, attn_implementation="sdpa"
    )
    if not args.full:
        import peft

        adapter = Path(args.scratch) / "adapter"
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)

    def collate(rows: list) -> dict[str, torch.Tensor]:
        rows = [data.Example(**row) if isinstance(row, dict) else row for row in rows]
        ids, mask, lengths = data.collate(rows, tokenizer.pad_id)
        batch = {"input_ids": ids, "labels": ids.masked_fill(~mask, -100)}
        if not args.lend:
            is_real = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
            batch["attention_mask"] = is_real.long()
        return batch

    steps = steps_of(args, tokenizer)
    if args.lend:
        steps = [sorted(s, key=lambda e: -len(e.ids)) for s in steps]
    rows = [example for step in steps for example in step]
    if args.peer == "trl":  # trl takes no list of tuples, and wants a tokenizer
        import datasets
        import trl

        rows = datasets.Dataset.from_list([example._asdict() for example in rows])
        Base, Settings = trl.SFTTrainer, trl.SFTConfig
        own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
        names = transformers.AutoTokenizer.from_pretrained(folder)
    else:
        Base, Settings, own, names = transformers.Trainer, transformers.TrainingArguments, {}, None

    class Trainer(Base):
        loss = 0.0  # of the step; Trainer divides by the supervised tokens of the whole step

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *inputs, **kwargs):
            part = super().training_step(*inputs, **kwargs)
            self.loss += part
            return part

    class TakeTurns(transformers.TrainerCallback):
        def on_step_begin(self, _, state, control, **kwargs):
            if state.global_step == 0:
                plain = "bfloat16" if args.dtype == torch.bfloat16 else "float32"
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                turns.ready(arithmetic="bfloat16 (autocast)" if bf16 else plain, trained=trained)
            trainer.loss = 0.0
            if state.global_step % args.steps == 0:
                turns.begin()
                self.losses = []

        def on_step_end(self, _, state, control, **kwargs):
            self.losses.append(trainer.loss.item())
            if state.global_step % args.steps == 0:
                turns.end(losses=self.losses)

    settings = Settings(
        output_dir=args.scratch, max_steps=args.total, seed=SEED, use_cpu=args.device == "cpu",
        per_device_train_batch_size=args.micro_batch, gradient_accumulation_steps=args.accumulation,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=bf16, optim="adamw_torch", learning_rate=args.lr, lr_scheduler_type="constant",
        weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM, remove_unused_columns=False,
        report_to="none",
        save_strategy="no", eval_strategy="no", logging_strategy="no", disable_tqdm=True, **own,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, data_collator=collate, train_dataset=rows,
                      processing_class=names, callbacks=[TakeTurns()])  # fmt: skip
    trainer.train()
    turns.rest()


# ------------------------------------------------------------------------------------ the parent


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    check(args)
    if args.worker:
        return {"ours": ours, "peer": peer}[args.worker](args, Turns(args.device))

    needed = PACKAGES if args.peer == "trl" else PACKAGES[:-2]
    sides = compete("benchmarks.sft_speed", argv, needed, args.rounds)
    results = summary(args, sides)
    show(args, results)
    if args.json:
        files.write_json(args.json, results)


def summary(args, sides: dict[str, Side]) -> dict:
    """All that is reported. The warm-up round counts for the losses only."""
    mine, steps = sides["ours"], args.steps * args.rounds
    mean = lambda per_step: sum(per_step[args.steps :]) / steps  # noqa: E731
    installed = importlib.metadata.distributions()
    r = {
        "arguments": vars(args) | {"dtype": str(args.dtype)},
        "environment": machine.environment(),
        "versions": {d.name: d.version for d in installed if d.name in PACKAGES},
        "sides": {},
    }
    for name, side in sides.items():
        seconds = [one["seconds"] for one in side.rounds]
        per_step = sum(seconds[1:]) / steps
        r["sides"][name] = {
            "arithmetic": side.about["arithmetic"], "trained": side.about["trained"],
            "loading_s": side.about["loading"], "loading_memory": side.about["memory"],
            "warm_up_s": seconds[0], "rounds_s": seconds[1:], "step_s": per_step,
            "examples_per_s": args.micro_batch * args.accumulation / per_step,
            "tokens_per_s": mean(mine.about["tokens"]) / per_step,
            "peak_memory": side.rounds[-1]["memory"],
            "losses": [loss for one in side.rounds for loss in one["losses"]],
        }  # fmt: skip
    a, rate = r["sides"]["ours"], mine.about["matrix_rate"]
    flops, needed = mean(mine.about["flops"]), mean(mine.about["needed"])
    names = mine.rounds[0]["spans"]
    span = {name: sum(one["spans"][name] for one in mine.rounds[1:]) / steps for name in names}
    r["utilisation"] = needed / a["step_s"] / rate
    r["phases_s"] = {
        "forward": span["forward"],
        "vocabulary": span["vocabulary"],
        "backward": span["gradient"] - span["forward"] - span["vocabulary"],
        "optimizer": a["step_s"] - span["gradient"],
    }
    r |= {"flops_per_step": flops, "matrix_rate": rate}
    r["matrix_share"] = flops / a["step_s"] / rate
    if b := r["sides"].get("peer"):
        r["ratios"] = [theirs / us for us, theirs in zip(a["rounds_s"], b["rounds_s"])]
        r["ratio"] = statistics.median(r["ratios"])
        r["memory_ratio"] = a["peak_memory"] / max(1, b["peak_memory"])
        r["loss_difference"] = max(abs(x - y) for x, y in zip(a["losses"], b["losses"]))
        exact = a["arithmetic"] == b["arithmetic"] == "float32"
        r["loss_tolerance"] = 1e-4 if exact else 1e-2
    return r


def show(args, r: dict) -> None:
    kind, threads = "full" if args.full else "LoRA", r["environment"]["threads"]
    print(f"\n{kind}, base {args.base}, {args.device}, {args.micro_batch} x {args.accumulation} "
          f"examples per step, {threads} threads")  # fmt: skip
    columns = "s/step  examples/s  tokens/s  peak GiB  loading s, GiB  arithmetic           losses"
    print(f"       {columns}")
    for name, s in r["sides"].items():
        losses = " ".join(f"{loss:.5f}" for loss in s["losses"][:4])
        memory, loading = s["peak_memory"] / 2**30, s["loading_memory"] / 2**30
        print(f"{name} {s['step_s']:8.3f}{s['examples_per_s']:12.3f}{s['tokens_per_s']:10,.0f}"
              f"{memory:10.2f}{s['loading_s']:11.1f}{loading:5.2f}  {s['arithmetic']:19}  "
              f"{losses}")  # fmt: skip
    if "ratio" in r:
        equal = r["loss_difference"] <= r["loss_tolerance"]
        verdict = "the same work" if equal else "NOT THE SAME WORK"
        low, high = min(r["ratios"]), max(r["ratios"])
        print(f"ours / peer: {r['ratio']:.2f} x the examples/s (median; rounds {low:.2f} to "
              f"{high:.2f}), {r['memory_ratio']:.2f} x the peak memory; losses differ by up to "
              f"{r['loss_difference']:.1e}: {verdict}")  # fmt: skip
        if r["sides"]["peer"]["arithmetic"] == "bfloat16":
            print("this machine has no bfloat16 instructions: the peer is faster with --base fp32")
    phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in r["phases_s"].items())
    print(f"ours, seconds per step: {phases}")
    print(f"ours, matrix products: {r['flops_per_step'] / 1e12:.4g} TFLOP per step, at "
          f"{r['matrix_share']:.0%} of the measured {r['matrix_rate'] / 1e9:,.0f} GFLOP/s; "
          f"{r['utilisation']:.0%} without recomputation (model FLOPs utilisation)")  # fmt: skip


if __name__ == "__main__":
    console.entry(main)
