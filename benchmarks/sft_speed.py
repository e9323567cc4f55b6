"""Fine-tuning by nanogsm against transformers Trainer or trl's SFTTrainer, with peft: seconds and
memory for the same work.

    python -m benchmarks.sft_speed --model google/gemma-3-270m --base fp32
    python -m benchmarks.sft_speed --model PATH --data-dir DIR --full --rounds 5 --json OUT.json

Same for both sides: weights, start of the adapters (ours, read by peft), the examples of every
step, micro-batch, accumulation, rank 16 and alpha 32 on the seven linear layers of every
block, float32 adapters, gradient checkpointing (not reentrant), AdamW with 32-bit moments at one
learning rate, clipping at 1. So the losses must agree, and both are printed. Nothing is evaluated,
logged or saved inside the timing.

- The two take turns, each in a process of its own (sides.py; peak memory is the process's on a CPU,
  the tensors' on CUDA). Loading is reported, not counted; the first round of each is a warm-up.
  Rates are compared round by round.
- The peer runs one trainer.train() from start to end, whose on_step_begin callback waits for its
  turn: its start-up is not counted, and nor are its few milliseconds of collating, as it fetches a
  step's batches before that callback. Ours pays for collating.
- Ours's phases are timed as it goes (on CUDA it waits for the GPU at their ends, at its own cost):
  forward; vocabulary (log-probs and, under a frozen head, their slopes); backward; optimizer.
- The peer is used as it comes: a step's examples in the order drawn, padded on the right to the
  longest of each micro-batch, with an attention mask. --lend gives it a step's examples sorted by
  length, which saves it some of the padding that ours leaves out, and no mask (right padding needs
  none).
- --base is the dtype of the frozen base. Where the hardware computes in bfloat16, both run a bf16
  base under bf16 autocast. On a CPU that does not, ours casts it to float32 layer by layer and the
  peer computes in bfloat16 all the same, slowly: compare with --base fp32 there. --full keeps float32
  weights on both sides, and --base says whether they are computed with under bf16 autocast.
"""

import argparse
import importlib.metadata
import statistics
import sys
from pathlib import Path

import torch

import train_sft
from benchmarks.sides import Side, Turns, compete, matrix_rate, products
from nanogsm import UserError, data, lora
from nanogsm.fast.checkpointing import CHECKPOINTING
from nanogsm.fast.head import KEPT_EXPONENTIALS
from nanogsm.model import compute_in_float32, load_model, save_adapter, set_checkpointing
from nanogsm.optim import AdamW
from nanogsm.run import console, flags, machine
from nanogsm.store import files, hub

R, ALPHA, SEED, CLIP, LONGEST = 16, 32, 0, 1.0, 768
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser("Time fine-tuning: nanogsm against transformers + peft.")
    p.add_argument("--model", default="google/gemma-3-270m", help="Hub id or folder")
    p.add_argument("--data", default="main", help="main, socratic or a .jsonl file of your own")
    flags.add_data_dir_flag(p)
    p.add_argument("--full", action="store_true", help="train all weights, not adapters")
    p.add_argument("--base", choices=("bf16", "fp32"), default="bf16", help="see above")
    p.add_argument("--checkpointing", choices=CHECKPOINTING, default="light", help="ours; the peer's is full")
    p.add_argument("--steps", type=int, default=1, help="optimizer steps a round")
    p.add_argument("--rounds", type=int, default=3, help="counted rounds of each side")
    p.add_argument("--micro-batch", type=int, default=8)
    p.add_argument("--accumulation", type=int, default=2)
    p.add_argument("--peer", choices=("trainer", "trl"), default="trainer", help="transformers' or trl's")
    p.add_argument("--lend", action="store_true", help="sorted, mask-free batches for the peer")
    p.add_argument("--device", default="auto", help="cuda or cpu; auto takes the first there is")
    p.add_argument("--json", help="write all figures there")
    p.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    p.add_argument("--scratch", help=argparse.SUPPRESS)
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
    examples = train_sft.encode_all(tokenizer, problems, prompt, LONGEST)
    size = args.micro_batch * args.accumulation
    if len(examples) < size:
        raise UserError(f"{args.data} has {len(examples)} examples; a step takes {size}")
    examples = examples[: len(examples) // size * size]  # every step is a whole one
    return [train_sft.examples_of_step(examples, s, size, SEED) for s in range(args.total)]


# ----------------------------------------------------------------------------------- the workers


def ours(args, turns: Turns) -> None:
    """What train_sft.train does, without its run folder."""
    bf16 = args.precision == "bf16"
    kind = torch.device(args.device).type
    autocast = lambda: torch.autocast(kind, torch.bfloat16, enabled=bf16)  # noqa: E731
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
    train_sft.token_logprobs = turns.timed("vocabulary", train_sft.token_logprobs)
    backward_step = turns.timed("gradient", train_sft.backward_step)

    turns.ready(
        arithmetic="bfloat16 (autocast)" if bf16 else "float32",
        flops=[flops_of(args, model, trained, examples) for examples in steps],
        needed=[flops_of(args, model, trained, examples, needed=True) for examples in steps],
        tokens=[sum(len(e.ids) for e in examples) for examples in steps],
        matrix_rate=matrix_rate(args.device, torch.bfloat16 if bf16 else torch.float32),
        trained=sum(p.numel() for p in trained.values()),
    )
    for step, examples in enumerate(steps):
        if step % args.steps == 0:
            turns.begin()
            losses = []
        loss = backward_step(model, examples, args.micro_batch, tokenizer.pad_id, autocast)
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP).item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if (step + 1) % args.steps == 0:
            turns.end(losses=losses)
    turns.rest()


