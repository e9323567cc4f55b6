"""What the HTML page shows of one run: its settings, its metrics so far, and its evaluation."""

import json
from pathlib import Path
from typing import NamedTuple

from nanogsm import UserError
from nanogsm.report import eval_files, scores
from nanogsm.run.past import run_of


class Stage(NamedTuple):
    name: str
    folder: Path  # absolute
    path: str  # of the evaluation's eval-*.jsonl; "" without an evaluation
    summary: dict  # eval-*.json; {} without an evaluation
    rows: dict[int, dict]  # problem -> row of eval-*.jsonl
    probes: list[dict]  # rows of eval-probes-*.jsonl, empty without that file
    metrics: list[dict]
    args: dict  # the run's arguments; {} for an untuned model
    finished: bool


NEEDED = "accuracy ci_low ci_high formatted truncated mean_tokens n correct".split()


def read_stage(where: str) -> Stage:
    """where: a run's folder, the folder of an untuned model's evaluation, or an eval-*.jsonl. A run
    may lack an evaluation or its end. Raises UserError if there is nothing to show, or if a file is
    damaged."""
    run = run_of(where)
    folder = run[0] if run else Path(where)
    path, rows, summary, probes = "", {}, {}, []
    # The answers of an unscored run are not right or wrong.
    evaluated = run and eval_files.one_answer_each(folder)
    if not run or (evaluated and not run[1]["args"].get("unscored")):
        if folder.is_dir() and not any(folder.glob("eval-*.jsonl")):
            raise UserError(f"{where} is not a run and has no evaluation: give a run's folder")
        path, listed = eval_files.read_rows(str(folder))
        folder = Path(path).absolute().parent
        run = run or run_of(str(folder))  # None for an untuned model
        rows, summary = scores.by_problem(path, listed), _read_summary(where, path, listed)
        found = sorted(folder.glob("eval-probes*.jsonl"))
        probes = eval_files.read_rows(str(found[-1]))[1] if found else []
    metrics = read_metrics(folder / "metrics.jsonl") if run else []
    if not rows and not metrics:
        raise UserError(f"{where} has neither a step nor an evaluation yet: wait for a step")
    args, finished = run[1]["args"] if run else {}, (folder / "summary.json").exists()
    return Stage(folder.name, folder, path, summary, rows, probes, metrics, args, finished)


def _read_summary(where: str, path: str, rows: list[dict]) -> dict:
    """The .json beside an evaluation's rows. UserError if the two cannot be shown."""
    try:
        summary = json.loads(Path(path).with_suffix(".json").read_text("utf-8"))
        beside = "text_accuracy" if "grader" in summary else "flexible_accuracy"
        for key in (*NEEDED, beside):
            if not _is_number(summary[key]):
                raise ValueError(f"{key} is {summary[key]!r:.60}, not a number")
        for key in ("data", "split", "precision"):
            if not isinstance(summary.get(key, ""), str):
                raise ValueError(f"{key} is {summary[key]!r:.60}, not a text")
        rows[0], [scores.kind_of(row) for row in rows]
        return summary
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"cannot show {where} ({error!r}): evaluate it again") from error


def _is_number(value: object) -> bool:
    """Whether a JSON value is a number, and small enough to be drawn."""
    return type(value) in (int, float) and abs(value) < 1e300


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, whose last line may just be being written."""
    try:
        lines = path.read_text("utf-8").split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
        for row in rows:
            numbers = [{"step": None, **row}.get(key, 0) for key in ("step", "tokens", "seconds")]
            drawn = [x for x in row.values() if type(x) is int]
            if not all(map(_is_number, numbers + drawn)):
                raise ValueError(f"a row without its numbers: {str(row)[:60]}")
        return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error!r}") from error
