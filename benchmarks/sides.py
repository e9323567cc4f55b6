"""Two processes that take turns, ours and a peer's, so that times and memory can be compared.

Each side has a process of its own, because peak memory is a property of a process. They compute by
turns (ours, peer, ours, peer), and one waits while the other works. So whatever else the machine
does affects both alike. A benchmark calls `compete` in the parent process. The same file, started
with --worker NAME, is a side and answers through `Turns`.
"""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from nanogsm import UserError, lora
from nanogsm.run import card, machine
from nanogsm.store import hub
from nanogsm.transformer import Linear, Transformer


def now(device: str) -> float:
    """The time, after the device has finished what it was asked to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device.startswith("mps"):
        torch.mps.synchronize()
    return time.perf_counter()


def check(args) -> None:
    """UserError if --model is an adapter, which the two sides would read differently, or if there
    is no place for --json. Called before the work."""
    if hub.find_model(args.model).adapter:
        raise UserError(f"{args.model} is an adapter: give a run or folder of a whole model")
    if args.json:
        try:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {args.json}: {error.strerror}") from error


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second in a large matrix product, the best of six."""
    n, best = 8192 if device.startswith("cuda") else 2048, math.inf
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(6):
        start = now(device)
        a @ a
        best = min(best, now(device) - start)
    return 2 * n**3 / best


def matrices_of(model: Transformer) -> card.Weights:
    """How many entries its matrices have: what card.forward_flops and update_flops count with.
    Trap: of stacked adapters the frozen ones are counted as trained."""
    layers = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    adapted = [m for m in model.modules() if isinstance(m, lora.LoRALinear)]
    adapters = sum(m.lora_A.weight.numel() + m.lora_B.weight.numel() for m in adapted)
    return card.Weights(layers, model.model.embed_tokens.weight.numel(), adapters)


def read_rate(device: str) -> float:
    """Bytes per second at which memory is read, the best of six sums over a large tensor."""
    x, best = torch.ones(2**30 if device.startswith("cuda") else 2**27, device=device), math.inf
    for _ in range(6):
        start = now(device)
        x.sum()
        best = min(best, now(device) - start)
    return x.nbytes / best


class Turns:
    """A worker's side of the conversation: `ready`, then `begin`, work, `end` in each round, and
    `rest` at the end. Before each round it waits for a line on stdin. After it, it answers with one
    line of JSON."""

    def __init__(self, device: str):
        self.device, self.born, self.spans = device, time.perf_counter(), defaultdict(float)
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print on stdout goes to the log

    def _say(self, **facts) -> None:
        facts["memory"] = machine.peak_memory(self.device)
        print(json.dumps(facts), file=self.out, flush=True)

    def ready(self, **facts) -> None:
        self._say(loading=time.perf_counter() - self.born, **facts)

    def begin(self) -> None:
        if not sys.stdin.readline():
            sys.exit(1)  # the parent is gone
        self.spans, self.began = defaultdict(float), now(self.device)

    def end(self, **facts) -> None:
        self._say(seconds=now(self.device) - self.began, spans=self.spans, **facts)

    def rest(self) -> None:
        """Wait for the parent to kill us. Exiting would take CPU time from the other side."""
        sys.stdin.read()

    def timed(self, name: str, function):
        """The function, changed so that it adds its time to spans[name]."""

        def run(*args, **kwargs):
            start = now(self.device)
            result = function(*args, **kwargs)
            self.spans[name] += now(self.device) - start
            return result

        return run


class Side:
    """A worker process as the parent sees it: what it said when it was ready, and its rounds."""

    def __init__(self, name: str, module: str, argv: list[str], scratch: str):
        self.name, self.log = name, Path(scratch) / f"{name}.log"
        command = [sys.executable, "-m", module, *argv, "--worker", name, "--scratch", scratch]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.about = self._listen()
        self.rounds: list[dict] = []

    def _listen(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the worker {self.name} died:\n{self.log.read_text()[-1000:]}")
        return json.loads(line)

    def run_round(self) -> dict:
        with contextlib.suppress(BrokenPipeError):  # a worker that died: _listen says why
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        self.rounds.append(self._listen())
        return self.rounds[-1]


def compete(
    module: str, argv: list[str], packages: tuple[str, ...], rounds: int
) -> dict[str, Side]:
    """Run ours and, if its packages are installed, the peer: one round to warm up, then `rounds`.

    Ours starts first and goes first in every round. It leaves what the peer needs in --scratch.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}; only ours is timed")
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name in ("ours",) if missing else ("ours", "peer"):
                sides[name] = Side(name, module, argv, scratch)
            for number in range(rounds + 1):
                seconds = [f"{n} {s.run_round()['seconds']:.2f} s" for n, s in sides.items()]
                print(f"round {number or '0 (not counted)'}: {', '.join(seconds)}", flush=True)
        finally:
            for side in sides.values():
                side.process.kill()
                side.process.wait()
    return sides
