"""What a script shows and how it ends: the progress line, stopping, errors in one line.

    if __name__ == "__main__":
        console.entry(main)

A user's mistake ends in one line and status 2. Ctrl-C, SIGTERM and a closed terminal end at a
step's boundary with status 130, 143 and 129. A bug of ours keeps its traceback.
"""

import contextlib
import datetime
import errno
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch

from nanogsm import UserError, distributed


def disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))


# ---- stopping


SIGHUP = getattr(signal, "SIGHUP", None)  # a closed terminal or a dropped ssh; not on Windows


class Stopped(Exception):
    """Raised to stop a run at the last whole step, for example during sampling."""


class Interrupt:
    """Whether a stop was requested: `requested` is the signal's number, or None."""

    requested: int | None = None

    def __init__(self):
        self.terminal = [fd for fd in (1, 2) if os.isatty(fd)]  # stdout, stderr

    @property
    def exit_code(self) -> int:
        """What the script returns: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP (a closed
        terminal), 0 without a request."""
        return 128 + self.requested if self.requested else 0

    def agreed(self) -> int | None:
        """The signal that any rank got. All ranks get the same answer."""
        # Trap: a signal of our own may arrive meanwhile, and must not be forgotten.
        number = distributed.agreed(self.requested)
        self.requested = self.requested or number
        return number

    def message(self, step: int) -> str:
        """How to continue. Print it after the checkpoint of `step` is written."""
        name = signal.Signals(self.requested).name
        return f"stopped by {name}: run the same command again to continue from step {step}"

    def _handle(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = number
        if number == SIGHUP:  # the terminal is gone, and writing to it would end the run unsaved
            for fd in self.terminal:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        # print() is not re-entrant, and the signal may have interrupted one.
        with contextlib.suppress(OSError):
            if distributed.RANK == 0:
                again = b"; press Ctrl-C again to stop at once" * (number == signal.SIGINT)
                os.write(2, b"\nstopping after this step" + again + b"\n")


_stop: Interrupt | None = None  # of the run that goes on


@contextlib.contextmanager
def graceful_stop() -> Iterator[Interrupt]:
    """`with graceful_stop() as stop`: SIGINT, SIGTERM and SIGHUP only set `stop.requested`.

    The loop looks at it at each step boundary, saves and leaves. A second Ctrl-C raises
    KeyboardInterrupt at once. Trap: outside the main thread Python allows no handlers. There, and
    for a signal that the parent process told us to ignore (nohup, `&`), nothing is changed.
    """
    global _stop
    stop, previous = Interrupt(), {}
    _stop = stop
    if threading.current_thread() is threading.main_thread():
        for number in filter(None, (signal.SIGINT, signal.SIGTERM, SIGHUP)):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, stop._handle)
    try:
        yield stop
    finally:
        _stop = None
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_if_asked() -> None:
    """Raise Stopped if a stop was requested, in a run on one device. (On many a stop waits for the
    end of the step, where all hear of it.)"""
    if _stop and _stop.requested and distributed.COUNT == 1:
        raise Stopped


# ---- the progress line


