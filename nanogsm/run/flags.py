"""Command-line flags and recipes of the two training scripts, and the parser every command uses.

A recipe gives values to the flags that the command line leaves unset. `tuned` has our settings,
`original` those of the study that this project implements. docs/recipes.md compares them and says
what the study leaves open.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

from nanogsm import UserError, boxed, data, distributed, rewards
from nanogsm.fast.checkpointing import CHECKPOINTING
from nanogsm.run import card, past

# ---------------------------------------------------------------------------------------- recipes


class Setting(NamedTuple):
    """A flag whose default depends on the recipe. A pair of values is (full, with --lora)."""

    name: str
    help: str
    original: object
    tuned: object


SFT = (
    Setting("lr", "Peak learning rate.", (1e-5, 1e-5), (2e-5, 2e-4)),
    Setting("warmup", "Share of all steps in which the learning rate rises from 0.", 0.0, 0.03),
    Setting("epochs", "Passes over the data.", 1, 1),
    Setting("micro_batch", "Examples that go through the model at once.", 8, 8),
    Setting("accumulation", "Micro-batches per step. Only micro-batch x accumulation changes the "
            "result; how it is split changes memory.", 2, 2),
)  # fmt: skip
# The embedded model is so small that it learns at rates 15 to 100 times higher. Its tuned values
# were found by experiments/tune.py (results/tiny/search).
SFT_TINY = {
    "original": {"lr": (1e-3, 1e-3), "micro_batch": 16, "accumulation": 1},
    "tuned": {"lr": (4.3e-4, 3e-3), "warmup": 0.1, "epochs": 3, "micro_batch": (8, 16),
              "accumulation": 1},
}  # fmt: skip

PPO = (
    Setting("steps", "Steps: each is a rollout with its updates.", 100, 100),
    Setting("rollouts", "Answers sampled per step.", 512, 512),
    Setting("rollout_batch", "Answers sampled per batch. More take more memory.", 32, 64),
    Setting("critic", "shared: the critic reads the policy's hidden states. separate: it has "
            "adapters of its own.", "shared", "shared"),
    Setting("critic_warmup", "Number of first steps that train the critic alone.", 0, 0),
    Setting("kl_coef", "Reward lost per nat of KL from the reference.", 0.05, 0.001),
    Setting("gamma", "Discount per token.", 0.99, 1.0),
    Setting("lam", "GAE's lambda.", 0.95, 1.0),
    Setting("epochs", "Passes over a rollout.", 2, 1),
    Setting("micro_batch", "Answers that go through the model at once in an update.", 2, 8),
    Setting("accumulation", "Micro-batches per update. Only micro-batch x accumulation changes the "
            "result; how it is split changes memory.", 8, 16),
    Setting("lr", "Learning rate of the policy, constant.", (5e-7, 5e-7), (1e-6, 2e-5)),
    Setting("value_lr", "Learning rate of the value head and of a separate critic.", 5e-7, 1e-4),
    Setting("value_coef", "Weight of the value loss in a shared critic. (In a separate one it has "
            "hardly any effect, because Adam undoes a constant factor.)", 0.1, 1.0),
    Setting("entropy_coef", "Weight of the entropy bonus.", 0.01, 0.0),
    Setting("clip", "PPO's epsilon: probability ratios are clipped to 1 +- epsilon.", 0.2, 0.2),
    Setting("value_clip", "Clip range of a value's change since the rollout.", 0.2, 0.5),
)  # fmt: skip
CHOICES = {"critic": ("shared", "separate")}
# Flags of GAE and of the critic, and what they are in a run without a critic.
OF_CRITIC = {"critic": None, "critic_warmup": 0, "gamma": 1.0, "lam": 1.0, "value_lr": None,
             "value_coef": None, "value_clip": None}  # fmt: skip
PPO_TINY = {
    "original": {"steps": 20, "rollout_batch": 256, "micro_batch": 16, "accumulation": 1,
                 "lr": (5e-5, 5e-5), "value_lr": 5e-5},
    "tuned": {"steps": 20, "rollout_batch": 256, "micro_batch": 64, "accumulation": 4,
              "lr": (1.5e-4, 1e-3), "value_lr": 2e-3, "kl_coef": 0.01},
}  # fmt: skip


ALL = 10**7  # what number_or_all makes of "all"
# How a step is split. It changes time and memory, and the result only by rounding.
SPLIT = ("micro_batch", "accumulation", "rollout_batch", "checkpointing")


def recipe(settings: tuple[Setting, ...], name: str, changes: dict | None = None) -> dict:
    """{flag: value} of a recipe, with some values changed (those for --tiny)."""
    return {s.name: getattr(s, name) for s in settings} | (changes or {}).get(name, {})


# ------------------------------------------------------------------------------------- the parser


class Help(argparse.HelpFormatter):
    """--help with the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = action.default in (None, False, 0, "", "auto", argparse.SUPPRESS)
        return (action.help or "") + ("" if says_nothing else " Default: %(default)s.")


