"""What a search writes: tune.md with all trials, best first, and tune.svg. It also says which trial
is the best, and deletes what the others leave."""

import json
import math
import shlex
from pathlib import Path

from experiments.tune_space import command_of, flags_of
from nanogsm.report import charts
from nanogsm.report.scores import Z95
from nanogsm.store import files


def folder_of(trial, args) -> Path:
    return args.out / f"trial-{trial.number:03}"


def score_of(folder: Path, metric: str) -> float:
    """The score of a finished run: that of the weights it saved. Of another: its last validation's.
    NaN if there is none."""
    if (folder / "summary.json").exists():
        rows = [files.read_json(folder / "summary.json")]
    else:
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if metric in row]
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
                if (folder_of(trial, args) / name).exists():
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
    give = Z95 * math.sqrt(p * (1 - p) / args.val_use + q * (1 - q) / n)
    return (
        f"It scores {q:.1%} (95%: {100 * fresh['ci_low']:.1f} to "
        f"{100 * fresh['ci_high']:.1f}) on {n} held-out problems that the search never looked at. "
        f"On the {args.val_use} that the search judged by, it scores {p:.1%}. So the search "
        f"flattered it by {100 * (p - q):.1f} points, give or take {100 * give:.1f}."
    )


def table(study, args) -> str:
    names = list(args.space)
    lines = [f"| trial | {args.metric} | {' | '.join(names)} | |", "|" + "---|" * (len(names) + 3)]
    for trial in ranked(study, args):
        shown = "" if trial.value is None else f"{trial.value:.4f}"
        values = [f"{trial.params[n]:.3g}" if n in trial.params else "" for n in names]
        end = "" if ended(trial) else trial.user_attrs.get("why", trial.state.name.lower())
        lines.append(f"| {trial.number} | {shown} | {' | '.join(values)} | {end} |")
    return "\n".join(lines)


def picture(study, args) -> str:
    """Score against each parameter, a dot for each trial."""
    kinds = {"finished": True, "pruned": False}
    trials = [trial for trial in study.trials if trial.value is not None]
    panels = []
    for name, values in args.space.items():
        log = isinstance(values, tuple) and isinstance(values[0], float)
        lines = [
            (kind, [(math.log10(t.params[name]) if log else t.params[name], t.value)
                    for t in trials if ended(t) == is_ended])
            for kind, is_ended in kinds.items()
        ]  # fmt: skip
        title = f"{args.metric} against {'log10 of ' * log}{name}"
        panels.append(charts.Panel(title, lines, args.metric == "val_exact_match", dots=True))
    return charts.page(panels, list(kinds))


def write(study, args) -> str:
    """Write tune.md and tune.svg. Returns what the winner is and what it scored."""
    trials, best = study.trials, best_of(study, args)
    count = [sum(trial.state.name == name for trial in trials) for name in ("COMPLETE", "PRUNED")]
    title = f"# {args.script}: {len(trials)} trials, {count[0]} to the end, {count[1]} pruned"
    parts, end = [title], "No trial has come to its end."
    if best is not None:
        command = shlex.join(["python", *command_of(args, best.number, best.params)])
        end = f"The winner is trial {best.number}. {flattery(best, args)}"
        parts += [end, f"```\n{command}\n```"]
    parts += [table(study, args), "A pruned trial has the score of its last rung.",
              f"![{args.metric} against each parameter](tune.svg)"]  # fmt: skip
    files.replace_file(args.out / "tune.svg", picture(study, args).encode())
    files.replace_file(args.out / "tune.md", "\n\n".join(parts).encode() + b"\n")
    chosen = f" ({shlex.join(flags_of(args, best.params))})" if best else ""
    return f"{end}\nwritten to {args.out / 'tune.md'}{chosen}"
