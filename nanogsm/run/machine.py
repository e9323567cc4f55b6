"""The machine a run is on: device and precision, memory, and what is recorded about it."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from nanogsm import UserError, distributed
from nanogsm.fast import cuda


def pick_compute(device: str, precision: str) -> tuple[str, str]:
    """("cuda" | "mps" | "cpu", "bf16" | "fp32") for what --device and --precision say."""
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(name for name, present in here.items() if present)
    kind, colon, number = device.partition(":")
    cards = torch.cuda.device_count()
    most = cards if kind == "cuda" else 1
    if not here.get(kind) or (colon and not (number.isdigit() and int(number) < most)):
        numbers = f" (cuda:0 to cuda:{cards - 1})" if cards > 1 else ""
        have = ", ".join(name + numbers * (name == "cuda") for name in here if here[name])
        raise UserError(f"--device {device}: this machine has only {have}")
    if kind != "cuda":
        device = kind  # of "cpu:0", too
    device = distributed.local_device(device)
    cuda.prepare(device)
    if precision == "auto":
        precision = "bf16" if _has_bf16(device) else "fp32"
    return device, precision


def _has_bf16(device: str) -> bool:
    """A CPU without the instructions still computes in bfloat16, but several times slower than in
    float32. MPS emulates part of it, too."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not public, so may be absent
    return device == "cpu" and any(getattr(torch.cpu, ask, lambda: False)() for ask in asks)


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of a frozen model's weights for --precision bf16 or fp32."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast_of(device: str, precision: str) -> Callable:
    """`with autocast():` as a run uses it: matrix products in bfloat16 if precision is "bf16"."""
    kind = torch.device(device).type  # "cuda:1" is a device, "cuda" a kind of device
    return lambda: torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")


def free_memory(device: str) -> int | None:
    """Bytes that are free on a GPU; None for other devices, where memory can be swapped."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else None


def peak_memory(device: torch.device | str) -> int:
    """The most bytes held so far: by tensors on a GPU, by the whole process on a CPU, 0 if unknown.

    Trap: Apple's GPU reports no peak. There it is what is held now.
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
    # Only our own checkout: inside an enclosing project's, the commit would not be ours.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (root / ".git").exists():
            dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
            env |= {"commit": _git(root, "rev-parse", "HEAD"), "dirty": dirty}
    return env


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