class Parser(argparse.ArgumentParser):
    """A bad flag is one line, like all bad input, and not a page of usage."""

    def __init__(self, description: str | None):
        """description: its first line is shown. (python -OO leaves no docstring to show.)"""
        # Of `python -m MODULE`. A script has none, and a debugger's __main__ not even the name.
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        prog = f"python -m {spec.name.removesuffix('.__main__')}" if spec else None
        line = (description or "").split("\n")[0]
        super().__init__(prog, description=line, formatter_class=Help, allow_abbrev=False)

    def parse_known_args(self, argv=None, namespace=None):
        args, unknown = super().parse_known_args(argv, namespace)
        # An empty value, as of `--out $RUN` with RUN unset, must not pass for the default.
        for action in self._actions:
            value = getattr(args, action.dest, None)
            empty = value == "" != action.default or (isinstance(value, list) and "" in value)
            if empty:
                self.error(f"{(action.option_strings or [action.dest])[0]} is empty")
        return args, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def flag_of(name: str) -> str:
    """The flag whose value is args.name."""
    return f"--{name.replace('_', '-')}"


def fill_unset(args: argparse.Namespace, values: dict) -> None:
    """Give a value to each flag that is None. A pair is (in full, with LoRA)."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value[args.lora] if isinstance(value, tuple) else value)


def check_step(args: argparse.Namespace) -> None:
    """UserError if a step has too few rows to give every device one."""
    if 0 < args.micro_batch * args.accumulation < distributed.COUNT:
        raise UserError(f"a step of {args.micro_batch} x {args.accumulation} is too small for "
                        f"{distributed.COUNT} devices: raise --accumulation")  # fmt: skip


def check_temperature(args: argparse.Namespace, greedy: bool = False) -> None:
    """UserError for a temperature that cannot be sampled at. greedy: 0 is allowed, too."""
    if not 0.01 <= args.temperature <= 100 and not (greedy and args.temperature == 0):
        zero = "0 (greedy) or " * greedy
        raise UserError(f"--temperature is {args.temperature}: give {zero}a number from 0.01 to "
                        "100")  # fmt: skip


def check_numbers(
    args: argparse.Namespace, at_least: dict[str, float], positive: tuple = ()
) -> None:
    """UserError for the first flag that is below its limit, above ten million (a seed: 2**31 - 1),
    or not positive where it must be. None means unset."""
    for name in (*at_least, *positive):
        value, flag = getattr(args, name), flag_of(name)
        most = 2**31 - 1 if name == "seed" else 10**7
        if value is None:
            continue
        if name in positive and not 0 < value <= 1e30:  # float32 must hold it
            limit = "at most 1e30" if value > 1e30 else "a positive number"
            raise UserError(f"{flag} is {value}: give {limit}")
        if name in at_least and not at_least[name] <= value <= most:
            limit = f"at most {most:,}" if value > most else f"at least {at_least[name]}"
            raise UserError(f"{flag} is {value}: give {limit}")


def add_tiny_flag(p: argparse.ArgumentParser) -> None:
    text = "Use the embedded model and its problems: no download, any machine."
    p.add_argument("--tiny", action="store_true", help=text)


def add_data_dir_flag(p: argparse.ArgumentParser) -> None:
    text = "Folder with the data's .jsonl files. Default: $NANOGSM_DATA_DIR, else a download."
    p.add_argument("--data-dir", default=os.environ.get("NANOGSM_DATA_DIR") or None, help=text)


def add_unscored_flag(p: argparse.ArgumentParser) -> None:
    text = "The answers of --data FILE need no number, so none is right or wrong."
    p.add_argument("--unscored", action="store_true", help=text)


def check_unscored(args: argparse.Namespace) -> None:
    if args.unscored and args.data in data.NAMED:
        raise UserError(f"--unscored is for a file of your own, and --data is {args.data}")


def number_or_all(text: str) -> int:
    """argparse's type of a number of problems. "all" is more than any data set has."""
    try:
        return ALL if text == "all" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"give a number or all, not {text!r}") from error