def printable(text: str) -> str:
    """`text` with control characters, except line feeds and tabs, as backslash escapes. A model can
    emit escape sequences, and a terminal would obey them."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )


class Progress:
    """One updating console line. In a file or pipe, one line at most every ten seconds.

    `unit` is what is counted. Use it as `with Progress(total_steps) as progress:`, so that the line
    is ended whatever happens.
    """

    SECONDS = 10.0

    def __init__(self, total: int, unit: str = "step"):
        self.total, self.unit = total, unit
        self.terminal = sys.stdout.isatty()
        self.line = ""  # what the terminal's last line shows
        self.printed = -math.inf  # when a line was last printed
        self.ended = False  # whether that line was the last step's
        self.seen: deque[tuple[int, float]] = deque(maxlen=20)  # (step, when it was first shown)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, step: int, **metrics: float | str | None) -> None:
        """Show step/total, the time left, and the metrics in the order given.

        `memory` is in bytes, `tokens_per_s` is a rate; None is left out. The time left follows from
        the last 20 steps that this process has shown.
        """
        now = time.monotonic()
        if not self.seen or step > self.seen[-1][0]:
            self.seen.append((step, now))
        parts = [f"{self.unit} {step}/{self.total}"]
        (first, began), (last, ended) = self.seen[0], self.seen[-1]
        if first < last < self.total:
            left = (self.total - last) * (ended - began) / (last - first) - (now - ended)
            parts.append(f"ETA {datetime.timedelta(seconds=max(0, round(left)))}")
        parts += [_shown(name, value) for name, value in metrics.items() if value is not None]
        text = printable("  ".join(parts))
        if self.terminal:
            self.line = text[: shutil.get_terminal_size().columns - 1]  # \r cannot undo a wrap
            print(f"\r\x1b[K{self.line}", end="", flush=True)
        elif now - self.printed >= self.SECONDS or (step >= self.total and not self.ended):
            print(text, flush=True)
            self.printed, self.ended = now, step >= self.total

    def note(self, text: str) -> None:
        """Print whole lines above the progress line. Control characters are made visible."""
        print(("\r\x1b[K" if self.line else "") + printable(text))
        print(self.line, end="", flush=True)

    def close(self) -> None:
        """End the line, so that what follows starts on its own line."""
        if self.line:
            print(flush=True)
        self.line = ""


SHARES = ("val_exact_match", "val_truncated")


def listed(metrics: dict[str, float]) -> str:
    """Metrics in one line, as in "step 20, val_loss 0.1134, val_exact_match 59.4%"."""
    forms = {name: ".1%" if name in SHARES else ".4g" for name in metrics}
    return ", ".join(
        f"{name} {value}" if isinstance(value, int) else f"{name} {value:{forms[name]}}"
        for name, value in metrics.items()
    )


def _shown(name: str, value: float | str) -> str:
    if name == "memory":
        return f"{value / 2**30:.2f} GiB"
    if name == "tokens_per_s":
        return f"{value:,.0f} tokens/s"
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"


# ---- the way in and out

MEMORY_ADVICE = (
    "out of memory: give --checkpointing full, or halve --micro-batch and double --accumulation "
    "(the same result), or lower --max-seq-length, or give --lora; in PPO lower --rollout-batch or "
    "--max-new-tokens, in evaluate.py --batch-size"
)


# Flags that name a place, which may be elsewhere on another machine. Data, weights and rewards are
# compared later, by digest.
PLACES = ("data", "model", "init", "base", "reward", "out", "run", "rerank", "compare")
# A rank has a GPU of its own, and --data-dir may come from the environment of one machine only.
OF_MACHINE = ("device", "data_dir")


def same_command(args):
    """A script's parsed flags, unchanged. UserError if the ranks run different scripts or have
    different flags. Of a flag that names a place only its presence is compared. A script calls this
    right after it has parsed its flags: ranks that do different things would wait for each other,
    or take each other's messages for their own."""
    distributed.check_same({"the script": os.path.basename(sys.argv[0])})
    flags = {
        name: value is not None if name in PLACES else value
        for name, value in vars(args).items() if name not in OF_MACHINE
    }  # fmt: skip
    distributed.check_same(flags)
    return args


def entry(main: Callable[[], int | None]) -> NoReturn:
    """`if __name__ == "__main__": entry(main)`: run main and exit with what it returns.

    A UserError, a full disk and too little memory are one line on stderr and status 2. Ctrl-C is
    130, a closed pipe on stdout 141. Everything else keeps its traceback.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed, as by >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):  # a character that the console lacks must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        distributed.start()
        code = main() or 0
        sys.stdout.flush()
        distributed.end()
    except UserError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        code = 130
        if distributed.speaks_first():
            print("\nstopped at once: what was not saved is lost", file=sys.stderr)
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain about it there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except SystemExit as error:  # --help
        code = error.code or 0
        if not isinstance(code, int):  # as Python does: sys.exit("text") prints it and ends with 1
            _fail(str(code))
            code = 1
    except Exception as error:
        message = _explained(error)
        if not message and distributed.COUNT == 1:
            raise
        code = _fail(message) if message else 1
        if not message and distributed.speaks_first():
            traceback.print_exc()
    distributed.leave(code)


def _explained(error: Exception) -> str | None:
    """What to say about an error that is not our bug, and None if it is."""
    if isinstance(error, OSError) and disk_full(error):
        return f"disk full ({error}): free some space, then run the same command again"
    if isinstance(error, (MemoryError, RuntimeError)):
        return distributed.lost_peer(error) or (MEMORY_ADVICE if _out_of_memory(error) else None)
    return None


def _out_of_memory(error: Exception) -> bool:
    """PyTorch has an exception for the CUDA allocator only. Elsewhere the text must tell."""
    texts = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(text in str(error) for text in texts)


def _fail(message: str) -> int:
    if distributed.speaks_first():
        print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    return 2
