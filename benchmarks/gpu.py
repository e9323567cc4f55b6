"""One command that proves the GPU path: is it right, how fast is it, how much memory does it take?

    python -m benchmarks.gpu --json OUT.json                  # nine minutes at most on one H100
    python -m benchmarks.gpu --json OUT.json --only card,sft  # these alone; OUT keeps the others
    python -m benchmarks.gpu --json OUT.json --dry            # all code at toy size on a CPU
    python -m benchmarks.gpu --stage sft                      # one stage, its rows as they come

It needs no network and no weights: gemma-2b has its own shape and random numbers, GSM8K's examples
have its lengths and random ids. The small models of tests/fixtures and nanogsm/tiny are real. The
peers need transformers and peft, and are left out without them.

Each stage is a process with a time limit. One that fails, or is ended at its limit, is recorded
with its last lines and with what it had found so far, and the others go on. OUT is written anew
after each stage. What does not fit into --minutes is left out. The exit status is 1 if a stage
failed. A missed goal is a result and no failure.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import gpu_checks, gpu_speed
from benchmarks.gpu_parts import ROOT, Skipped, Work
from nanogsm import UserError
from nanogsm.model import load_model
from nanogsm.run import console, flags, machine
from nanogsm.store import files

# In order of value: what it runs, and its limit in seconds. They add up to less than 9 minutes, the
# first four to less than 5.
STAGES = {
    "card": (gpu_checks.card, 25),
    "correct": (gpu_checks.correct, 65),
    "sft": (gpu_speed.sft, 75),
    "decode": (gpu_speed.decode, 70),
    "ppo": (gpu_speed.ppo, 80),
    "peer-lora": (gpu_speed.peer_lora, 35),
    "peer-full": (gpu_speed.peer_full, 35),
    "profile": (gpu_speed.profile, 30),
    "resume": (gpu_checks.resume, 35),
    "tiny": (gpu_checks.tiny, 75),
    "study": (gpu_speed.study, 8),
}
SAME = ("gpu", "driver", "torch", "commit", "dirty", "dry", "device")  # results that may be mixed


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = flags.Parser("Prove the GPU path in one command: results, speed, memory.")
    add = p.add_argument
    # fmt: off
    add("--json", type=Path, help="File for all results. What it has of other stages is kept.")
    add("--only", metavar="STAGE,...", help=f"Run only these of {', '.join(STAGES)}.")
    add("--minutes", type=float, default=9.0, help="Stages that may take longer are left out.")
    add("--device", help="Default: cuda, with --dry cpu.")
    add("--dry", action="store_true", help="Run all code at toy size. Its numbers mean nothing.")
    add("--commit", help="Commit to record, where the folder is no git checkout.")
    add("--stage", choices=STAGES, help="Run one stage in this process, without a limit.")
    # fmt: on
    args = p.parse_args(argv)
    args.only = list(dict.fromkeys(args.only.split(","))) if args.only else list(STAGES)
    if unknown := [name for name in args.only if name not in STAGES]:
        raise UserError(f"--only {unknown[0]}: the stages are {', '.join(STAGES)}")
    flags.check_numbers(args, {}, positive=("minutes",))
    if not (args.json or args.stage):
        raise UserError("--json is needed: a file for the results")
    args.json = args.json and args.json.absolute()  # stages run in the repository's folder
    args.device, _ = machine.pick_compute(args.device or ("cpu" if args.dry else "cuda"), "bf16")
    if not (args.dry or args.device.startswith("cuda")):
        raise UserError(f"--device {args.device}: only --dry runs without a GPU")
    return args


# --------------------------------------------------------------------------------------- one stage


def run_stage(args) -> None:
    """In the stage's own process: print its rows, each as a line of JSON, as they are found."""
    function, limit = STAGES[args.stage]
    if args.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(args.device).index or 0)
    load_model(ROOT / "nanogsm" / "tiny" / "gemma", device=args.device)  # sets switches of PyTorch
    earlier = files.read_json(args.json)["stages"] if args.json and args.json.exists() else {}
    work = Work(args.device, args.dry, time.perf_counter() + limit - 10, earlier)
    try:
        for row in function(work):
            print(files.to_json(row).decode(), end="", flush=True)
    except Skipped as reason:
        print(json.dumps({"skipped": str(reason)}), flush=True)


def command_of(name: str, args) -> list[str]:
    given = ["--stage", name, "--json", str(args.json), "--device", args.device]
    return [sys.executable, "-m", "benchmarks.gpu", *given, *["--dry"] * args.dry]