def add_base_flag(p: argparse.ArgumentParser) -> None:
    text = "Base model of an adapter, in place of the one that the adapter names."
    p.add_argument("--base", metavar="MODEL", help=text)


def add_compute_flags(p: argparse.ArgumentParser) -> None:
    """--device and --precision, to be resolved by machine.pick_compute."""
    text = "cuda, mps or cpu. auto takes the first that is there."
    p.add_argument("--device", default="auto", help=text)
    text = "Precision of matrix products. auto is bf16 where the hardware has it."
    p.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help=text)


def training_parser(description: str, settings: tuple, changes: dict, argv: list[str]) -> Parser:
    """A parser with the flags that both training scripts have, and with a script's own settings."""
    p = Parser(description)
    add = p.add_argument
    add("--recipe", choices=("tuned", "original"), default="tuned",
        help="Where the values of unset flags come from.")  # fmt: skip
    add_tiny_flag(p)
    add("--lora", action="store_true", help="Train LoRA adapters on a frozen base.")
    add_base_flag(p)
    own = "An adapter that SFT trains further keeps its own."
    add("--lora-r", type=int, help=f"Rank of new adapters. Default: 16. {own}")
    add("--lora-alpha", type=float,
        help=f"The change is scaled by alpha / r. Default: 32. {own}")  # fmt: skip
    add("--data", default="main",
        help="main, socratic, math, worked (--tiny only) or your own .jsonl file.")  # fmt: skip
    add_data_dir_flag(p)
    add_unscored_flag(p)
    add("--max-new-tokens", type=int, help="Longest answer, in tokens. Default: 320 (socratic 512, "
        "math 1024, tiny 128, tiny's socratic 160).")  # fmt: skip
    for setting in settings:
        # With --tiny on the command line, --help shows tiny's values.
        tiny = changes if "--tiny" in argv else None
        ours, theirs = (recipe(settings, x, tiny)[setting.name] for x in ("tuned", "original"))
        kind = type(ours[0] if isinstance(ours, tuple) else ours)
        other = f"; original: {_shown(theirs)}" if theirs != ours else ""
        text = f"{setting.help} Default: {_shown(ours)}{other}."
        choices = CHOICES.get(setting.name)
        add(flag_of(setting.name), type=kind, choices=choices, help=text)
    add("--max-grad-norm", type=float, default=1.0,
        help="Limit of the gradient norm. Larger gradients are scaled down.")  # fmt: skip
    add("--optim", choices=("adamw8bit", "adamw"), default="adamw8bit",
        help="AdamW with moments in 8 or 32 bits.")  # fmt: skip
    add("--checkpointing", choices=CHECKPOINTING,
        help="What backward recomputes: nothing, the cheap part, or every block. Recomputing more "
        "takes less memory. Default: light (tiny: none).")  # fmt: skip
    add("--val-examples", type=int, help="Training problems held out for validation. Default: 64 "
        "(tiny: 256), at most a tenth of the data, or what the run held out that this one starts "
        "from.")  # fmt: skip
    add("--val-use", type=int, metavar="N", help="Validate on N of the problems held out. "
        "evaluate.py --split validation --part 2/2 asks the other half.")  # fmt: skip
    add("--keep", choices=("last", "best"), default="last",
        help="Weights to save: the last, or those of the best validation.")  # fmt: skip
    add("--patience", type=int, default=0, metavar="N", help="End when N validations have brought "
        "nothing better, and keep the best weights. 0: never.")  # fmt: skip
    add("--pause-at", type=int, metavar="STEP", help="Save and leave after this step. The same "
        "command without it, or with a later one, goes on.")  # fmt: skip
    add("--seed", type=int, default=0, help="Seed of sampling, adapters and the order of problems.")
    add("--save-every", type=int, help="Steps between checkpoints.")
    add("--overwrite", action="store_true", help="Start over in a folder that has a run.")
    add("--wandb", metavar="PROJECT", help="Also send the metrics to Weights & Biases.")
    add("--shard", type=int, default=1, metavar="N", help="Full fine-tuning under torchrun: "
        "split weights, gradients and moments over N devices.")  # fmt: skip
    add("--dry-run", action="store_true", help="Print the plan. No weights are loaded.")
    add("--gpu-memory", type=float, metavar="GIB", help="With --dry-run: plan for a GPU that has "
        "this much memory free, and need not be here.")  # fmt: skip
    add_compute_flags(p)
    return p


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        full, lora = value
        return f"{full:g}" if full == lora else f"{full:g}, with --lora {lora:g}"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def fill_in(args: argparse.Namespace, script: str, settings: tuple, changes: dict) -> None:
    """Give a value to what the command line left open, from the recipe and the machine.
    args.left_open names what the plan may still choose on a GPU (card.fit_card)."""
    args.left_open = [name for name in SPLIT if getattr(args, name, 1) is None]
    fill_unset(args, recipe(settings, args.recipe, changes if args.tiny else None))
    args.checkpointing = args.checkpointing or ("none" if args.tiny else "light")
    folder, method = "runs/tiny" if args.tiny else "runs", "lora" if args.lora else "full"
    # A run that starts from another gets a name of its own, so that neither is in the other's way.
    run = past.run_of(args.model) if script == "sft" else None
    after = f"-from-{run[0].name}" if run else ""
    args.out = args.out or f"{folder}/{script}-{method}-{Path(args.data).stem}{after}"
    args.data, args.precision = for_tiny(args)
    check_unscored(args)
    boxed.check_data(args.data, "train")
    args.device, args.precision = card.pick_compute(args)
    check_step(args)
    check_numbers(args, {"shard": 1})
    if args.shard > 1 and (args.lora or getattr(args, "critic", "shared") == "separate"):
        raise UserError("--shard is for full fine-tuning with a shared critic: adapters are small")
    if distributed.COUNT % args.shard and not args.dry_run:
        raise UserError(f"--shard {args.shard} needs a multiple of that many devices (torchrun "
                        f"--nproc-per-node): here {distributed.COUNT} run")  # fmt: skip


