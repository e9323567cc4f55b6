"""Prove that a change of the code changed no bit of any result.

    python tests/bits.py COMMIT                          # against the working tree as it stands
    python tests/bits.py COMMIT --here OTHER             # against another commit or folder
    python tests/bits.py COMMIT --expect-changed entropy,kl   # two metrics differ on purpose

The script copies both versions into a temporary folder. It trains the embedded model with each of
them: SFT and PPO, full and LoRA, in float32 and in bfloat16. Then it evaluates every run. It
compares the weights, the metrics, the samples and the answers, and it prints a line with a short
SHA-256 for each. The clock, the memory and the environment are not compared.

Exit status 1 means that something differs. A digest holds for one machine and one PyTorch: other
hardware rounds differently. This takes about three minutes. Pytest does not collect it.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]

# The commands must fit both versions, so they use only flags that both have. RECIPE stands for the
# recipe that is called "original" today and that was called "report" before.
SFT = "train_sft.py --tiny --device cpu --epochs 1 --val-examples 16 --max-new-tokens 48"
PPO = (
    "train_ppo.py --tiny --device cpu --init runs/sft --max-new-tokens 48"
    " --steps 3 --rollouts 64 --micro-batch 16"
)
RATE = "--warmup 0.03 --micro-batch 16 --accumulation 1"  # a recipe's values may change
EVALUATE = "evaluate.py --device cpu --n 64 --max-new-tokens 48"

# PPO starts from the run "sft". That run sees enough examples to answer some problems: without a
# reward PPO would have nothing to learn, and there would be little to compare.
RUNS = {
    "sft": f"{SFT} {RATE} --lr 0.002 --max-examples 1000 --val-every 20 --keep best",
    "lora": f"{SFT} --recipe RECIPE --lora --max-examples 160 --micro-batch 8 --accumulation 2"
    " --optim adamw --weight-decay 0.01",
    "ppo": f"{PPO} --recipe RECIPE --accumulation 1",
    "ppo-lora": f"{PPO} --recipe tuned --lora --critic separate --accumulation 2",
    "sft-bf16": f"{SFT} --recipe RECIPE --max-examples 48 --checkpointing light",
    "lora-bf16": f"{SFT} {RATE} --lr 0.01 --lora --max-examples 48",
    "ppo-bf16": f"{PPO} --recipe tuned --accumulation 2 --checkpointing full",
}

# These keys tell of the clock, the machine and the place, not of the result.
# So does every key that begins with "seconds".
IGNORED = ("tokens_per_s", "peak_memory", "environment", "model")
MISSING = "missing"  # stands for the value of a key that a row or a side does not have


# ----------------------------------------------------------------------------------- the two sides


def export(version: str, folder: Path) -> None:
    """Copy a version, which is a folder or a commit, into a new folder."""
    if os.path.isdir(version):
        without = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")
        shutil.copytree(version, folder, symlinks=True, ignore=without)
        return
    folder.mkdir()
    git = ["git", "-C", str(ROOT), "archive", version]
    archive = subprocess.run(git, capture_output=True)
    if archive.returncode:
        sys.exit(f"{version} is neither a folder nor a commit: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def python(side: Path, command: str) -> str:
    """Run a script of one side in its folder, on one thread, and return what it prints."""
    argv = [sys.executable, *command.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=side, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side.name}: {command}\nfailed with status {done.returncode}:\n{done.stderr}")
    return done.stdout


def name_of_recipe(side: Path) -> str:
    """What this side calls the recipe of the original study."""
    return "original" if "original" in python(side, "train_sft.py --help") else "report"


def train_and_evaluate(side: Path, run: str, recipe: str) -> None:
    precision = "bf16" if run.endswith("bf16") else "fp32"
    command = RUNS[run].replace("RECIPE", recipe)
    python(side, f"{command} --precision {precision} --out runs/{run}")
    evaluate = f"{EVALUATE} --precision {precision} --model runs/{run} --out runs/{run}"
    python(side, evaluate)
    python(side, f"{evaluate} --samples 4 --temperature 0.7")


# ------------------------------------------------------------------------------------ what is there


def things(folder: Path) -> dict[str, dict]:
    """Everything to compare of one run: for each thing its name, and its values by key.

    A file of tensors, of samples, of answers or of figures is one thing. Each metric is one, too.
    """
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found[str(file.relative_to(folder))] = load_file(file)
    for file in sorted(folder.glob("*.jsonl")):
        if file.name == "metrics.jsonl":
            for key, column in columns(file).items():
                found[f"{file.name} {key}"] = {key: column}
        else:
            found[file.name] = columns(file)
    for file in sorted(folder.glob("eval-*.json")):
        found[file.name] = without_ignored(json.loads(file.read_text()))
    return found


def columns(file: Path) -> dict[str, list]:
    """The rows of a .jsonl file as one list a key."""
    rows = [without_ignored(json.loads(line)) for line in file.read_text().splitlines()]
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key, MISSING) for row in rows] for key in keys}


def without_ignored(row: dict) -> dict:
    kept = [key for key in row if key not in IGNORED and not key.startswith("seconds")]
    return {key: row[key] for key in kept}


# ---------------------------------------------------------------------------------- the comparison


def packed(value) -> bytes:
    """A tensor or a JSON value as bytes. Two values have the same bytes only if they are equal."""
    if not isinstance(value, torch.Tensor):
        return json.dumps(value, sort_keys=True).encode()
    head = f"{value.dtype} {list(value.shape)} ".encode()
    return head + value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest(values: dict) -> str:
    """The beginning of the SHA-256 over all keys and values."""
    hashed = hashlib.sha256()
    for key in sorted(values):
        for part in (key.encode(), packed(values[key])):
            hashed.update(len(part).to_bytes(8, "big"))
            hashed.update(part)
    return hashed.hexdigest()[:12]


def numbers(value) -> list[float]:
    """All numbers in a tensor or in a JSON value, in their order. NaN stands for all else."""
    if isinstance(value, torch.Tensor):
        return value.double().flatten().tolist()
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [float(value)] if isinstance(value, (int, float)) else [math.nan]


def how_far(old: dict, new: dict, keys: list[str]) -> str:
    """The first key that differs, and the largest difference of any of these keys."""
    first = f"DIFFERENT: first {keys[0]}"
    largest = 0.0
    for key in keys:
        if key not in old or key not in new:
            return f"{first}; only the {'old' if key in old else 'new'} side has {key}"
        a, b = numbers(old[key]), numbers(new[key])
        if len(a) != len(b):
            return f"{first}; {key} has {len(a)} values in old and {len(b)} in new"
        distances = [abs(x - y) for x, y in zip(a, b)]
        largest = max([largest, *(d for d in distances if not math.isnan(d))])
    if largest == 0:
        return f"{first}; no number differs, so it is a text, a type, a NaN or a zero's sign"
    return f"{first}, largest difference {largest:.3g}"


def compare(run: str, old: dict, new: dict, expected: list[str]) -> list[str]:
    """Print a line for each thing of a run. Return the verdicts."""
    verdicts = []
    for thing in old | new:
        a, b = old.get(thing, {}), new.get(thing, {})
        changed = [k for k in a | b if packed(a.get(k, MISSING)) != packed(b.get(k, MISSING))]
        by_accident = [key for key in changed if key not in expected]
        if by_accident:
            verdict = how_far(a, b, by_accident)
        elif changed:
            verdict = f"changed on purpose: {', '.join(changed)}"
        else:
            verdict = "equal"
        print(f"{run:<10}{thing:<44}{digest(a)}  {verdict}", flush=True)
        verdicts.append(verdict)
    return verdicts


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("commit", help="the old side: a commit, or a folder")
    p.add_argument("--here", default=str(ROOT), help="the new side (default: the working tree)")
    p.add_argument("--expect-changed", default="", metavar="KEY[,KEY]",
                   help="metrics and figures that differ on purpose")  # fmt: skip
    args = p.parse_args()
    expected = args.expect_changed.split(",")
    began = time.time()
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        old, new = Path(folder) / "old", Path(folder) / "new"
        export(args.commit, old)
        export(args.here, new)
        recipes = {side: name_of_recipe(side) for side in (old, new)}
        for run in RUNS:
            for side in (old, new):
                train_and_evaluate(side, run, recipes[side])
            before, after = things(old / "runs" / run), things(new / "runs" / run)
            verdicts += compare(run, before, after, expected)
    tally = Counter(verdict.split()[0] for verdict in verdicts)
    seconds = time.time() - began
    print(f"{len(verdicts)} things compared in {seconds:.0f} s: {tally['equal']} equal, "
          f"{tally['changed']} changed on purpose, {tally['DIFFERENT:']} different")  # fmt: skip
    return 1 if tally["DIFFERENT:"] else 0


if __name__ == "__main__":
    sys.exit(main())
