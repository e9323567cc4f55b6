"""The opening of a training run: which weights, which problems, which folder."""

import os
from collections.abc import Callable
from pathlib import Path

from nanogsm import UserError, data, distributed
from nanogsm.model import load_model, read_adapter_config, save_model
from nanogsm.run import flags, machine, past
from nanogsm.run.folder import RunFolder, open_run_folder
from nanogsm.run.reward import load_reward
from nanogsm.store import hub

# Settings that may change when a run continues. Some change memory and not the result. micro_batch
# and accumulation may change if their product, "batch", does not. Data and weights may move or be
# spelt otherwise, because their contents are compared by digest.
MAY_DIFFER = ("save_every", "data_dir", "data", "model", "init", "base", "device", "merge", "wandb",
              "checkpointing", "micro_batch", "accumulation", "rollout_batch", "shard",
              "reward", "pause_at")  # fmt: skip


def find_start(args, flag: str) -> hub.ModelFiles:
    """The files of the model that --model or --init (`flag`) names. UserError if they lie in the
    run folder, which would replace them."""
    found = hub.find_model(getattr(args, flag), weights=not args.dry_run, base=args.base)
    out = Path(args.out).resolve()
    if any(path and path.resolve().is_relative_to(out) for path in (found.base, found.adapter)):
        raise UserError(f"--{flag} lies in the run folder {args.out}: choose another --out")
    return found


def set_rank(args, found: hub.ModelFiles) -> None:
    """Fill in r and alpha: the adapter's own if SFT continues one, else the flags' or defaults."""
    continued = None
    if args.lora and found.adapter:
        config = read_adapter_config(found.adapter)
        continued = config["r"], config["scale"] * config["r"]
    flags.set_rank(args, continued)


def split_problems(args) -> tuple[list[data.Problem], list[data.Problem]]:
    """(training problems, problems held out of them and used for validation). Fills in
    args.val_examples."""
    problems = data.load_problems(args.data, "train", args.data_dir)
    if args.val_examples is None:
        args.val_examples = data.usual_held_out(len(problems), args.tiny)
    problems, held_out = data.split_validation(problems, args.val_examples)
    if args.keep == "best" and not held_out:
        flag = "--patience" if args.patience else "--keep best"
        raise UserError(f"{flag} has nothing to choose by: --val-examples is 0")
    if args.val_use:
        if args.val_use > len(held_out):
            raise UserError(f"--val-use {args.val_use}: only {len(held_out)} problems are held out")
        held_out = past.drawn(held_out, 0, args.val_use)
    used = data.subset(problems, getattr(args, "max_examples", None) or len(problems))
    trained = {problem.question for problem in used}
    if twice := sum(problem.question in trained for problem in held_out):
        print(f"note: {twice} of {len(held_out)} held-out problems are also trained on, because "
              "the data repeat questions: validation will look better than it is")  # fmt: skip
    return problems, held_out


def encode_all(
    tokenizer, problems, prompt: data.Prompt, max_seq_length: int, held_out: bool = False
) -> list[data.Example]:
    """Problems as training examples. Those over the limit are left out, never cut: a cut answer
    would lose its #### and teach the model not to give one. UserError if none is left to train
    on."""
    encoded = [(p.index, data.encode(tokenizer, prompt, p.question, p.answer)) for p in problems]
    examples = [data.Example(*ids_and_mask, index) for index, ids_and_mask in encoded]
    kept = [example for example in examples if len(example.ids) <= max_seq_length]
    limit = f"longer than --max-seq-length {max_seq_length}"
    if examples and not kept and not held_out:
        shortest = min(len(example.ids) for example in examples)
        raise UserError(f"every example is {limit} (the shortest has {shortest} tokens)")
    if len(kept) < len(examples):
        kind = "held-out examples" if held_out else "examples"
        print(f"left out {len(examples) - len(kept)} of {len(examples)} {kind}: {limit}")
    return kept


def merge_result(folder: Path, found: hub.ModelFiles) -> None:
    """Save the base with the run's adapter merged into it as model/, unless that is there."""
    distributed.first(lambda: _merge_result(folder, found))


def _merge_result(folder: Path, found: hub.ModelFiles) -> None:
    if not (folder / "model").exists():
        run = past.run_of(str(folder))
        # The folder of an earlier version is not compared with this command's arguments.
        if run is None or run[1]["args"].get("model_sha256") != hub.fingerprint(found):
            raise UserError(f"{folder} was trained on another model: give that one as --model")
        merged, tokenizer = load_model(found._replace(adapter=folder / "adapter"), merge=True)
        save_model(merged, tokenizer, folder / "model")
        print(f"merged into {folder / 'model'}")


def open_folder(args, flag: str, found: hub.ModelFiles, prompt: data.Prompt, problems) -> RunFolder:
    """The run folder of these arguments, locked. `problems` are all the run uses, held out or
    not."""
    settings = {k: v for k, v in vars(args).items() if k not in ("dry_run", "overwrite", "out")}
    settings |= {
        f"{flag}_sha256": hub.fingerprint(found),
        "data_sha256": data.digest(problems),
        "prompt": prompt._asdict(),
        "batch": args.micro_batch * args.accumulation,
    }
    info = machine.environment() | {"prompt": prompt._asdict(), "base": str(found.base)}
    if distributed.COUNT > 1:
        info["devices"] = distributed.COUNT
    # PPO's learning rate is constant, so a run of 10 steps is the beginning of one of 20. The best
    # of 10 may come from its last validation, which a run of 20 need not have.
    grows = "steps" if flag == "init" and args.keep != "best" else None
    return open_run_folder(args.out, settings, info, args.overwrite, MAY_DIFFER, grows)


def own_reward(args) -> Callable | None:
    """The function in the file that --reward names, whose digest is compared when the run
    continues."""
    if args.reward is None:
        return None
    function, args.reward_sha256 = load_reward(args.reward)
    return function


def prompt_of_init(args) -> data.Prompt:
    """The prompt that the run --init was trained with. UserError if PPO's default start is
    missing."""
    default = f"{'runs/tiny' if args.tiny else 'runs'}/sft-{'lora' if args.lora else 'full'}-main"
    if not os.path.isdir(args.init) and args.init == default:
        sft = "python train_sft.py" + " --tiny" * args.tiny + " --lora" * args.lora
        raise UserError(
            f"there is no {args.init} yet: PPO starts from a fine-tuned model; make the default "
            f"one with {sft}, or name another with --init (for --dry-run any model will do)"
        )
    return past.prompt_of(args.init) or data.Prompt()
