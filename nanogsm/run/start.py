"""The opening of a training run: which weights, which problems, which folder."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from nanogsm import UserError, boxed, data, distributed
from nanogsm.model import load_model, read_adapter_config, read_config, save_model
from nanogsm.run import console, flags, known, machine, past
from nanogsm.run.folder import RunFolder, open_run_folder
from nanogsm.run.reward import load_reward
from nanogsm.store import files, hub

NO_SETTINGS = ("dry_run", "gpu_memory", "overwrite", "out", "held_out_sha256")
# Settings that may change when a run continues. Some change memory and not the result. micro_batch
# and accumulation may change if their product, "batch", does not. Data and weights may move or be
# spelt otherwise, because their contents are compared by digest.
MAY_DIFFER = ("save_every", "data_dir", "data", "model", "init", "base", "device", "merge", "wandb",
              "checkpointing", "micro_batch", "accumulation", "rollout_batch", "shard",
              "reward", "pause_at")  # fmt: skip


def find_start(args, flag: str) -> hub.ModelFiles:
    """The files of the model that --model or --init (`flag`) names. UserError if they lie in the
    run folder, which would replace them."""
    try:
        found = hub.find_model(getattr(args, flag), weights=not args.dry_run, base=args.base)
    except UserError as error:
        found = known.model(getattr(args, flag)) if args.gpu_memory and not args.base else None
        if found is None and args.gpu_memory:
            raise UserError(f"{error} (known without it: {', '.join(known.names())})") from error
        may = args.dry_run and hasattr(args, "left_open") and not args.base  # no reward model
        if found is None and may and known.model(getattr(args, flag)):
            raise UserError(f"{error}; --gpu-memory GIB plans without it") from error
        if found is None:
            raise
        print(f"note: planned from the known sizes of {found.base.name}, because: {error}")
    out = Path(args.out).resolve()
    if any(path and path.resolve().is_relative_to(out) for path in (found.base, found.adapter)):
        raise UserError(f"--{flag} lies in the run folder {args.out}: choose another --out")
    if (not args.lora or getattr(args, "merge", False)) and read_config(found.base).multimodal:
        raise UserError(f"{found.name} is multimodal, and its text part alone cannot be saved: "
                        "train adapters with --lora, without --merge")  # fmt: skip
    return found


def set_rank(args, found: hub.ModelFiles) -> None:
    """Fill in r and alpha: the adapter's own if SFT continues one, else the flags' or defaults."""
    continued = None
    if args.lora and found.adapter:
        config = read_adapter_config(found.adapter)
        continued = config["r"], config["scale"] * config["r"]
    flags.set_rank(args, continued)


def split_problems(args, found: hub.ModelFiles) -> tuple[list[data.Problem], list[data.Problem]]:
    """(training problems, problems held out of them and used for validation). Fills in
    args.val_examples."""
    problems = known.load_problems(args, found)
    if args.tiny and args.data not in data.NAMED:
        note_unknown_words(problem.question + " " + problem.answer for problem in problems)
    if args.val_examples is None:
        args.val_examples = data.usual_held_out(len(problems), args.tiny)
    past.check_unchanged(getattr(args, "init", None) or args.model, args.data, problems)
    problems, held_out = data.split_validation(problems, args.val_examples)
    args.held_out_sha256 = past.digest_of(held_out)
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


def note_unknown_words(texts: Iterable[str]) -> None:
    """Say which words of the texts the embedded model was not pretrained on."""
    words = lambda text: re.findall(r"[^\W\d_]+", text)  # noqa: E731
    known = {w for p in data.load_problems("tiny", "train") for w in words(p.question + p.answer)}
    unknown = [*dict.fromkeys(w for text in texts for w in words(text) if w not in known)]
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        shown = console.printable(", ".join(unknown[:8]))
        print(f"note: words this model has never seen: {shown}{more}")


def encode_all(
    tokenizer, problems, prompt: data.Prompt, max_seq_length: int, held_out: bool = False
) -> list[data.Example]:
    """Problems as training examples. Those over the limit are left out, never cut: a cut answer
    would lose its #### and teach the model not to give one. UserError if none is left to train
    on."""
    encoded = [(p.index, known.encode(tokenizer, prompt, p.question, p.answer)) for p in problems]
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
    distributed.on_rank_0(lambda: _merge_result(folder, found))


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
    settings = {k: v for k, v in vars(args).items() if k not in NO_SETTINGS}
    settings |= {
        f"{flag}_sha256": hub.fingerprint(found),
        "data_sha256": data.digest(problems),
        "prompt": prompt.settings(),
        "batch": args.micro_batch * args.accumulation,
    }
    info = machine.environment() | {"prompt": settings["prompt"], "base": str(found.base)}
    if digest := getattr(args, "held_out_sha256", None):  # a PRM holds out answers
        info["held_out_sha256"] = digest
    if any(getattr(problem, "boxed", False) for problem in problems):  # a PRM has other rows
        info["grader"] = boxed.grader_name()
    if distributed.COUNT > 1:
        info["devices"] = distributed.COUNT
    places = (*console.PLACES, *console.OF_MACHINE)
    same = {name: value for name, value in settings.items() if name not in places}
    distributed.check_same(files.strict(same))
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
    """The prompt that the run --init was trained with, in another --style if that is given.
    UserError if PPO's default start is missing."""
    if not os.path.isdir(args.init) and args.init == past.usual_init(args):
        sft = "python train_sft.py" + " --tiny" * args.tiny + " --lora" * args.lora
        sft += " --data math" * (args.data == "math")
        raise UserError(
            f"there is no {args.init} yet: PPO starts from a fine-tuned model; make the default "
            f"one with {sft}, or name another with --init (for --dry-run any model will do)"
        )
    usual = past.prompt_of(args.init) or data.Prompt()
    return usual._replace(style=args.style or usual.style)
