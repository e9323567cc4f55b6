"""What a search writes: tune.md with all trials, best first, and tune.svg. It also says which trial
is the best, and deletes what the others leave."""

import math
import shlex
import textwrap
from pathlib import Path

from experiments.tune_space import flags_of, written
from nanogsm.report import charts
from nanogsm.report.scores import Z95
from nanogsm.store import files

KINDS = FINISHED, PRUNED, WINNER = "finished", "pruned (score when pruned)", "winner"
MOST_LABELS = 8  # along an axis
SPREAD = 0.5  # of the room that a choice has on its axis


def folder_of(trial, args) -> Path:
    return args.out / f"trial-{trial.number:03}"


def score_of(folder: Path, metric: str) -> float:
    """The score of a finished run: that of the weights it saved. Of another: its last validation's.
    NaN if there is none."""
    if (folder / "summary.json").exists():
        rows = [files.read_json(folder / "summary.json")]
    else:
        rows = [row for row in files.json_lines(folder / "metrics.jsonl") if metric in row]
    value = rows[-1].get(metric) if rows else None
    return math.nan if value is None else value


def ended(trial) -> bool:
    return trial.state.name == "COMPLETE"


def ranked(study, args) -> list:
    """All trials, best first: those that ended by score, then those that got furthest."""
    sign = 1 if args.metric == "val_loss" else -1

    def key(trial) -> tuple:
        score = math.inf if trial.value is None else sign * trial.value
        return not ended(trial), -(trial.last_step or 0) * (not ended(trial)), score, trial.number

    return sorted(study.trials, key=key)


def best_of(study, args):
    return next(filter(ended, ranked(study, args)), None)


def delete_losers(study, args) -> None:
    """Delete the checkpoints and weights of all trials that can no longer win. Adapters of trials
    that came to their end are small, and stay."""
    best = best_of(study, args)
    for trial in study.trials:
        if trial.state.is_finished() and (best is None or trial.number != best.number):
            weights = ["adapter", "value_head.safetensors"] * (not ended(trial))
            for name in ["checkpoint", "model", *weights]:
                files.remove(folder_of(trial, args) / name)


def last_score(best, args) -> dict | None:
    """The evaluation of the winner on the problems that the search has not looked at."""
    found = sorted(folder_of(best, args).glob("eval-*part2of2*.json"))
    return files.read_json(found[-1]) if found else None


def flattery(best, args) -> str:
    """By how much the winner's score in the search is above its score on new problems."""
    fresh = last_score(best, args)
    if fresh is None:
        return (
            f"Its {args.metric} in the search is {best.value:.4g}. It has not been scored on other "
            "problems, so this number flatters it."
        )
    p, q, n = best.value, fresh["accuracy"], fresh["n"]
    points = 100 * (p - q)
    give = 100 * Z95 * math.sqrt(p * (1 - p) / args.val_use + q * (1 - q) / n)
    return (
        f"It scores {q:.1%} (95%: {100 * fresh['ci_low']:.1f} to "
        f"{100 * fresh['ci_high']:.1f}) on {n} held-out problems that the search never looked at. "
        f"On the {args.val_use} that the search judged by, it scores {p:.1%}. So the search "
        f"flattered it by {points:.1f} points (95%: {points - give:+.1f} to {points + give:+.1f})."
    )


def table(study, args) -> str:
    names = list(args.space)
    lines = [f"| trial | {args.metric} | {' | '.join(names)} | |", "|" + "---|" * (len(names) + 3)]
    for trial in ranked(study, args):
        shown = "" if trial.value is None else f"{trial.value:.4f}"
        values = [written(trial.params[n]) if n in trial.params else "" for n in names]
        end = "" if ended(trial) else trial.user_attrs.get("why", trial.state.name.lower())
        lines.append(f"| {trial.number} | {shown} | {' | '.join(values)} | {end} |")
    return "\n".join(lines)