def flops_of(args, model, trained: dict, examples: list, needed: bool = False) -> float:
    """Additions and multiplications in the matrix products of one step of ours: 2 a weight and
    token for each pass. Passes are forward, the gradient of the input, where a weight is trained its
    own, and under a full checkpoint forward once more (what a light one recomputes is left out); a
    trained head's logits, where they are not kept, are made twice. Attention's scores are left out.
    needed: without recomputation, what model FLOPs utilisation counts."""
    adapters = 0 if args.full else sum(p.numel() for p in trained.values())
    tokens, again = sum(len(e.ids) for e in examples), args.checkpointing == "full" and not needed
    supervised = [sum(sum(e.mask) for e in rows) for rows in data.micro_batches(examples, args.micro_batch)]
    kept = KEPT_EXPONENTIALS[torch.device(args.device).type] // model.config.vocab_size
    passes = (3 if args.full else 2) * sum(supervised)
    if args.full and not needed:
        passes += sum(max(0, n - kept) for n in supervised)
    of_adapters = 2 * tokens * (3 + again) * adapters
    return products(model, (2 + args.full + again) * tokens, passes) + of_adapters


def peer(args, turns: Turns) -> None:
    import transformers

    folder, bf16 = hub.find_model(args.model).base, args.precision == "bf16"
    tokenizer = data.Tokenizer(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=args.dtype, attn_implementation="sdpa"
    )
    if not args.full:
        import peft

        model = peft.PeftModel.from_pretrained(model, Path(args.scratch) / "adapter", is_trainable=True)

    def collate(rows: list) -> dict[str, torch.Tensor]:
        rows = [data.Example(**row) if isinstance(row, dict) else row for row in rows]
        ids, mask, lengths = data.collate(rows, tokenizer.pad_id)
        batch = {"input_ids": ids, "labels": ids.masked_fill(~mask, -100)}
        if not args.lend:
            batch["attention_mask"] = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
        return batch

    steps = steps_of(args, tokenizer)
    if args.lend:
        steps = [sorted(s, key=lambda e: -len(e.ids)) for s in steps]
    rows = [example for step in steps for example in step]
    if args.peer == "trl":  # which takes no list of tuples, and asks for a tokenizer
        import datasets
        import trl

        rows = datasets.Dataset.from_list([example._asdict() for example in rows])
        Base, Settings = trl.SFTTrainer, trl.SFTConfig
        own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
        names = transformers.AutoTokenizer.from_pretrained(folder)
    else:
        Base, Settings, own, names = transformers.Trainer, transformers.TrainingArguments, {}, None

    class Trainer(Base):
        loss = 0.0  # of the step: Trainer divides by the supervised tokens of all its micro-batches

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
        weight_decay=0.0, max_grad_norm=CLIP, remove_unused_columns=False, report_to="none",
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
    if args.worker:
        return {"ours": ours, "peer": peer}[args.worker](args, Turns(args.device))

    needed = PACKAGES if args.peer == "trl" else PACKAGES[:-2]
    sides = compete("benchmarks.sft_speed", argv, needed, args.rounds)
    figures = summary(args, sides)
    show(args, figures)
    if args.json:
        files.write_json(args.json, figures)


