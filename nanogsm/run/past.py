"""Questions about earlier runs, answered from their folders: what they were trained on and how."""

import os
import shlex
from pathlib import Path

from nanogsm import UserError, boxed, data, distributed
from nanogsm.store import files, hub

# Settings of a run that others read, and their types. Any may be null.
NUMBERS = """lr min_lr value_lr head_lr warmup seed epochs micro_batch accumulation rollouts group
    kl_coef gamma lam clip_high lora_r lora_alpha val_examples val_use max_new_tokens""".split()
KINDS = {"style": str, "shots": int, "instruction": bool, "boxed": bool}  # of a prompt
TEXTS = "data model init base source recipe precision device reward critic advantage".split()


def run_of(model: str) -> tuple[Path, dict] | None:
    """(folder, content of run_args.json) of the run that `model` names: the folder itself, or its
    model/ or adapter/. None if it is no run. UserError if a setting is of another type."""
    path = Path(os.path.abspath(os.path.expanduser(model)))
    for folder in (path, *[path.parent] * (path.name in ("model", "adapter"))):
        record = hub.run_record(folder)
        prompt, args = record.get("info", {}).get("prompt"), record.get("args", {})
        has_prompt = isinstance(prompt, dict) and prompt.keys() <= KINDS.keys()
        has_prompt = has_prompt and all(type(prompt[key]) is KINDS[key] for key in prompt)
        if has_prompt and "val_examples" in args:
            _check_args(model, args)
            return folder, record
    return None


def _check_args(run: str, args: dict) -> None:
    """UserError if a setting of a run is of another type. (Its file may have been edited.)"""
    for name, value in args.items():
        number = name in NUMBERS or name.startswith("penalty_")
        kinds = (int, float) if number else str if name in TEXTS else object
        fits = isinstance(value, kinds) and (not number or abs(value) < 1e300)
        if value is not None and not fits:
            wanted = "a number" if number else "a text"
            raise UserError(f"{run}: in run_args.json {name} is {value!r:.60}, not {wanted}")


def prompt_of(model: str) -> data.Prompt | None:
    """The prompt that the run `model` was trained with; None if it is no run."""
    run = run_of(model)
    return data.Prompt(**run[1]["info"]["prompt"]) if run else None


def prompt_about(prompt: data.Prompt, problems: list[data.Problem]) -> data.Prompt:
    """The prompt for these problems. In a mixed file the kind of most of them decides."""
    return prompt._replace(boxed=2 * sum(p.boxed for p in problems) > len(problems))


def is_tiny(model: str) -> bool:
    """Whether `model` is the embedded one, or a run that began with --tiny."""
    run = run_of(model)
    return model == "tiny" or bool(run and run[1]["args"].get("tiny"))


def answer_limit_of(model: str, of_data: str) -> int:
    """The default for --max-new-tokens: the data's own limit, or the limit that the run `model` was
    validated with if that is larger. A socratic run gives long answers whatever it is asked."""
    run = run_of(model)
    return max(data.answer_limit(of_data), run and run[1]["args"].get("max_new_tokens") or 0)


def held_out_by(model: str, of_data: str) -> int | None:
    """How many of these problems the run `model` held out. None if it is no run, or a run on other
    problems. (main and socratic have the same questions in the same order.)"""
    run = run_of(model)
    theirs = str(run[1]["args"].get("data")) if run else ""
    named = {theirs, of_data} <= set(data.NAMED)
    alike = named and (theirs in data.GENERATED) == (of_data in data.GENERATED)
    alike = alike and (theirs in boxed.NAMES) == (of_data in boxed.NAMES)
    same = alike or files.same_place(theirs, of_data)
    return run[1]["args"]["val_examples"] if same else None


def digest_of(held_out: list[data.Problem]) -> str:
    """Which problems are held out: a digest of their questions. (Those of main and socratic are the
    same.)"""
    return data.digest([p._replace(answer="", index=0) for p in held_out])


def check_unchanged(model: str, of_data: str, problems: list[data.Problem]) -> None:
    """UserError if the run `model` held out others of these training problems than would be held
    out now: the file has changed since. Runs of earlier versions recorded nothing to compare."""
    run, n = run_of(model), held_out_by(model, of_data)
    infos = [run[1]["info"], *run[1].get("continued", [])] if run and n else []
    recorded = next((i["held_out_sha256"] for i in infos if "held_out_sha256" in i), None)
    if recorded is None:
        return
    same = n < len(problems) and digest_of(data.split_validation(problems, n)[1]) == recorded
    if not same:
        raise UserError(f"{of_data} has changed since {model} was trained: what is held out now "
                        "may have been trained on; restore the file, or put the new problems into "
                        "another one")  # fmt: skip


def usual_init(args) -> str:
    """Where PPO starts by default: from the run of train_sft.py with the same flags. (GSM8K's runs
    all start from main.)"""
    folder, method = "runs/tiny" if args.tiny else "runs", "lora" if args.lora else "full"
    return f"{folder}/sft-{method}-{'math' if args.data == 'math' else 'main'}"


def drawn(held_out: list, first: int, last: int) -> list:
    """The held-out problems that a fixed draw puts in places first to last - 1, in file order. A
    file may be sorted, for example by difficulty, so its own order makes no fair halves."""
    order = data.permutation(len(held_out), data.SUBSET_SEED, 0)
    return [held_out[i] for i in sorted(order[first:last])]


def part_of(held_out: list, part: tuple[int, int] | None) -> list:
    """Part K of N (evaluate.py's --part K/N) of what was held out; all of it without a part."""
    if part is None:
        return held_out
    (k, n), size = part, len(held_out)
    if n > size:
        raise UserError(f"--part {k}/{n}: only {size} problems are held out: give a smaller N")
    return drawn(held_out, size * (k - 1) // n, size * k // n)


def recorded_init(folder: str) -> str | None:
    """The --init of the PPO run in a folder; None if there is none."""
    run = run_of(folder)
    return run[1]["args"].get("init") if run else None


def what_next(args) -> str:
    """The last lines that a run prints. (Rank 0 may be deleting files by now.)"""
    if distributed.RANK:
        return ""
    more = ["--data-dir", args.data_dir] if args.data_dir and args.data in data.NAMED else []
    checkpoint = Path(args.out) / "checkpoint"
    size = sum(file.stat().st_size for file in checkpoint.rglob("*.*") if file.is_file())
    kept = f"{checkpoint} ({size / 2**20:,.0f} MiB) lets --steps grow later; you may delete it\n"
    following = shlex.join(["evaluate.py", args.out, *more])
    said = f"the result is in {args.out}; next: python {following}"
    return kept * checkpoint.is_dir() + said
