"""The flags of train_prm.py, the plan that it prints, and the saving of its result."""

import argparse
import math
import sys
from pathlib import Path

from nanogsm import UserError, data, steps
from nanogsm.run import flags, machine, past, plan
from nanogsm.run.critic import save_head
from nanogsm.run.folder import RunFolder
from nanogsm.store import hub

# {flag: (value, with --tiny)}; a pair is (with --full, with LoRA).
USUAL = {
    "lr": ((1e-5, 1e-4), (1e-3, 3e-3)),
    "head_lr": (1e-3, 1e-2),
    "epochs": (1, 2),
    "micro_batch": (8, 64),
    "accumulation": (4, 1),
}


def prm_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of train_prm.py, checked and complete, but for r and alpha, and for
    val_examples where the number of problems is not known yet."""
    argv = sys.argv[1:] if argv is None else argv
    p = flags.Parser("A process reward model: is everything right so far, at the end of each step?")
    add, tiny = p.add_argument, "--tiny" in argv
    flags.add_tiny_flag(p)
    add("--model", help="Hub id, folder or run to start from, best the one whose answers are "
        "labelled. Default: google/gemma-2b-it.")  # fmt: skip
    flags.add_base_flag(p)
    add("--data", help="A file of labelled steps (python -m experiments.label), prm800k (phase 1, "
        "8 MB), or a file of PRM800K.")  # fmt: skip
    flags.add_data_dir_flag(p)
    add("--outcome", action="store_true", help="Learn the last step's label alone: an outcome "
        "reward model, to compare with.")  # fmt: skip
    add("--full", action="store_true", help="Train all weights. Default: LoRA.")
    add("--lora-r", type=int, help="Rank of the adapters. Default: 16.")
    add("--lora-alpha", type=float, help="The change is scaled by alpha / r. Default: 32.")
    for name, text in (("lr", "Peak learning rate of the network."),
                       ("head_lr", "Peak learning rate of the head."),
                       ("epochs", "Passes over the data."),
                       ("micro_batch", "Answers that go through the model at once."),
                       ("accumulation", "Micro-batches per step.")):  # fmt: skip
        value = USUAL[name][tiny]
        shown = "{1:g}, with --full {0:g}".format(*value) if type(value) is tuple else f"{value:g}"
        kind = float if name.endswith("lr") else int
        add(flags.flag_of(name), type=kind, help=f"{text} Default: {shown}.")
    add("--max-seq-length", type=int, default=768, help="Longer answers are left out.")
    add("--max-examples", type=int, help="Read a fixed sample of this many answers.")
    add("--max-grad-norm", type=float, default=1.0, help="Limit of the gradient norm.")
    add("--optim", choices=("adamw8bit", "adamw"), default="adamw8bit",
        help="AdamW with moments in 8 or 32 bits.")  # fmt: skip
    add("--checkpointing", choices=flags.CHECKPOINTING,
        help="What backward recomputes. Default: light (tiny: none).")  # fmt: skip
    add("--style", choices=("plain", "chat"),
        help="Style of the prompt. Default: as --model was trained, or plain.")  # fmt: skip
    add("--val-examples", type=int, help="Problems held out for validation, with all their "
        "answers. Default: 64 (tiny: 256), at most a tenth.")  # fmt: skip
    add("--val-every", type=int, default=0, help="Steps between validations. 0: at the end only.")
    add("--seed", type=int, default=0, help="Seed of adapters and of the order of answers.")
    add("--save-every", type=int, default=100, help="Steps between checkpoints.")
    add("--out", help="Run folder. Default: runs/prm-{lora,full}-{data}, or orm-... with "
        "--outcome (tiny: runs/tiny/...).")  # fmt: skip
    add("--overwrite", action="store_true", help="Start over in a folder that has a run.")
    add("--wandb", metavar="PROJECT", help="Also send the metrics to Weights & Biases.")
    add("--dry-run", action="store_true", help="Print the plan. No weights are loaded.")
    flags.add_compute_flags(p)
    args = p.parse_args(argv)
    if args.data is None:
        raise UserError("--data is missing: give a file of python -m experiments.label, or "
                        f"{steps.PRM800K}")  # fmt: skip
    args.lora, args.shard, args.gpu_memory = not args.full, 1, None
    args.tiny = args.tiny or bool(args.model and past.is_tiny(args.model))
    args.model = args.model or ("tiny" if args.tiny else "google/gemma-2b-it")
    if args.full and (args.lora_r or args.lora_alpha):
        raise UserError("--lora-r and --lora-alpha have no meaning with --full")
    flags.fill_unset(args, {name: values[args.tiny] for name, values in USUAL.items()})
    args.checkpointing = args.checkpointing or ("none" if args.tiny else "light")
    args.style = args.style or (past.prompt_of(args.model) or data.Prompt()).style
    folder, kind = "runs/tiny" if args.tiny else "runs", "orm" if args.outcome else "prm"
    method = "lora" if args.lora else "full"
    args.out = args.out or f"{folder}/{kind}-{method}-{Path(args.data).stem}"
    args.precision = "fp32" if args.tiny and args.precision == "auto" else args.precision
    args.device, args.precision = machine.pick_compute(args.device, args.precision)
    counts = "lora_r epochs micro_batch accumulation max_examples save_every".split()
    at_least = dict.fromkeys(counts, 1) | dict.fromkeys(("val_examples", "val_every", "seed"), 0)
    at_least["max_seq_length"] = 2
    flags.check_numbers(args, at_least, ("lr", "head_lr", "max_grad_norm", "lora_alpha"))
    flags.check_step(args)
    return args


def prompt_for(args) -> data.Prompt:
    """The prompt that --model was trained with, in the given style."""
    usual = past.prompt_of(args.model) or data.Prompt()
    return usual._replace(style=args.style)


def load_solutions(args) -> tuple[list[steps.Solution], list[steps.Solution]]:
    """(those to train on, those of the problems held out). Fills in args.source and
    args.val_examples."""
    solutions, args.source = steps.load(args.data, args.data_dir, args.max_examples)
    if args.outcome and args.source != "labels":
        raise UserError("--outcome needs answers that are right or wrong: PRM800K's end at the "
                        "first wrong step")  # fmt: skip
    if args.val_examples is None:
        problems = len({solution.index for solution in solutions})
        args.val_examples = data.usual_held_out(problems, args.tiny)
    return steps.hold_out(solutions, args.val_examples)


def settle(args, found: hub.ModelFiles, config, examples: list, held_out: list, n: int) -> None:
    """Print the plan; with --dry-run also its memory."""
    everything, adapters = plan.shapes_of(config, args, found.adapter)
    shapes = adapters if args.lora else everything
    total, trained = plan.entries(everything) + plan.entries(adapters), plan.entries(shapes)
    lengths = [len(example.ids) for example in examples]
    what = "the last step's label" if args.outcome else "every step's label"
    lines = {
        "model": f"{args.model} ({config.model_type}), {total:,} parameters, {trained:,} trained; "
                 f"a head of {config.hidden_size + 1:,}",
        "data": f"{len(examples):,} answers ({args.source}), {sum(lengths):,} tokens, "
                f"{data.supervised_tokens(examples):,} labels: {what}; "
                f"{len(held_out):,} answers held out, to {args.val_examples} "
                f"problem{'s' * (args.val_examples != 1)}",
        "steps": f"{n:,} of {args.micro_batch} x {args.accumulation} answers, {args.epochs} "
                 f"epoch{'s' * (args.epochs > 1)}; lr {args.lr:g}, head {args.head_lr:g}; "
                 f"{args.optim}",
        "compute": f"{args.device}, {args.precision}",
    }  # fmt: skip
    for name, text in lines.items():
        plan.say(name, text)
    if args.dry_run:
        budget = plan.sft_budget(args, config, total, shapes, lengths)
        plan.print_budget(budget | {"vocabulary": 0})


def save_prm(folder: RunFolder, head, found: hub.ModelFiles, lora: bool) -> None:
    """Write the head to a run folder that has the trained network already."""
    adapter = folder.path / "adapter" if lora else None
    trunk = hub.ModelFiles(found.base if lora else folder.path / "model", adapter, "")
    weights = {name: p.detach() for name, p in head.named_parameters("head")}
    save_head(folder, weights, trunk, "prm")


def steps_in(examples: list, args) -> int:
    return math.ceil(len(examples) / (args.micro_batch * args.accumulation)) * args.epochs
