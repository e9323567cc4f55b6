"""Files and folders that are whole or absent: written beside, forced to disk, renamed.

A kill at any instant, or a full disk, leaves the older one or the newer one, never half of one. (Of a
folder, a kill between two renames leaves the older as <name>.old; the next attempt puts it back.)
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nanogsm import UserError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def sync_folder(folder: Path) -> None:
    """Force a folder's names to disk: a rename is durable only after this (not on Windows)."""
    if os.name != "nt":
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def remove(path: Path) -> None:
    """Delete a file or folder; a folder is renamed to .tmp first, so no half of it is believed."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix != ".tmp":
            doomed = path.with_name(path.name + ".tmp")
            shutil.rmtree(doomed, ignore_errors=True)
            path = path.rename(doomed)
        shutil.rmtree(path, ignore_errors=True)  # what stays (NFS, Windows) goes at the next start
    else:
        path.unlink(missing_ok=True)


def strict(value):
    """`value` with every NaN and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(obj, indent: int | None = None) -> bytes:
    # A lone surrogate, which a model can emit, cannot be UTF-8: it stays a JSON escape.
    text = json.dumps(strict(obj), indent=indent, allow_nan=False, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"


def replace_file(path: Path, chunks: bytes | Iterable, shared: bool = False) -> None:
    """Write a file atomically: a reader sees the old one or the new one, never half of one.

    shared: several processes may write it at once (a download), so each has its own file beside it;
    otherwise the next attempt writes over what a killed one left. Trap: a link at `path` is
    replaced, not followed.
    """
    own = f".{os.getpid()}.{secrets.token_hex(4)}" * shared
    beside = path.with_name(f"{path.name}{own}.tmp")
    try:
        write(beside, [chunks] if isinstance(chunks, bytes) else chunks)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def replaced_folder(folder: Path | str) -> Iterator[Path]:
    """`with replaced_folder(f) as beside`: fill beside; afterwards it stands at f, whole, instead
    of what was there. If anything fails, what was there stays."""
    folder = Path(folder)
    beside, aside = (folder.with_name(folder.name + ending) for ending in (".new", ".old"))

    def put_back() -> None:
        if os.path.lexists(aside) and not os.path.lexists(folder):
            aside.rename(folder)

    put_back()  # what a kill left
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        sync_folder(beside)
        remove(aside)
        if os.path.lexists(folder):  # no system renames a folder onto a full one
            folder.rename(aside)
        beside.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        put_back()
        shutil.rmtree(beside, ignore_errors=True)
        raise
    remove(aside)


def same_place(a: str | None, b: str | None) -> bool:
    """Whether two paths, or names, as somebody typed them mean the same."""
    return os.path.abspath(str(a)) == os.path.abspath(str(b))


def one_line(error: BaseException) -> str:
    """Somebody else's error message, on one line, cut at 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_json(path: Path) -> dict:
    """The JSON object in a file; UserError if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def write_json(path: Path | str, obj) -> None:
    """Write `obj` as JSON, atomically: a reader sees the old file or the new one.

    NaN and infinity become null: a figure that is undefined once (the explained variance of equal
    returns) must not end a long run, and a bare NaN would make the file invalid for other readers.
    """
    replace_file(Path(path), to_json(obj, indent=1))


def write(path: Path, chunks: Iterable) -> dict:
    """Write chunks of bytes and force them to disk; their size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def write_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict:
    """Write a safetensors file as transformers and peft expect one, in dtype if given; its size and
    SHA-256."""
    return write(path, safetensors_bytes(tensors, dtype))


def safetensors_bytes(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> Iterator:
    """The bytes of a safetensors file, one tensor at a time.

    safetensors.torch.save_file wants everything on the CPU, contiguous and unshared at once, and
    reports a full disk as its own error. Here a GPU or strided tensor costs one temporary copy of
    itself, a plain CPU tensor none; tied tensors are written each and load as separate ones.
    """
    kinds = {name: dtype or t.dtype for name, t in tensors.items()}
    # Widest type first: every tensor then starts at a multiple of its own item size.
    names = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        end = offset + tensors[name].numel() * kinds[name].itemsize
        header[name] = {"dtype": DTYPES[kinds[name]], "shape": list(tensors[name].shape),
                        "data_offsets": [offset, end]}  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        t = tensors[name].detach().to("cpu", kinds[name]).contiguous()
        yield t.reshape(-1).view(torch.uint8).numpy()
