"""Kill training runs at random, continue them, and compare with a run that nobody killed.

    python tests/kill.py        # 102 kills of full SFT, LoRA, PPO, a PPO run that is made longer and
                                # one with --patience, and of one of two devices in SFT
    python tests/kill.py --kills 4 --seed 3

Every second kill comes from outside, after a random time. The others strike at a random disk
operation of a checkpoint or of the end: before a write reaches the disk, before a rename, or before
an older file is deleted. The same command then starts the killed run again, until it ends. All
weights, the state of the optimizer, and every row of metrics and samples must be equal to the bit.
Only what the clock and the memory say is not compared. Exit status 1 if anything differs. Pytest
does not collect this file.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
SMALL = ["--tiny", "--val-examples", "16", "--save-every", "2", "--max-new-tokens", "48"]
SFT = [*SMALL, "--recipe", "original", "--max-examples", "160", "--val-every", "4"]
RUNS = {  # name: script and flags; "sft" comes first, because PPO starts from it
    "sft": ["train_sft.py", *SFT],
    "lora": ["train_sft.py", *SFT, "--lora"],
    "ppo": ["train_ppo.py", *SMALL, "--init", "sft", "--recipe", "tuned", "--critic", "separate",
            "--steps", "6", "--rollouts", "32", "--micro-batch", "8", "--accumulation", "2",
            "--val-every", "3"],
    "many": ["train_sft.py", *SFT, "--shard", "2"],  # one of two processes is killed
}  # fmt: skip
RUNS["patient"] = [*RUNS["ppo"][:-1], "1", "--patience", "2"]
RUNS["longer"] = [flag if flag != "6" else "4" for flag in RUNS["ppo"]]
RANKS = {"many": 2}
BEFORE = {"longer": ["--steps", "2"]}  # the run has ended with these flags before the first kill

# Runs the script in argv[2:] with two changes. The last checkpoint is kept for the comparison. The
# process dies before its argv[1]-th disk operation (0: never).
HARNESS = """
import os, runpy, shutil, signal, sys
sys.path.insert(0, os.environ["ROOT"])
from pathlib import Path
from nanogsm.run.folder import RunFolder
left = int(sys.argv[1])
def deadly(module, name):
    real = getattr(module, name)
    def wrapped(*args, **kw):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kw)
    setattr(module, name, wrapped)
for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"),
                     (Path, "rename"), (Path, "unlink"), (Path, "replace")):
    deadly(module, name)
finish = RunFolder.finish
def keep(folder, summary):
    [last] = folder.path.glob("checkpoint/step-*[0-9]")  # an older one would be left behind
    shutil.copytree(last, Path(str(folder.path) + "-kept") / last.name, dirs_exist_ok=True)
    finish(folder, summary)
RunFolder.finish = keep
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(
    name: str, out: str, place: Path, die_at: int = 0, more: tuple = ()
) -> list[subprocess.Popen]:
    """The processes of a run: one, or as torchrun would start them."""
    script, *flags = [*RUNS[name], *more, "--out", out]
    argv = [sys.executable, "-c", HARNESS, str(die_at), str(ROOT / script), *flags]
    count, processes = RANKS.get(name, 1), []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for rank in range(count):
        env = os.environ | {"ROOT": str(ROOT), "OMP_NUM_THREADS": "1"}
        if count > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        processes.append(subprocess.Popen(
            argv, cwd=place, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ))  # fmt: skip
    return processes


def statuses(processes: list[subprocess.Popen]) -> tuple[list[int], str]:
    """How the processes ended, and what they said. As under torchrun, the others are killed if they
    go on for long after the first that failed."""
    until = None
    while any(process.poll() is None for process in processes):
        time.sleep(0.02)
        if until is None and any(process.poll() for process in processes):
            until = time.time() + 10
        for process in processes if until and time.time() > until else ():
            process.kill()
    said = [process.communicate()[1].decode() for process in processes]
    return [process.returncode for process in processes], "".join(said)


def ended(processes: list[subprocess.Popen]) -> None:
    codes, error = statuses(processes)
    if any(codes):
        sys.exit(f"the run failed with status {codes}: {error[-2000:]}")


def without_clock(row: dict) -> dict:
    return {k: v for k, v in row.items() if not k.startswith(("seconds", "peak_memory"))}


def everything(folder: Path) -> dict:
    """All that a run leaves behind, except what the clock and the memory say."""
    found = {}
    for place in (folder, Path(f"{folder}-kept")):
        for file in place.rglob("*.safetensors"):
            for name, array in load_file(file).items():
                key = (str(file.relative_to(place)), name)
                found[key] = (str(array.dtype), array.shape, array.tobytes())
    for file in Path(f"{folder}-kept").rglob("state.json"):
        state = json.loads(file.read_text())["state"]
        found["state"] = state | {"metrics": without_clock(state["metrics"])}
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        found[name] = [without_clock(row) for row in rows]
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--kills", type=int, default=17, help="Kills of each run. Default: 17.")
    p.add_argument("--only", choices=RUNS, help="Kill this run only.")
    p.add_argument("--seed", type=int, default=0, help="Seed of the moments of death.")
    args = p.parse_args()
    rng, wrong = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in RUNS if not args.only else [args.only]:
            if "--init" in RUNS[name] and not (place / "sft").exists():
                ended(start("sft", "sft", place))
            began = time.time()
            ended(start(name, name, place))
            seconds, whole = time.time() - began, everything(place / name)
            from_outside = in_disk_operation = complete = 0
            while from_outside + in_disk_operation < args.kills:
                if name in BEFORE:
                    ended(start(name, "cut", place, more=BEFORE[name]))
                    shutil.rmtree(place / "cut-kept")
                while from_outside + in_disk_operation < args.kills:
                    outside = (from_outside + in_disk_operation) % 2 == 0
                    ranks = start(name, "cut", place, 0 if outside else rng.randrange(1, 60))
                    if outside:
                        try:
                            ranks[0].wait(rng.uniform(0, 0.9 * seconds))
                        except subprocess.TimeoutExpired:
                            rng.choice(ranks).send_signal(signal.SIGKILL)
                    codes, error = statuses(ranks)
                    if not any(codes):
                        break
                    # The others say that they lost it (2), or end when nobody is left to hear (1).
                    if -signal.SIGKILL not in codes or {*codes} - {-signal.SIGKILL, 0, 1, 2}:
                        sys.exit(f"{name}: status {codes} after a kill: {error[-2000:]}")
                    from_outside += outside
                    in_disk_operation += not outside
                ended(start(name, "cut", place))
                cut = everything(place / "cut")
                keys = whole.keys() | cut.keys()
                different = [key for key in keys if whole.get(key) != cut.get(key)]
                complete += 1
                if different:
                    wrong += 1
                    first = different[0]
                    print(f"{name}: {len(different)} of {len(whole)} differ, the first is {first}")
                for finished in ("cut", "cut-kept"):
                    shutil.rmtree(place / finished)
            rows = len(whole["metrics.jsonl"]) + len(whole["samples.jsonl"])
            print(
                f"{name}: {from_outside} kills from outside, {in_disk_operation} in a disk "
                f"operation, {complete} runs finished; {len(whole) - 3} tensors, the state and "
                f"{rows} rows compared",
                flush=True,
            )
    print("all equal" if not wrong else f"{wrong} runs differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
