"""The two files of an evaluation: their names, when they may be replaced, and how to read them.

eval-test-256.json holds the summary and eval-test-256.jsonl one row per completion. Settings that
are not the run's own are added to the name, as in eval-test-256-chat-zero-shot-max64.json.
"""

import os
import re
import tempfile
from pathlib import Path

from nanogsm import UserError, boxed
from nanogsm.data import GENERATED, NAMED, Prompt
from nanogsm.run.past import is_tiny, run_of
from nanogsm.store import files


def place_of(args, prompt: Prompt, usual: Prompt) -> tuple[Path, str]:
    """(folder, file name without ending) of the result. args: evaluate.py's. usual: the prompt that
    the model is asked with by default."""
    run, judge = run_of(args.model), run_of(args.rerank) if args.rerank else None
    own_data = "" if args.data in NAMED else Path(args.data).stem[:60]
    if own_data in ("test", "validation"):
        own_data = f"own-{own_data}"
    prompt_name = str(prompt).replace(", ", "-")
    short = f"{args.temperature:g}"
    temperature = short if float(short) == args.temperature else repr(args.temperature)
    # The usual folder of an untuned model has the prompt in its own name.
    unusual = prompt != usual if run else bool(args.out)
    parts = [
        "eval",
        own_data or args.split,
        "validation" if own_data and args.split == "validation" else "",
        str(args.n),
        "part{}of{}".format(*args.part) if args.part else "",
        "socratic" if args.data.endswith("socratic") else "",
        args.data if args.data in boxed.NAMES else "",
        "tiny" if args.data in GENERATED and not is_tiny(args.model) else "",
        prompt_name if unusual else "",
        f"{args.samples}x-t{temperature}-seed{args.seed}" if args.temperature else "",
        f"max{args.max_new_tokens}" if args.max_new_tokens else "",
        f"base-{Path(args.base).name[:60]}" if args.base else "",
        f"rerank-{args.rerank_by}-{judge[0].name[:60]}" if judge else "",
    ]
    model_name = args.model.strip("/").replace("/", "--")
    untuned = f"{'runs/tiny' if args.tiny else 'runs'}/eval-{model_name}-{prompt_name}"
    return Path(args.out or (run[0] if run else untuned)), "-".join(filter(None, parts))


def check_place(args, folder: Path, name: str) -> None:
    """Raise UserError if the result could not be written, or would replace the result of another
    model, other data, another precision or another critic. Called before the work, not after it."""
    try:
        folder.stat()
    except FileNotFoundError:
        pass
    except OSError as error:  # for example a name that is too long
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    existing = next(f for f in (folder, *folder.absolute().parents) if os.path.exists(f))
    try:  # some file systems, such as /proc, look writable and are not
        os.rmdir(tempfile.mkdtemp(dir=existing))
    except OSError as error:
        fault = f"{existing} is not a folder, or is read-only"
        raise UserError(f"cannot write to {folder}: {fault}") from error
    path = folder / f"{name}.json"
    if not os.path.exists(path):
        return
    old = files.read_json(path)
    keys = ["data_sha256" if "data_sha256" in old else "data", "precision"]
    run = run_of(args.model)
    if "model_sha256" in old:
        keys.append("model_sha256")
    elif not run or run[0] != folder:  # a run's own folder may have been renamed
        keys.append("model")
    if "rerank_sha256" in old:
        keys.append("rerank_sha256")
    elif isinstance(old.get("rerank"), dict):  # of an earlier version
        keys.append("rerank")
        old["rerank"] = old["rerank"].get("run")
    for key in keys:
        if key in old and not files.same_place(old[key], getattr(args, key)):
            names = {"data_sha256": "other problems", "model_sha256": "other weights",
                     "rerank_sha256": "values of another critic"}  # fmt: skip
            other = names.get(key, f"{key} {old[key]}")
            raise UserError(f"{path} is a result with {other}: choose another --out")


def rank(path: Path) -> tuple:
    """Sort key of a folder's evaluations, of which `read_rows` takes the last: it prefers the test
    split, then fewer settings in the name, then more problems, then the newer file."""
    parts = path.stem.split("-")
    n = max((int(part) for part in parts if part.isdecimal()), default=0)
    return path.name.startswith("eval-test"), -len(parts), n, path.stat().st_mtime


def one_answer_each(folder: Path, ending: str = ".jsonl") -> list[Path]:
    """The files of evaluations in a folder that have one answer to each problem, by `rank`."""
    several = re.compile(r"-(?!1x)\d+x-t[\d.e-]+-seed\d")  # as in eval-test-256-8x-t1-seed0
    found = folder.glob(f"eval-*{ending}")
    return sorted((path for path in found if not several.search(path.name)), key=rank)


def read_rows(where: str) -> tuple[str, list[dict]]:
    """(path, rows) of an evaluation. `where` is its .jsonl file, its .json file, or a run's folder:
    then the last of `one_answer_each`. UserError if there is none or a row is not valid."""
    path = Path(where)
    if path.suffix == ".json" and not os.path.isdir(path):
        path = path.with_suffix(".jsonl")
    if os.path.isdir(path):
        found = one_answer_each(path)
        if not found:
            sampled = any(path.glob("eval-*.jsonl"))
            what = "evaluation with one answer to each problem" if sampled else "evaluation"
            raise UserError(f"{where} has no {what} yet: python evaluate.py --model {where}")
        path = found[-1]
    elif not os.path.exists(path):
        raise UserError(f"there is no {path}: give a run's folder or an eval-....jsonl file")
    types = {"index": int, "correct": bool, "gold": int | float, "question": str, "completion": str}
    of_math = types | {"gold": str, "timed_out": bool}
    try:
        rows = files.json_lines(path)
        if any(row["gold"] is None and row["correct"] is None for row in rows):
            raise UserError(f"{path}: its problems are unscored, so no answer is right or wrong")
        for row in rows:
            kinds = of_math if "timed_out" in row else types
            if wrong := [key for key, kind in kinds.items() if not isinstance(row[key], kind)]:
                raise ValueError(f"a row's {wrong[0]} is {row[wrong[0]]!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        problem = f"a row has no {e}" if isinstance(e, KeyError) else str(e)
        raise UserError(f"cannot read an evaluation from {path}: {problem}") from e
    return str(path), rows