def summary(args, sides: dict[str, Side]) -> dict:
    """Everything reported, warm-up round left out but for its losses."""
    mine, steps = sides["ours"], args.steps * args.rounds
    mean = lambda per_step: sum(per_step[args.steps :]) / steps  # noqa: E731
    f = {"arguments": vars(args) | {"dtype": str(args.dtype)}, "environment": machine.environment()}
    f["versions"] = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}
    f["sides"] = {}
    for name, side in sides.items():
        seconds = [r["seconds"] for r in side.rounds]
        per_step = sum(seconds[1:]) / steps
        f["sides"][name] = {
            "arithmetic": side.about["arithmetic"], "trained": side.about["trained"],
            "loading_s": side.about["loading"], "loading_memory": side.about["memory"],
            "warm_up_s": seconds[0], "rounds_s": seconds[1:], "step_s": per_step,
            "examples_per_s": args.micro_batch * args.accumulation / per_step,
            "tokens_per_s": mean(mine.about["tokens"]) / per_step,
            "peak_memory": side.rounds[-1]["memory"],
            "losses": [loss for r in side.rounds for loss in r["losses"]],
        }  # fmt: skip
    span = {k: sum(r["spans"][k] for r in mine.rounds[1:]) / steps for k in mine.rounds[0]["spans"]}
    a, flops, rate = f["sides"]["ours"], mean(mine.about["flops"]), mine.about["matrix_rate"]
    f["utilisation"] = mean(mine.about["needed"]) / a["step_s"] / rate
    f["phases_s"] = {"forward": span["forward"], "vocabulary": span["vocabulary"],
                     "backward": span["gradient"] - span["forward"] - span["vocabulary"],
                     "optimizer": a["step_s"] - span["gradient"]}  # fmt: skip
    f |= {"flops_per_step": flops, "matrix_rate": rate, "matrix_share": flops / a["step_s"] / rate}
    if b := f["sides"].get("peer"):
        f["ratios"] = [theirs / us for us, theirs in zip(a["rounds_s"], b["rounds_s"])]
        f["ratio"] = statistics.median(f["ratios"])
        f["memory_ratio"] = a["peak_memory"] / max(1, b["peak_memory"])
        f["loss_difference"] = max(abs(x - y) for x, y in zip(a["losses"], b["losses"]))
        f["loss_tolerance"] = 1e-4 if a["arithmetic"] == b["arithmetic"] == "float32" else 1e-2
    return f


def show(args, f: dict) -> None:
    print(f"\n{'full' if args.full else 'LoRA'}, base {args.base}, {args.device}, {args.micro_batch} x "
          f"{args.accumulation} examples a step, {f['environment']['threads']} threads")  # fmt: skip
    print("       s/step  examples/s  tokens/s  peak GiB  loading s, GiB  arithmetic           losses")
    for name, s in f["sides"].items():
        losses = " ".join(f"{loss:.5f}" for loss in s["losses"][:4])
        print(f"{name} {s['step_s']:8.3f}{s['examples_per_s']:12.3f}{s['tokens_per_s']:10,.0f}"
              f"{s['peak_memory'] / 2**30:10.2f}{s['loading_s']:11.1f}{s['loading_memory'] / 2**30:5.2f}  "
              f"{s['arithmetic']:19}  {losses}")  # fmt: skip
    if "ratio" in f:
        same = "the same work" if f["loss_difference"] <= f["loss_tolerance"] else "NOT THE SAME WORK"
        print(f"ours / peer: {f['ratio']:.2f} x the examples/s (median; rounds {min(f['ratios']):.2f} to "
              f"{max(f['ratios']):.2f}), {f['memory_ratio']:.2f} x the peak memory; losses differ by up "
              f"to {f['loss_difference']:.1e}: {same}")  # fmt: skip
        if f["sides"]["peer"]["arithmetic"] == "bfloat16":
            print("this machine has no bfloat16 instructions: quote --base fp32, the peer's better choice")
    phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in f["phases_s"].items())
    print(f"ours, seconds a step: {phases}")
    print(f"ours, matrix products: {f['flops_per_step'] / 1e12:.4g} TFLOP a step, at {f['matrix_share']:.0%} "
          f"of the measured {f['matrix_rate'] / 1e9:,.0f} GFLOP/s; {f['utilisation']:.0%} without "
          "recomputation (model FLOPs utilisation)")  # fmt: skip


if __name__ == "__main__":
    console.entry(main)