def set_rank(args: argparse.Namespace, continued: tuple[int, float] | None = None) -> None:
    """Fill in --lora-r and --lora-alpha. continued: r and alpha of an adapter that is trained on,
    which flags cannot change."""
    usual = continued or (16, 32.0)
    for name, value in zip(("lora_r", "lora_alpha"), usual):
        given = getattr(args, name)
        if continued and given is not None and not math.isclose(given, value):
            flag = flag_of(name)
            raise UserError(f"{flag} {given:g}: the adapter in {args.model} has {value:g}, and "
                            "keeps it")  # fmt: skip
        setattr(args, name, value if continued or given is None else given)


def check_choosing(args: argparse.Namespace) -> None:
    """The flags that choose by validation: --patience, which implies --keep best, and --val-use."""
    check_numbers(args, {"patience": 0, "pause_at": 1, "val_use": 1})
    if args.patience:
        args.keep = "best"
    if args.keep == "best" and args.val_every == 0:
        flag = "--patience" if args.patience else "--keep best"
        raise UserError(f"{flag} needs --val-every, or there is only one validation to choose from")


def part(text: str) -> tuple[int, int]:
    """argparse's type of --part K/N: (K, N)."""
    try:
        k, n = map(int, text.split("/"))
        if not 1 <= k <= n:
            raise ValueError
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"give K/N, K from 1 to N, not {text!r}") from error
    return k, n


def for_tiny(args: argparse.Namespace) -> tuple[str, str]:
    """(data, precision). With --tiny: the embedded problems, and float32 unless --precision is
    given. So small a model is no slower in float32, and machines agree more closely."""
    given = args.data or "main"
    if not args.tiny:
        return given, args.precision
    own = {"main": "tiny", "socratic": "tiny-socratic", "worked": "tiny-worked"}
    return own.get(given, given), "fp32" if args.precision == "auto" else args.precision


# --------------------------------------------------------------------------------------- the flags


