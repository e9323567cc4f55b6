"""What every script shares at its edges: flags of the machine, stopping, the console line, errors.

    if __name__ == "__main__":
        console.entry(main)

A user's mistake ends in one line and status 2; Ctrl-C and SIGTERM end at a step's boundary with
status 130 and 143; a bug of ours keeps its traceback.
"""

import argparse
import contextlib
import datetime
import errno
import importlib.metadata
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch

from nanogsm import UserError


def disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))


# ---- stopping


class Stopped(Exception):
    """Somebody asked to stop in the middle of sampling, which is not worth ending first."""


class Interrupt:
    """Whether somebody asked to stop: `requested` is the signal's number, or None."""

    requested: int | None = None

    @property
    def exit_code(self) -> int:
        """What the script returns: 130 after Ctrl-C, 143 after SIGTERM, 0 if nobody asked."""
        return 128 + self.requested if self.requested else 0

    def message(self, step: int) -> str:
        """How to go on; print it after the checkpoint of `step` is written."""
        return (f"stopped by {signal.Signals(self.requested).name}: "
                f"run the same command again to continue from step {step}")  # fmt: skip

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = number
        # os.write: print() may be what the signal interrupted, and is not re-entrant.
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; a Ctrl-C from now on stops at once\n")


@contextlib.contextmanager
def graceful_stop() -> Iterator[Interrupt]:
    """`with graceful_stop() as stop`: SIGINT and SIGTERM only set `stop.requested`.

    The loop looks at it at each step boundary, saves and leaves. A Ctrl-C after that raises
    KeyboardInterrupt at once. Trap: outside the main thread Python allows no handlers; then, and
    for a signal the parent had us ignore (nohup, `&`), nothing is changed.
    """
    stop, previous = Interrupt(), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, stop._handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ---- the console


def printable(text: str) -> str:
    """`text` with everything but line feeds, tabs and visible characters as backslash escapes.

    A model can emit escape sequences, and a terminal would obey them.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class Progress:
    """One updating console line; to a file or pipe, a line at most every ten seconds. `unit` is
    what is counted.

    Use as `with Progress(total_steps) as progress:` so that the line is ended whatever happens.
    """

    SECONDS = 10.0

    def __init__(self, total: int, unit: str = "step"):
        self.total, self.unit = total, unit
        self.terminal = sys.stdout.isatty()
        self.line = ""  # what the terminal's last line shows
        self.printed = -math.inf  # when a line was last printed
        self.ended = False  # whether that was the last step's
        self.first: tuple[int, float] | None = None  # step and time of the first update

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, step: int, **figures: float | str | None) -> None:
        """Show step/total, the figures in the order given, and the time left.

        `memory` is in bytes, `tokens_per_s` a rate; None is left out. The time left is measured
        between this process's first update and now: steps of earlier processes do not count.
        """
        now = time.monotonic()
        self.first = self.first or (step, now)
        parts = [f"{self.unit} {step}/{self.total}"]
        parts += [_figure(name, value) for name, value in figures.items() if value is not None]
        if self.first[0] < step < self.total:
            left = (self.total - step) * (now - self.first[1]) / (step - self.first[0])
            parts.append(f"ETA {datetime.timedelta(seconds=round(left))}")
        text = printable("  ".join(parts))
        if self.terminal:
            self.line = text[: shutil.get_terminal_size().columns - 1]  # \r cannot undo a wrap
            print(f"\r\x1b[K{self.line}", end="", flush=True)
        elif now - self.printed >= self.SECONDS or (step >= self.total and not self.ended):
            print(text, flush=True)
            self.printed, self.ended = now, step >= self.total

    def note(self, text: str) -> None:
        """Print whole lines above the progress line; control characters are made visible."""
        print(("\r\x1b[K" if self.line else "") + printable(text))
        print(self.line, end="", flush=True)

    def close(self) -> None:
        """End the line, so that what follows starts on its own."""
        if self.line:
            print(flush=True)
        self.line = ""


def _figure(name: str, value: float | str) -> str:
    if name == "memory":
        return f"{value / 2**30:.2f} GiB"
    if name == "tokens_per_s":
        return f"{value:,.0f} tokens/s"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


# ---- where it ran


def peak_memory(device: torch.device | str) -> int:
    """Most bytes held so far: of tensors on a GPU, of the whole process on the CPU, 0 if unknown.

    Trap: Apple's GPU reports no peak; this is what it holds now.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if kind == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict:
    """Versions, hardware and commit: what one must know to repeat a run's numbers."""
    env = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "numpy", "safetensors", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            env[package] = importlib.metadata.version(package)
    env["cpu"] = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, AttributeError):  # only Linux has this file
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        env["cpu"] = model.group(1)
    env |= {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    env["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    root = Path(__file__).parents[2]
    # Not in an enclosing project's checkout (a virtual environment's): its commit is not ours.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (root / ".git").exists():
            env |= {"commit": _git(root, "rev-parse", "HEAD"),
                    "dirty": bool(_git(root, "status", "--porcelain"))}  # fmt: skip
    return env


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


# ---- where it runs


class Help(argparse.HelpFormatter):
    """--help with the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = action.default in (None, False, 0, "", "auto", argparse.SUPPRESS)
        return (action.help or "") + ("" if says_nothing else " (%(default)s)")


class Parser(argparse.ArgumentParser):
    """Bad flags get one line as all bad input does, not a page of usage."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=Help)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def check_numbers(args: argparse.Namespace, at_least: dict[str, float], positive: tuple = ()) -> None:
    """UserError for the first flag that is absurd: below its limit or above ten million (a seed:
    2**31 - 1), or not positive. None is unset."""
    for name in (*at_least, *positive):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        most = 2**31 - 1 if name == "seed" else 10**7
        if value is None:
            continue
        if name in positive and not 0 < value < math.inf:
            raise UserError(f"{flag} is {value}: give a positive number")
        if name in at_least and not at_least[name] <= value <= most:
            limit = f"at most {most:,}" if value > most else f"at least {at_least[name]}"
            raise UserError(f"{flag} is {value}: give {limit}")


def add_compute_flags(parser: argparse.ArgumentParser) -> None:
    """--device and --precision, to be resolved by `pick_compute`."""
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; auto takes the first there is")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                        help="of matrix products; auto is bf16 where the hardware has it")  # fmt: skip


def add_data_dir_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", default=os.environ.get("NANOGSM_DATA_DIR"),
                        help="folder with GSM8K's .jsonl files (default: $NANOGSM_DATA_DIR, "
                        "else downloaded once)")  # fmt: skip


def add_tiny_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiny", action="store_true",
                        help="the embedded model and its problems: no download, any machine")  # fmt: skip