def round_values(low: float, high: float) -> list[float]:
    """Values of a logarithmic axis to label: the powers of ten from low to high. Where these are
    few, also 2 and 5 times them. Where this is no help, low and high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [float(f"{factor}e{power}") for power in powers for factor in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) > 2:
            return found[:: math.ceil(len(found) / MOST_LABELS)]
    return [low, high]


def axis(name: str, values: list | tuple, trials: list) -> tuple[dict, list, str]:
    """The x axis of a parameter: {trial's number: place}, the ticks, and the title. A range of
    rates is logarithmic. Choices are evenly spaced. Trials of one choice lie side by side in their
    order, or equal scores would lie on one dot."""
    if isinstance(values, tuple) and isinstance(values[0], float):
        labels = [(math.log10(value), charts.number(value)) for value in round_values(*values)]
        first, last = map(math.log10, values)
        places = {t.number: math.log10(t.params[name]) for t in trials}
        title = f"{name}, logarithmic"
    else:
        choices = sorted(values) if isinstance(values, list) else range(values[0], values[1] + 1)
        every = math.ceil(len(choices) / MOST_LABELS)
        labels = [(i, charts.number(choices[i])) for i in range(0, len(choices), every)]
        first, last = -0.5, len(choices) - 0.5
        places, title = {}, f"{name} (within a value, in the order of the trials)"
        for choice in {t.params[name] for t in trials}:
            same = [t.number for t in trials if t.params[name] == choice]
            for k, number in enumerate(same):
                beside = SPREAD * ((k + 0.5) / len(same) - 0.5)
                places[number] = choices.index(choice) + beside
    return places, [(first, ""), *labels, (last, "")], title


def picture(study, args) -> str:
    """Score against each parameter, a dot for each trial."""
    best, panels = best_of(study, args), []
    trials = [trial for trial in study.trials if trial.value is not None]

    def kind(trial) -> str:
        is_best = best is not None and trial.number == best.number
        return WINNER if is_best else FINISHED if ended(trial) else PRUNED

    for name, values in args.space.items():
        places, ticks, title = axis(name, values, trials)
        lines = [(k, [(places[t.number], t.value) for t in trials if kind(t) == k]) for k in KINDS]
        share, of = args.metric == "val_exact_match", f"{args.metric} against {name}"
        panels.append(charts.Panel(of, lines, share, title, dots=True, ticks=ticks))
    return charts.page(panels, list(KINDS))


def write(study, args) -> str:
    """Write tune.md and tune.svg. Returns what the winner is and what it scored."""
    trials, best = study.trials, best_of(study, args)
    count = [sum(trial.state.name == name for trial in trials) for name in ("COMPLETE", "PRUNED")]
    title = f"# {args.script}: {len(trials)} trials, {count[0]} to the end, {count[1]} pruned"
    parts, end = [title], "No trial has come to its end."
    if best is not None:
        command = ["python", args.script, *args.flags, *flags_of(args, best.params)]
        usual = " and with only the usual number of problems held out"
        again = "To train again with its settings, in the script's usual folder"
        again += usual * ("--val-examples" not in args.named)
        end = f"The winner is trial {best.number}. {flattery(best, args)}"
        parts += [textwrap.fill(text, 100) for text in (end, f"{again}:")]
        parts.append(f"```\n{shlex.join(command)}\n```")
    parts.append(table(study, args))
    if count[1]:
        parts.append("A pruned trial has the score at which it was pruned.")
    parts.append(f"![{args.metric} against each parameter](tune.svg)")
    files.replace_file(args.out / "tune.svg", picture(study, args).encode())
    files.replace_file(args.out / "tune.md", "\n\n".join(parts).encode() + b"\n")
    chosen = f" ({shlex.join(flags_of(args, best.params))})" if best else ""
    return f"{end}\nwritten to {args.out / 'tune.md'}{chosen}"
