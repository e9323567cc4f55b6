"""What a search tries: its parameters, the run that a trial is, and the disk that it takes."""

import math
import shutil

from nanogsm import UserError
from nanogsm.model import read_config
from nanogsm.run import flags, known, plan, start

RUNGS = (1 / 4, 1 / 2)  # shares of a trial's steps after which it may be pruned
HELD_OUT = 1024  # problems: one half for the search, one for the winner's last score


def space_of(args) -> dict[str, list | tuple]:
    """{parameter: a list of choices, or the pair (lowest, highest)}. A parameter that is given as a
    flag is not searched, and one of the critic is not where --advantage does without a critic."""
    space, narrowed = {}, set()
    absent = flags.OF_CRITIC if getattr(args.run, "advantage", None) else ()
    for name, values in args.usual.items():
        flag = "--accumulation" if name == "batch" else flags.flag_of(name)
        if flag not in args.named and name not in absent:
            times = getattr(args.run, name) if isinstance(values, tuple) else 1
            space[name] = type(values)(times * value for value in values)
    for text in args.space or ():
        name, _, values = text.partition("=")
        if name not in space:
            searched = ", ".join(space) or "nothing"
            raise UserError(f"--space {text}: {args.method} searches {searched}")
        if name in narrowed:
            raise UserError(f"--space {text}: {name} is given twice")
        narrowed.add(name)
        kind, is_range = type(space[name][0]), ":" in values
        try:
            given = [kind(value) for value in values.split(":" if is_range else ",")]
            # A batch of 37 could only be cut into single examples.
            if is_range and not (len(given) == 2 and 0 < given[0] < given[1] and name != "batch"):
                raise ValueError
            if not all(map(math.isfinite, given)):
                raise ValueError
        except ValueError as error:
            what = "whole numbers" if kind is int else "numbers"
            how = "A,B,C" if name == "batch" else "LOW:HIGH or A,B,C"
            raise UserError(f"--space {text}: give {what}, as {how}") from error
        if len(set(map(written, given))) < len(given):
            digits = "" if kind is int else " in three digits, which is what a trial gets"
            raise UserError(f"--space {text}: two of the values are the same{digits}")
        space[name] = tuple(given) if is_range else given
    if not space:
        raise UserError("nothing is left to search: every parameter is given as a flag")
    return space


def written(value: int | float) -> str:
    """A parameter's value as a trial's flag. Three digits of a rate are enough."""
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def flags_of(args, params: dict) -> list[str]:
    """A trial's parameters as flags."""
    found = []
    for name, value in params.items():
        if name == "batch":
            micro = math.gcd(value, args.run.micro_batch)
            found += ["--micro-batch", str(micro), "--accumulation", str(value // micro)]
        else:
            found += [flags.flag_of(name), written(value)]
    return found


def prepare(args) -> None:
    """Find out how many problems there are, and say what is searched and what it takes."""
    settings, ppo = args.run, args.method == "ppo"
    if ppo:
        start.prompt_of_init(settings)  # says which start is missing
    found = start.find_start(settings, "init" if ppo else "model")
    if not ppo:
        if found.adapter and args.space.pop("lora_r", None):
            print("note         an adapter keeps its rank, so lora_r is not searched")
        start.set_rank(settings, found)
    problems = known.load_problems(settings, found)
    if settings.val_examples is None:  # else a flag says it, or the run that the trials start from
        settings.val_examples = min(HELD_OUT, len(problems) // 5)
    args.val_use, rest = settings.val_examples // 2, len(problems) - settings.val_examples
    if args.val_use < 1 or rest < 1:
        raise UserError(f"--val-examples {settings.val_examples}: a search needs held-out problems")
    args.examples = min(rest, getattr(settings, "max_examples", None) or rest)
    for name, values in args.space.items():
        shown = (" to " if isinstance(values, tuple) else ", ").join(f"{v:g}" for v in values)
        print(f"{name:<12} {shown}")
    few = f"; --val-examples {HELD_OUT} (for PPO: of its start) is better" * (args.val_use < 512)
    print(f"judged on    {args.val_use} held-out problems, the winner on as many others{few}")
    settings.lora_r = max(args.space.get("lora_r", [settings.lora_r]))
    checkpoint, result = plan.disk_bytes(settings, read_config(found.base))
    kept = result * (args.trials if settings.lora else 1) + checkpoint * ppo
    place = next(f for f in (args.out, *args.out.absolute().parents) if f.exists())
    sizes = 2 * (checkpoint + result), kept, shutil.disk_usage(place).free
    each, stays, free = (f"{size / 2**20:,.0f} MiB" for size in sizes)
    losers = " and the adapters of all that end" * settings.lora
    print(f"disk         {each} for each process that searches, {stays} for what stays: the best "
          f"trial's weights{losers}; {free} are free")  # fmt: skip


def schedule(args, params: dict) -> tuple[int, list[int]]:
    """(steps between validations, steps at which a trial with these parameters pauses)."""
    get = lambda name: params.get(name, getattr(args.run, name, None))  # noqa: E731
    size = get("batch") or get("micro_batch") * get("accumulation")
    # The script may leave out a few examples as too long. A rung need not be exact.
    steps = get("steps") or math.ceil(args.examples / size) * get("epochs")
    every = args.run.val_every if "--val-every" in args.named else 0
    every = every or math.ceil(steps / 4)
    rungs = {max(1, round(steps * share / every)) * every for share in RUNGS}
    return every, sorted(rung for rung in rungs if rung < steps)


def command_of(args, number: int, params: dict) -> list[str]:
    held_out = ["--val-examples", str(args.run.val_examples), "--val-use", str(args.val_use)]
    every = ["--val-every", str(schedule(args, params)[0])]
    out = ["--out", str(args.out / f"trial-{number:03}")]
    return [args.script, *args.flags, *flags_of(args, params), *held_out, *every, *out]