def add_wandb_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wandb", metavar="PROJECT", help="send the metrics to Weights & Biases, too")


def for_tiny(args: argparse.Namespace) -> tuple[str, str]:
    """(--data, --precision) as --tiny means them: its own problems, and float32, in which so small
    a model is no slower and machines agree better."""
    data, own = args.data or "main", {"main": "tiny", "socratic": "tiny-socratic", "worked": "tiny-worked"}
    if not args.tiny:
        return data, args.precision
    return own.get(data, data), "fp32" if args.precision == "auto" else args.precision


def pick_compute(device: str, precision: str) -> tuple[str, str]:
    """("cuda" | "mps" | "cpu", "bf16" | "fp32") for what the two flags say."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, present in there.items() if present)
    kind, _, number = device.partition(":")
    cards = torch.cuda.device_count() if kind == "cuda" else 1
    if not there.get(kind) or (number and not (number.isdigit() and int(number) < cards)):
        have = ", ".join(name for name, present in there.items() if present)
        raise UserError(f"--device {device}: not here; there is {have}")
    if precision == "auto":
        precision = "bf16" if _has_bf16(device) else "fp32"
    return device, precision


def _has_bf16(device: str) -> bool:
    """Without the instructions bfloat16 still computes, but on a CPU several times slower than
    float32. MPS emulates part of it, too."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not public, so may be absent
    return device == "cpu" and any(getattr(torch.cpu, ask, lambda: False)() for ask in asks)


# ---- the way in and out

MEMORY_ADVICE = (
    "out of memory: take --checkpointing full, or lower --micro-batch and raise --accumulation (the same "
    "result), or lower --max-seq-length, or take --lora (PPO: also --rollout-batch, --max-new-tokens; "
    "evaluate.py: --batch-size)"
)


def entry(main: Callable[[], int | None]) -> NoReturn:
    """`if __name__ == "__main__": entry(main)`: run main and exit with what it returns.

    One line on stderr and status 2 for a UserError, a full disk or too little memory; 130 after
    Ctrl-C, 141 if the reader of our output left. Everything else keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a console that cannot show a character stops nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain about it there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if not disk_full(error):
            raise
        code = _fail(f"disk full ({error}): free some space, then run the same command again")
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        code = _fail(MEMORY_ADVICE)
    sys.exit(code)


def _out_of_memory(error: Exception) -> bool:
    """PyTorch has an exception for the CUDA allocator only; elsewhere the text must tell."""
    texts = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(text in str(error) for text in texts)


def _fail(message: str) -> int:
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    return 2