def watch_stage(command: list[str], limit: float) -> dict:
    """Run a stage's process, and end it with all its children at the limit. Returns its record."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also after Ctrl-C; a session's leader has the group's number
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    return record_of(lines, code, limit) | {"seconds": time.perf_counter() - start}


def record_of(lines: list[str], code: int | None, limit: float) -> dict:
    """What a stage's lines and exit status (None: it was ended) say."""
    rows, said, skipped = [], [], None
    for line in lines:
        whole = line.startswith("{") and line.endswith("}")  # the last may have been cut
        if whole and line.startswith('{"measure"'):
            rows.append(json.loads(line))
        elif whole and line.startswith('{"skipped"'):
            skipped = json.loads(line)["skipped"]
        elif line.strip():
            said.append(line[:300])
    if code is None:
        status, reason = "timed out", f"ended after {limit:.0f} s"
    elif code:
        status, reason = "failed", said[-1] if said else f"exit status {code}"
    else:
        status, reason = ("skipped", skipped) if skipped else ("done", "")
    bad = status in ("failed", "timed out")
    return {"status": status, "reason": reason, "rows": rows, "last_lines": said[-20:] * bad}


# -------------------------------------------------------------------------------------- all stages


def about(args) -> dict:
    """The machine and the code, as the results name them."""
    facts = {"commit": None, "dirty": None} | machine.environment()
    facts["commit"] = args.commit or facts["commit"]
    facts["driver"], facts["cuda"] = None, torch.version.cuda
    for package in ("transformers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True)
        facts["driver"] = done.stdout.split("\n")[0].strip()
    return facts | {"dry": args.dry, "device": args.device}


def begin(args) -> dict:
    """Results without stages, or those in the file if they are of this machine and this code."""
    results = {"about": about(args), "stages": {}}
    if not args.json.exists():
        try:  # now, and not when the first stage has ended
            args.json.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(args.json, results)
        except OSError as error:
            raise UserError(f"cannot write {args.json}: {error.strerror}") from error
        return results
    old = files.read_json(args.json)
    for name in SAME:
        was, is_now = (r.get("about", {}).get(name) for r in (old, results))
        if was != is_now:
            raise UserError(f"{args.json} has results of {name} {was}, not {is_now}: name another")
    results["stages"] = {n: s for n, s in old["stages"].items() if n not in args.only}
    return results


def table(results: dict) -> list[list[str]]:
    """The cells: stage, measure, result, goal, met. A stage without rows has its status."""
    found = [["stage", "measure", "result", "goal", "met"]]
    for name, stage in results["stages"].items():
        for row in stage["rows"]:
            value = row["value"]
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            shown = f"{value:,.4g} {row['unit']}" if number else "" if value is None else str(value)
            result = "; ".join(filter(None, (shown.strip(), row["note"])))
            met = {True: "yes", False: "NO", None: ""}[row["met"]]
            found.append([name, row["measure"], result, row["goal"], met])
        if stage["status"] != "done":
            found.append([name, stage["status"], stage["reason"], "", ""])
    return found


def show(results: dict) -> None:
    cells = table(results)
    widths = [max(len(line[i]) for line in cells) for i in range(2)]
    for stage, measure, result, goal, met in cells:
        wanted = f"  [{goal}] {met}" if goal else ""
        print(console.printable(f"{stage:<{widths[0]}}  {measure:<{widths[1]}}  {result}{wanted}"))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.stage:
        run_stage(args)
        return 0
    results, start = begin(args), time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the stage's process, too
    for name in args.only:
        limit, left = STAGES[name][1], 60 * args.minutes - (time.perf_counter() - start)
        if limit > left:
            reason = f"it may take {limit} s, and {max(0, left):.0f} s were left"
            stage = {"status": "left out", "reason": reason, "rows": [], "last_lines": []}
            stage["seconds"] = 0.0
        else:
            print(f"{name} ...", flush=True)
            stage = watch_stage(command_of(name, args), limit)
        results["stages"][name] = stage
        files.write_json(args.json, results)
        said = f"{name}: {stage['status']} in {stage['seconds']:.1f} s {stage['reason']}"
        print(console.printable(said), flush=True)
    show(results)
    bad = [n for n in args.only if results["stages"][n]["status"] in ("failed", "timed out")]
    return 1 if bad else 0


if __name__ == "__main__":
    console.entry(main)