def sft_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of train_sft.py, checked and complete, but for r and alpha: see set_rank."""
    argv = sys.argv[1:] if argv is None else argv
    description = "SFT on GSM8K, full or LoRA. With --tiny this page shows tiny's values."
    p = training_parser(description, SFT, SFT_TINY, argv)
    add = p.add_argument
    add("--model", help="Hub id, folder or run to start from. Default: google/gemma-2b-it. "
        "An adapter is trained further with --lora, and merged without.")  # fmt: skip
    add("--merge", action="store_true", help="Also save base and adapters as one model.")
    as_start = "Default: as the run was trained that --model names"
    add("--style", choices=("plain", "chat"), help=f"Style of the prompt. {as_start}, or plain.")
    add("--instruction", action=argparse.BooleanOptionalAction, default=None,
        help=f"Begin prompts with the instruction. {as_start}, or no.")  # fmt: skip
    add("--max-seq-length", type=int,
        help="Longer examples are left out. Default: 768 (math 1024).")  # fmt: skip
    add("--max-examples", type=int, help="Train on a fixed sample of this many examples.")
    add("--min-lr", type=float, help="Learning rate at the end. Default: a tenth of --lr.")
    add("--weight-decay", type=float, default=0.0, help="AdamW's weight decay, of matrices only.")
    add("--val-every", type=int, default=0, help="Steps between validations. 0: at the end only.")
    add("--out", help="Run folder. Default: runs/sft-{full,lora}-{data} (tiny: runs/tiny/...), "
        "with -from-RUN after it if --model is a run.")  # fmt: skip
    p.set_defaults(save_every=100)
    args = p.parse_args(argv)
    for name in ("lora_r", "lora_alpha"):
        if getattr(args, name) is not None and not args.lora:
            raise UserError(f"{flag_of(name)} needs --lora")
    args.tiny = args.tiny or bool(args.model and past.is_tiny(args.model))
    if args.model is None:
        args.model = "tiny" if args.tiny else "google/gemma-2b-it"
    fill_in(args, "sft", SFT, SFT_TINY)
    usual = past.prompt_of(args.model) or data.Prompt()
    args.style = args.style or usual.style
    args.instruction = usual.instruction if args.instruction is None else args.instruction
    if args.val_examples is None:  # what the run held out has to stay held out
        args.val_examples = past.held_out_by(args.model, args.data)
    args.min_lr = 0.1 * args.lr if args.min_lr is None else args.min_lr
    if args.max_new_tokens is None:
        args.max_new_tokens = data.answer_limit(args.data)
    if args.max_seq_length is None:
        args.max_seq_length = 1024 if args.data in boxed.NAMES else 768

    at_least = {
        "lora_r": 1, "max_seq_length": 2, "max_examples": 1, "epochs": 1, "micro_batch": 1,
        "accumulation": 1, "val_examples": 0, "val_every": 0, "max_new_tokens": 1, "save_every": 1,
        "seed": 0,
    }  # fmt: skip
    check_numbers(args, at_least, positive=("lr", "max_grad_norm", "lora_alpha"))
    for name, most in (("min_lr", args.lr), ("warmup", 1), ("weight_decay", 10)):
        if not 0 <= getattr(args, name) <= most:
            flag = flag_of(name)
            raise UserError(f"{flag} is {getattr(args, name):g}: give a number from 0 to {most:g}")
    if args.merge and not args.lora:
        raise UserError("--merge needs --lora: full fine-tuning has nothing to merge")
    check_choosing(args)
    return args


def ppo_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of train_ppo.py, complete and checked. val_examples stays None where --init is
    no run: how many problems are held out then depends on how many there are."""
    argv = sys.argv[1:] if argv is None else argv
    description = "PPO, RLOO or GRPO on GSM8K. With --tiny this page shows tiny's values."
    p = training_parser(description, PPO, PPO_TINY, argv)
    add = p.add_argument
    add("--init", help="Run or model to start from. Default: runs/sft-full-main, with --lora "
        "runs/sft-lora-main; -math with --data math (tiny: runs/tiny/...).")  # fmt: skip
    add("--reward", metavar="FILE.py", help="Score answers by the function reward(completion, "
        "problem, truncated) in this file, in place of exact match.")  # fmt: skip
    for name, what in (("false", "four false calculator annotations or more, a quarter each"),
                       ("no-answer", 'an answer without "#### number"'),
                       ("overlong", "an answer as long as --max-new-tokens, less for one that "
                        "comes near it")):  # fmt: skip
        add(f"--penalty-{name}", type=float, default=0.0, metavar="W",
            help=f"Cost of {what}. Default: 0.")  # fmt: skip
    add("--advantage", choices=("gae", "rloo", "grpo"), help="gae: a critic and GAE (PPO). rloo, "
        "grpo: no critic; an answer is compared with others to its problem. "
        "Default: gae.")  # fmt: skip
    add("--group", type=int, metavar="K", help="Answers to each problem of a rollout, for rloo and "
        "grpo. Default: 8.")  # fmt: skip
    add("--clip-high", type=float, help="Upper clip of probability ratios, 1 + this. Default: as "
        "--clip.")  # fmt: skip
    add("--style", choices=("plain", "chat"),
        help="Style of the prompt. Default: as --init was trained, or plain.")  # fmt: skip
    add("--temperature", type=float, default=1.0, help="Sampling temperature.")
    add("--val-every", type=int, default=10, help="Steps between validations. 0: at the end only.")
    add("--out", help="Run folder. Default: runs/{ppo,rloo,grpo}-{full,lora}-{data} (tiny: "
        "runs/tiny/...).")  # fmt: skip
    p.set_defaults(save_every=5)
    args = p.parse_args(argv)
    args.init = args.init and os.path.expanduser(args.init)
    args.reward = args.reward and os.path.expanduser(args.reward)
    args.tiny = args.tiny or bool(args.init and past.is_tiny(args.init))
    for name in ("lora_r", "lora_alpha"):
        if getattr(args, name) is not None and not (args.lora or args.critic == "separate"):
            raise UserError(f"{flag_of(name)} needs --lora or --critic separate")
    check_numbers(args, {"group": 2})
    if args.advantage == "gae":
        args.advantage = None  # unset, as in the records of runs that are older than the flag
    if args.advantage:
        without_critic(args)
    elif args.group is not None:
        raise UserError("--group needs --advantage rloo or grpo: GAE compares with a critic")
    fill_in(args, args.advantage or "ppo", PPO, PPO_TINY)
    if args.advantage:
        vars(args).update(OF_CRITIC)
    if args.group and args.rollouts % args.group:
        raise UserError(f"--rollouts {args.rollouts} is no multiple of --group {args.group}")
    if args.unscored and not args.reward:
        raise UserError("--unscored needs --reward FILE.py: exact match has nothing to compare")
    set_rank(args)
    if args.init is None:  # a run that has begun keeps its start
        recorded = None if args.overwrite else past.recorded_init(args.out)
        args.init = recorded or past.usual_init(args)
    if args.max_new_tokens is None:
        args.max_new_tokens = past.answer_limit_of(args.init, args.data)
    if args.val_examples is None:
        args.val_examples = past.held_out_by(args.init, args.data)

    at_least = {
        "lora_r": 1, "max_new_tokens": 1, "steps": 1, "rollouts": 1, "rollout_batch": 1,
        "epochs": 1, "micro_batch": 1, "accumulation": 1, "critic_warmup": 0, "val_examples": 0,
        "val_every": 0, "save_every": 1, "seed": 0, "kl_coef": 0, "value_coef": 0,
        "entropy_coef": 0,
    }  # fmt: skip
    penalties = [f"penalty_{name}" for name in rewards.TERMS]
    at_least |= dict.fromkeys(penalties, 0)
    positive = ("lr", "value_lr", "clip", "clip_high", "value_clip", "max_grad_norm", "lora_alpha")
    check_numbers(args, at_least, positive)
    if args.clip_high is not None and args.clip_high < args.clip:
        raise UserError(f"--clip-high {args.clip_high:g} is below --clip {args.clip:g}")
    if (total := sum(getattr(args, name) for name in penalties)) > rewards.MOST + 1e-9:
        raise UserError(f"the weights of --penalty-... add up to {total:g}: give at most "
                        f"{rewards.MOST:g} in all, or a wrong answer could be worth more than a "
                        "right one")  # fmt: skip
    check_choosing(args)
    # Runs from before PPO had the flag recorded nothing, and can still be made longer.
    args.keep = None if args.keep == "last" else args.keep
    check_temperature(args)
    for name in ("gamma", "lam"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} is {getattr(args, name):g}: give a number from 0 to 1")
    return args


def without_critic(args: argparse.Namespace) -> None:
    """Refuse the flags of the critic on a command line with --advantage rloo or grpo."""
    for name in OF_CRITIC:
        if getattr(args, name) is not None:
            flag = flag_of(name)
            raise UserError(f"{flag} has no meaning with --advantage {args.advantage}, which has "
                            "no critic and no discount: leave it out")  # fmt: skip
    args.group = 8 if args.group is None else args.group
